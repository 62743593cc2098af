"""Batches, and checks of their values that do not wait for an accelerator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kronlaplace.data.inputs import Inputs

__all__ = ["Batch", "DeferredChecks", "all_finite"]


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device: its position in the data, the inputs, and the targets if there are any."""

    index: int
    inputs: Inputs
    targets: Tensor | None


class DeferredChecks:
    """Conditions on tensor values, checked without stalling an accelerator.

    On the CPU, a violated condition raises an error at once. On other devices, the first batch that violated it is recorded
    in a tensor there, which `settle` reads once, at the end of the pass.
    """

    def __init__(self) -> None:
        self._first_broken: dict[str, Tensor] = {}

    def require(self, holds: Tensor, batch: Batch, message: str) -> None:
        """Require that ``holds``, a boolean 0-dim tensor, be true for this batch.

        Raises:
            ValueError: If it is false on the CPU, as ``batch <index>: <message>``; on other devices, `settle` raises it.
        """
        if holds.device.type == "cpu":
            if not holds:
                raise ValueError(f"batch {batch.index}: {message}")
            return
        first = self._first_broken.get(message)
        if first is None:
            first = torch.full((), -1, dtype=torch.int64, device=holds.device)
        self._first_broken[message] = torch.where(holds | (first >= 0), first, batch.index)

    def settle(self) -> None:
        """Raise an error for the first condition that was violated, if any.

        Raises:
            ValueError: If a condition was violated.
        """
        broken = [(int(first), message) for message, first in self._first_broken.items() if int(first) >= 0]
        if broken:
            index, message = min(broken)
            raise ValueError(f"batch {index}: {message}")


def all_finite(values: Tensor) -> Tensor:
    """Return whether no value is NaN or infinite, as a boolean 0-dim tensor, in one pass and without a copy of them."""
    if values.is_floating_point() and values.numel():
        for axis, stride in enumerate(values.stride()):
            values = values.narrow(axis, 0, 1) if stride == 0 else values  # expanded, and would be copied
        return torch.isfinite(torch.stack(torch.aminmax(values))).all()
    return torch.isfinite(values).all()
