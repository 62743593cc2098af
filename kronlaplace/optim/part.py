"""How many examples of a batch something is computed on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kronlaplace.optim.checks import fraction_of_batch

__all__ = ["Part", "part_of"]


@dataclass(frozen=True)
class Part:
    """The first examples of a batch.

    Args:
        fraction: Fraction of the batch, from 0 (excluded) to 1.
        fewest: Number of examples at least, if the batch has that many.
    """

    fraction: float
    fewest: int = 1

    def count(self, n_examples: int) -> int:
        """Return the number of examples for a batch of ``n_examples``."""
        wanted = math.ceil(self.fraction * n_examples - 1e-9)  # 0.1 · 30 is 3, whatever its rounding
        return min(n_examples, max(wanted, self.fewest))


def part_of(fraction: float | None, name: str, default: Part) -> Part:
    """Return the part for a fraction that the user gave, or the default for None.

    Raises:
        TypeError, ValueError: If the fraction is not a number from 0 (excluded) to 1.
    """
    return default if fraction is None else Part(fraction_of_batch(fraction, name))
