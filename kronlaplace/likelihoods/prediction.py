"""Predictions: a Gaussian for every output in regression, probabilities in classification."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Prediction", "gaussian_nll", "require_probabilities"]


@dataclass(frozen=True)
class Prediction:
    """Regression prediction: a Gaussian for every output of every example, in at least float32.

    Attributes:
        mean: Predicted mean, shape ``(N, C)`` (or ``(N,)`` if the network returns that shape).
        variance: Variance of the *function value*, same shape as ``mean``. It does **not** include the noise.
        noise_variance: Variance of the observation noise: a 0-dim tensor ``σ²`` if it is the same everywhere
            (`Gaussian`), or of the shape of ``mean`` if the outputs have noises of their own or the network predicts it
            (`HeteroscedasticGaussian`).
    """

    mean: Tensor
    variance: Tensor
    noise_variance: Tensor

    @property
    def total_variance(self) -> Tensor:
        """Variance of a new observation: function variance plus noise, same shape as ``mean``."""
        return self.variance + self.noise_variance

    def __repr__(self) -> str:
        noise = self.noise_variance
        noise_text = f"{noise.item():.4g}" if noise.ndim == 0 else f"of shape {tuple(noise.shape)}"
        return (
            f"{type(self).__name__}(mean and variance of shape {tuple(self.mean.shape)}, noise_variance {noise_text})"
        )


def require_probabilities(likelihood: object, prediction: Tensor | Prediction) -> Tensor:
    """Return the prediction of a classifier after checking that it is a tensor.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(prediction, Tensor):
        return prediction
    raise TypeError(
        f"{likelihood} predicts probabilities, a tensor of the shape of the network's outputs; got a "
        f"{type(prediction).__name__}. Pass the result of its predictive method."
    )


def gaussian_nll(likelihood: object, prediction: Tensor | Prediction, targets: Tensor) -> Tensor:
    """Compute the negative log density of each target under a Gaussian prediction, in float64.

    The targets have the shape of the prediction's mean.

    Raises:
        TypeError: If the prediction is not a `Prediction`.
    """
    if not isinstance(prediction, Prediction):
        raise TypeError(
            f"{likelihood} predicts a Prediction, with mean and variance; got a {type(prediction).__name__}. Pass the "
            "result of its predictive method."
        )
    variance = prediction.total_variance.double()
    squared_error = (targets.double() - prediction.mean.double()).square()
    return 0.5 * (squared_error / variance + torch.log(2 * math.pi * variance))
