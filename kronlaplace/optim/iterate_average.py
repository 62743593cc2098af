"""Exponential moving average of the weights over the iterations, which is evaluated in place of the last weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kronlaplace._precision import wide
from kronlaplace._wrappers import unwrapped

__all__ = ["IterateAverage"]


class IterateAverage:
    """Exponential moving average of a network's weights, ``θ̄ ← ξ'θ̄ + (1 − ξ')θ``, started at the current ones.

    The noise of the iterates averages out, so that the average is nearer to the minimum than any of them: K-FAC (section 13)
    and KFC (section 5) evaluate and return it. Floating-point buffers, such as the running statistics of batch norm, are
    averaged, too.

    In contrast to `torch.optim.swa_utils.AveragedModel`, there is no second network, the start belongs to the average, half
    precision is averaged in single precision, and an update does not wait for the device.

        >>> average = kl.IterateAverage(model, timescale=len(loader))  # doctest: +SKIP
        >>> average.update()             # after each optimizer.step()   # doctest: +SKIP
        >>> with average.applied():      # to evaluate                   # doctest: +SKIP
        ...     validate(model)

    Args:
        model: The network, on its final device.
        timescale: The number ``τ`` of updates after which a weight counts ``1/e``, ``ξ' = e^(−1/τ)``. KFC averages over
            50,000 examples, so that ``τ`` is the number of batches in them; K-FAC's 0.99 is ``τ = 99.5``.

    Raises:
        ValueError: If the timescale is not a positive, finite number.
    """

    def __init__(self, model: nn.Module, timescale: float) -> None:
        if not 0 < timescale < math.inf:
            raise ValueError(f"timescale must be a positive, finite number of updates, got {timescale}.")
        self.decay = math.exp(-1 / timescale)
        """The factor ``ξ'`` by which the average is multiplied in each update."""
        self._update = get_ema_multi_avg_fn(self.decay)
        self._weights = _weights_of(model)
        self._average = {name: wide(tensor).clone() for name, tensor in self._weights.items()}
        self._applied = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._average)} tensors, decay={self.decay:.6g})"

    @torch.no_grad()
    def update(self) -> None:
        """Add the network's current weights to the average.

        Raises:
            RuntimeError: Inside `applied`, where the network has the average itself.
        """
        if self._applied:
            raise RuntimeError("update() inside applied() would average the average; call it after the with block.")
        self._update([*self._average.values()], [wide(tensor) for tensor in self._weights.values()], None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the average inside a ``with`` block, and exactly the weights from before at its end.

        What the block itself does to the weights is lost.

        Raises:
            RuntimeError: If it is nested.
        """
        if self._applied:
            raise RuntimeError("the average is applied already: applied() cannot be nested.")
        before = {name: tensor.detach().clone() for name, tensor in self._weights.items()}
        self._applied = True
        try:
            _copy(self._average, self._weights)
            yield
        finally:
            _copy(before, self._weights)
            self._applied = False

    def copy_to(self, model: nn.Module) -> None:
        """Copy the average into a network of the same structure, such as a copy of this one, or this one after training.

        Raises:
            ValueError: If it has other weights.
        """
        weights = _weights_of(model)
        _check_alike(weights, self._average, "the model")
        _copy(self._average, weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the average, by the names of parameters and buffers, for a checkpoint."""
        return {"average": {name: tensor.clone() for name, tensor in self._average.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the average in a checkpoint.

        Raises:
            ValueError: If it belongs to another network.
        """
        _check_alike(state["average"], self._average, "the checkpoint")
        _copy(state["average"], self._average)


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    model = unwrapped(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {name: tensor.detach() for name, tensor in {**dict(model.named_parameters()), **buffers}.items()}


def _check_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], owner: str) -> None:
    shapes, wanted = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (found, expected))
    if shapes != wanted:
        wrong = sorted(name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name))
        raise ValueError(
            f"{owner} has other weights than the average: {wrong} differ in shape or are missing on one side. Use the "
            "network that the average was made for, or a copy of it."
        )


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
