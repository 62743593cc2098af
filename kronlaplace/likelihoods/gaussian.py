"""`Gaussian`: regression with the same noise everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronlaplace._precision import wide
from kronlaplace.likelihoods.base import Likelihood
from kronlaplace.likelihoods.links import Link, variance_of
from kronlaplace.likelihoods.prediction import Prediction, gaussian_nll
from kronlaplace.likelihoods.tensors import (
    any_finite_target,
    check_same_shape,
    one_element_at_a_time,
    positive_numbers,
    standard_normal,
    sum_and_count,
)

__all__ = ["Gaussian"]


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Regression with independent Gaussian noise; outputs of any shape ``(N, ...)``, targets of the same shape.

    Args:
        noise_std: Standard deviation ``σ`` of the noise, in target units; None if it is not known, which begins with 1. A
            sequence or tensor of length ``C``, one for each output on the last axis, becomes its geometric mean and
            ``relative_noise``.
        noise_known: Whether `KronLaplace.tune` keeps the noise unless asked otherwise; None: if it is given. Likelihoods
            with the same noise are equal, known or not.
        relative_noise: ``r``, length ``C``, if the outputs on the last axis have noises ``σ r_c`` of their own; tuning finds
            the ``σ`` that is common to them, which is in units of ``r``. None is the same noise everywhere.
    """

    metric_is_constant: ClassVar[bool] = True
    # None becomes a value in __post_init__.
    noise_std: float = None  # type: ignore[assignment]
    noise_known: bool = field(default=None, compare=False)  # type: ignore[assignment]
    relative_noise: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        given: dict[str, Any] = dict(vars(self))
        if given["relative_noise"] is not None:
            object.__setattr__(self, "relative_noise", _noises(given["relative_noise"], "relative_noise"))
        if isinstance(given["noise_std"], (list, tuple, Tensor)):
            if given["relative_noise"] is not None:
                raise ValueError("noise_std is one number if relative_noise is given; pass one of both.")
            each = _noises(given["noise_std"], "noise_std")
            mean = math.exp(sum(map(math.log, each)) / len(each))
            object.__setattr__(self, "noise_std", mean)
            object.__setattr__(self, "relative_noise", tuple(std / mean for std in each))
        if given["noise_known"] is None:
            object.__setattr__(self, "noise_known", given["noise_std"] is not None)
        if given["noise_std"] is None:
            object.__setattr__(self, "noise_std", 1.0)
        if given["noise_known"] not in (True, False, None):
            raise TypeError(f"noise_known must be True, False or None, got {self.noise_known!r}.")
        if not (isinstance(self.noise_std, (int, float)) and 0 < self.noise_std < math.inf):
            raise ValueError(f"noise_std must be a positive finite number, got {self.noise_std!r}.")

    def __repr__(self) -> str:
        relative = "" if self.relative_noise is None else f", relative_noise={self.relative_noise}"
        return f"Gaussian(noise_std={self.noise_std}, noise_known={self.noise_known}{relative})"

    def relative_to(self, outputs: Tensor) -> Tensor | float:
        """Return ``r``, which can be broadcast over outputs or their means, in at least float32; 1 if there is none."""
        return 1.0 if self.relative_noise is None else wide(outputs).new_tensor(self.relative_noise)

    def check_outputs(self, outputs: Tensor) -> None:
        super().check_outputs(outputs)
        n = len(self.relative_noise or ())
        if n and (outputs.ndim < 2 or outputs.shape[-1] != n):
            raise ValueError(
                f"there are {n} noises, one for each output on the last axis, for outputs of shape {tuple(outputs.shape)}."
            )

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        check_same_shape("Gaussian", outputs, targets)
        return any_finite_target(targets)

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the sum of squared errors over ``r²`` and the number of targets, so that ``σ`` can still change."""
        return sum_and_count(((wide(targets) - wide(outputs)) / self.relative_to(outputs)).double().square())

    def log_likelihood(self, statistics: Tensor, noise_std: Tensor | float | None = None) -> Tensor:
        """Compute ``−SSE / (2σ²) − n log(σ √(2π))``, and ``−n/C Σ_c log r_c`` if the outputs have noises of their own.

        The argument ``noise_std`` overrides the field of that name and may carry a gradient.
        """
        sigma = torch.as_tensor(
            self.noise_std if noise_std is None else noise_std, dtype=torch.float64, device=statistics.device
        )
        squared_error, count = statistics
        relative = self.relative_noise or (1.0,)
        constant = 0.5 * math.log(2 * math.pi) + sum(map(math.log, relative)) / len(relative)
        return -squared_error / (2 * sigma**2) - count * (torch.log(sigma) + constant)

    def noise_derivatives(self, statistics: Tensor, noise_std: float) -> tuple[float, float]:
        squared_error, count = statistics.tolist()
        return squared_error / noise_std**2 - count, -2 * squared_error / noise_std**2

    def training_error(self, statistics: Tensor) -> float:
        """Return the root mean square error of the data summarized by ``statistics``, in target units (or of ``r``)."""
        squared_error, count = statistics.tolist()
        return math.sqrt(squared_error / count)

    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        roots = torch.full_like(outputs, 1 / self.noise_std)
        yield from one_element_at_a_time((roots / self.relative_to(outputs)).to(outputs.dtype))

    def _metric_diagonal(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        return self._metric_product(outputs, torch.ones_like(outputs), targets)

    def _metric_product(self, outputs: Tensor, vectors: Tensor, targets: Tensor | None) -> Tensor:
        return (vectors / (self.noise_std * self.relative_to(outputs)) ** 2).to(vectors.dtype)

    def _sampled_direction(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        drawn = standard_normal(wide(outputs), generator) / self.noise_std
        return (drawn / self.relative_to(outputs)).to(outputs.dtype)

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        error = wide(outputs) - wide(targets)
        return (error / (self.noise_std * self.relative_to(outputs)) ** 2).to(outputs.dtype)

    @property
    def links(self) -> tuple[Link, ...]:
        return ()

    def sample_mean(self, outputs: Tensor) -> Tensor:
        return wide(outputs)

    def noise_variance(self, outputs: Tensor) -> Tensor:
        if self.relative_noise is None:
            return wide(outputs).new_tensor(self.noise_std**2)
        return (wide(outputs).new_tensor(self.relative_noise) * self.noise_std).square().expand(outputs.shape)

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Prediction:
        """Compute mean, function variance and noise in closed form, in at least float32."""
        mean, covariance = wide(mean), wide(covariance)
        return Prediction(mean, variance_of(mean, covariance), self.noise_variance(mean))

    def predictive_nll(self, prediction: Tensor | Prediction, targets: Tensor) -> Tensor:
        if isinstance(prediction, Prediction):
            check_same_shape("Gaussian", prediction.mean, targets)
        return sum_and_count(gaussian_nll(self, prediction, targets))


def _noises(given: Any, name: str) -> tuple[float, ...]:
    noises = positive_numbers(given)
    if noises is None:
        raise ValueError(f"{name} must be a positive finite number, or one for each output; got {given!r}.")
    return noises
