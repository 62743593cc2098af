"""Damping strategies: how ``γ`` enters a block before it is inverted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kronlaplace.inversion import DampedInverse
from kronlaplace.kronecker import KroneckerBlock

__all__ = ["DampedInverse", "Tikhonov"]


@dataclass(frozen=True)
class Tikhonov:
    """Exact Tikhonov damping: ``γ`` is added to the block itself, ``scale · G ⊗ A + γ I``.

    Args:
        damping: ``γ``, not negative.
    """

    damping: float | Tensor

    def invert(self, block: KroneckerBlock) -> DampedInverse:
        """The damped inverse of one layer's block; see `DampedInverse` for what it answers and raises."""
        return DampedInverse(block, self.damping)
