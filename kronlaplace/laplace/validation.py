"""Tuning the hyperparameters on validation data, by the very predictive that will be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from tqdm.auto import tqdm

from kronlaplace.alignment import Alignment
from kronlaplace.batches import Batch, DeferredChecks, Rewind, device_of, iterate, preserved_random_state
from kronlaplace.laplace.predictive import Predictive
from kronlaplace.likelihoods import HeteroscedasticGaussian, Likelihood, Prediction

__all__ = ["Candidate", "Validator", "best_of_grid", "default_grid"]

_NOISE_RANGE = 1e3
"""Factor by which the noise may differ from the root mean square error."""


def default_grid(relative: bool) -> list[float]:
    """Prior precisions from 1e-4 to 1e6, or factors from 1e-4 to 1e4, two each decade."""
    return [float(x) for x in (np.logspace(-4, 4, 17) if relative else np.logspace(-4, 6, 21))]


@dataclass(frozen=True)
class Candidate:
    """One point of the grid.

    Attributes:
        loss: Mean negative log-likelihood, in nats per target.
        prior_precision: As in `KronLaplace.prior_precision`.
        noise_std: The noise that is best there (Gaussian likelihood), or None.
    """

    loss: float
    prior_precision: Tensor
    noise_std: float | None


class Predictor(Protocol):
    """What the validator needs of a posterior."""

    model: torch.nn.Module
    likelihood: Likelihood

    def set_hyperparameters(self, prior_precision: Tensor, noise_std: float | None) -> None: ...

    def predict_batch(self, x: Any, predictive: Predictive) -> Tensor | Prediction: ...


class Validator:
    """The validation loss as a function of the prior precision; in regression at the noise that is best with it.

    The noise is searched for with the ratio of curvature and prior precision kept: the prior precision goes with
    ``(σ₀ / σ)ᵏ``, the variance of the linearised function then exactly with ``(σ / σ₀)ᵏ``, and one prediction for ``σ₀``
    (the root mean square error on the training data) is enough.

    Args:
        posterior: The posterior, whose hyperparameters are changed.
        data: Batches with targets.
        predictive: How predictions are made.
        noise_std: ``σ₀``, or None for a likelihood without noise to be tuned.
        exponent: ``k``; the Fisher goes with ``σ⁻ᵏ``.
    """

    def __init__(
        self,
        posterior: Predictor,
        data: Iterable[Any],
        predictive: Predictive,
        noise_std: float | None,
        exponent: int,
    ) -> None:
        self._posterior = posterior
        self._data = data
        self._predictive = predictive
        self._exponent = exponent
        self._checks = DeferredChecks()
        self._alignment = Alignment(posterior.model, posterior.likelihood)
        self._noise = noise_std

    def __call__(self, prior_precision: Tensor) -> Candidate:
        """The loss at a prior precision, and the best noise."""
        noise = self._noise
        self._posterior.set_hyperparameters(prior_precision, noise)
        if noise is None:
            return Candidate(self._loss(), prior_precision, None)

        def with_noise(log_factor: float) -> tuple[Tensor, float]:
            return prior_precision * math.exp(-self._exponent * log_factor), noise * math.exp(log_factor)

        def by_predicting(log_factor: float) -> float:
            self._posterior.set_hyperparameters(*with_noise(log_factor))
            return self._loss()

        squares, variances = self._errors()
        center = math.log(max(math.sqrt(float(squares.mean())), 1e-12) / noise)
        if not math.isfinite(center):
            return Candidate(math.nan, prior_precision, noise)

        def by_scaling(log_factor: float) -> float:
            total = variances * math.exp(self._exponent * log_factor) + noise**2 * math.exp(2 * log_factor)
            return float(0.5 * (torch.log(2 * math.pi * total) + squares / total).mean())

        sampled = self._predictive.samples
        result = minimize_scalar(
            by_predicting if sampled else by_scaling,
            bounds=(center - math.log(_NOISE_RANGE), center + math.log(_NOISE_RANGE)),
            method="bounded",
            options={"xatol": 0.05 if sampled else 1e-6},
        )
        return Candidate(float(result.fun), *with_noise(float(result.x)))

    def _errors(self) -> tuple[Tensor, Tensor]:
        """Squared errors and variances of the function, of all targets, on the CPU."""
        squares, variances = [], []
        for prediction, targets in self._predictions():
            assert isinstance(prediction, Prediction)
            squares.append((prediction.mean - targets.to(prediction.mean)).double().square().flatten().cpu())
            variances.append(prediction.variance.double().flatten().cpu())
        return torch.cat(squares), torch.cat(variances)

    def _loss(self) -> float:
        sums = [self._posterior.likelihood.predictive_nll(p, y) for p, y in self._predictions()]
        total, count = torch.stack(sums).sum(0).tolist()
        return total / count if count else math.nan

    def _predictions(self) -> Iterator[tuple[Tensor | Prediction, Tensor]]:
        device = device_of(self._posterior.model)
        with preserved_random_state(device), Rewind(self._data):
            for batch in iterate(self._data, device, alignment=self._alignment, progress=False, description=""):
                if batch.targets is None:
                    raise TypeError('method="validation" needs data with targets, batches (inputs, targets).')
                prediction = self._posterior.predict_batch(batch.inputs.value, self._predictive)
                self._check(prediction, batch)
                yield prediction, batch.targets
        self._checks.settle()

    def _check(self, prediction: Tensor | Prediction, batch: Batch) -> None:
        likelihood = self._posterior.likelihood
        if isinstance(likelihood, HeteroscedasticGaussian) or batch.targets is None:
            return  # its predictions have another shape than its outputs; `predictive_nll` checks that
        outputs = prediction.mean if isinstance(prediction, Prediction) else prediction
        allowed, message = likelihood.check_targets(outputs, batch.targets)
        self._checks.require(allowed, batch, message)


def best_of_grid(
    grid: Sequence[Tensor], evaluate: Callable[[Tensor], Candidate], progress: bool
) -> tuple[int, Candidate]:
    """The point with the smallest finite loss, and its place.

    Raises:
        ValueError: If no loss is finite.
    """
    bar = tqdm(grid, desc="Validation", leave=False, disable=None if progress else True)
    candidates = [evaluate(value) for value in bar]
    finite = [i for i, candidate in enumerate(candidates) if math.isfinite(candidate.loss)]
    if not finite:
        raise ValueError(
            f"the validation loss is NaN or infinite at all {len(grid)} points of the grid; check the validation data and "
            "the network's outputs on them."
        )
    best = min(finite, key=lambda i: candidates[i].loss)
    return best, candidates[best]
