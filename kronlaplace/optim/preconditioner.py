"""The inverse that turns gradients into natural gradients, and its renewal while training goes on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from kronlaplace.blocks import Block
from kronlaplace.damping import Damping
from kronlaplace.damping.solvers import Solver, solver_from_tensors
from kronlaplace.optim.background import Background

__all__ = [
    "Amount",
    "BlockDiagonalInverse",
    "Inverse",
    "InverseInProgress",
    "Renewal",
    "block_diagonal_inverse",
    "on_device",
]


Amount: TypeAlias = float | Tensor
"""What is added to a damping: a number, or a 0-dim tensor that need not be read."""


class Inverse(Protocol):
    """Inverse of a damped Fisher."""

    def solve(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply the inverse with the matrices of all layers, by name."""

    def to_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors by layer, for checkpoints."""


class BlockDiagonalInverse:
    """Inverse of a damped Fisher layer by layer.

    Args:
        solvers: Solver of every layer, by name.
    """

    def __init__(self, solvers: Mapping[str, Solver]) -> None:
        self._solvers = dict(solvers)

    def solve(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply the inverse with matrices ``(..., q, p)`` of some or all layers, by name."""
        return {name: self._solvers[name].solve(matrix) for name, matrix in matrices.items()}

    def to_tensors(self) -> dict[str, Any]:
        """Return the tensors and kinds of all solvers by layer."""
        return {name: {"kind": s.kind, **s.to_tensors()} for name, s in self._solvers.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Mapping[str, Any]]) -> BlockDiagonalInverse:
        """Restore the inverse, bit for bit."""
        return cls(
            {
                name: solver_from_tensors({k: t for k, t in part.items() if k != "kind"}, part["kind"], name)
                for name, part in tensors.items()
            }
        )


class InverseInProgress:
    """An inverse that is computed, perhaps not finished, and not yet checked.

    Args:
        settle: Function that finishes it.
        ready: Function that tells whether ``settle`` would not wait for a device; by default it never would.
    """

    def __init__(self, settle: Callable[[], Inverse], ready: Callable[[], bool] = lambda: True) -> None:
        self._settle = settle
        self.ready = ready
        self._inverse: Inverse | None = None

    def settle(self) -> Inverse:
        """Return the inverse; this waits for the device if it is not ready.

        Raises:
            ValueError: If a block cannot be inverted, naming its layer.
        """
        if self._inverse is None:
            self._inverse = self._settle()
        return self._inverse


def block_diagonal_inverse(
    blocks: Mapping[str, Block], damping: Damping, added: Mapping[str, Amount]
) -> InverseInProgress:
    """Begin to invert all blocks, equal sizes together.

    Args:
        blocks: The blocks by layer.
        damping: The damping.
        added: What is added to the damping by layer, such as the weight decay. Layers with equal numbers go together.

    Returns:
        The inverse; to settle it raises a ValueError if a block is singular and the damping zero, or for NaN or infinite
        entries, naming the layer.
    """
    parts = []
    alike: dict[object, dict[str, Block]] = defaultdict(dict)
    for name, block in blocks.items():
        alike[id(added[name]) if isinstance(added[name], Tensor) else added[name]][name] = block
    for some in alike.values():
        parts.append(damping.with_added(added[next(iter(some))]).begin_solvers(some))
    return InverseInProgress(
        lambda: BlockDiagonalInverse({name: solver for part in parts for name, solver in part.settle().items()}),
        lambda: all(part.ready() for part in parts),
    )


def on_device(tensors: Mapping[str, Mapping[str, Any]], device: torch.device) -> dict[str, dict[str, Any]]:
    """Return what `Inverse.to_tensors` returned with all tensors on a device."""
    return {
        name: {key: value.to(device) if isinstance(value, Tensor) else value for key, value in part.items()}
        for name, part in tensors.items()
    }


class Renewal:
    """The current inverse, and the one that will replace it.

    A new inverse replaces the old one when it is ready: on the CPU at once, unless there is a background, and on an
    accelerator in one of the next steps, so that no step waits for it. Only the first is waited for.

    Args:
        background: Where inverses are computed beside the training, or None.
    """

    def __init__(self, background: Background[InverseInProgress] | None) -> None:
        self.inverse: Inverse | None = None
        """The current inverse, or None before the first."""
        self._background = background
        self._computation: Callable[[], InverseInProgress] | None = None  # kept, with its tensors, while it is computed
        self._next: InverseInProgress | None = None

    @property
    def busy(self) -> bool:
        """Whether a new inverse is being computed, so that another one cannot begin."""
        return self._next is not None or self._computation is not None

    def begin(self, compute: Callable[[], InverseInProgress]) -> None:
        """Compute a new inverse; only if none is being computed.

        Raises:
            ValueError: If a block cannot be inverted, naming its layer; the old inverse stays.
        """
        assert not self.busy
        if self.inverse is None:
            self.inverse = compute().settle()
        elif self._background is None:
            self._next = compute()
            self.swap()
        else:
            self._computation = compute
            self._background.submit(lambda: _begun(compute))

    def swap(self) -> None:
        """Take over the next inverse if it is ready; never waits for one.

        Raises:
            ValueError: If it could not be computed, naming the layer; the old inverse stays.
        """
        if self._background is not None and self._computation is not None:
            self._receive(self._background.result)
        if self._next is not None and self._next.ready():
            self._take()

    def wait(self) -> None:
        """Take over the next inverse, if any, after waiting for it.

        Raises:
            ValueError: As `swap`.
        """
        if self._background is not None and self._computation is not None:
            self._receive(self._background.wait)
        if self._next is not None:
            self._take()

    def restore(self, inverse: Inverse | None) -> None:
        """Replace the current inverse, and drop the next one."""
        if self._background is not None:
            with suppress(Exception):  # of a computation that is dropped
                self._background.wait()
        self.inverse, self._next, self._computation = inverse, None, None

    def _receive(self, result: Callable[[], InverseInProgress | None]) -> None:
        try:
            self._next = result()
        except Exception:
            self._computation = None
            raise
        if self._next is not None:
            self._computation = None

    def _take(self) -> None:
        assert self._next is not None
        following, self._next = self._next, None
        self.inverse = following.settle()

    def close(self) -> None:
        """Wait for the background and stop it."""
        if self._background is not None:
            self._background.close()


def _begun(compute: Callable[[], InverseInProgress]) -> InverseInProgress:
    """Begin an inverse, and finish it if nothing has to be waited for, as in a thread."""
    begun = compute()
    if begun.ready():
        begun.settle()
    return begun
