"""Tuning by the evidence with the exact Gauss-Newton matrix: prior precision and noise of a small regression table.

Where a table has fewer targets than the network has weights, a Kronecker product has far more directions with curvature
than the data do. Its evidence then counts more effective parameters than there are targets, and takes the network's fit for
noise. The exact matrix has at most as many directions as there are targets, and the posterior keeps its Kronecker factors
for predictions.

Where the network nearly interpolates, the exact evidence puts the uncertainty into the function and hardly any into the
noise. Exact blocks follow, with variances that grow where there are no data. A Kronecker posterior cannot: its variances
are at most a multiple of the noise, wherever the input. What it then lacks follows from the leave-one-out predictive
distribution of the exact posterior, which is known in closed form: an observation that is left out has the variance
``σ² / (1 − h)`` for the leverage ``h`` (Rasmussen and Williams 2006, Eq. 5.12). With ``γ`` effective parameters the
Kronecker posterior predicts ``σ² (1 + γ / n)`` on average. If that is less than the median of the former, noise and prior
variance grow until it is as much.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kronlaplace.blocks import DenseBlock
from kronlaplace.laplace.hyperparameters import Hyperparameters
from kronlaplace.laplace.output_kernel import LARGEST, OutputKernel
from kronlaplace.laplace.state import State
from kronlaplace.laplace.tuning import (
    NoiseTuning,
    Tuned,
    finish,
    known_noise,
    maximize_evidence,
)
from kronlaplace.priors.prior import PriorStructure

__all__ = ["by_exact_evidence", "has_exact_evidence"]


def has_exact_evidence(state: State, structure: PriorStructure) -> bool:
    """Tell whether a fitted posterior can be tuned by the exact evidence."""
    return state.fitted.kernel is not None and structure is PriorStructure.SCALAR and state.prior.unit_is_identity


def by_exact_evidence(state: State, structure: PriorStructure, noise: NoiseTuning | str | None) -> Hyperparameters:
    """Return the hyperparameters with the largest exact evidence, calibrated to the posterior's own variances.

    Args:
        state: A fitted posterior's state.
        structure: `PriorStructure.SCALAR`.
        noise: Whether the noise is tuned too, or fixed; None: fixed if it is known.

    Raises:
        ValueError: Where there is no exact evidence, or for a fixed noise where there is none.

    Warns:
        UserWarning: As `kronlaplace.laplace.tuning.by_evidence`.
    """
    kernel = state.fitted.kernel
    if kernel is None or not has_exact_evidence(state, structure):
        raise ValueError(
            'method="exact-evidence" is for one precision for all weights (structure="scalar", no Kronecker prior) of a '
            f"posterior that was fitted to all of a regression table of up to {LARGEST:,} targets: with a Gaussian "
            'likelihood, data that can be read twice, and sampling other than "empirical". Use method="evidence".'
        )
    fisher = state.fitted.fisher
    estimated_at = fisher.metadata.likelihood.noise_std
    assert estimated_at is not None
    evidence = state.evidence.with_eigenvalues(kernel.eigenvalues / (fisher.n_examples * estimated_at**2))
    tuned = maximize_evidence(evidence, structure, state.temperature, known_noise(noise, state.likelihood))
    if tuned.noise_std is not None and not all(isinstance(block, DenseBlock) for block in fisher.values()):
        tuned = _calibrated(state, kernel, tuned, tuned.noise_std)
    return finish(state, tuned)


def _calibrated(state: State, kernel: OutputKernel, tuned: Tuned, noise_std: float) -> Tuned:
    """Return noise and prior variance times the same factor, so that the posterior's predictions are wide enough."""
    temperature = state.temperature
    leverages = kernel.leverages(float(tuned.multiples) * noise_std**2 * temperature).clamp(max=1 - 1e-12)
    left_out = 1 + temperature * float((leverages / (1 - leverages)).median())
    scale = state.evidence.scale(noise_std, temperature)
    own = 1 + temperature * state.evidence.effective_parameters(tuned.multiples, scale) / len(leverages)
    factor = max(1.0, left_out / own)
    return replace(tuned, multiples=tuned.multiples / factor, noise_std=noise_std * math.sqrt(factor))
