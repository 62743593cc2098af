"""`HeteroscedasticGaussian`: regression with noise that the network predicts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kronlaplace._precision import wide
from kronlaplace.likelihoods.averages import Averages
from kronlaplace.likelihoods.base import Likelihood
from kronlaplace.likelihoods.divergence import exponential_excess
from kronlaplace.likelihoods.links import Link, variance_of
from kronlaplace.likelihoods.prediction import Prediction, gaussian_nll
from kronlaplace.likelihoods.tensors import any_finite_target, one_element_at_a_time, standard_normal, sum_and_count

__all__ = ["HeteroscedasticGaussian"]


@dataclass(frozen=True)
class HeteroscedasticGaussian(Likelihood):
    """Regression with Gaussian noise whose variance is also predicted by the network.

    The outputs ``(N, 2C)`` hold first the ``C`` means ``μ``, then the ``C`` log-variances ``s``. The targets have shape
    ``(N, C)``, or ``(N,)`` for one mean. The negative log-likelihood of one target is ``½ [(y − μ)² e⁻ˢ + s + log 2π]``;
    its Fisher is ``diag(e⁻ˢ, ½)`` in ``(μ, s)`` and, unlike the Hessian, does not depend on the targets.
    """

    def check_outputs(self, outputs: Tensor) -> None:
        if outputs.ndim != 2 or outputs.shape[1] == 0 or outputs.shape[1] % 2:
            raise ValueError(
                "HeteroscedasticGaussian needs outputs of shape (N, 2C), the C means followed by the C log-variances; the "
                f"network returned {tuple(outputs.shape)}. Give the last layer two outputs per target, or use "
                "Gaussian(noise_std=...) if the noise is the same everywhere."
            )

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        _check_shape(len(outputs), outputs.shape[1] // 2, targets)
        return any_finite_target(targets)

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the summed negative log-likelihood and the number of targets."""
        mean, log_variance = wide(outputs).chunk(2, dim=1)
        error = wide(targets).reshape(mean.shape) - mean
        return sum_and_count(0.5 * (error.square() * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi)))

    def log_likelihood(self, statistics: Tensor) -> Tensor:
        return -statistics[0]

    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        """Yield ``e^{−s/2}`` for each mean and ``1/√2`` for each log-variance."""
        log_variance = wide(outputs).chunk(2, dim=1)[1]
        root = torch.cat([torch.exp(-0.5 * log_variance), torch.full_like(log_variance, math.sqrt(0.5))], dim=1)
        yield from one_element_at_a_time(root.to(outputs.dtype))

    def _metric_diagonal(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        return self._metric_product(outputs, torch.ones_like(outputs), targets)

    def _metric_product(self, outputs: Tensor, vectors: Tensor, targets: Tensor | None) -> Tensor:
        log_variance = wide(outputs).chunk(2, dim=1)[1]
        diagonal = torch.cat([torch.exp(-log_variance), torch.full_like(log_variance, 0.5)], dim=1)
        return (diagonal * vectors).to(vectors.dtype)

    def _divergence(self, outputs: Tensor, new_outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Compute ``½ Σ [e^{s − s'} − 1 − (s − s') + (μ' − μ)² e^{−s'}]``."""
        (mean, log_variance), (new_mean, new_log_variance) = outputs.chunk(2, dim=1), new_outputs.chunk(2, dim=1)
        of_means = (new_mean - mean).square() * torch.exp(-new_log_variance)
        return 0.5 * (exponential_excess(log_variance - new_log_variance) + of_means).sum()

    def _gradient_error(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        """Return how far the gradients ``−e e⁻ˢ`` and ``½ (1 − e² e⁻ˢ)`` are from belonging to the same error ``e``."""
        of_mean, of_log_variance = gradient.chunk(2, dim=1)
        square = of_mean.square() * outputs.chunk(2, dim=1)[1].exp()
        return (of_log_variance - 0.5 * (1 - square)).abs() / (1 + square)

    def _sampled_direction(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Compute the gradient at ``y = μ + e^{s/2} z`` with standard normal ``z``; ``μ`` cancels."""
        log_variance = wide(outputs).chunk(2, dim=1)[1]
        z = standard_normal(log_variance, generator)
        return torch.cat([-z * torch.exp(-0.5 * log_variance), 0.5 * (1 - z.square())], dim=1).to(outputs.dtype)

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_variance = wide(outputs).chunk(2, dim=1)
        error = wide(targets).reshape(mean.shape) - mean
        precision = torch.exp(-log_variance)
        return torch.cat([-error * precision, 0.5 * (1 - error.square() * precision)], dim=1).to(outputs.dtype)

    def averages(
        self, mean: Tensor, covariance: Tensor, targets: Tensor | None, generator: torch.Generator
    ) -> Averages:
        """Compute both averages in closed form; see `Likelihood.averages`.

        With the variance ``v`` of ``s``, ``E[e⁻ˢ] = e^{v/2 − s}``, and ``E[(y − μ)² e⁻ˢ]`` is that times the second moment
        of ``y − μ`` when the mean of ``μ`` is shifted by ``−Cov(μ, s)``.
        """
        mu, log_variance = mean.double().chunk(2, dim=1)
        variance_mu, variance_s = covariance.double().diagonal(dim1=-2, dim2=-1).chunk(2, dim=1)
        precision = torch.exp(0.5 * variance_s - log_variance)
        metric = torch.cat([precision, torch.full_like(precision, 0.5)], dim=1)
        if targets is None:
            return Averages(metric, None)
        c = mu.shape[1]
        shifted = targets.reshape(mu.shape).double() - mu + covariance.double().diagonal(c, dim1=-2, dim2=-1)
        square = precision * (shifted.square() + variance_mu)
        return Averages(metric, -0.5 * (square + log_variance + math.log(2 * math.pi)).sum())

    @property
    def predictions_match_outputs(self) -> bool:
        return False

    @property
    def links(self) -> tuple[Link, ...]:
        return ()

    def sample_mean(self, outputs: Tensor) -> Tensor:
        """Return the predicted means, shape ``(N, C)``."""
        return wide(outputs).chunk(2, dim=1)[0]

    def noise_variance(self, outputs: Tensor) -> Tensor:
        return wide(outputs).chunk(2, dim=1)[1].exp()

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Prediction:
        """Compute means, their variances, and the expected noise variance ``E[eˢ] = e^{s + var(s)/2}``, each ``(N, C)``.

        Mean and covariance are those of all outputs, ``(N, 2C)`` and ``(N, 2C, 2C)`` or its diagonal. The results are in
        at least float32.
        """
        mean, covariance = wide(mean), wide(covariance)
        mu, log_variance = mean.chunk(2, dim=1)
        variance_mu, variance_log_variance = variance_of(mean, covariance).chunk(2, dim=1)
        return Prediction(mu, variance_mu, torch.exp(log_variance + 0.5 * variance_log_variance))

    def predictive_nll(self, prediction: Tensor | Prediction, targets: Tensor) -> Tensor:
        if isinstance(prediction, Prediction):
            _check_shape(len(prediction.mean), prediction.mean.shape[1], targets)
            targets = targets.reshape(prediction.mean.shape)
        return sum_and_count(gaussian_nll(self, prediction, targets))


def _check_shape(n: int, c: int, targets: Tensor) -> None:
    """Check the shape of the targets for ``n`` examples with ``c`` means each."""
    if targets.shape != (n, c) and not (c == 1 and targets.shape == (n,)):
        shapes = f"({n}, 1) or ({n},)" if c == 1 else f"({n}, {c})"
        raise ValueError(
            f"HeteroscedasticGaussian targets must have shape {shapes} for outputs of shape ({n}, {2 * c}), one target for "
            f"each mean and log-variance; got {tuple(targets.shape)}. Check the number of columns of the targets and of the "
            "last layer, which needs twice as many."
        )
