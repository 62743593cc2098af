"""Tuning the hyperparameters by the evidence: prior precision(s) and, in regression, the noise with them.

Precisions are multiples of the prior's unit (see `kronlaplace.priors.prior`), which is the identity for all but Kronecker
priors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

from kronlaplace._arguments import Choice, choice, warn
from kronlaplace.laplace.evidence import Evidence
from kronlaplace.laplace.hyperparameters import Hyperparameters
from kronlaplace.laplace.state import State
from kronlaplace.likelihoods import Likelihood
from kronlaplace.priors.prior import PriorStructure

__all__ = [
    "DIAGONAL_RANGE",
    "NEGLIGIBLE",
    "PRECISION_BOUNDS",
    "SUSPICIOUS_NOISE",
    "NoiseTuning",
    "ScaleTuning",
    "Tuned",
    "by_evidence",
    "check_noise",
    "finish",
    "known_noise",
    "maximize_evidence",
]

PRECISION_BOUNDS = (1e-10, 1e10)
"""Prior precisions that tuning considers."""

DIAGONAL_RANGE = 1e3
"""Factor by which a weight's own precision may differ from the one that is best for all."""

_NOISE_BOUNDS = (1e-1, 1e3)
"""Noise that tuning considers, in multiples of the root mean square error on the training data."""

SUSPICIOUS_NOISE = 4.0
"""Tuned noise, in multiples of the root mean square error on the training data, that is worth a warning.

Where the evidence is largest ``σ² = SSE / (n − γ)`` (MacKay 1992): at this factor the ``γ`` effective parameters are 15/16
of the ``n`` targets.
"""

NEGLIGIBLE = 1e-3
"""Differences of the evidence, in nats, that are negligible."""

_TOLERANCE = 1e-9
"""Gain of a Newton step, in nats, at which the maximum is reached."""

_GAIN_BY_WEIGHT = 1e-4
"""Gain of a step of L-BFGS-B, in nats, at which the precisions of single weights are good enough."""

_STEPS_BY_WEIGHT = 500

_LONGEST_STEP = 3.0
"""Largest Newton step, in log units: far from the maximum the evidence is nearly straight, and steps are very long."""

_HALVINGS = 40
"""Maximum number of step halvings; if no step increases the evidence, the maximum is reached."""


class NoiseTuning(Choice):
    """How a Gaussian likelihood's noise is treated: ``TUNED`` with the prior, or ``FIXED`` at its value."""

    TUNED = "tuned"
    FIXED = "fixed"


class ScaleTuning(Choice):
    """How the scale of a classifier's logits is treated: ``TUNED`` with the prior, or ``FIXED``."""

    TUNED = "tuned"
    FIXED = "fixed"


def known_noise(noise: NoiseTuning | str | None, likelihood: Likelihood) -> float | None:
    """Return the likelihood's noise if it is to stay as it is; None if it is tuned, or if there is none.

    Args:
        noise: Whether it is tuned or fixed; None is as `Likelihood.noise_known` says.
        likelihood: The likelihood.

    Raises:
        ValueError: For an unknown option, or a fixed noise where there is none.
    """
    if noise is None:
        return likelihood.noise_std if likelihood.noise_known else None
    if choice(NoiseTuning, noise, "noise") is NoiseTuning.TUNED:
        return None
    if likelihood.noise_std is None:
        raise ValueError(f'noise="fixed" would have no effect: {likelihood} has no noise_std. Leave it out.')
    return likelihood.noise_std


@dataclass(frozen=True)
class Tuned:
    """Tuned hyperparameters.

    Attributes:
        multiples: Multiples of the prior's unit, 0-dim, ``(L,)`` or ``(P,)``.
        noise_std: The noise, or None if there is none or it was known.
        at_the_edge: The hyperparameters for which a bound is as good as the value found: the evidence has no interior
            maximum.
    """

    multiples: Tensor
    noise_std: float | None
    at_the_edge: tuple[str, ...] = ()


def by_evidence(state: State, structure: PriorStructure, noise: NoiseTuning | str | None) -> Hyperparameters:
    """Return the hyperparameters with the largest evidence.

    Args:
        state: A fitted posterior's state.
        structure: Which groups of weights have a precision, or a multiple of the prior's unit, of their own.
        noise: Whether the noise is tuned too, or fixed; None: fixed if it is known.

    Raises:
        ValueError: For a fixed noise where there is none, or weights of a prior whose unit is not the identity.

    Warns:
        UserWarning: If the optimum is at the edge of the range searched, or the noise is much larger than the errors.
    """
    known = known_noise(noise, state.likelihood)
    return finish(state, maximize_evidence(state.evidence, structure, state.temperature, known))


