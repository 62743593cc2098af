"""`Euclidean`: the plain Gauss-Newton metric, without a noise model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from kronlaplace._precision import wide
from kronlaplace.likelihoods.base import Likelihood
from kronlaplace.likelihoods.links import Link
from kronlaplace.likelihoods.prediction import Prediction
from kronlaplace.likelihoods.tensors import (
    any_finite_target,
    check_same_shape,
    one_element_at_a_time,
    standard_normal,
    sum_and_count,
)

__all__ = ["Euclidean"]

_NO_NOISE = (
    "Euclidean has no noise model, so it cannot predict a distribution of the targets. For predictions use "
    "kl.Gaussian(noise_std=...), which has the same metric divided by noise_std²."
)


@dataclass(frozen=True)
class Euclidean(Likelihood):
    """Plain Gauss-Newton metric, the identity: the loss of one example is ``½ ‖f − y‖²``.

    The outputs have any shape ``(N, ...)``, and the targets the same shape. There is no noise model, so the
    log-likelihood has no normalizer and there are no predictions. `Gaussian` adds a noise model.
    """

    metric_is_constant: ClassVar[bool] = True

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        check_same_shape("Euclidean", outputs, targets)
        return any_finite_target(targets)

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the sum of squared errors and the number of targets."""
        return sum_and_count((wide(targets) - wide(outputs)).double().square())

    def log_likelihood(self, statistics: Tensor) -> Tensor:
        """Compute ``−½ SSE``, the negative loss, without the normalizer, which only a noise model has."""
        return -0.5 * statistics[0]

    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        yield from one_element_at_a_time(torch.ones_like(outputs))

    def _metric_diagonal(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        return self._metric_product(outputs, torch.ones_like(outputs), targets)

    def _metric_product(self, outputs: Tensor, vectors: Tensor, targets: Tensor | None) -> Tensor:
        return vectors.clone()

    def _sampled_direction(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return standard_normal(wide(outputs), generator).to(outputs.dtype)

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (wide(outputs) - wide(targets)).to(outputs.dtype)

    @property
    def has_normalizer(self) -> bool:
        return False

    @property
    def links(self) -> tuple[Link, ...]:
        return ()

    def sample_mean(self, outputs: Tensor) -> Tensor:
        return wide(outputs)

    def noise_variance(self, outputs: Tensor) -> NoReturn:
        raise NotImplementedError(_NO_NOISE)

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> NoReturn:
        """Raise an error: there is no noise model.

        Raises:
            NotImplementedError: Always; the message names an alternative.
        """
        raise NotImplementedError(_NO_NOISE)

    def predictive_nll(self, prediction: Tensor | Prediction, targets: Tensor) -> NoReturn:
        """Raise an error: there is no noise model.

        Raises:
            NotImplementedError: Always; the message names an alternative.
        """
        raise NotImplementedError(_NO_NOISE)
