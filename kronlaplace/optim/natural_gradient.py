"""`NaturalGradient`: training with the inverse Fisher as a preconditioner."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kronlaplace._arguments import Choice, choice, positive_number, warn
from kronlaplace._wrappers import unwrapped
from kronlaplace.damping import Damping, LevenbergMarquardt
from kronlaplace.damping.inversion import SingularBlockError
from kronlaplace.data.arriving import Arriving
from kronlaplace.data.device import device_of
from kronlaplace.estimators import KFAC, TKFAC, Estimator, resolve_estimator
from kronlaplace.likelihoods import Likelihood, Sampling
from kronlaplace.optim.adaptive_steps import AdaptiveSteps
from kronlaplace.optim.base import CurvatureOptimizer
from kronlaplace.optim.batch_model import BatchModel
from kronlaplace.optim.checks import check_setting
from kronlaplace.optim.damped_average import DampedBlockDiagonal, Decays
from kronlaplace.optim.parameters import PlainSGD, step_plainly
from kronlaplace.optim.part import Part, part_of
from kronlaplace.optim.period import Period, period_of
from kronlaplace.optim.step_model import StepModel
from kronlaplace.optim.structure import BlockDiagonal, Structure, structure_of
from kronlaplace.optim.vectors import Vector, combine, dot
from kronlaplace.priors.penalty import QuadraticPenalty

__all__ = ["Averaging", "NaturalGradient"]


class Averaging(Choice):
    """What is averaged over the batches: the factors as they are, or damped in each step."""

    UNDAMPED = "undamped"
    DAMPED = "damped"


_ADAPTIVE = LevenbergMarquardt(every=1, decay=0.7, lower=0.0, upper=0.5)
_CURVATURE_EVERY = Period(10, growth=0.02)
_INVERT_EVERY = Period(100, growth=0.05, fewest=2)
_MODEL_EVERY = Period(5, growth=0.05)

_KL_CLIP = 0.3

_FASTEST_GROWTH = 10.0
"""Largest factor by which the damping grows at once while steps are rejected in a row, unless a rule has a larger one."""

_PATIENCE = 20
"""Number of rejected steps in a row after which a warning tells that training is stuck."""


class NaturalGradient(CurvatureOptimizer):
    """Natural-gradient descent, with Kronecker factors that follow the training.

    Each step is preconditioned with the damped Fisher of the network, ``−(F̂ + γI)⁻¹ ∇h``, whose blocks are moving averages
    over the batches. The optimizer observes the user's own forward passes; labels are drawn from the model's predictive
    distribution, anew in each step. One line is added to the usual loop:

        >>> optimizer = kl.NaturalGradient(model, "classification")  # doctest: +SKIP
        >>> optimizer.zero_grad()                                    # doctest: +SKIP
        >>> outputs = model(x)                                       # doctest: +SKIP
        >>> optimizer.update_curvature(outputs)                      # doctest: +SKIP
        >>> loss_function(outputs, y).backward()                     # doctest: +SKIP
        >>> optimizer.step()                                         # doctest: +SKIP

    The loss is the mean over examples of the negative log-likelihood (for `Gaussian`, half the squared error over ``σ²``,
    summed over the outputs). A mean over tokens or pixels is found to be smaller by its factor.

    **By itself.** Without a ``damping``, nothing has to be set. The length ``α`` and the momentum ``μ`` of
    ``δ = α Δ + μ δ₀`` minimize the quadratic model of the loss along the natural gradient ``Δ`` and the last step ``δ₀``,
    with the exact Fisher of part of the batch (KFC Eq. 36). The batch that a step was computed from flatters it, so steps
    are multiplied by ``√x``, from 0.6 to 1, where ``x`` is the length that the next batches confirm, and by ``lr``, for
    schedules. The damping shrinks by a factor of 0.7 with each measurement of the model while the damped ratio, which is
    ``x`` with the damping in the curvature, is above 1/2. It grows by this factor when a step is rejected, because it would
    increase the loss of the batch (the slope is that of all examples, what is beyond it that of the part), and by twice the
    factor before with each further rejection in a row (Nielsen 1999), up to 10. It also grows by 1/0.7 when the mean
    ratio ``κ`` of the exact to the approximate curvature along ``Δ`` is above 2,000, and when the damped ratio is below -1,
    as with a regularizer that is not given as ``prior``. Noise alone does not drive it up.
    In every step at first, and then less often, the curvature, the inverses and the model are renewed. Between
    measurements, scalars carry the model on: the step with the last ``α`` and ``μ`` (at most 0.9) is shortened to the
    minimum along it, and to the length of the last measured step.

    **KFC's Algorithm 1.** With a ``damping`` of your own, steps are ``v = −lr · (F̂ + γI)⁻¹ ∇h``, shortened such that
    ``ν = vᵀFv + η‖v‖² ≤ kl_clip`` with the exact Fisher of part of the batch, and then ``δ = momentum · δ₀ + v``. If ``ν``
    is not measured in a step, it is taken from ``−vᵀ∇h``, in the proportion in which they were when it last was.
    `start_from` gives the averages a start, and `IterateAverage` averages the weights.

    **TKFAC's Algorithm 1** is ``estimator="tkfac"`` with ``damping=kl.damping.TraceRestricted(λ)`` (Eq. 5.15) or
    ``TraceRestrictedAuto(ν)`` (Eq. 5.16 and 5.17), ``averaging="damped"``, ``momentum=0.9``, ``kl_clip=None``.

    Batch norm and dropout run in training mode. The gradients behind the factors come from the backward pass of the batch,
    in which batch norm couples the examples.

    Args:
        model: The network. It carries hooks until `close`, or until the optimizer is deleted.
        likelihood: The likelihood whose mean negative log-likelihood the loss is, or a shorthand, as in `estimate_fisher`.
        params: Parameters or parameter groups to train; None means all trainable ones. Groups may have their own ``lr``,
            ``momentum`` and ``weight_decay``. All parameters of a layer must be in one group.
        lr: Learning rate.
        momentum: Momentum, from 0 to 1. None means that it adapts if the damping does, and otherwise 0.9.
        weight_decay: The factor ``η`` of ``½‖θ‖²`` in the objective. It is in the gradient and in the damping (KFC Eq. 28).
        estimator: Estimator of the blocks, as in `estimate_fisher`. None means ``"tkfac"`` without a ``damping``, and
            otherwise ``"kfac"``, as for the block-tridiagonal structure. Those with several passes over the data go on by
            one step per batch (`Estimator.online`): `KFOC` with one warm-started iteration, `EKFAC` with eigenvalues in a
            basis that is renewed with every inverse.
        structure: ``"block-diagonal"``, or ``"block-tridiagonal"`` for chains of linear layers (K-FAC section 3.3).
        damping: A damping, or a rule that adapts one, `kronlaplace.damping.LevenbergMarquardt`. None is that rule with
            `FactoredTikhonov`, started at the curvature along the first gradient, with a decay of 0.7 with each
            measurement of the model, and the limits 0 and 1/2. The ratio is the damped ratio, or KFC's ``ρ`` if there is a
            ``momentum``; a rule with a larger ``lower`` also lets the damping grow where the ratio is smaller.
        kl_clip: The bound ``C`` on ``ν``, or None. Steps whose length adapts need none and are not clipped.
        curvature_every: Number of steps between two updates of the curvature, exactly, or a `Period`.
        invert_every: Number of steps between two inversions, exactly, or a `Period`.
        model_every: Number of steps between two measurements of the quadratic model, which renew ``α``, ``μ`` and the
            adaptive damping, or of ``ν``, exactly, or a `Period`. After a rejected step the model is measured again.
        ema_decay: Decay ``ξ`` of the moving averages, from 0 to 1 (excluded); the first batches are averaged evenly.
        averaging: What is averaged over the batches: ``"undamped"`` factors, which are damped when they are inverted (KFC
            Eq. 33), or factors that are ``"damped"`` in each step (TKFAC Eq. 5.18 and 5.19), for which the damping must be
            a fixed one of factors and the estimator one of ``"kfac"``, ``"tkfac"``, and ``"sua"``.
        sampling: Where the labels of the Fisher come from: ``"mc"``, ``"exact"``; see `estimate_fisher`.
        mc_samples: Number of label draws per example.
        layers: Names or patterns of the modules that get a block; None means all.
        others: Rule for parameters without a Kronecker block: ``"diagonal"``, a diagonal block, or `PlainSGD`.
        curvature_fraction: Fraction of each batch that counts in the averages. None means 1/4 (K-FAC section 8), but at
            least 32 examples, if the batch has as many. Where each example uses a layer at several positions, ``"kfac"``
            then takes the moment of the inputs from a quarter of these, at least eight examples and ``p`` positions, and
            ``"tkfac"`` and ``"kfoc"`` take theirs from half of these, at least 16.
        model_fraction: Fraction of each batch on which exact products with the Fisher are computed. None means 1/8 for
            adaptive steps (K-FAC), and 1/4 for the clip (KFC). They are at least 24 examples, if the batch has as many.
        invert_async: Whether inverses are computed beside the training, in a thread or on a CUDA stream of their own, and
            replace the old ones when they are ready. When that is depends on the machine, so runs do not repeat exactly.
        prior: A penalty of the weights that is part of the loss, a `ContinualLaplace` or `PriorPenalty`, whose
            ``penalty() / n_examples`` is added to the mean negative log-likelihood in every step. Its curvature is then in
            the preconditioner, as the Kronecker product nearest to the sum with ``F̂`` (K-FOC Eq. 10), and, exactly, in the
            model of the steps and in ``ν``. The number of examples is not given here: the weight of the penalty in the loss
            is seen in the backward pass.
        seed: Seed of the label draws.

    Raises:
        TypeError, ValueError: If an argument is not allowed, or the model has no layer with a block.
        NotImplementedError: If there is a prior and the structure is block-tridiagonal, or averages are of damped factors;
            or if a module cannot have a block and ``others`` is ``"diagonal"``.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        *,
        params: Any = None,
        lr: float = 1.0,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        estimator: Estimator | str | None = None,
        structure: Structure | str = "block-diagonal",
        damping: Damping | LevenbergMarquardt | None = None,
        kl_clip: float | None = _KL_CLIP,
        curvature_every: int | Period = _CURVATURE_EVERY,
        invert_every: int | Period = _INVERT_EVERY,
        model_every: int | Period = _MODEL_EVERY,
        ema_decay: float = 0.95,
        averaging: Averaging | str = "undamped",
        sampling: Sampling | str = "mc",
        mc_samples: int = 1,
        layers: Sequence[str] | str | None = None,
        others: str | PlainSGD = "diagonal",
        curvature_fraction: float | None = None,
        model_fraction: float | None = None,
        invert_async: bool = False,
        prior: QuadraticPenalty | None = None,
        seed: int = 0,
    ) -> None:
        rule = _ADAPTIVE if damping is None else damping
        if not isinstance(rule, (Damping, LevenbergMarquardt)):
            raise TypeError(
                f"damping must be a damping such as kl.damping.FactoredTikhonov(1e-3), a rule that adapts one such as "
                f"kl.damping.LevenbergMarquardt(), or None; got {damping!r}."
            )
        self._rule = rule
        self._adapts_steps = isinstance(rule, LevenbergMarquardt) and momentum is None
        if self._adapts_steps and kl_clip not in (None, _KL_CLIP):
            raise ValueError(
                f"kl_clip={kl_clip} has no effect on steps whose length adapts. Leave it out, or give a damping such as "
                "kl.damping.FactoredTikhonov(1e-3), or a momentum."
            )
        momentum = 0.9 if momentum is None else momentum
        check_setting("momentum", momentum)
        check_setting("lr", lr)
        check_setting("weight_decay", weight_decay)
        self._clip = None if kl_clip is None else positive_number(kl_clip, "kl_clip")
        self._lambda: float | None = rule.initial if isinstance(rule, LevenbergMarquardt) else 0.0
        self._ratio: Arriving | None = None
        self._last_adapted = self._rejected = 0
        self._clip_ratio: Tensor | None = None
        self._model_every = period_of(model_every, "model_every")
        self._last_model: int | None = None
        self._adaptive = AdaptiveSteps()
        self._accepted: Arriving | None = None
        structure = structure_of(structure)
        if estimator is None:
            estimator = TKFAC() if damping is None and isinstance(structure, BlockDiagonal) else KFAC()
        if choice(Averaging, averaging, "averaging") is Averaging.DAMPED:
            decays = weakref.WeakMethod(self._weight_decays)  # the optimizer is closed when nobody else holds it
            estimator = resolve_estimator(estimator).online()
            structure = DampedBlockDiagonal(structure, estimator, rule, lambda: cast(Decays, decays())())
        super().__init__(
            unwrapped(model),
            likelihood,
            params=params,
            defaults={"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "natural": True},
            layers=layers,
            others=others,
            estimator=estimator,
            structure=structure,
            sampling=sampling,
            mc_samples=mc_samples,
            curvature_every=curvature_every,
            invert_every=invert_every,
            ema_decay=ema_decay,
            curvature_part=part_of(
                curvature_fraction, "curvature_fraction", Part(1 / 4, fewest=32, fewer_for_moments=True)
            ),
            model_part=part_of(
                model_fraction, "model_fraction", Part(1 / 8 if self._adapts_steps else 1 / 4, fewest=24)
            ),
            invert_async=invert_async,
            prior=prior,
            seed=seed,
        )

    @property
    def damping(self) -> Damping | None:
        """The damping of the next inverse, without the weight decay; None if it adapts and has not started yet."""
        if not isinstance(self._rule, LevenbergMarquardt):
            return self._rule
        return None if self._lambda is None else self._rule.damping(self._lambda)

    def _needs_batch(self) -> bool:
        """Return whether the next step measures its quadratic model, or ``ν``."""
        if not isinstance(self._rule, LevenbergMarquardt) and self._clip is None:
            return False
        accepted = None if self._accepted is None else self._accepted.value()
        return (accepted is not None and not accepted) or self._model_every.is_due(self._steps, self._last_model)

    def _damping(self) -> Damping:
        damping = self.damping
        assert damping is not None
        return damping

    def _make_step(self) -> None:
        gradient = self._gradient()
        batch = self._passes.batch()
        if self._lambda is None:
            self._lambda = self._curvature_along(gradient)
        self._adapt()
        self._renew()
        if gradient:
            self._take(
                self._adaptive_step(gradient, batch) if self._adapts_steps else self._fixed_step(gradient, batch)
            )
        step_plainly(self.param_groups, self.state, self._checks.finite)

    def _renew(self) -> None:
        """Compute a new inverse if it is due; a damping that adapts grows until the blocks are not singular."""
        rule = self._rule
        while True:
            try:
                return super()._renew()
            except SingularBlockError:
                if not isinstance(rule, LevenbergMarquardt) or self._lambda is None or self._lambda >= rule.maximum:
                    raise
                self._lambda = min(10 * self._lambda, rule.maximum)

    def _adapt(self) -> None:
        """Change the damping by the last reduction ratio, as soon as it has arrived."""
        rule = self._rule
        if self._ratio is None or not isinstance(rule, LevenbergMarquardt) or self._lambda is None:
            return
        if (ratio := self._ratio.value()) is None:
            return
        self._ratio = None
        self._rejected = self._rejected + 1 if ratio.isnan() else 0
        if self._steps - self._last_adapted >= rule.every:
            damping = float(rule.updated(self._lambda, ratio))
            if self._rejected > 1:
                faster = min(2 ** (self._rejected - 1) * damping, _FASTEST_GROWTH * self._lambda, rule.maximum)
                damping = max(damping, faster)
            self._lambda, self._last_adapted = damping, self._steps
        if self._rejected == _PATIENCE:
            warn(
                f"the last {_PATIENCE} steps were not made, because each would have increased the loss of the batch; the "
                f"damping is {self._lambda:.3g}. If the loss is not the mean negative log-likelihood of {self.likelihood}, "
                "correct either of them; otherwise training may have converged, or the batches are too small for "
                "model_fraction."
            )

    def _adaptive_step(self, gradient: Vector, batch: BatchModel | None) -> Vector:
        """Return ``α Δ + μ δ₀``, or zero if it would increase the loss."""
        rates = self._settings("lr")
        rate = max(rates[p] for p in gradient)
        step = self._solved(gradient)
        for v in step.values():
            v.neg_()
        last = {p: self.state[p]["last_step"] for p in step if "last_step" in self.state[p]}
        steps = self._adaptive
        if batch is None and steps.can_carry_on:
            slope = dot(gradient, step)
            along_last = dot(gradient, last) if last else torch.zeros_like(slope)
            coefficients = steps.carry_on(torch.stack([slope, along_last]), rate)
            combine(step, last, coefficients)
            return {p: v.mul_(rates[p]) for p, v in step.items()}
        self._last_model = self._steps
        model = self._model_of(gradient, step, last)
        assert self._lambda is not None
        added = self._lambda * dot(last, last) if last else torch.zeros_like(model.slopes[0, 0])
        confirmed = steps.confirm(model, added)
        coefficients = steps.choose(model)
        combine(step, last, coefficients)
        accepted = model.change_of_objective(step, coefficients) < 0
        steps.keep(model, coefficients, accepted, rate)
        ratio = steps.ratio_for_damping(confirmed, cast(LevenbergMarquardt, self._rule).upper)
        self._ratio = Arriving(torch.where(accepted, ratio, torch.nan))
        self._accepted = Arriving(accepted)
        return {p: torch.where(accepted, v, 0.0) * rates[p] for p, v in step.items()}

    def _fixed_step(self, gradient: Vector, batch: BatchModel | None) -> Vector:
        """Return ``momentum · δ₀ + v``, with ``v`` clipped."""
        rates, momenta = self._settings("lr"), self._settings("momentum")
        direction = {p: v.mul_(-rates[p]) for p, v in self._solved(gradient).items()}
        last = {p: self.state[p]["last_step"] for p in direction if "last_step" in self.state[p]}
        last = {p: momenta[p] * v for p, v in last.items() if momenta[p]}
        adapts = isinstance(self._rule, LevenbergMarquardt)
        model = None if batch is None else self._model_of(gradient, direction, last if adapts else {})
        if model is not None:
            self._last_model = self._steps
        step = direction
        coefficients = [torch.ones((), dtype=torch.float64, device=v.device) for v in list(direction.values())[:1]]
        if self._clip is not None:
            scale = self._clipping(model, gradient, direction)
            coefficients = [scale]
            step = {p: v * scale for p, v in direction.items()}
        for p, v in last.items():
            step[p] = step[p] + v
        if model is not None and adapts:
            both = torch.stack([*coefficients, *[torch.ones_like(coefficients[0]) for _ in range(bool(last))]])
            self._ratio = Arriving(model.ratio(step, both, torch.zeros(1, dtype=torch.long, device=both.device)))
        return step

    def _model_of(self, gradient: Vector, direction: Vector, last: Vector) -> StepModel:
        batch = self._required_batch()
        assert self._lambda is not None
        decays = self._settings("weight_decay")
        model = StepModel(
            batch, self._names, gradient, [direction], last, self._lambda, decays, len(self._passes), self._penalty
        )
        self._checks.require(*batch.check())
        return model

    def _clipping(self, model: StepModel | None, gradient: Vector, direction: Vector) -> Tensor:
        """Return the factor, at most 1, with which ``ν ≤ C``."""
        assert self._clip is not None
        decrease = -dot(gradient, direction)
        if model is not None:
            self._clip_ratio = model.curvature[0, 0, 0] / decrease
        assert self._clip_ratio is not None
        size = self._clip_ratio * decrease
        return torch.where(size > self._clip, (self._clip / size).sqrt(), 1.0)

    def _advice(self) -> str:
        if self._adapts_steps:
            return (
                "If training has diverged, start with a larger damping, "
                "damping=kl.damping.LevenbergMarquardt(initial=...), or use larger batches or a larger model_fraction."
            )
        return "If training has diverged, use a smaller lr, a larger damping, or a smaller kl_clip."

    def _more_state(self) -> dict[str, Any]:
        return {
            "damping": self._lambda,
            "last_adapted": self._last_adapted,
            "rejected": self._rejected,
            "clip_ratio": self._clip_ratio,
            "last_model": self._last_model,
            "adaptive": self._adaptive.state_dict(),
            "accepted": None if self._accepted is None else self._accepted.value(),
            "ratio": None if self._ratio is None else self._ratio.value(),
        }

    def _load_more_state(self, state: Mapping[str, Any]) -> None:
        self._lambda, self._last_adapted = state["damping"], state["last_adapted"]
        self._rejected, self._clip_ratio = state["rejected"], state["clip_ratio"]
        self._last_model = state["last_model"]
        self._adaptive.load_state_dict(state["adaptive"], device_of(self._model))
        self._accepted = None if state["accepted"] is None else Arriving(state["accepted"])
        self._ratio = None if state["ratio"] is None else Arriving(state["ratio"])
