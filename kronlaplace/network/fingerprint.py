"""Detection of changed weights: whether a network still has the weights at which something was computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kronlaplace._storage import digest

__all__ = ["WeightsGuard", "difference", "fingerprint"]


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Return a digest of every parameter and buffer by name; it depends on values and dtypes, but not on devices."""
    return {name: digest(tensor) for name, tensor in _tensors(model)}


def difference(expected: dict[str, str], actual: dict[str, str]) -> str | None:
    """Return the name of the first tensor that differs, or None if all are equal."""
    names = [*expected, *(name for name in actual if name not in expected)]
    return next((name for name in names if expected.get(name) != actual.get(name)), None)


_BEGINNING = 2**14
"""How many numbers at the beginning of a tensor are kept and compared as they are."""


class WeightsGuard:
    """Detector of changed weights that takes one pass over them; digests are compared only if that pass finds a difference.

    Version counters alone, which cost less, miss changes that bypass them: through ``weight.data``, arrays that share the
    memory, or fused kernels. So the beginning of every tensor, which is all of most tensors, is compared bit by bit, and the
    rest by the sum of its bits as 64-bit integers. This detects the smallest change of one number. Among the changes in the
    rest that bypass the counters, it misses numbers that swap places, and changes that cancel modulo 2^64 (an even number of
    signs in float64).

    Args:
        model: The network.
        expected: The network's `fingerprint` when something was computed at its weights.
    """

    def __init__(self, model: nn.Module, expected: dict[str, str]) -> None:
        self._model = model
        self._expected = expected
        self._seen = _look(model)

    def changed(self) -> str | None:
        """Return the name of the first parameter or buffer that changed, or None; waits for an accelerator once."""
        seen = _look(self._model)
        if _same(seen, self._seen):
            return None
        name = difference(self._expected, fingerprint(self._model))
        if name is None:
            self._seen = seen
        return name


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


_Look: TypeAlias = tuple[list[tuple[int, int]], dict[torch.device, Tensor]]


def _same(a: _Look, b: _Look) -> bool:
    return (
        a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][device], b[1][device]) for device in a[1])
    )


@torch.no_grad()
def _look(model: nn.Module) -> _Look:
    """Return what is compared: the address and version counter of every tensor, and some of the bits on each device."""
    versions = []
    exact: dict[torch.device, dict[torch.dtype, list[Tensor]]] = {}
    sums: dict[torch.device, list[Tensor]] = {}
    for _, tensor in _tensors(model):
        # torch counts every in-place change of a tensor (an optimizer step, load_state_dict).
        versions.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))
        kept = exact.setdefault(tensor.device, {}).setdefault(tensor.dtype, [])
        summed = sums.setdefault(tensor.device, [])
        values = _in_memory_order(tensor)
        in_word = max(1, 8 // tensor.element_size())
        start = _BEGINNING - values.storage_offset() % in_word  # words begin at multiples of their size
        words = (len(values) - start) // in_word
        if words <= 0:
            kept.append(values)
            continue
        stop = start + words * in_word
        kept += values[:start], values[stop:]
        summed.append(values[start:stop].view(torch.int64).sum())
    return versions, {device: _as_words(by_dtype, sums[device]) for device, by_dtype in exact.items()}


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return the values in one row, without a copy if they are contiguous in some order of the axes."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return tensor.reshape(-1).contiguous()


def _as_words(values: dict[torch.dtype, list[Tensor]], sums: list[Tensor]) -> Tensor:
    """Return everything as 64-bit integers, zero-padded; these compare fast, and are equal even where values are NaN."""
    parts = [torch.cat(some).view(torch.uint8) for some in values.values()]
    if sums:
        parts.append(torch.stack(sums).view(torch.uint8))
    parts.append(parts[0].new_zeros(-sum(map(len, parts)) % 8))
    return torch.cat(parts).view(torch.int64)
