"""Tuning the hyperparameters on validation data, by the very predictive that will be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from tqdm.auto import tqdm

from kronlaplace._arguments import positive_number, warn
from kronlaplace.data.deferred_checks import Batch, DeferredChecks
from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.loader import Rewind, iterate, warn_of_share
from kronlaplace.laplace.evidence import noise_exponent
from kronlaplace.laplace.hyperparameters import Hyperparameters
from kronlaplace.laplace.predictive import Predictive, checked_predictive
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.laplace.state import State
from kronlaplace.laplace.tuning import NoiseTuning, check_noise, known_noise, maximize_evidence
from kronlaplace.likelihoods import Prediction
from kronlaplace.network.alignment import Alignment
from kronlaplace.priors.prior import PriorStructure

__all__ = ["Candidate", "Validator", "best_of_grid", "by_validation", "default_grid"]

_NOISE_RANGE = 1e3
"""Factor by which the noise may differ from the root mean square error."""


def default_grid(relative: bool) -> list[float]:
    """Prior precisions from 1e-4 to 1e6, or factors from 1e-4 to 1e4, two each decade."""
    return [float(x) for x in (np.logspace(-4, 4, 17) if relative else np.logspace(-4, 6, 21))]


@dataclass(frozen=True)
class Candidate:
    """A point of the grid.

    Attributes:
        loss: Mean negative log-likelihood, in nats per target.
        hyperparameters: The hyperparameters, with the noise that is best there if it is tuned.
    """

    loss: float
    hyperparameters: Hyperparameters


def by_validation(
    model: nn.Module,
    state: State,
    predictor: Callable[[Hyperparameters], Predictor],
    data: Iterable[Any] | None,
    structure: PriorStructure,
    noise: NoiseTuning | str | None,
    predictive: Predictive | None,
    grid: Sequence[float] | None,
    progress: bool,
) -> Hyperparameters:
    """Return the hyperparameters under which validation data are most likely; arguments as in `KronLaplace.tune`.

    Args:
        model: The network.
        state: A fitted posterior's state.
        predictor: Predicts with the posterior at other hyperparameters.
        data: Batches with targets.
        structure: What has a precision of its own.
        noise: Whether the noise is tuned too, or fixed; None: fixed if it is known.
        predictive: How predictions will be made.
        grid: Precisions or factors to try.
        progress: Whether to show a progress bar.

    Raises:
        TypeError, ValueError: As `KronLaplace.tune`.
    """
    relative = structure is not PriorStructure.SCALAR or not state.prior.unit_is_identity
    known = known_noise(noise, state.likelihood)
    values = _checked_grid(data, relative, grid)
    assert data is not None
    predictive = checked_predictive(predictive, state.likelihood)
    warn_of_share(data)
    base = torch.ones((), dtype=torch.float64)
    if structure is not PriorStructure.SCALAR:
        base = maximize_evidence(state.evidence, structure, state.temperature, known).multiples
    start = _training_error(state) if known is None else None
    validator = Validator(model, state, predictor, data, predictive, start)
    index, best = best_of_grid([base * factor for factor in values], validator, progress)
    if index in (0, len(values) - 1) and len(values) > 1:
        what = "factor of the prior precisions" if relative else "prior precision"
        warn(
            f"the validation loss is smallest at the edge of the grid, for the {what} {values[index]:.3g} of "
            f"{values[0]:.3g} to {values[-1]:.3g}; give a wider grid= or more validation data"
            + (", unless the trained network itself predicts best." if index else ".")
        )
    check_noise(
        state,
        best.hyperparameters.noise_std if start is not None else None,
        "its errors on the validation data are so much larger. It follows the noise of the training data, or the "
        "validation data are of another kind, or in another unit",
    )
    return best.hyperparameters


def _checked_grid(data: Iterable[Any] | None, relative: bool, grid: Sequence[float] | None) -> list[float]:
    if data is None or isinstance(data, Iterator):
        got = "none" if data is None else "an iterator, which can be read only once"
        raise TypeError(f'method="validation" needs data=, batches (inputs, targets) such as a DataLoader; got {got}.')
    grid = default_grid(relative) if grid is None else grid
    if not isinstance(grid, Iterable):
        raise TypeError(f"grid must be a list of prior precisions, such as [0.1, 1, 10]; got {grid!r}.")
    values = sorted(positive_number(value, "an entry of grid") for value in grid)
    if not values:
        raise ValueError("grid is empty; give at least one prior precision.")
    return values


def _training_error(state: State) -> float | None:
    """Error on the training data, to start the search for the noise from; the noise itself if there were no targets."""
    if state.likelihood.noise_std is None:
        return None
    statistics = state.fitted.fisher.statistics
    error = 0.0 if statistics is None else state.likelihood.training_error(statistics)
    return error if error > 0 else state.likelihood.noise_std


class Validator:
    """The validation loss as a function of multiples of the prior's unit; in regression at the noise that is best there.

    The noise is searched for with the ratio of curvature and prior precision kept: the prior precision goes with
    ``(σ₀ / σ)ᵏ``, the variance of the linearized function then exactly with ``(σ / σ₀)ᵏ``, and one prediction for ``σ₀``
    (the root mean square error on the training data) is enough.

    Args:
        model: The network.
        state: The posterior's state.
        predictor: Predicts with the posterior at other hyperparameters.
        data: Batches with targets.
        predictive: How predictions are made.
        noise_std: ``σ₀``, or None for a likelihood without noise to be tuned.
    """

    def __init__(
        self,
        model: nn.Module,
        state: State,
        predictor: Callable[[Hyperparameters], Predictor],
        data: Iterable[Any],
        predictive: Predictive,
        noise_std: float | None,
    ) -> None:
        self._state = state
        self._predictor = predictor
        self._data = data
        self._predictive = predictive
        self._exponent = -noise_exponent(state.fitted.fisher)
        self._model = model
        self._checks = DeferredChecks()
        self._alignment = Alignment(self._model, state.likelihood)
        self._noise = noise_std

    def __call__(self, multiples: Tensor) -> Candidate:
        """Return the loss at multiples of the prior's unit, with the noise that is best there."""
        noise = self._noise
        if noise is None:
            known = self._at(multiples, self._state.likelihood.noise_std)
            return Candidate(self._loss(known), known)

        def with_noise(log_factor: float) -> Hyperparameters:
            return self._at(multiples * math.exp(-self._exponent * log_factor), noise * math.exp(log_factor))

        def by_predicting(log_factor: float) -> float:
            return self._loss(with_noise(log_factor))

        squares, variances = self._errors(self._at(multiples, noise))
        center = math.log(max(math.sqrt(float(squares.mean())), 1e-12) / noise)
        if not math.isfinite(center):
            return Candidate(math.nan, self._at(multiples, noise))

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
        return Candidate(float(result.fun), with_noise(float(result.x)))

    def _at(self, multiples: Tensor, noise_std: float | None) -> Hyperparameters:
        return replace(
            self._state.hyperparameters, prior=self._state.prior.with_multiples(multiples), noise_std=noise_std
        )

    def _errors(self, at: Hyperparameters) -> tuple[Tensor, Tensor]:
        """Squared errors and variances of the function, of all targets, on the CPU."""
        squares, variances = [], []
        for prediction, targets in self._predictions(at):
            assert isinstance(prediction, Prediction)
            squares.append((prediction.mean - targets.to(prediction.mean)).double().square().flatten().cpu())
            variances.append(prediction.variance.double().flatten().cpu())
        return torch.cat(squares), torch.cat(variances)

    def _loss(self, at: Hyperparameters) -> float:
        likelihood = self._state.with_hyperparameters(at).likelihood
        sums = [likelihood.predictive_nll(p, y) for p, y in self._predictions(at)]
        total, count = torch.stack(sums).sum(0).tolist()
        return total / count if count else math.nan

    def _predictions(self, at: Hyperparameters) -> Iterator[tuple[Tensor | Prediction, Tensor]]:
        device = device_of(self._model)
        predictor = self._predictor(at)
        with preserved_random_state(device), Rewind(self._data):
            for batch in iterate(self._data, device, alignment=self._alignment, progress=False, description=""):
                if batch.targets is None:
                    raise TypeError('method="validation" needs data with targets, batches (inputs, targets).')
                prediction = predictor.predict(batch.inputs.value, self._predictive)
                self._check(prediction, batch)
                yield prediction, batch.targets
        self._checks.settle()

    def _check(self, prediction: Tensor | Prediction, batch: Batch) -> None:
        likelihood = self._state.likelihood
        if not likelihood.predictions_match_outputs or batch.targets is None:
            return  # its predictions have another shape than its outputs; `predictive_nll` checks that
        outputs = prediction.mean if isinstance(prediction, Prediction) else prediction
        allowed, message = likelihood.check_targets(outputs, batch.targets)
        self._checks.require(allowed, batch, message)


def best_of_grid(
    grid: Sequence[Tensor], evaluate: Callable[[Tensor], Candidate], progress: bool
) -> tuple[int, Candidate]:
    """Return the point with the smallest finite loss, and its index.

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
