"""K-FAC, which is KFC on convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronlaplace._arguments import Choice, choice
from kronlaplace.blocks import Block, KroneckerBlock, Sketch
from kronlaplace.blocks.sketch import DEFAULT_SKETCH, checked_sketch
from kronlaplace.estimators.base import Estimator, State, kind_of
from kronlaplace.estimators.second_moments import factors_by_group, mean_factors, squeezed
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

__all__ = ["KFAC", "WeightSharing"]


class WeightSharing(Choice):
    """Treatment of positions that share weights: each by itself (``EXPAND``), or averaged first (``REDUCE``)."""

    EXPAND = "expand"
    REDUCE = "reduce"


@dataclass(frozen=True, repr=False)
class KFAC(Estimator):
    """Kronecker-factored approximate curvature (K-FAC Eq. 1), on shared weights by the rule of KFC (Eq. 30–32).

    The factors are ``A = E_n[Σ_t a_t a_tᵀ]`` and ``G = 1/T · E_n[Σ_v Σ_t g_t g_tᵀ]``, means over examples, with
    ``scale = 1``. On a plain linear layer ``T = 1``. If ``T`` differs between batches, each batch is weighted with its own
    ``1/T``.

    Padded tokens, where the network's ``attention_mask`` is zero, count neither in ``A`` nor in ``T``, which is then each
    example's own, in linear layers with inputs ``(N, T, p)`` that are called once per pass. In batches where a gradient
    reaches one of them, as from outputs whose targets are not ignored, all positions count.

    Args:
        weight_sharing: Treatment of the positions of shared weights outside convolutions (tokens, time steps):
            ``"expand"`` treats them like those of a convolution, ``"reduce"`` takes ``A = E[ā āᵀ]``,
            ``G = E[Σ_v g̅ g̅ᵀ]`` with ``ā`` the mean and ``g̅`` the sum over positions (Eschenhagen et al. 2023).
        sketch: Which factors are so large that they are never formed, and what is kept of them instead; None forms all.
    """

    name: ClassVar[str] = "kfac"
    constants: ClassVar[frozenset[str]] = CONSTANTS
    weight_sharing: WeightSharing | str = WeightSharing.EXPAND
    sketch: Sketch | None = DEFAULT_SKETCH

    def __repr__(self) -> str:
        return shown(self)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sketch", checked_sketch(self.sketch))
        object.__setattr__(self, "weight_sharing", choice(WeightSharing, self.weight_sharing, "weight_sharing"))

    def _reduces(self, layer: Layer) -> bool:
        return self.weight_sharing is WeightSharing.REDUCE and not layer.shares_weights_over_space

    def start(self, layer: Layer) -> State:
        return {}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        if any_large(layer, self.sketch):
            raise no_start(layer)
        block = kind_of(block, KroneckerBlock, layer)
        gradient, activation, scale = (t.to(layer.device, layer.dtype) for t in factors_by_group(block))
        return {"gradient": weight * scale * gradient, "activation": weight * activation}

    def only_squares(self, layer: Layer) -> bool:
        return is_large(layer, "gradient", self.sketch)

    def add_inputs(self, state: State, batch: LayerBatch) -> None:
        if self._reduces(batch.layer) or batch.mask is not None:
            return
        if is_large(batch.layer, "activation", self.sketch):
            add_rows(state, batch.layer, "activation", batch.moment_activations().flatten(1, 2), self.sketch)
        else:
            batch.add_activation_moment(state)

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        layer = gradients.layer
        if gradients.batch.mask is not None:
            self._add_masked(state, gradients, gradients.batch.mask)
        elif self._reduces(layer):
            state.setdefault("positions", gradients.positions)
            self._add_summed_rows(state, gradients, gradients.gradients())
        elif is_large(layer, "gradient", self.sketch):
            self._add_gradient_rows(state, gradients, gradients.gradients(), gradients.positions)
        else:
            gradients.add_gradient_moment(layer.sum_of(state, "gradient"))

    def _add_gradient_rows(
        self, sums: dict[str, Any], gradients: LayerGradients, g: Tensor, positions: Tensor | int
    ) -> None:
        """Add the gradients at all positions, ``1/T · Σ_t g_t g_tᵀ``."""
        rows = (g / positions**0.5).flatten(1, 2)
        only_squares = gradients.only_squares
        add_rows(sums, gradients.layer, "gradient", rows, self.sketch, only_squares=only_squares)

    def _add_summed_rows(self, sums: dict[str, Any], gradients: LayerGradients, g: Tensor) -> None:
        """Add the sums of the gradients over all positions, which are uncorrelated if only squares are meant."""
        only_squares = gradients.only_squares
        rows = g.square().sum(2).sqrt() if only_squares else g.sum(2)
        add_rows(sums, gradients.layer, "gradient", rows, self.sketch, only_squares=only_squares)

    def _add_masked(self, state: State, gradients: LayerGradients, mask: Tensor) -> None:
        """Add the gradients of one direction of a batch with padded positions, which may turn out to count."""
        g = gradients.gradients()
        reached = (g.ne(0).any(-1).any(0) & ~mask).any()
        state["reached"] = state["reached"] | reached if "reached" in state else reached
        if self._reduces(gradients.layer):
            self._add_summed_rows(state, gradients, g)
            return
        for key, counted in (("without", mask), ("with", torch.ones_like(mask))):
            self._add_gradient_rows(state.setdefault(key, {}), gradients, g, _numbers(counted, g))

    def _end_masked(self, state: State, batch: LayerBatch, mask: Tensor) -> None:
        """Add the inputs of the positions that count, and the gradients with their number."""
        reached = state.pop("reached")
        mask = mask | reached
        a = batch.activations() * mask.unsqueeze(-1)
        if self._reduces(batch.layer):
            a = a.sum(2) / _numbers(mask, a).squeeze(2)
        else:
            a = a.flatten(1, 2)
            counted, all_of_them = state.pop("without"), state.pop("with")
            for name, sums in counted.items():
                total = sums if name in CONSTANTS else torch.where(reached, all_of_them[name], sums)
                state[name] = total if name in CONSTANTS or name not in state else state[name].add_(total)
        add_rows(state, batch.layer, "activation", a, self.sketch)

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        if "reached" in state and batch.mask is not None:
            self._end_masked(state, batch, batch.mask)
            return
        positions = state.pop("positions", None)
        if positions is not None:
            add_rows(state, batch.layer, "activation", batch.activations().sum(2) / positions, self.sketch)

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        if any_large(layer, self.sketch):
            return block_of_sums(state, layer, weight)
        # In place: the factors of a wide layer are the largest tensors in a pass.
        activation = layer.activation_moment(state).div_(weight)
        return KroneckerBlock(squeezed(state["gradient"].div_(weight)), squeezed(activation), name=layer.name)

    def peek(self, state: State, layer: Layer, weight: float) -> Block:
        if any_large(layer, self.sketch):
            return super().peek(state, layer, weight)
        activation = layer.activation_moment(dict(state)) / weight
        return KroneckerBlock(squeezed(state["gradient"] / weight), squeezed(activation), name=layer.name)

    def combine(self, first: Block, second: Block, weights: tuple[float, float]) -> Block:
        check_not_sketched(first, second)
        gradient, activation = mean_factors(first, second, weights, scaled_activation=False)
        return KroneckerBlock(squeezed(gradient), squeezed(activation), name=first.name)


def _numbers(mask: Tensor, like: Tensor) -> Tensor:
    """Return the number of positions of each example that count, shape ``(N, 1, 1)``, at least 1."""
    return mask.sum(1).clamp(min=1).to(like.dtype)[:, None, None]