def finish(state: State, tuned: Tuned) -> Hyperparameters:
    """Return tuned hyperparameters for the posterior, with warnings if they look wrong.

    Args:
        state: A fitted posterior's state.
        tuned: What was found.

    Warns:
        UserWarning: If the optimum is at the edge of the range searched, or the noise is much larger than the errors.
    """
    if tuned.at_the_edge:
        warn(
            f"the evidence is largest at the edge of the range searched for: {', '.join(tuned.at_the_edge)}. It has "
            "no maximum inside; check that the network is trained and that the prior suits its weights."
        )
    check_noise(
        state,
        tuned.noise_std,
        "the network has nearly as many effective parameters as there are targets and follows their noise, so that "
        "its training errors do not reveal it",
    )
    noise_std = state.likelihood.noise_std if tuned.noise_std is None else tuned.noise_std
    return replace(state.hyperparameters, prior=state.prior.with_multiples(tuned.multiples), noise_std=noise_std)


def check_noise(state: State, tuned: float | None, meaning: str) -> None:
    """Warn if the tuned noise is far from the errors on the training data.

    Args:
        state: A fitted posterior's state.
        tuned: The noise, None if there is none or it was known.
        meaning: What that would mean.
    """
    statistics = state.fitted.fisher.statistics
    if tuned is None or statistics is None:
        return
    error = state.likelihood.training_error(statistics)
    if 0 < error < tuned / SUSPICIOUS_NOISE:
        warn(
            f"the tuned noise_std, {tuned:.3g}, is {tuned / error:.3g} times the network's root mean square error on "
            f"the training data, {error:.3g}: {meaning}. Train with more data or weight decay, or stop earlier; if the "
            "noise is known set it, posterior.likelihood = kl.Gaussian(noise_std), and tune again."
        )


def maximize_evidence(
    evidence: Evidence, structure: PriorStructure, temperature: float, noise_std: float | None = None
) -> Tuned:
    """Maximize the evidence over prior precision(s) and noise, in log space with bounds.

    It is concave there (see `kronlaplace.laplace.evidence`), so the maximum is found from anywhere: no learning rate, no
    number of steps, no dependence on the present values. With one precision in all or one per block by Newton's method
    on sums over cached eigenvalues, with one per weight by L-BFGS-B.

    Precisions of single weights start from the one that is best for all and stay within a factor `DIAGONAL_RANGE` of
    it: where the data say nothing about a weight, the evidence has no maximum in its precision.

    Args:
        evidence: The function.
        structure: One precision for all, one per block, or one per weight.
        temperature: ``τ``.
        noise_std: The noise if it is known, and only the prior is to be found (Gaussian likelihood only).
    """
    if structure is PriorStructure.DIAGONAL:
        if not evidence.unit_is_identity:
            raise ValueError(
                'structure="diagonal" tunes a precision for every weight, and this prior ties the weights of a layer '
                'together. Use "scalar" or "layerwise", which tune a factor of the prior, or another prior.'
            )
        of_all = maximize_evidence(evidence, PriorStructure.SCALAR, temperature, noise_std)
        return _by_weight(evidence, temperature, of_all, noise_std)
    scalar = structure is PriorStructure.SCALAR
    n = 1 if scalar else len(evidence.blocks)
    low, high = map(math.log, PRECISION_BOUNDS)
    bounds = [(low, high)] * n
    start = [min(max(math.log(evidence.n_weights / max(evidence.squared_norm, 1e-12)), low), high)] * n
    if evidence.likelihood.noise_std is not None and noise_std is None:
        start.append(_log_error(evidence))
        bounds.append(_noise_bounds(evidence))

    def derivatives(logs: Tensor) -> tuple[float, Tensor, Tensor]:
        if noise_std is None:
            return evidence.derivatives(logs, temperature)
        known = torch.tensor([math.log(noise_std)], dtype=logs.dtype)
        value, gradient, hessian = evidence.derivatives(torch.cat([logs, known]), temperature)
        return value, gradient[:n], hessian[:n, :n]

    u = _newton(derivatives, torch.tensor(start).double(), bounds)
    precision = u[:n].exp().to(evidence.statistics.device)
    return Tuned(
        multiples=precision[0] if scalar else precision,
        noise_std=float(u[-1].exp()) if len(u) > n else None,
        at_the_edge=_at_the_edge(evidence, u, bounds, n, temperature, noise_std),
    )


