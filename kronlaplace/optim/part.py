"""How many examples of a batch something is computed on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kronlaplace.layers import LayerBatch, MomentExamples
from kronlaplace.optim.checks import fraction_of_batch

__all__ = ["Part", "part_of"]

_FEWEST_INPUTS, _FEWEST_PRODUCTS = 8, 16
"""Number of examples from which a moment of inputs, or of weight gradients, is taken at least."""


@dataclass(frozen=True)
class Part:
    """The first examples of a batch.

    Args:
        fraction: Fraction of the batch, from 0 (excluded) to 1.
        fewest: Number of examples at least, if the batch has that many.
        fewer_for_moments: Whether costly moments of layers that each example uses at several positions are taken from
            fewer of these examples.
    """

    fraction: float
    fewest: int = 1
    fewer_for_moments: bool = False

    def count(self, n_examples: int) -> int:
        """Return the number of examples for a batch of ``n_examples``."""
        wanted = math.ceil(self.fraction * n_examples - 1e-9)  # 0.1 · 30 is 3, whatever its rounding
        return min(n_examples, max(wanted, self.fewest))

    def moment_examples(self, batch: LayerBatch) -> MomentExamples:
        """Return from how many examples a layer's moments are taken.

        With ``T`` positions, that of the inputs is taken from a quarter of the examples, but at least eight, and as many as
        give ``p`` positions, without which it would not have full rank. Products of weight gradients ``X`` (`TKFAC`,
        `KFOC`) vary more from one example to another, and are taken from half of the examples, but at least 16. Moments of
        gradients alone cost the least, and have all of them.

        Args:
            batch: The inputs of the layer, only those of the part.
        """
        n, positions = batch.n_examples, batch.input_positions
        if not self.fewer_for_moments or positions == 1:
            return MomentExamples(n, n)
        inputs = max(math.ceil(n / 4), _FEWEST_INPUTS, math.ceil(batch.layer.shape[1] / positions))
        return MomentExamples(min(n, inputs), min(n, max(math.ceil(n / 2), _FEWEST_PRODUCTS)))


def part_of(fraction: float | None, name: str, default: Part) -> Part:
    """Return the part for a fraction that the user gave, or the default for None.

    Raises:
        TypeError, ValueError: If the fraction is not a number from 0 (excluded) to 1.
    """
    return default if fraction is None else Part(fraction_of_batch(fraction, name))
