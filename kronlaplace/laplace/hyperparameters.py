"""The hyperparameters of a posterior, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from kronlaplace.priors.prior import Prior

__all__ = ["Hyperparameters"]


@dataclass(frozen=True, eq=False)
class Hyperparameters:
    """Everything about a posterior that may change without a new fit.

    Attributes:
        prior: The prior over the weights.
        noise_std: Observation noise in the targets' unit, None where the likelihood has none.
        temperature: ``τ``, divides the log-likelihood.
        logit_scale: ``a``, multiplies the mean of a classifier's logits, 1 where the outputs are not logits; see
            `kronlaplace.laplace.calibration`.
    """

    prior: Prior
    noise_std: float | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