def _newton(
    derivatives: Callable[[Tensor], tuple[float, Tensor, Tensor]], u: Tensor, bounds: list[tuple[float, float]]
) -> Tensor:
    """Maximize a concave function inside bounds by Newton's method; every step goes up.

    Args:
        derivatives: Value, gradient ``(n,)`` and Hessian ``(n, n)``.
        u: Where to start, ``(n,)``.
        bounds: The smallest and largest value of each variable.
    """
    low, high = torch.tensor(bounds, dtype=u.dtype).T
    value, gradient, hessian = derivatives(u)
    while True:
        # A variable at a bound that wants to go farther stays there.
        free = ~((u <= low) & (gradient < 0) | (u >= high) & (gradient > 0))
        if not free.any():
            return u
        g, curvature = gradient[free], -hessian[free][:, free]
        # The curvature may vanish to rounding where the function is straight.
        ridge = 1e-12 * (curvature.diagonal().max() + g.abs().max())
        step = torch.zeros_like(u)
        step[free] = torch.linalg.solve(curvature + ridge * torch.eye(len(g), dtype=u.dtype), g)
        step *= min(1.0, _LONGEST_STEP / max(float(step.abs().max()), 1e-300))
        for _ in range(_HALVINGS):
            new = (u + step).clamp(low, high)
            gain = float(gradient @ (new - u))
            if gain > _TOLERANCE:
                candidate = derivatives(new)
                if candidate[0] >= value + 1e-4 * gain:
                    break
            step = step / 2
        else:
            return u
        u = new
        value, gradient, hessian = candidate


def _log_error(evidence: Evidence) -> float:
    return math.log(max(evidence.likelihood.training_error(evidence.statistics), 1e-12))


def _noise_bounds(evidence: Evidence) -> tuple[float, float]:
    center, (low, high) = _log_error(evidence), _NOISE_BOUNDS
    return center + math.log(low), center + math.log(high)


def _at_the_edge(
    evidence: Evidence,
    u: Tensor,
    bounds: list[tuple[float, float]],
    n: int,
    temperature: float,
    known_noise: float | None,
) -> tuple[str, ...]:
    """Return the hyperparameters that might as well be at one of their bounds."""
    names = []
    noise = float(u[-1].exp()) if len(u) > n else None
    scale = evidence.scale(known_noise if noise is None else noise, temperature)
    for i in range(n):
        losses = [evidence.occam_of(None if n == 1 else i, math.exp(v), scale) for v in (float(u[i]), *bounds[i])]
        if min(losses[1:]) - losses[0] <= 2 * NEGLIGIBLE:
            names = ["prior precision"]
    if noise is not None:

        def loss(log: float) -> float:
            return -evidence.derivatives(torch.cat([u[:-1], torch.tensor([log], dtype=u.dtype)]), temperature)[0]

        if min(map(loss, bounds[-1])) - loss(float(u[-1])) <= NEGLIGIBLE:
            names.append("noise")
    return tuple(names)


def _by_weight(evidence: Evidence, temperature: float, start: Tuned, known_noise: float | None) -> Tuned:
    """Tune one precision per weight by L-BFGS-B, with gradients from autograd."""
    device = evidence.statistics.device
    count = evidence.n_weights
    center = math.log(float(start.multiples))
    bounds = [(center - math.log(DIAGONAL_RANGE), center + math.log(DIAGONAL_RANGE))] * count
    u = np.full(count, center)
    if start.noise_std is not None:
        bounds.append(_noise_bounds(evidence))
        u = np.append(u, math.log(start.noise_std))

    def loss_and_gradient(values: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        with torch.inference_mode(False), torch.enable_grad():
            logs = torch.tensor(values, dtype=torch.float64, device=device, requires_grad=True)
            noise = known_noise if start.noise_std is None else logs[-1].exp()
            value = evidence(logs[:count].exp(), noise, temperature)
            (gradient,) = torch.autograd.grad(value, logs)
        return -float(value.detach()), -gradient.cpu().numpy()

    # SciPy's tolerance is relative to the value.
    options = {"ftol": _GAIN_BY_WEIGHT / max(1.0, abs(loss_and_gradient(u)[0])), "maxiter": _STEPS_BY_WEIGHT}
    result = minimize(loss_and_gradient, u, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return Tuned(
        multiples=torch.tensor(np.exp(result.x[:count]), dtype=torch.float64, device=device),
        noise_std=None if start.noise_std is None else float(np.exp(result.x[-1])),
    )
