"""Variational curvature: the Fisher with the output metric averaged over the posterior's own outputs.

Of all Gaussians around the trained weights ``θ``, the one nearest to the posterior of the linearized network, by the
Kullback-Leibler divergence, has the precision

    S⁻¹ = Σ_n J_nᵀ E[M(f_n)] J_n / τ + D,    f_n ~ N(f(x_n), J_n S J_nᵀ)

(Opper and Archambeau 2009, Eq. 14, for likelihoods whose Hessian is the metric ``M``; `HeteroscedasticGaussian` has the
expected Hessian, as it has everywhere). At saturated outputs the metric at ``f(x_n)`` is nearly zero and its average is not.

It is a fixed point. From the posterior ``q`` of a Fisher ``F``, a pass over the data gives a new Fisher ``F'`` of the
averaged metric, and ``(1 − ρ) F + ρ F'`` is the next; with exact blocks this is a step along the natural gradient of the
evidence lower bound of the linearized network,

    E_q[log p(D | f)] / τ − KL(q ‖ prior),

so that it ascends if ``ρ`` is small enough. ``ρ`` is halved where the bound falls. The prior precision is set after every step
to the fixed point ``δ ‖θ − m‖² = γ``, where the bound is stationary in ``δ`` if ``S`` is: the maximum of the evidence with that
Fisher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from kronlaplace._arguments import choice, positive_integer, positive_number
from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.loader import Rewind, iterate
from kronlaplace.estimators import Estimator
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.curvature_pass import accumulate
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.fisher.mixing import mix_fishers
from kronlaplace.laplace.averaged_sampling import AveragedSampling
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.laplace.prior import Prior, PriorStructure
from kronlaplace.laplace.state import State
from kronlaplace.laplace.tuning import NoiseTuning, by_evidence, maximize_evidence
from kronlaplace.likelihoods import Likelihood, Sampling
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.alignment import Alignment

__all__ = ["VariationalFit", "VariationalOptions", "VariationalRound", "find_fixed_point"]

_FIRST_STEP = 1.0
_STEP = 0.5
_SMALLEST_STEP = 2.0**-6
"""Step at which the search ends: no step raises the bound."""

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
    progress: bool

    def __post_init__(self) -> None:
        positive_integer(self.rounds, "rounds")
        positive_number(self.tolerance, "tolerance")
        object.__setattr__(self, "structure", choice(PriorStructure, self.structure, "structure"))
        if self.sampling.kind is Sampling.EMPIRICAL:
            raise ValueError(
                'variational curvature averages the Fisher over outputs: sampling must be "exact" or "mc", got "empirical".'
            )

    def check(self, likelihood: Likelihood, data: Iterable[Any]) -> None:
        """Check that the metric can be averaged, and that the data can be read several times.

        Raises:
            ValueError: For a likelihood whose metric is constant.
            TypeError: For an iterator.
        """
        if likelihood.metric_is_constant:
            raise ValueError(
                f"the metric of {likelihood} is the same at all outputs, so its variational curvature is the plain one: "
                "use fit(data).tune(), which gives the same posterior."
            )
        if isinstance(data, Iterator):
            raise TypeError("data must be readable again and again, such as a DataLoader or a list; got an iterator.")


@dataclass(frozen=True)
class VariationalRound:
    """A posterior on the way to the fixed point, with its value.

    Attributes:
        bound: The evidence lower bound of the linearized network in nats, ``expected_log_likelihood / τ − divergence``.
        expected_log_likelihood: ``E_q[log p(D | f)]`` over the Gaussian outputs of the linearized network, in nats.
        divergence: ``KL(q ‖ prior)`` in nats.
        effective_parameters: ``γ = P − tr(D S)``.
        prior: The prior, with the precisions chosen for this posterior.
        step: ``ρ``, the share of the new Fisher in the one of this posterior; 0 for the plain fit.
    """

    bound: float
    expected_log_likelihood: float
    divergence: float
    effective_parameters: float
    prior: Prior
    step: float

    @property
    def prior_precision(self) -> Tensor:
        """Precision(s) of the prior, as in `KronLaplace.prior_precision`."""
        return self.prior.precisions


@dataclass(frozen=True)
class VariationalFit(Generic[_Posterior]):
    """The result of `KronLaplace.fit_variational`.

    Attributes:
        posterior: The posterior, fitted.
        history: The plain fit, and every posterior with a larger bound (up to the tolerance) after it.
        converged: Whether the bound grew by less than the tolerance in the end, or no step could raise it.
    """

    posterior: _Posterior
    history: tuple[VariationalRound, ...] = field(repr=False)
    converged: bool

    @property
    def bound(self) -> float:
        """The evidence lower bound of the posterior, in nats."""
        return self.history[-1].bound


def find_fixed_point(
    model: nn.Module, state: State, estimator: Estimator, data: Iterable[Any], options: VariationalOptions
) -> tuple[State, tuple[VariationalRound, ...], bool]:
    """Return the posterior with variational curvature, the history, and whether the search converged.

    Args:
        model: The network.
        state: The plain fit to the same data.
        estimator: The estimator of that fit.
        data: Batches with targets.
        options: The options.
    """
    search = _Search(model, estimator, data, options)
    structure = PriorStructure(options.structure)
    best = _tuned(state, structure)
    record, target = search.round(best, 1, 0.0)
    history, step, converged = [record], _FIRST_STEP, False
    for k in range(1, options.rounds + 1):
        mixed = mix_fishers(best.fitted.fisher, target, step)
        trial = _tuned(replace(best, fit=replace(best.fitted, fisher=mixed)), structure)
        if k == options.rounds:
            record, new = search.value(trial, step), target
        else:
            record, new = search.round(trial, k + 1, step)
        gain = record.bound - history[-1].bound
        if gain > -options.tolerance:
            best, target = trial, new
            history.append(record)
            step = min(step, _STEP)
            if gain < options.tolerance:
                converged = True
                break
        else:
            step /= 2
            if step < _SMALLEST_STEP:
                converged = True
                break
    by_evidence(best, structure, NoiseTuning.TUNED)  # for its warnings
    return best, tuple(history), converged


def _tuned(state: State, structure: PriorStructure) -> State:
    """Return the state with the prior precision(s) that maximize the evidence with its Fisher."""
    tuned = maximize_evidence(state.evidence, structure, state.temperature)
    return replace(state, given=state.prior.with_multiples(tuned.multiples))


class _Search:
    """Passes over the data with a posterior."""

    def __init__(self, model: nn.Module, estimator: Estimator, data: Iterable[Any], options: VariationalOptions) -> None:
        self._model = model
        self._estimator = estimator
        self._data = data
        self._options = options

    def round(self, state: State, number: int, step: float) -> tuple[VariationalRound, KroneckerFisher]:
        """Return the value of a posterior, and the Fisher of the metric averaged over its outputs."""
        sampling = self._sampling(state)
        plain = state.fitted.fisher
        with torch.inference_mode(False):
            accumulation = Accumulation(self._estimator, state.layers)
            passed = accumulate(
                self._model,
                self._data,
                state.likelihood,
                accumulation,
                sampling,
                progress=self._options.progress,
                description=f"Variational round {number} of {self._options.rounds}",
            )
            blocks = accumulation.finish()
        metadata = replace(plain.metadata, variational=True, seed=sampling.seed)
        fisher = KroneckerFisher(blocks, passed.n_examples, metadata, plain.statistics)
        return _record(state, sampling, step), fisher

    def value(self, state: State, step: float) -> VariationalRound:
        """Return the value of a posterior only."""
        sampling = self._sampling(state)
        device = device_of(self._model)
        alignment = Alignment(self._model, state.likelihood)
        progress = self._options.progress
        with preserved_random_state(device), Rewind(self._data):
            for batch in iterate(
                self._data, device, alignment=alignment, progress=progress, description="Evidence lower bound"
            ):
                sampling.metric(batch)
        return _record(state, sampling, step)

    def _sampling(self, state: State) -> AveragedSampling:
        rule = self._options.sampling
        return AveragedSampling(rule.kind, rule.mc_samples, rule.seed, predictor=Predictor(self._model, state))


def _record(state: State, sampling: AveragedSampling, step: float) -> VariationalRound:
    parts = [part for part in sampling.log_likelihoods.values() if part is not None]
    expected = float(torch.stack(parts).sum())
    divergence, effective = _divergence(state)
    bound = expected / state.temperature - divergence
    return VariationalRound(bound, expected, divergence, effective, state.prior, step)


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
        effective = float(slope * scale)
    return 0.5 * (float(occam.detach()) - effective), effective
