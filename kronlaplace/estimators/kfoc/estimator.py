"""K-FOC: the Kronecker product nearest to the Fisher in Frobenius norm.

The rearranged Fisher is an operator from the space of activation factors to that of gradient factors,
``A ↦ Σ_n X_n A X_nᵀ``; the best ``G ⊗ A`` is its leading singular pair (K-FOC Lemma 3.2). Each way of merging batches is an
estimator in its own file, and `KFOC` chooses among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from kronlaplace._arguments import choice, positive_integer, positive_number, seed_number
from kronlaplace.blocks import Block
from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.kfoc.approximate import Approximate
from kronlaplace.estimators.kfoc.full import Full
from kronlaplace.estimators.kfoc.online import OnlineSweeps
from kronlaplace.estimators.kfoc.options import Aggregation, Initialization, UnitFactor
from kronlaplace.estimators.kfoc.power_iteration import PowerIteration
from kronlaplace.estimators.kfoc.running import Running
from kronlaplace.estimators.kfoc.sweeps import Sweeps
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["KFOC"]


@dataclass(frozen=True)
class KFOC(Estimator):
    """Kronecker-factored optimal curvature (K-FOC Algorithms 1 and 2).

    Both factors are positive semidefinite: the power iteration stays in that cone if it starts there. For shared weights,
    the terms between positions are kept (Eq. 13–15).

    Args:
        aggregation: How batches are merged, see `Aggregation`. ``"sweeps"`` (the default) came within one percent of the
            optimum after two passes over the data on all networks measured, and a third pass closes the gap; it needs no
            power iteration per batch and never waits for the device. ``"running"`` and ``"approx"`` are the paper's
            methods, with one pass over the data.
        rank: Number of terms of the running sum (``"running"`` only); the paper uses 1, and 8 is close to the optimum. Each
            batch adds its best pair. With ``rank > 1``, small batches (at most ``4 · rank`` examples) of layers that use
            the weights once per example instead add all of their examples, which are held until there are up to
            ``4 · rank`` of them, and then the sum is cut to ``rank`` terms again.
        unit_factor: Factor of a batch that has unit norm before factors are averaged (``"approx"`` only), see
            `UnitFactor`. The unit factors of all batches have the same weight in the average, however small the gradients;
            only batches without any gradient are excluded. (The paper prints the sum of the unit factors instead of their
            average, but the sum would grow with the number of batches.)
        sweeps: Number of passes over the data (``"sweeps"`` only). One sweep is `TKFAC` with ``spatial="exact"``.
        max_iter: Maximum number of power iteration steps per batch (for all data in ``"full"``).
        tol: Relative error of the factors at which the iteration stops (in single precision it may stop at about 1e-4,
            where the captured norm has converged up to rounding). In ``"full"``, the ground truth, it continues until the
            relative residual of the singular pair is below ``tol²``.
        init: Starting point of the iteration.
        seed: Seed for ``init="normal"``.

    Raises:
        ValueError: For values out of range, or if ``rank``, ``sweeps``, ``unit_factor`` or ``init`` would have no effect.
    """

    name: ClassVar[str] = "kfoc"
    not_combinable: ClassVar[str] = (
        "the Kronecker product nearest to the Fisher of all data depends on more than the Kronecker products nearest to "
        "the Fishers of the parts"
    )
    aggregation: Aggregation | str = Aggregation.SWEEPS
    rank: int = 1
    sweeps: int = 2
    max_iter: int = 100
    tol: float = 1e-5
    init: Initialization | str = Initialization.IDENTITY
    seed: int = 0
    unit_factor: UnitFactor | str = UnitFactor.GRADIENT

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregation", choice(Aggregation, self.aggregation, "aggregation"))
        object.__setattr__(self, "init", choice(Initialization, self.init, "init"))
        for key in ("rank", "sweeps", "max_iter"):
            object.__setattr__(self, key, positive_integer(getattr(self, key), key))
        object.__setattr__(self, "tol", positive_number(self.tol, "tol"))
        object.__setattr__(self, "seed", seed_number(self.seed))
        object.__setattr__(self, "unit_factor", choice(UnitFactor, self.unit_factor, "unit_factor"))
        for key, default, where in (
            ("rank", 1, Aggregation.RUNNING),
            ("sweeps", 2, Aggregation.SWEEPS),
            ("unit_factor", UnitFactor.GRADIENT, Aggregation.APPROX),
        ):
            if getattr(self, key) != default and self.aggregation is not where:
                raise ValueError(
                    f'{key}={getattr(self, key)!r} only applies when aggregation="{where.value}" '
                    f"(got aggregation={self.aggregation!r})."
                )
        if self.aggregation is Aggregation.SWEEPS and self.init is not Initialization.IDENTITY:
            raise ValueError(
                'init="normal" only applies to the power iteration of a batch; aggregation="sweeps" does not have one.'
            )

    @cached_property
    def _rule(self) -> Estimator:
        """Estimator that merges batches in the requested way."""
        if self.aggregation is Aggregation.SWEEPS:
            return Sweeps(self.sweeps)
        iteration = PowerIteration(self.max_iter, self.tol, Initialization(self.init), self.seed)
        if self.aggregation is Aggregation.RUNNING:
            return Running(iteration, self.rank)
        if self.aggregation is Aggregation.APPROX:
            return Approximate(iteration, UnitFactor(self.unit_factor))
        return Full(iteration)

    @property
    def passes(self) -> int:
        return self._rule.passes

    def online(self) -> Estimator:
        if self.aggregation is Aggregation.FULL:
            raise self._not_online("it keeps all examples")
        return OnlineSweeps() if self.passes > 1 else self

    def start(self, layer: Layer) -> State:
        return self._rule.start(layer)

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        return self._rule.state_from(block, layer, weight)

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        self._rule.add_gradients(state, gradients)

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        self._rule.end_batch(state, batch)

    def merge(self, state: State, other: State) -> State:
        return self._rule.merge(state, other)

    def decay(self, state: State, factor: float) -> None:
        self._rule.decay(state, factor)

    def next_pass(self, state: State, layer: Layer, weight: float) -> State:
        return self._rule.next_pass(state, layer, weight)

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        return self._rule.finish(state, layer, weight)

    def peek(self, state: State, layer: Layer, weight: float) -> Block:
        return self._rule.peek(state, layer, weight)

    def to_plain(self, state: State) -> dict[str, Any]:
        return self._rule.to_plain(state)

    def from_plain(self, saved: Mapping[str, Any], layer: Layer) -> State:
        return self._rule.from_plain(saved, layer)
