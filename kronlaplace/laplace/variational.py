"""Variational curvature: the Fisher with the output metric averaged over the posterior's own outputs.

Of all Gaussians around the trained weights ``θ``, the one nearest to the posterior of the linearized network, by the
Kullback-Leibler divergence, has the precision

    S⁻¹ = Σ_n J_nᵀ E[M(f_n)] J_n / τ + D,    f_n ~ N(f(x_n), J_n S J_nᵀ)

(Opper and Archambeau 2009, for likelihoods whose Hessian is the metric ``M``; `HeteroscedasticGaussian` has the
expected Hessian, as it has everywhere). At saturated outputs the metric at ``f(x_n)`` is nearly zero and its average is not.

It is a fixed point. From the posterior ``q`` of a Fisher ``F``, a pass over the data gives a new Fisher ``F'`` of the
averaged metric, and ``(1 − ρ) F + ρ F'`` is the next; with exact blocks, or a diagonal, this is a step along the natural
gradient of the evidence lower bound of the linearized network,

    E_q[log p(D | f)] / τ − KL(q ‖ prior),

so that it ascends if ``ρ`` is small enough. ``ρ`` is 1 in the first step, then ½, and is halved where the bound falls. The
prior precision is set after every step to the fixed point ``δ ‖θ − m‖² = γ``, the maximum of the evidence with that Fisher:
where ``S`` is stationary, so is the bound in ``δ``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from kronlaplace._arguments import choice, positive_integer, positive_number
from kronlaplace.blocks import Truncation
from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.loader import Rewind, iterate
from kronlaplace.estimators import Estimator
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.curvature_pass import accumulate
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.fisher.mixing import mix_fishers
from kronlaplace.laplace.averaged_sampling import AveragedSampling
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.laplace.state import State
from kronlaplace.laplace.tuning import NoiseTuning, by_evidence, maximize_evidence
from kronlaplace.likelihoods import Likelihood, Sampling
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.alignment import Alignment
from kronlaplace.priors.prior import Prior, PriorStructure

__all__ = ["LowerBound", "VariationalFit", "VariationalOptions", "check_curved", "find_fixed_point", "lower_bound"]

_FIRST_STEP = 1.0
_STEP = 0.5
_SMALLEST_STEP = 2.0**-6
"""Step at which the search ends: no step raises the bound."""

_BUDGET = 2**21
"""Numbers that the covariances of some examples of a batch may keep: about as much as the fit needs for a batch."""

_Posterior = TypeVar("_Posterior")


@dataclass(frozen=True)
class VariationalOptions:
    """The options of `KronLaplace.fit_variational`, checked.

    Raises:
        ValueError, TypeError: As there.
    """

    rounds: int
    tolerance: float
    structure: PriorStructure | str
    sampling: DirectionSampling
    progress: bool = False
    truncation: Truncation | None = None

    def __post_init__(self) -> None:
        positive_integer(self.rounds, "rounds")
        positive_number(self.tolerance, "tolerance")
        object.__setattr__(self, "structure", choice(PriorStructure, self.structure, "structure"))
        if self.sampling.kind is Sampling.EMPIRICAL:
            raise ValueError(
                'variational curvature averages the Fisher over outputs: sampling must be "exact" or "mc", got "empirical".'
            )


def check_curved(likelihood: Likelihood) -> None:
    """Check that a likelihood's output metric is not constant.

    Raises:
        ValueError: If it is, with what to use instead.
    """
    if likelihood.metric_is_constant:
        raise ValueError(
            f"the output metric of {likelihood} is the same at all outputs, so the variational posterior is the plain one, "
            "and its value is the evidence: use fit(data), tune() and log_marginal_likelihood()."
        )


@dataclass(frozen=True)
class LowerBound:
    """The evidence lower bound of a linearized network, with its parts, in nats.

    Attributes:
        value: ``expected_log_likelihood / τ − divergence``.
        expected_log_likelihood: ``E_q[log p(D | f)]`` over the Gaussian outputs.
        divergence: ``KL(q ‖ prior)`` over the weights.
        effective_parameters: ``γ = P − tr(D S)``.
        prior: The prior.
    """

    value: float
    expected_log_likelihood: float
    divergence: float
    effective_parameters: float
    prior: Prior = field(repr=False)

    @property
    def prior_precision(self) -> Tensor:
        """Precision(s) of the prior, as in `KronLaplace.prior_precision`."""
        return self.prior.precisions


@dataclass(frozen=True)
class VariationalFit(Generic[_Posterior]):
    """The result of `KronLaplace.fit_variational`.

    Attributes:
        posterior: The posterior, fitted. If the rounds ended before they converged, the bound of what the last one made is
            not in the history; see `KronLaplace.evidence_lower_bound`.
        history: The bound of the plain fit, and of every posterior after it from which a round began and that was kept.
        converged: Whether the bound grew by less than the tolerance in the end, or no step could raise it.
    """

    posterior: _Posterior
    history: tuple[LowerBound, ...] = field(repr=False)
    converged: bool


def find_fixed_point(
    model: nn.Module, plain: State, estimator: Estimator, data: Iterable[Any], options: VariationalOptions
) -> tuple[State, tuple[LowerBound, ...], bool]:
    """Return the posterior with variational curvature, the history, and whether the search converged.

    Args:
        model: The network.
        plain: The plain fit to the same data.
        estimator: The estimator of that fit.
        data: Batches with targets.
        options: The options.
    """
    structure = PriorStructure(options.structure)
    trial = best = _tuned(plain, structure)
    target = plain.fitted.fisher
    history: list[LowerBound] = []
    step, converged = _FIRST_STEP, False
    for k in range(1, options.rounds + 1):
        description = f"Variational round {k} of {options.rounds}"
        bound, averaged = _round(model, trial, estimator, data, options, description)
        gain = bound.value - history[-1].value if history else math.inf
        accepted = gain > -options.tolerance
        if accepted:
            step = min(step, _STEP) if history else step
            best, target = trial, averaged
            history.append(bound)
        else:
            step /= 2
        converged = gain < options.tolerance if accepted else step < _SMALLEST_STEP
        if converged or (k == options.rounds and not accepted):
            trial = best
            break
        fisher = mix_fishers(best.fitted.fisher, target, step)
        if options.truncation is not None:
            fisher = fisher.truncated(options.truncation)
        trial = _tuned(replace(best, fit=replace(best.fitted, fisher=fisher)), structure)
    by_evidence(trial, structure, NoiseTuning.TUNED)  # for its warnings
    return trial, tuple(history), converged


def _tuned(state: State, structure: PriorStructure) -> State:
    """Return the state with the prior precision(s) that maximize the evidence with its Fisher."""
    tuned = maximize_evidence(state.evidence, structure, state.temperature)
    return replace(state, given=state.prior.with_multiples(tuned.multiples))


def _round(
    model: nn.Module,
    state: State,
    estimator: Estimator,
    data: Iterable[Any],
    options: VariationalOptions,
    description: str,
) -> tuple[LowerBound, KroneckerFisher]:
    """Return the bound of a posterior, and the Fisher of the metric averaged over its outputs."""
    rule, plain = options.sampling, state.fitted.fisher
    sampling = AveragedSampling(rule.kind, rule.mc_samples, rule.seed, predictor=Predictor(model, state, _BUDGET))
    with torch.inference_mode(False):
        accumulation = Accumulation(estimator, state.layers)
        accumulate(
            model, data, state.likelihood, accumulation, sampling, progress=options.progress, description=description
        )
        blocks = accumulation.finish()
    metadata = replace(plain.metadata, variational=True, sampling=rule.kind, mc_samples=rule.mc_samples, seed=rule.seed)
    fisher = KroneckerFisher(blocks, plain.n_examples, metadata, plain.statistics)
    return _bound(state, sampling), fisher


def lower_bound(model: nn.Module, state: State, data: Iterable[Any], seed: int, progress: bool) -> LowerBound:
    """Return the evidence lower bound of a posterior in one pass over the data it was fitted to.

    Raises:
        TypeError: If batches come without targets.
    """
    sampling = AveragedSampling(seed=seed, predictor=Predictor(model, state, _BUDGET))
    device, alignment = device_of(model), Alignment(model, state.likelihood)
    with preserved_random_state(device), Rewind(data):
        for batch in iterate(data, device, alignment=alignment, progress=progress, description="Evidence lower bound"):
            if batch.targets is None:
                raise TypeError(
                    "the evidence lower bound needs batches of (inputs, targets); some come without targets."
                )
            sampling.metric(batch)
    return _bound(state, sampling)


def _bound(state: State, sampling: AveragedSampling) -> LowerBound:
    parts = [part for part in sampling.log_likelihoods.values() if part is not None]
    expected = float(torch.stack(parts).sum())
    divergence, effective = _divergence(state)
    return LowerBound(expected / state.temperature - divergence, expected, divergence, effective, state.prior)


def _divergence(state: State) -> tuple[float, float]:
    """Return ``KL(q ‖ prior)`` and the effective number of parameters ``γ``.

    With ``c`` in front of the Fisher, ``γ = c tr(F S)`` is the derivative of ``log det(c F + D)`` by ``log c``, and
    ``2 KL = (θ − m)ᵀ D (θ − m) + log det(c F + D) − log det D − γ``.
    """
    evidence, prior = state.evidence, state.prior
    with torch.inference_mode(False), torch.enable_grad():
        scale = evidence.scale(state.likelihood.noise_std, state.temperature).detach().clone().requires_grad_()
        occam = evidence.occam(prior.multiples.to(scale.device), scale)
        (slope,) = torch.autograd.grad(occam, scale)
    effective = float(slope * scale.detach())
    return 0.5 * (float(occam.detach()) - effective), effective
