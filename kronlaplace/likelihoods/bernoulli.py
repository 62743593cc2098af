"""`Bernoulli`: independent yes/no outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kronlaplace._precision import wide
from kronlaplace.likelihoods.averages import Averages
from kronlaplace.likelihoods.base import Likelihood
from kronlaplace.likelihoods.divergence import explained_by_sigmoid, softmax_divergence
from kronlaplace.likelihoods.links import Link, mean_over_samples, probit_scaled
from kronlaplace.likelihoods.logistic import logistic_curvature
from kronlaplace.likelihoods.prediction import Prediction, require_probabilities
from kronlaplace.likelihoods.tensors import check_same_shape, log_at_least_tiny, one_element_at_a_time, sum_and_count

__all__ = ["Bernoulli"]


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent yes/no outputs: logits of any shape ``(N, ...)``, targets in ``[0, 1]`` of that shape."""

    accepts_logits: ClassVar[bool] = True
    outputs_are_independent: ClassVar[bool] = True

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        check_same_shape("Bernoulli", outputs, targets)
        message = "Bernoulli targets must lie between 0 and 1; some do not. Map your two labels to 0 and 1."
        return ((targets >= 0) & (targets <= 1)).all(), message

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the summed negative log-likelihood and the number of targets."""
        logits = wide(outputs)
        nll = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        return sum_and_count(nll)

    def log_likelihood(self, statistics: Tensor) -> Tensor:
        return -statistics[0]

    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        """Yield ``√(π_c (1 − π_c))`` in output ``c`` and zeros elsewhere, computed in log space to be exact in the tails."""
        logits = wide(outputs)
        root = torch.exp(0.5 * (F.logsigmoid(logits) + F.logsigmoid(-logits))).to(outputs.dtype)
        yield from one_element_at_a_time(root)

    def _metric_diagonal(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        return self._metric_product(outputs, torch.ones_like(outputs), targets)

    def _metric_product(self, outputs: Tensor, vectors: Tensor, targets: Tensor | None) -> Tensor:
        logits = wide(outputs)
        return (torch.sigmoid(logits) * torch.sigmoid(-logits) * vectors).to(vectors.dtype)

    def _divergence(self, outputs: Tensor, new_outputs: Tensor, targets: Tensor | None) -> Tensor:
        first, second = (torch.stack([logits, torch.zeros_like(logits)]) for logits in (outputs, new_outputs))
        return softmax_divergence(first, second, axis=0).sum()

    def largest_decrease(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        return explained_by_sigmoid(outputs, gradient)

    def likely_targets(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        return (gradient < 0).to(outputs.dtype)

    def _gradient_error(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        explained = torch.sigmoid(outputs) - gradient
        return torch.maximum(-explained, explained - 1)

    def _sampled_direction(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        probability = torch.sigmoid(wide(outputs))
        uniform = torch.rand(outputs.shape, generator=generator, device=outputs.device, dtype=probability.dtype)
        return self._gradient(outputs, (uniform < probability).to(probability.dtype))

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        probability = torch.sigmoid(wide(outputs))
        return (probability - targets.to(probability.dtype)).to(outputs.dtype)

    def averages(
        self, mean: Tensor, covariance: Tensor, targets: Tensor | None, generator: torch.Generator
    ) -> Averages:
        """Compute both averages by quadrature, to nearly machine precision; see `Likelihood.averages`."""
        metric, softplus = logistic_curvature(mean, covariance)
        if targets is None:
            return Averages(metric, None)
        return Averages(metric, (targets.reshape(mean.shape).double() * mean.double() - softplus).sum())

    def sample_mean(self, outputs: Tensor) -> Tensor:
        return torch.sigmoid(wide(outputs))

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Compute the probability of a one by ``link``, of the shape of ``mean``, in at least float32."""
        mean, covariance = wide(mean), wide(covariance)
        if link is Link.PROBIT:
            return torch.sigmoid(probit_scaled(mean, covariance))
        return mean_over_samples(lambda f, dim: torch.sigmoid(f), mean, covariance, n_samples, generator)

    def predictive_nll(self, prediction: Tensor | Prediction, targets: Tensor) -> Tensor:
        """Compute ``−y log p − (1 − y) log(1 − p)``, summed, which also covers targets between 0 and 1."""
        p = require_probabilities(self, prediction)
        check_same_shape("Bernoulli", p, targets)
        y = targets.double()
        return sum_and_count(-y * log_at_least_tiny(p, p.dtype) - (1 - y) * log_at_least_tiny(1 - p.double(), p.dtype))
