"""Whether a network still has the weights that something was computed at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["WeightsGuard", "difference", "digest", "fingerprint"]


def fingerprint(model: nn.Module) -> dict[str, str]:
    """A digest of every parameter and buffer by name; equal values in the same dtype, on any device, are equal."""
    return {name: digest(tensor) for name, tensor in _tensors(model)}


def difference(expected: dict[str, str], actual: dict[str, str]) -> str | None:
    """Name of the first tensor that differs, or None if all are equal."""
    names = [*expected, *(name for name in actual if name not in expected)]
    return next((name for name in names if expected.get(name) != actual.get(name)), None)


class WeightsGuard:
    """Notices changed weights at the price of looking at version counters; values are compared only if those differ.

    Args:
        model: The network.
        expected: Its `fingerprint` when something was computed at its weights.
    """

    def __init__(self, model: nn.Module, expected: dict[str, str]) -> None:
        self._model = model
        self._expected = expected
        self._versions = _versions(model)

    def changed(self) -> str | None:
        """Name of the first parameter or buffer that changed, or None."""
        versions = _versions(self._model)
        if versions == self._versions:
            return None
        name = difference(self._expected, fingerprint(self._model))
        if name is None:
            self._versions = versions
        return name


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def digest(tensor: Tensor) -> str:
    """A digest of dtype, shape and values of a tensor on any device."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    header = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    digest = hashlib.blake2b(header, digest_size=16)
    digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    # torch counts every in-place change of a tensor (an optimizer step, load_state_dict).
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for _, t in _tensors(model)]
