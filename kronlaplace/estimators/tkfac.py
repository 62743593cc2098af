"""TKFAC: Kronecker factors that preserve the trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kronlaplace._arguments import Choice, choice
from kronlaplace.blocks import Block, KroneckerBlock, Sketch
from kronlaplace.blocks.eigendecomposition import trace
from kronlaplace.blocks.sketch import DEFAULT_SKETCH, checked_sketch
from kronlaplace.estimators.base import Estimator, State, kind_of
from kronlaplace.estimators.second_moments import add_pair_sums, add_row_sums, mean_factors, partial_traces, squeezed
from kronlaplace.estimators.sides import (
    CONSTANTS,
    add_rows,
    any_large,
    block_of_sums,
    check_not_sketched,
    is_large,
    no_start,
    shown,
)
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["TKFAC", "SpatialCorrelation", "trace_preserving_block"]


class SpatialCorrelation(Choice):
    """Assumption about the products ``g_t a_tᵀ`` at different positions.

    ``EXACT`` makes none, ``UNCORRELATED`` assumes that they are uncorrelated (TKFAC Assumption 4.1).
    """

    EXACT = "exact"
    UNCORRELATED = "uncorrelated"


@dataclass(frozen=True, repr=False)
class TKFAC(Estimator):
    """Trace-restricted K-FAC: ``A ∝ E[Σ ‖g‖² a aᵀ]`` and ``G ∝ E[Σ ‖a‖² g gᵀ]`` with unit traces (TKFAC Eq. 4.9).

    The ``scale`` is the trace ``δ`` of the block; on linear layers it is exactly the trace of the Fisher's block.

    Args:
        spatial: Rule for shared weights. ``"exact"`` (the default) is ``A ∝ E[XᵀX]``, ``G ∝ E[XXᵀ]`` with the full
            gradient ``X`` of the example, so that the trace is exact on every layer; this is the first half step of
            K-FOC. ``"uncorrelated"`` is the paper's Eq. 4.13, which takes positions one by one; its trace is that of the
            Fisher without the terms between positions.
        sketch: Which factors are so large that they are never formed, and what is kept of them instead; None forms all.
    """

    name: ClassVar[str] = "tkfac"
    constants: ClassVar[frozenset[str]] = CONSTANTS
    spatial: SpatialCorrelation | str = SpatialCorrelation.EXACT
    sketch: Sketch | None = DEFAULT_SKETCH

    def __repr__(self) -> str:
        return shown(self)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sketch", checked_sketch(self.sketch))
        object.__setattr__(self, "spatial", choice(SpatialCorrelation, self.spatial, "spatial"))

    def start(self, layer: Layer) -> State:
        return {}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        if any_large(layer, self.sketch):
            raise no_start(layer)
        return dict(partial_traces(kind_of(block, KroneckerBlock, layer), layer, weight))

    def only_squares(self, layer: Layer) -> bool:
        return is_large(layer, "gradient", self.sketch)

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        if any_large(gradients.layer, self.sketch):
            self._add_large(state, gradients)
            return
        if self.spatial is SpatialCorrelation.EXACT or gradients.once_per_example:
            add_pair_sums(state, gradients)
            return
        for part in gradients.parts(activations=True):
            a, g = part.activations().flatten(1, 2), part.gradients().flatten(1, 2)
            for key, u, v in (("activation", a, g), ("gradient", g, a)):
                gradients.layer.sum_of(state, key).baddbmm_((u * v.square().sum(2, keepdim=True)).mT, u)

    def _add_large(self, state: State, gradients: LayerGradients) -> None:
        """Add the sums of a layer of which a side is large, which has no groups."""
        layer, only_squares = gradients.layer, gradients.only_squares
        by_position = self.spatial is SpatialCorrelation.UNCORRELATED or only_squares or gradients.once_per_example
        for part in gradients.parts(activations=True):
            a, g = part.activations(), part.gradients()  # (1, N, T, p), (1, N, T, q)
            for side, u, v in (("activation", a, g), ("gradient", g, a)):
                others = u * v.square().sum(3, keepdim=True) if by_position else (v @ v.mT) @ u
                squares = only_squares and side == "gradient"
                rows = u.flatten(1, 2)
                add_rows(state, layer, side, rows, self.sketch, others=others.flatten(1, 2), only_squares=squares)

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        add_row_sums(state, batch)

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        if any_large(layer, self.sketch):
            return block_of_sums(state, layer, weight, unit_traces=True)
        return trace_preserving_block(state["gradient"], state["activation"], weight, layer.name)

    def peek(self, state: State, layer: Layer, weight: float) -> Block:
        if any_large(layer, self.sketch):
            return super().peek(state, layer, weight)
        return self.finish(state, layer, weight)  # the factors are new tensors

    def combine(self, first: Block, second: Block, weights: tuple[float, float]) -> Block:
        check_not_sketched(first, second)
        gradient, activation = mean_factors(first, second, weights, scaled_activation=True)
        return trace_preserving_block(gradient, activation, 1.0, first.name)


def trace_preserving_block(gradient: Tensor, activation: Tensor, weight: float, name: str) -> KroneckerBlock:
    """Return the block for the two partial traces ``Σ X Xᵀ`` and ``Σ Xᵀ X``, which have the same trace."""
    total = trace(activation)
    tiny = torch.finfo(total.dtype).tiny
    divisor = total.clamp_min(tiny).view(-1, 1, 1)
    other = trace(gradient).clamp_min(tiny).view(-1, 1, 1)
    return KroneckerBlock(squeezed(gradient / other), squeezed(activation / divisor), squeezed(total / weight), name)
