"""`AdaptiveKFAC`: K-FAC with step sizes that adapt, as its authors trained with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace._arguments import positive_integer
from kronlaplace._wrappers import unwrapped
from kronlaplace.blocks import Block
from kronlaplace.damping import Damping, LevenbergMarquardt
from kronlaplace.data.arriving import Arriving
from kronlaplace.estimators import Estimator
from kronlaplace.likelihoods import Likelihood, Sampling
from kronlaplace.optim.base import CurvatureOptimizer
from kronlaplace.optim.batch_model import BatchModel
from kronlaplace.optim.checks import check_setting, fraction_of_batch
from kronlaplace.optim.parameters import PlainSGD, step_plainly
from kronlaplace.optim.part import Part
from kronlaplace.optim.preconditioner import Amount, InverseInProgress
from kronlaplace.optim.step_model import StepModel
from kronlaplace.optim.structure import Structure
from kronlaplace.optim.vectors import Vector, combine
from kronlaplace.priors.penalty import QuadraticPenalty

__all__ = ["AdaptiveKFAC"]

_FIRST_STEPS = 3
"""Number of steps at the beginning in each of which the inverse is renewed."""


class AdaptiveKFAC(CurvatureOptimizer):
    """K-FAC whose step sizes, momentum and dampings all adapt (Martens and Grosse 2015; KFC appendix A.2).

    No learning rate has to be chosen. Each step is ``δ = αΔ + μδ₀``, from the preconditioned gradient ``Δ = −F̂(γ)⁻¹∇h`` and
    the last step ``δ₀``, where ``α`` and ``μ`` minimize the quadratic model ``M(δ) = h + ∇hᵀδ + ½ δᵀ(F + (λ + η)I)δ`` with
    the exact Fisher ``F`` of part of the batch (Eq. 36). The two dampings adapt on their own:

    - ``λ``, that of the model, by the Levenberg-Marquardt rule from the reduction ratio ``ρ`` (Eq. 37 and 38), which is
      measured on the same part of the batch, without targets;
    - ``γ``, that of the factors, every few steps: of three candidates the one with the lowest ``M(δ)``.

    ``γ`` is K-FAC's, which is added to each factor, ``(A + πγ I) ⊗ (G + γ/π I)``; in terms of the dampings of this package,
    this is ``FactoredTikhonov(damping=γ**2)``. It starts at ``√(λ + η)``, so that it contains the weight decay.

    The loss is the mean over examples of the negative log-likelihood, as for `NaturalGradient`.

        >>> optimizer = kl.AdaptiveKFAC(model, "classification")  # doctest: +SKIP
        >>> optimizer.zero_grad()                                 # doctest: +SKIP
        >>> outputs = model(x)                                    # doctest: +SKIP
        >>> optimizer.update_curvature(outputs)                   # doctest: +SKIP
        >>> loss_function(outputs, y).backward()                  # doctest: +SKIP
        >>> optimizer.step()                                      # doctest: +SKIP

    The defaults are the constants of the long version of the K-FAC paper. It also lets batches grow (`GrowingBatches`) and
    evaluates an average of the iterates (`IterateAverage` with a timescale of 99.5).

    Args:
        model: The network.
        likelihood: The likelihood whose mean negative log-likelihood the loss is.
        params: Parameters or parameter groups to train; None means all trainable ones. Groups may have their own ``lr`` and
            ``weight_decay``. All parameters of a layer must be in one group.
        lr: Factor of the steps, for schedules; 1 is the minimum of the model.
        damping: The rule that adapts ``λ`` every ``T₁`` steps, and its start. The paper's 150 is for autoencoders whose loss
            is hundreds of nats; ``LevenbergMarquardt()`` starts at the curvature along the first gradient, whatever the
            loss. The rule's own ``damping`` is the strategy that damps the factors, given ``γ²``.
        weight_decay: ``η``, the factor of ``½‖θ‖²`` in the objective.
        momentum: Whether the last step is part of the next one.
        estimator: Estimator of the blocks, as for `NaturalGradient`.
        structure: ``"block-diagonal"``, or ``"block-tridiagonal"`` for chains of linear layers (K-FAC section 3.3).
        adapt_factors_every: Number of steps (``T₂``) between two choices of ``γ``.
        factor_decay: Factor (``ω₂``) by which the candidates for ``γ`` differ.
        invert_every: Number of steps (``T₃``) between two inversions, which also happen in each of the first three steps.
        ema_decay: Largest decay ``ξ`` of the moving averages; after ``k`` batches it is ``min(1 − 1/k, ξ)``.
        curvature_fraction: Fraction of the batch for the factors.
        model_fraction: Fraction of the batch for the quadratic model and the reduction ratio.
        sampling: Where the labels of the Fisher come from.
        mc_samples: Number of labels that are drawn for each example.
        layers: Names or patterns of the modules that get a block; None means all.
        others: ``"diagonal"`` or `PlainSGD`: the rule for parameters without a Kronecker block. `PlainSGD` steps with
            momentum 0.9.
        prior: A penalty that is part of the loss, as for `NaturalGradient`.
        seed: Seed of the draws.

    Raises:
        TypeError, ValueError: If an argument is not allowed, or the model has no layer with a block.
        NotImplementedError: If a module cannot have a block.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        *,
        params: Any = None,
        lr: float = 1.0,
        damping: LevenbergMarquardt = LevenbergMarquardt(initial=150.0),  # noqa: B008 - it is frozen
        weight_decay: float = 1e-5,
        momentum: bool = True,
        estimator: Estimator | str = "kfac",
        structure: Structure | str = "block-diagonal",
        adapt_factors_every: int = 20,
        factor_decay: float = (19 / 20) ** 10,
        invert_every: int = 20,
        ema_decay: float = 0.95,
        curvature_fraction: float = 1 / 4,
        model_fraction: float = 1 / 8,
        sampling: Sampling | str = "mc",
        mc_samples: int = 1,
        layers: Sequence[str] | str | None = None,
        others: str | PlainSGD = "diagonal",
        prior: QuadraticPenalty | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(damping, LevenbergMarquardt):
            raise TypeError(
                f"damping must be the rule that adapts it, such as kl.damping.LevenbergMarquardt(initial=150.0), got "
                f"{damping!r}. For a fixed damping, use NaturalGradient."
            )
        if not 0 < factor_decay < 1:
            raise ValueError(f"factor_decay must be between 0 and 1, got {factor_decay!r}.")
        check_setting("weight_decay", weight_decay)
        check_setting("lr", lr)
        self._rule = damping
        self._adapt_factors_every = positive_integer(adapt_factors_every, "adapt_factors_every")
        self._factor_decay = factor_decay
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._lambda, self._gamma = math.nan, math.nan
        if damping.initial is not None:
            self._start(damping.initial)
        self._ratio: Arriving | None = None
        self._candidates: list[tuple[float, InverseInProgress]] = []
        self._choice: Arriving | None = None
        super().__init__(
            unwrapped(model),
            likelihood,
            params=params,
            defaults={"lr": lr, "weight_decay": weight_decay, "momentum": 0.9, "natural": True},
            layers=layers,
            others=others,
            estimator=estimator,
            structure=structure,
            sampling=sampling,
            mc_samples=mc_samples,
            curvature_every=1,
            invert_every=invert_every,
            ema_decay=ema_decay,
            curvature_part=Part(fraction_of_batch(curvature_fraction, "curvature_fraction")),
            model_part=Part(fraction_of_batch(model_fraction, "model_fraction")),
            invert_async=False,
            prior=prior,
            seed=seed,
        )

    @property
    def damping(self) -> float:
        """The damping ``λ`` of the quadratic model; NaN before the first step if the rule has no start."""
        return self._lambda

    @property
    def factor_damping(self) -> float:
        """The damping ``γ`` of the factors; NaN before the first step if the rule has no start."""
        return self._gamma

    def _needs_batch(self) -> bool:
        return True

    def _damping(self) -> Damping:
        return self._rule.damping(self._gamma**2)

    def _inversion(self, damping: Damping) -> Callable[[], InverseInProgress]:
        return self._inversion_of(*self._blocks_and_added(), damping)

    def _blocks_and_added(self) -> tuple[dict[str, Block], Mapping[str, Amount]]:
        return self._objective_blocks(dict.fromkeys(self._layers, 0.0))  # γ contains the weight decay

    def _inversion_of(
        self, blocks: Mapping[str, Block], added: Mapping[str, Amount], damping: Damping
    ) -> Callable[[], InverseInProgress]:
        return self._structure.inversion(self._curvature.accumulation, blocks, damping, added)

    def _start(self, damping: float) -> None:
        self._lambda, self._gamma = float(damping), math.sqrt(damping + self._weight_decay)

    def _make_step(self) -> None:
        gradient = self._gradient()
        batch = self._required_batch()
        if math.isnan(self._lambda):
            self._start(self._curvature_along(gradient))
        self._adapt()
        self._choose()
        if self._steps < _FIRST_STEPS:
            self._last_inversion = None
        if self._steps and self._steps % self._adapt_factors_every == 0:
            self._renewal.swap()
            self._try_factor_dampings()
        else:
            self._renew()
        if gradient:
            self._take(self._best_step(gradient, batch))
        step_plainly(self.param_groups, self.state, self._checks.finite)

    def _adapt(self) -> None:
        """Change ``λ`` by the last reduction ratio, as soon as it is there."""
        if self._ratio is not None and (ratio := self._ratio.value()) is not None:
            self._ratio = None
            self._lambda = float(self._rule.updated(self._lambda, ratio))

    def _try_factor_dampings(self) -> None:
        """Begin the inverses for the candidates of ``γ``, of the blocks as they are now."""
        (blocks, added), self._choice = self._blocks_and_added(), None
        gammas = (self._gamma, self._gamma * self._factor_decay, self._gamma / self._factor_decay)
        self._candidates = [
            (gamma, self._inversion_of(blocks, added, self._rule.damping(gamma**2))()) for gamma in gammas
        ]

    def _choose(self) -> None:
        """Keep the best candidate for ``γ``, as soon as it is known on the host; all are solved with until then."""
        if self._choice is not None and (number := self._choice.value()) is not None:
            self._gamma, inverse = self._candidates[int(number)]
            self._renewal.restore(inverse.settle())
            self._candidates, self._choice = [], None

    def _best_step(self, gradient: Vector, batch: BatchModel) -> Vector:
        """Return the step with the lowest quadratic model."""
        current, tried = self._renewal.inverse, [inverse for _, inverse in self._candidates]
        assert current is not None
        tries = bool(tried) and all(inverse.ready() for inverse in tried)
        inverses = [inverse.settle() for inverse in tried] if tries else [current]
        directions = [{p: v.neg() for p, v in self._solved(gradient, one).items()} for one in inverses]
        last = {p: self.state[p]["last_step"] for p in directions[0] if self._momentum and "last_step" in self.state[p]}
        decays = self._settings("weight_decay")
        model = StepModel(
            batch, self._names, gradient, directions, last, self._lambda, decays, len(self._passes), self._penalty
        )
        self._checks.require(*batch.check())
        coefficients, lowest = model.minimum()
        if tries and self._choice is None:
            self._choice = Arriving(lowest)
        best = coefficients.index_select(0, lowest).squeeze(0)
        step = {p: _chosen([d[p] for d in directions], lowest) for p in directions[0]}
        combine(step, last, best)
        self._choose()
        if (self._steps + 1) % self._rule.every == 0:
            self._ratio = Arriving(model.ratio(step, best, lowest))
        rates = self._settings("lr")
        return step if all(rates[p] == 1 for p in step) else {p: v * rates[p] for p, v in step.items()}

    def _advice(self) -> str:
        return (
            "If training has diverged, start with a larger damping, damping=kl.damping.LevenbergMarquardt(initial=...), or "
            "use larger batches or a larger model_fraction."
        )

    def state_dict(self) -> dict[str, Any]:
        while self._choice is not None:  # it is on its way from the device
            self._choose()
        return super().state_dict()

    def _more_state(self) -> dict[str, Any]:
        return {
            "damping": self._lambda,
            "factor_damping": self._gamma,
            "ratio": None if self._ratio is None else self._ratio.value(),
        }

    def _load_more_state(self, state: Mapping[str, Any]) -> None:
        self._lambda, self._gamma = state["damping"], state["factor_damping"]
        self._ratio = None if state["ratio"] is None else Arriving(state["ratio"])
        self._candidates, self._choice = [], None


def _chosen(parts: Sequence[Tensor], number: Tensor) -> Tensor:
    """Return one of several tensors by its number on the device."""
    return parts[0] if len(parts) == 1 else torch.stack([*parts]).index_select(0, number).squeeze(0)
