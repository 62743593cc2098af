"""Damping strategies: how ``γ`` enters a block before it is inverted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kronlaplace.blocks import Block
from kronlaplace.inversion import DampedInverse, check_damping

__all__ = ["DampedInverse", "Tikhonov"]


@dataclass(frozen=True)
class Tikhonov:
    """Exact Tikhonov damping: ``γ`` is added to the block itself, ``F + γ I``.

    Args:
        damping: ``γ``, not negative; a number or a 0-dim tensor, which may carry a gradient.

    Raises:
        ValueError: If it is negative or not finite.
    """

    damping: float | Tensor

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def invert(self, block: Block) -> DampedInverse:
        """The damped inverse of one layer's block; see `DampedInverse` for what it answers and raises."""
        return DampedInverse(block, self.damping)
