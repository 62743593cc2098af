"""The Laplace evidence (log marginal likelihood) and the hyperparameters that maximise it.

With the Fisher ``F`` (a mean over ``N`` examples), prior ``N(0, δ⁻¹ I)`` and posterior mode ``θ``,

    log p(D) ≈ log p(D | θ) / τ − ½ δ ‖θ‖² − ½ log det(N r F / τ + δ I) + ½ P log δ

(MacKay 1992; Immer et al. 2021, Eq. 4), where ``τ`` is the temperature and ``r`` rescales a Fisher that was estimated
with another observation noise. All is a sum over eigenvalues that are computed once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from kronlaplace.blocks import Block
from kronlaplace.inversion import DampedInverse
from kronlaplace.likelihoods import Gaussian, Likelihood

__all__ = ["Evidence", "PriorStructure", "TuningResult", "maximise"]

PRECISION_BOUNDS = (1e-10, 1e10)
"""Prior precisions that tuning considers."""

_NEGLIGIBLE = 1e-3
"""Differences of the evidence, in nats, that mean nothing."""


class PriorStructure(str, Enum):
    """What has a prior precision of its own: ``SCALAR`` one for all weights, ``LAYERWISE`` one for each layer."""

    SCALAR = "scalar"
    LAYERWISE = "layerwise"


@dataclass(frozen=True)
class Evidence:
    """The evidence as a function of its hyperparameters.

    Attributes:
        blocks: Each layer's Fisher block, mean over examples, scaled by ``N / τ``.
        squared_norms: ``‖θ_l − prior mean‖²`` of each layer, shape ``(L,)``, float64.
        likelihood: The likelihood; its noise is the one that the blocks were made with.
        statistics: Sufficient statistics of the log-likelihood of the training data.
        temperature: ``τ``.
        noise_exponent: The Fisher is proportional to ``noise_std`` to this power.
    """

    blocks: Sequence[Block]
    squared_norms: Tensor
    likelihood: Likelihood
    statistics: Tensor
    temperature: float
    noise_exponent: int

    def __call__(self, prior_precision: Tensor, noise_std: Tensor | float | None = None) -> Tensor:
        """The evidence, 0-dim, float64, differentiable in its arguments.

        Args:
            prior_precision: ``δ``, 0-dim or one per layer, shape ``(L,)``.
            noise_std: ``σ`` (Gaussian likelihood only); None is the likelihood's own.
        """
        if isinstance(self.likelihood, Gaussian):
            fit = self.likelihood.log_likelihood(self.statistics, noise_std)
        else:
            fit = self.likelihood.log_likelihood(self.statistics)
        scale = noise_rescaling(self.likelihood, noise_std, self.noise_exponent)
        precisions = prior_precision.double().expand(len(self.blocks))
        value = fit / self.temperature
        for block, squared_norm, precision in zip(self.blocks, self.squared_norms, precisions, strict=True):
            log_det_ratio = DampedInverse(block.scaled(scale), precision).logdet() - math.prod(block.shape) * torch.log(
                precision
            )
            value = value - 0.5 * (precision * squared_norm + log_det_ratio)
        return value


def noise_rescaling(likelihood: Likelihood, noise_std: Tensor | float | None, noise_exponent: int) -> Tensor | float:
    """The factor by which a Fisher changes when the noise goes from the likelihood's own to ``noise_std``."""
    if noise_std is None or not isinstance(likelihood, Gaussian):
        return 1.0
    return (noise_std / likelihood.noise_std) ** noise_exponent


@dataclass(frozen=True)
class TuningResult:
    """Where the evidence is largest: prior precision(s), noise (None without one), and the evidence there."""

    prior_precision: Tensor
    noise_std: float | None
    log_marginal_likelihood: float


def maximise(evidence: Evidence, structure: PriorStructure) -> TuningResult:
    """Maximise the evidence over the prior precision and, in regression, the noise, in log space with bounds.

    A coarse grid finds the right basin, L-BFGS-B with exact gradients the top of it. No learning rate, no step count, and
    no dependence on the present values.

    Args:
        evidence: The function.
        structure: One precision for all, or one per layer.

    Warns:
        UserWarning: If a hyperparameter ends at its bound: the evidence then has no maximum inside.
    """
    n_precisions = 1 if structure is PriorStructure.SCALAR else len(evidence.blocks)
    device = evidence.statistics.device
    noise = isinstance(evidence.likelihood, Gaussian)
    bounds = [(math.log(PRECISION_BOUNDS[0]), math.log(PRECISION_BOUNDS[1]))] * n_precisions
    starts = [np.full(n_precisions, value) for value in np.linspace(math.log(1e-6), math.log(1e6), num=13)]
    if noise:
        squared_error, count = evidence.statistics.tolist()
        root_mean_square = max(math.sqrt(squared_error / count), 1e-12)
        bounds.append((math.log(root_mean_square * 1e-1), math.log(root_mean_square * 1e3)))
        starts = [np.append(u, math.log(root_mean_square * factor)) for u in starts for factor in (1.0, 1.5, 3.0)]

    def value_at(logs: Tensor) -> Tensor:
        precision = logs[:n_precisions].exp()
        return evidence(
            precision if structure is PriorStructure.LAYERWISE else precision[0], logs[-1].exp() if noise else None
        )

    def loss(u: np.ndarray) -> float:
        with torch.no_grad():
            return -float(value_at(torch.tensor(u, dtype=torch.float64, device=device)))

    def loss_and_gradient(u: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.enable_grad():
            logs = torch.tensor(u, dtype=torch.float64, device=device, requires_grad=True)
            value = value_at(logs)
            (gradient,) = torch.autograd.grad(value, logs)
        return -float(value.detach()), -gradient.cpu().numpy()

    result = minimize(loss_and_gradient, min(starts, key=loss), jac=True, method="L-BFGS-B", bounds=bounds)
    _warn_at_the_edge(loss, result.x, bounds, ["prior precision"] * n_precisions + ["noise"])
    tuned = torch.tensor(np.exp(result.x[:n_precisions]), dtype=torch.float64, device=device)
    return TuningResult(
        prior_precision=tuned if structure is PriorStructure.LAYERWISE else tuned[0],
        noise_std=float(np.exp(result.x[-1])) if noise else None,
        log_marginal_likelihood=-float(result.fun),
    )


def _warn_at_the_edge(
    loss: Callable[[np.ndarray], float], u: np.ndarray, bounds: Sequence[tuple[float, float]], names: Sequence[str]
) -> None:
    """Warn about every hyperparameter that could as well be at one of its bounds: it has no optimum inside."""
    edges = set()
    as_good = loss(u) + _NEGLIGIBLE
    for i, name in enumerate(names[: len(u)]):
        for bound in bounds[i]:
            moved = u.copy()
            moved[i] = bound
            if loss(moved) <= as_good:
                edges.add(name)
    if edges:
        warnings.warn(
            f"the evidence is largest at the edge of the range searched for: {', '.join(sorted(edges))}. It has no maximum "
            "inside; check that the network is trained and that the prior suits its weights.",
            stacklevel=4,
        )
