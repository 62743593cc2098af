"""The inverse that turns gradients into natural gradients, and its renewal while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from kronlaplace.blocks import Block
from kronlaplace.damping import Damping
from kronlaplace.damping.solvers import Solver, solver_from_tensors
from kronlaplace.optim.background import Background

__all__ = ["BlockDiagonalInverse", "Inverse", "Renewal", "block_diagonal_inverse"]


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


def block_diagonal_inverse(
    blocks: Mapping[str, Block], damping: Damping, added: Mapping[str, float]
) -> BlockDiagonalInverse:
    """Invert all blocks, equal sizes together.

    Args:
        blocks: The blocks by layer.
        damping: The damping.
        added: A number by layer that is added to the damping, such as the weight decay.

    Raises:
        ValueError: If a block is singular and the damping zero, or for NaN or infinite entries; the message names the layer.
    """
    solvers: dict[str, Solver] = {}
    for amount in dict.fromkeys(added[name] for name in blocks):
        some = {name: block for name, block in blocks.items() if added[name] == amount}
        solvers.update(damping.with_added(amount).solvers(some))
    return BlockDiagonalInverse(solvers)


class Renewal:
    """The current inverse, and the one that will replace it.

    Args:
        background: Where inverses are computed while training goes on; None computes them at once.
    """

    def __init__(self, background: Background[Inverse] | None) -> None:
        self.inverse: Inverse | None = None
        """The current inverse, or None before the first."""
        self._background = background

    def begin(self, compute: Callable[[], Inverse]) -> None:
        """Compute a new inverse: the first at once, later ones in the background if there is one.

        A request is dropped while the one before it is being computed.

        Raises:
            ValueError: As ``compute``; the old inverse stays.
        """
        if self._background is None or self.inverse is None:
            self.inverse = compute()
        elif not self._background.pending:
            self._background.submit(compute)

    def swap(self) -> None:
        """Take over the inverse that the background has finished, if any; never waits for one.

        Raises:
            ValueError: If its computation failed.
        """
        if self._background is not None and (finished := self._background.result()) is not None:
            self.inverse = finished

    def wait(self) -> None:
        """Take over the inverse that is being computed, if any, after waiting for it."""
        if self._background is not None and (finished := self._background.wait()) is not None:
            self.inverse = finished

    def close(self) -> None:
        """Wait for the background and stop it."""
        if self._background is not None:
            self._background.close()
