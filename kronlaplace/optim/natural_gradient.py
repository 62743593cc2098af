"""`NaturalGradient`: training with the inverse Fisher as a preconditioner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace._arguments import positive_number
from kronlaplace.damping import Damping, LevenbergMarquardt
from kronlaplace.estimators import Estimator
from kronlaplace.likelihoods import Likelihood, Sampling
from kronlaplace.optim.arriving import Arriving
from kronlaplace.optim.base import CurvatureOptimizer, Vector
from kronlaplace.optim.parameters import PlainSGD
from kronlaplace.optim.period import Period
from kronlaplace.optim.step_model import StepModel, dot
from kronlaplace.optim.structure import Structure

__all__ = ["NaturalGradient"]


class NaturalGradient(CurvatureOptimizer):
    """TODO"""

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        *,
        params: Any = None,
        lr: float = 1.0,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        estimator: Estimator | str = "kfac",
        structure: Structure | str = "block-diagonal",
        damping: Damping | LevenbergMarquardt | None = None,
        kl_clip: float | None = 0.3,
        curvature_every: int | Period = Period(10, growth=0.1),
        invert_every: int | Period = Period(100, growth=0.1),
        ema_decay: float = 0.95,
        sampling: Sampling | str = "mc",
        mc_samples: int = 1,
        layers: Sequence[str] | str | None = None,
        others: str | PlainSGD = "diagonal",
        curvature_fraction: float = 1.0,
        model_fraction: float = 0.25,
        invert_async: bool = False,
        seed: int = 0,
    ) -> None:
        self._rule = LevenbergMarquardt(initial=1.0, every=1, decay=0.8) if damping is None else damping
        self._adapts_damping = isinstance(self._rule, LevenbergMarquardt)
        self._adapts_steps = self._adapts_damping and momentum is None
        momentum = 0.9 if momentum is None else momentum
        if not (isinstance(momentum, (int, float)) and 0 <= momentum < 1):
            raise ValueError(f"momentum must be at least 0 and less than 1, or None, got {momentum!r}.")
        self._clip = None if kl_clip is None or self._adapts_steps else positive_number(kl_clip, "kl_clip")
        self._lambda = self._rule.initial if isinstance(self._rule, LevenbergMarquardt) else 0.0
        self._ratio: Arriving | None = None
        self._coefficients: Tensor | None = None
        self._clip_ratio: Tensor | None = None
        super().__init__(
            model,
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
            curvature_fraction=curvature_fraction,
            model_fraction=model_fraction,
            invert_async=invert_async,
            seed=seed,
        )

    @property
    def damping(self) -> Damping:
        """The damping of the next inverse, without the weight decay."""
        return self._rule.damping(self._lambda) if isinstance(self._rule, LevenbergMarquardt) else self._rule

    def _needs_batch(self) -> bool:
        return self._adapts_damping or self._clip is not None

    def _damping(self) -> Damping:
        return self.damping

    def _make_step(self) -> None:
        self._adapt()
        self._renew()
        gradient = self._gradient()
        if gradient:
            self._step_naturally(gradient)
        self._step_plainly()

    def _adapt(self) -> None:
        """Change the damping by the last reduction ratio, as soon as it has arrived."""
        if self._ratio is not None and (ratio := self._ratio.value()) is not None:
            assert isinstance(self._rule, LevenbergMarquardt)
            self._ratio = None
            self._lambda = float(self._rule.updated(self._lambda, ratio))

    def _step_naturally(self, gradient: Vector) -> None:
        rates, momenta = self._settings("lr"), self._settings("momentum")
        largest = max((rates[p] for p in gradient), default=0.0)
        relative = {p: rates[p] / largest if largest else 0.0 for p in gradient}
        direction = {p: v.mul_(-relative[p]) for p, v in self._solved(gradient).items()}
        last = {p: self.state[p]["last_step"] for p in direction if "last_step" in self.state[p]}
        model = self._measured(gradient, direction, last)
        if self._adapts_steps:
            step, used = self._adapted(model, direction, last, largest)
        else:
            scale = self._clipping(model, gradient, direction, largest)
            step = {p: v.mul(scale * largest) for p, v in direction.items()}
            for p, v in last.items():
                step[p].add_(v, alpha=momenta[p])
            used = [scale * largest, momenta[next(iter(direction))]]
        if model is not None and self._adapts_damping:
            coefficients = (
                model.slopes.new_tensor([])
                if not used
                else torch.stack(
                    [
                        torch.as_tensor(c, dtype=model.slopes.dtype, device=model.slopes.device)
                        for c in used[: model.slopes.shape[1]]
                    ]
                )
            )
            first = torch.zeros(1, dtype=torch.long, device=model.slopes.device)
            self._ratio = Arriving(model.ratio(step, coefficients, first))
        self._take(step)

    def _measured(self, gradient: Vector, direction: Vector, last: Vector) -> StepModel | None:
        """Return the quadratic model of this step, if the batch was observed."""
        batch = self._batch
        if batch is None:
            return None
        if batch.gradient is None:
            raise RuntimeError(
                "the loss was not propagated back through the outputs that update_curvature got. Call it between the forward "
                "and the backward pass, with the outputs from which the loss is computed."
            )
        self._require(*batch.check())
        damping = self._lambda if self._adapts_damping else 0.0
        decays = self._settings("weight_decay")
        return StepModel(batch, self._names, gradient, [direction], last, damping, decays)

    def _adapted(self, model, direction, last, lr):
        if model is not None:
            self._coefficients = model.minimum()[0][0]
        if self._coefficients is None:
            raise RuntimeError("call update_curvature in the first step")
        c = self._coefficients
        step = {p: v.mul(c[0] * lr) for p, v in direction.items()}
        for p, v in last.items():
            step[p].add_(v * c[-1])
        return step, [c[0] * lr, c[-1]]

    def _clipping(self, model: StepModel | None, gradient: Vector, direction: Vector, lr: float) -> Tensor | float:
        """Return the factor that shortens the step so that ``ν = vᵀFv + λ‖v‖² ≤ C``."""
        if self._clip is None:
            return 1.0
        slope = -dot(gradient, direction)
        if model is not None:
            self._clip_ratio = model.curvature[0, 0, 0] / slope
        assert self._clip_ratio is not None
        size = lr**2 * self._clip_ratio * slope
        return torch.where(size > self._clip, (self._clip / size).sqrt(), 1.0)

    def _advice(self) -> str:
        if self._adapts_damping:
            return "Use a larger initial damping: damping=kl.damping.LevenbergMarquardt(initial=...), or a smaller lr."
        return "Use a smaller lr, a larger damping, or kl_clip."

    def _more_state(self) -> dict[str, Any]:
        return {
            "damping": self._lambda,
            "coefficients": self._coefficients,
            "clip_ratio": self._clip_ratio,
            "ratio": None if self._ratio is None else self._ratio.value(),
        }

    def _load_more_state(self, state: Mapping[str, Any]) -> None:
        self._lambda, self._coefficients = state["damping"], state["coefficients"]
        self._clip_ratio = state["clip_ratio"]
        self._ratio = None if state["ratio"] is None else Arriving(state["ratio"])
