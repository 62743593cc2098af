"""The hyperparameters of a posterior, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from kronlaplace.laplace.prior import Prior

__all__ = ["Hyperparameters"]


@dataclass(frozen=True, eq=False)
class Hyperparameters:
    """Everything about a posterior that may change without a new fit.

    Attributes:
        prior: The prior over the weights.
        noise_std: Observation noise in the targets' unit, None where the likelihood has none.
        temperature: ``τ``, divides the log-likelihood.
    """

    prior: Prior
    noise_std: float | None = None
    temperature: float = 1.0
