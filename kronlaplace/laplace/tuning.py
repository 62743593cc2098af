"""Tuning the hyperparameters by the evidence: prior precision(s) and, in regression, the noise with them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

from kronlaplace.laplace.evidence import Evidence
from kronlaplace.laplace.prior import PriorStructure
from kronlaplace.likelihoods import Gaussian

__all__ = ["PRECISION_BOUNDS", "Tuned", "maximise_evidence", "warn_at_the_edge"]

FloatArray = npt.NDArray[np.float64]

PRECISION_BOUNDS = (1e-10, 1e10)
"""Prior precisions that tuning considers."""

DIAGONAL_RANGE = 1e3
"""Factor by which a weight's own precision may differ from the one that is best for all."""

_NEGLIGIBLE = 1e-3
"""Differences of the evidence, in nats, that mean nothing."""


@dataclass(frozen=True)
class Tuned:
    """Tuned hyperparameters: prior precision(s), and the noise or None."""

    prior_precision: Tensor
    noise_std: float | None


def maximise_evidence(evidence: Evidence, structure: PriorStructure, temperature: float) -> Tuned:
    """Maximise the evidence over prior precision(s) and noise, in log space with bounds.

    It is concave there (see `kronlaplace.laplace.evidence`), so L-BFGS-B with exact gradients finds the maximum from
    anywhere: no learning rate, no number of steps, no dependence on the present values.

    Precisions of single weights start from the one that is best for all and stay within a factor `DIAGONAL_RANGE` of
    it: where the data say nothing about a weight, the evidence has no maximum in its precision.

    Args:
        evidence: The function.
        structure: One precision for all, one per block, or one per weight.
        temperature: ``τ``.

    Warns:
        UserWarning: If a hyperparameter ends at its bound: the evidence then has no maximum inside.
    """
    if structure is PriorStructure.DIAGONAL:
        start = maximise_evidence(evidence, PriorStructure.SCALAR, temperature)
        return _Search(evidence, structure, temperature).run(start)
    return _Search(evidence, structure, temperature).run()


class _Search:
    """The evidence as a function of the logarithms of precisions and noise."""

    def __init__(self, evidence: Evidence, structure: PriorStructure, temperature: float) -> None:
        self._evidence = evidence
        self._structure = structure
        self._temperature = temperature
        self._device = evidence.statistics.device
        self._noise = isinstance(evidence.likelihood, Gaussian)
        self._n_weights = [math.prod(shape) for shape in evidence.shapes]
        sizes = {
            PriorStructure.SCALAR: 1,
            PriorStructure.LAYERWISE: len(self._n_weights),
            PriorStructure.DIAGONAL: sum(self._n_weights),
        }
        self._n_precisions = sizes[structure]

    def run(self, start: Tuned | None = None) -> Tuned:
        """Find the maximum, starting at a scalar optimum if there is one."""
        if start is None:
            low, high = map(math.log, PRECISION_BOUNDS)
            total = max(float(sum(square.sum() for square in self._evidence.squares)), 1e-12)
            center = min(max(math.log(sum(self._n_weights) / total), low), high)
        else:
            center = math.log(float(start.prior_precision))
            low, high = center - math.log(DIAGONAL_RANGE), center + math.log(DIAGONAL_RANGE)
        u = np.full(self._n_precisions, center)
        bounds = [(low, high)] * self._n_precisions
        if self._noise:
            squared_error, count = self._evidence.statistics.tolist()
            root_mean_square = max(math.sqrt(squared_error / count), 1e-12)
            bounds.append((math.log(root_mean_square * 1e-1), math.log(root_mean_square * 1e3)))
            u = np.append(u, math.log(root_mean_square if start is None else start.noise_std or root_mean_square))
        result = minimize(self._loss_and_gradient, u, jac=True, method="L-BFGS-B", bounds=bounds)
        if start is None:
            self._warn_at_the_edge(result.x, bounds)
        precision = torch.tensor(np.exp(result.x[: self._n_precisions]), dtype=torch.float64, device=self._device)
        return Tuned(
            prior_precision=precision[0] if self._structure is PriorStructure.SCALAR else precision,
            noise_std=float(np.exp(result.x[-1])) if self._noise else None,
        )

    def _value(self, logs: Tensor) -> Tensor:
        precision = logs[: self._n_precisions].exp()
        if self._structure is PriorStructure.SCALAR:
            precision = precision[0]
        return self._evidence(precision, logs[-1].exp() if self._noise else None, self._temperature)

    def _loss(self, u: FloatArray) -> float:
        with torch.no_grad():
            return -float(self._value(torch.tensor(u, dtype=torch.float64, device=self._device)))

    def _loss_and_gradient(self, u: FloatArray) -> tuple[float, FloatArray]:
        with torch.inference_mode(False), torch.enable_grad():
            logs = torch.tensor(u, dtype=torch.float64, device=self._device, requires_grad=True)
            value = self._value(logs)
            (gradient,) = torch.autograd.grad(value, logs)
        return -float(value.detach()), -gradient.cpu().numpy()

    def _warn_at_the_edge(self, u: FloatArray, bounds: list[tuple[float, float]]) -> None:
        """Warn about every hyperparameter that could as well be at one of its bounds: it has no optimum inside."""
        changes = [self._changes_of_precision(i, u, bounds[i]) for i in range(self._n_precisions)]
        names = ["prior precision"] if min(map(min, changes)) <= _NEGLIGIBLE else []
        if self._noise:
            best = self._loss(u)
            ends = [np.append(u[:-1], end) for end in bounds[-1]]
            if min(self._loss(end) for end in ends) - best <= _NEGLIGIBLE:
                names.append("noise")
        if names:
            warn_at_the_edge(
                f"the evidence is largest at the edge of the range searched for: {', '.join(names)}. It has no maximum "
                "inside; check that the network is trained and that the prior suits its weights."
            )

    @torch.no_grad()
    def _changes_of_precision(self, index: int, u: FloatArray, ends: Iterable[float]) -> list[float]:
        """How much is lost by moving one precision to each of its bounds."""
        sigma = float(np.exp(u[-1])) if self._noise else None
        scale = self._evidence.scale(sigma, self._temperature)

        def term(log: float) -> float:
            precision = torch.tensor(math.exp(log), dtype=torch.float64, device=self._device)
            if self._structure is PriorStructure.SCALAR:
                return 0.5 * float(self._evidence.occam(precision, scale))
            return 0.5 * float(self._evidence.block_term(index, precision, scale))

        here = term(float(u[index]))
        return [term(end) - here for end in ends]


def warn_at_the_edge(message: str) -> None:
    """A warning that points to the user's call of `KronLaplace.tune`."""
    warnings.warn(message, stacklevel=6)
