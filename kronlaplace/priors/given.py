"""A prior as the user gives it, until the layers that it belongs to are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronlaplace.layers import Layer
from kronlaplace.priors.mean import PriorMean, mean_by_layer
from kronlaplace.priors.precision import Precision, precision_tensor
from kronlaplace.priors.prior import IsotropicPrior, Prior, prior_from_multiples

__all__ = ["GivenPrior", "owned"]


@dataclass(frozen=True, eq=False)
class GivenPrior:
    """A prior, or its precision and mean, not tied to layers yet.

    Args:
        precision: A prior, or its precision as `KronLaplace` takes it; a number is checked at once.
        mean: Its mean as `KronLaplace` takes it; a prior has its own.

    Raises:
        TypeError: If a mean is given in addition to a prior that has one.
        ValueError: For a number that is not positive and finite.
    """

    precision: Prior | Precision = 1.0
    mean: PriorMean = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.precision, Prior):
            if not (isinstance(self.mean, (int, float)) and self.mean == 0):
                raise TypeError(
                    "a prior object has a mean of its own, and prior_mean was given as well. Give the mean to the prior "
                    "only, such as kl.IsotropicPrior(1.0, mean=...)."
                )
        elif _is_number(self.precision):
            precision_tensor(self.precision, [])

    @property
    def number(self) -> Tensor | None:
        """The precision, 0-dim and float64, if it is one number for all weights."""
        value = self.precision
        if isinstance(value, IsotropicPrior):
            value = value.precision
        return precision_tensor(value, []) if not isinstance(value, Prior) and _is_number(value) else None

    def shown(self) -> str:
        """Describe the prior for the posterior's repr."""
        return "prior_precision=1" if self.number is None else f"prior_precision={float(self.number):.4g}"

    def with_precision(self, precision: Prior | Precision) -> GivenPrior:
        """Return a copy with another precision; a prior brings its own mean."""
        if isinstance(precision, Prior):
            return GivenPrior(precision)
        return GivenPrior(precision, self.precision.mean if isinstance(self.precision, Prior) else self.mean)

    def with_mean(self, mean: PriorMean) -> GivenPrior:
        """Return a copy with another mean."""
        if isinstance(self.precision, Prior):
            return GivenPrior(self.precision.with_mean(mean))
        return replace(self, mean=mean)

    def over(self, layers: Sequence[Layer]) -> Prior:
        """Return the prior over these layers, which shares no precision with what was given.

        Raises:
            TypeError, ValueError: If its values do not fit the layers.
        """
        if isinstance(self.precision, Prior):
            return owned(self.precision.over(layers))
        with torch.inference_mode(False):
            return owned(
                prior_from_multiples(precision_tensor(self.precision, layers), mean_by_layer(self.mean, layers))
            )


def owned(prior: Prior) -> Prior:
    """Return a prior whose precision is a copy without gradient, so that the caller's tensors can change."""
    with torch.inference_mode(False):
        return prior.with_multiples(prior.multiples.detach().clone())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)
