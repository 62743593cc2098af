"""K-FOC by averaging the factors of batches as if they were independent (K-FOC §3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.kfoc.kept_examples import joined, kept_examples
from kronlaplace.estimators.kfoc.options import UnitFactor
from kronlaplace.estimators.kfoc.power_iteration import PowerIteration, made_psd
from kronlaplace.estimators.kfoc.truncation import factors_of
from kronlaplace.estimators.second_moments import squeezed
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["Approximate"]

_SUMS = ("activation", "gradient", "batches")


@dataclass(frozen=True)
class Approximate(Estimator):
    """K-FOC by separate averages of the factors of the batches' best Kronecker products.

    Args:
        iteration: Power iteration for each batch.
        unit_factor: Factor of a batch that has unit norm.
    """

    name: ClassVar[str] = "kfoc"
    iteration: PowerIteration
    unit_factor: UnitFactor

    def start(self, layer: Layer) -> State:
        return {"batch": []}

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        state["batch"].append(kept_examples(gradients))

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        examples = joined(state["batch"], same_inputs=True)
        state["batch"] = []
        size, gradient, activation = self.iteration.leading_triple(examples, factors_of(batch.layer.name))
        present = (size > 0).to(activation.dtype).view(-1, 1, 1)
        size = size.to(activation.dtype).view(-1, 1, 1)
        if self.unit_factor is UnitFactor.GRADIENT:
            activation = size * activation
        else:
            gradient = size * gradient
        for key, value in zip(_SUMS, (activation, gradient, present), strict=True):
            state[key] = state[key] + value if key in state else value

    def decay(self, state: State, factor: float) -> None:
        for key in _SUMS:
            if key in state:
                state[key] = state[key] * factor

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        gradient, activation = state["gradient"], state["activation"]
        count = state["batches"].clamp_min(torch.finfo(gradient.dtype).tiny)  # if zero, so are the factors
        if self.unit_factor is UnitFactor.GRADIENT:
            gradient = gradient / count
        else:
            activation = activation / count
        name = factors_of(layer.name)
        gradient, activation = made_psd(gradient, name), made_psd(activation, name)
        return KroneckerBlock(squeezed(gradient / weight), squeezed(activation), name=layer.name)
