"""Length and momentum of natural-gradient steps, from measurements of the quadratic model that are made now and then.

A measurement is the model over the preconditioned gradient ``Δ = −F̂⁻¹∇h`` and the last step ``δ₀``, with the exact Fisher of
part of the batch. It has its minimum at ``(α, μ)`` (KFC Eq. 36). Four things are added to that, all for gradients and
curvatures of single batches, which are noisy:

**Confirmation.** The minimum is that of one batch. The next batch tells how far the step ``δ`` should have gone for it: with
its gradient ``g'`` after the step and its curvature ``δᵀFδ``, the loss along the step had its minimum at
``x = 1 − g'ᵀδ / δᵀFδ``, taken from the sums over the recent measurements. It is near 1 where batches agree, and near 0 where
gradients are mostly noise. Steps are multiplied by ``√x``, at least 0.6: ``x`` itself would be best for the loss right after
the step, which noise along strongly curved directions dominates, but too short for the weakly curved ones, along which
progress adds up over many steps (short-horizon bias, Wu et al. 2018).

**The ratio κ** of the exact curvature along ``Δ`` to ``ΔᵀF̂Δ = −∇hᵀΔ``, which is 1 for an exact ``F̂``. A gradient finds the
directions in which ``F̂`` is too small, and ``κ`` tells by how much. A part of a batch may miss them, so ``κ`` is taken to be
at least its mean over the recent measurements. Where that is large, ``F̂`` needs more damping.

**The loss that there is.** Where a softmax or a logistic function is saturated at a wrong class, the gradient is large and
the curvature nearly zero, so the model promises more than the whole loss of the batch. A step is therefore no longer than
promises that loss to first order, which is half of it at the model's minimum. Above all, noise (dropout, small batches)
cannot carry the weights away: what a step can lose is bounded by the loss, too.

**Between measurements** the model is carried on with scalars: the curvature along ``Δ`` is ``−κ ∇hᵀΔ``, that between ``Δ``
and ``δ₀`` is ``−κ ∇hᵀδ₀``, and that along ``δ₀`` is known from the step before. The step with the last ``(α, μ)`` goes no
farther than to the minimum along it, and no farther in the metric of the model than the last measured step. A measured step
may be longer than the one before by a factor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kronlaplace.optim.quadratic_model import quotient
from kronlaplace.optim.step_model import StepModel

__all__ = ["AdaptiveSteps"]

_MEMORY = 0.7
"""Factor by which measurements count less with every new one."""

_LEAST_SCALE = 0.6
"""Least number by which steps are multiplied."""

_OVERSHOT = -1.0
"""Damped ratio below which the objective curves more than twice as much as the model knows, such as by a regularizer.

Where gradients are noise alone, ``x`` is 0 in the mean.
"""

_LARGEST_RATIO = 2000.0
"""Mean ``κ`` above which the damping grows."""

_GROWTH = 10.0
"""Largest factor by which ``δᵀFδ`` grows from one measured step to the next."""

_LARGEST_MOMENTUM = 0.9
"""Largest ``μ`` that is kept between measurements: what is kept must not accelerate for ever."""

_NAMES = ("sums", "scale", "size", "ratio", "kept", "last_curvature", "longest", "factor")


class AdaptiveSteps:
    """Lengths of steps; all state is tensors, and nothing waits for the device."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """Sums over measurements of ``−∇hᵀδ`` before the step and ``δᵀFδ``, damped and undamped, shape ``(2, 2)``."""
        self.scale: Tensor | None = None
        """``√x``, by which steps are multiplied, at least 0.6, 0-dim."""
        self.size: Tensor | None = None
        """By which number the last step was multiplied, the scale times the learning rate, 0-dim."""
        self.ratio: Tensor | None = None
        """The mean ``κ``, 0-dim."""
        self.kept: Tensor | None = None
        """``(α, μ)`` until the next measurement, shape ``(2,)``."""
        self.last_curvature: Tensor | None = None
        """``δ₀ᵀ(F + (λ + η)I)δ₀``, 0-dim."""
        self.longest: Tensor | None = None
        """The same of the last measured step that was made, for the learning rate 1, 0-dim."""
        self.is_bounded: Tensor | None = None
        """Whether the last measured step had to be shorter than its model's minimum, for the loss to be enough, 0-dim."""
        self.factor: Tensor | None = None
        """By which factor the loss is larger than the mean negative log-likelihood, 0-dim."""

    def confirm(self, model: StepModel, damped: Tensor) -> Tensor:
        """Take in what the batch of a measured model tells about the last step, before this step is chosen.

        Args:
            model: The model, whose last direction is ``δ₀``.
            damped: ``λ ‖δ₀‖²``, which the model's curvature contains, 0-dim.

        Returns:
            As ``x``, but of the damped model, by which the damping adapts, 0-dim; NaN if it is not known. What noise can
            make of it, from -1 to 0, is 0.
        """
        slope, curvature = model.slopes[0, -1], model.curvature[0, -1, -1]
        if self.scale is None:
            self.scale = torch.ones_like(slope)
        if self.size is None or model.slopes.shape[-1] == 1:  # there is no last step
            return torch.full_like(slope, torch.nan)
        both = torch.stack([curvature, curvature - damped])
        new = torch.stack([(both - slope) / self.size, both / self.size.square()])
        total = new if self.sums is None else new + _MEMORY * self.sums
        before = torch.zeros_like(total) if self.sums is None else self.sums
        known = total.isfinite().all() & (curvature > 0)
        self.sums = torch.where(known, total, before)
        ratio, x = quotient(self.sums[0], self.sums[1])
        self.scale = torch.where(self.sums[1, 1] > 0, x.clamp_min(0).sqrt().clamp(_LEAST_SCALE, 1), self.scale)
        ratio = torch.where(ratio < _OVERSHOT, ratio, ratio.clamp_min(0))
        return torch.where(known, ratio, torch.nan)

    def choose(self, model: StepModel) -> Tensor:
        """Return the coefficients of this step by a measured model, ``(k,)``, without the learning rate."""
        assert self.scale is not None
        decrease = -model.slopes[0, 0]
        ratio = quotient(model.curvature[0, 0, 0], decrease)
        before = torch.ones_like(ratio) if self.ratio is None else self.ratio
        mean = ratio if self.ratio is None else _MEMORY * self.ratio + (1 - _MEMORY) * ratio
        self.ratio = torch.where(ratio.isfinite(), mean, before)  # one step that overflows does not stay
        model.raise_curvature(self.ratio * decrease)
        coefficients = model.minimum()[0][0] * self.scale
        share = model.share_of_loss(coefficients)
        self.is_bounded = share < 1
        coefficients = coefficients * share
        if self.longest is not None:
            longest = torch.where(self.longest > 0, _GROWTH * self.longest, torch.inf)
            coefficients = coefficients * _within(longest, _form(model.curvature[0], coefficients))
        return coefficients

    def ratio_for_damping(self, confirmed: Tensor, upper: float) -> Tensor:
        """Return the ratio by which the damping adapts after `choose`, 0-dim: -1 if ``F̂`` needs more damping.

        Args:
            confirmed: What `confirm` returned.
            upper: The largest ratio at which the damping stays as it is; not more than this where nothing is known, and
                where the loss bounds the step, which less damping would make longer.
        """
        assert self.ratio is not None and self.is_bounded is not None
        ratio = torch.where(confirmed.isnan(), upper, confirmed)
        ratio = torch.where(self.is_bounded, ratio.clamp_max(upper), ratio)
        return torch.where(self.ratio > _LARGEST_RATIO, -1.0, ratio)

    def keep(self, model: StepModel, coefficients: Tensor, accepted: Tensor, rate: float) -> None:
        """Keep what the steps until the next measurement need.

        Args:
            model: The measured model.
            coefficients: Those of the step, shape ``(k,)``.
            accepted: Whether the step is made, 0-dim, boolean.
            rate: The learning rate.
        """
        assert self.scale is not None
        momentum = (coefficients[1:] / self.scale).clamp(0, _LARGEST_MOMENTUM)
        pair = torch.cat([coefficients[:1] / self.scale, momentum, coefficients.new_zeros(2 - len(coefficients))])
        self.kept = torch.where(accepted, pair, 0.0)
        size = torch.where(accepted, _form(model.curvature[0], coefficients), 0.0)
        self.last_curvature = size * rate**2
        self.longest = size if self.longest is None else torch.where(accepted, size, self.longest)
        self.factor = model.factor.to(coefficients)
        self.size = self.scale * rate

    @property
    def can_carry_on(self) -> bool:
        """Whether there has been a measurement."""
        return self.kept is not None

    def carry_on(self, slopes: Tensor, rate: float) -> Tensor:
        """Return the coefficients of a step without a measurement, shape ``(2,)``, without the learning rate.

        Args:
            slopes: ``∇hᵀΔ`` and ``∇hᵀδ₀`` with the gradient of the loss, shape ``(2,)``.
            rate: The learning rate.
        """
        assert self.kept is not None and self.scale is not None and self.factor is not None
        assert self.ratio is not None and self.last_curvature is not None and self.longest is not None
        slopes = slopes / self.factor
        first = (-self.ratio * slopes[0]).clamp_min(0)
        bound = (first * self.last_curvature).sqrt()  # |ΔᵀFδ₀| cannot be larger
        mixed = (-self.ratio * slopes[1]).clamp(-bound, bound)
        curvature = torch.stack([torch.stack([first, mixed]), torch.stack([mixed, self.last_curvature])])
        along = _form(curvature, self.kept)
        to_minimum = quotient(-slopes @ self.kept, along).clamp(0, 1)
        self.size = self.scale * rate
        share = torch.minimum(to_minimum, _within(self.longest, along * self.scale.square()))
        coefficients = self.kept * share * self.scale
        size = _form(curvature, coefficients * rate)
        self.last_curvature = torch.where(size.isfinite(), size, 0.0)  # a step that is not finite is not made
        return coefficients

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return the state, for checkpoints."""
        return {name: getattr(self, name) for name in _NAMES}

    def load_state_dict(self, state: Mapping[str, Tensor | None], device: torch.device) -> None:
        """Restore what `state_dict` returned, on a device."""
        for name in _NAMES:
            value = state[name]
            setattr(self, name, None if value is None else value.to(device))


def _within(largest: Tensor, size: Tensor) -> Tensor:
    """Return the factor, at most 1, of a vector whose squared length is to be at most ``largest`` instead of ``size``."""
    return torch.where(size > largest, quotient(largest, size).sqrt(), 1.0)


def _form(matrix: Tensor, vector: Tensor) -> Tensor:
    return vector @ matrix @ vector
