"""K-FOC over all examples at once, which are kept: the ground truth for the other methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.kfoc.kept_examples import from_tensors, joined, kept_examples
from kronlaplace.estimators.kfoc.power_iteration import PowerIteration, made_psd
from kronlaplace.estimators.kfoc.truncation import factors_of
from kronlaplace.estimators.second_moments import squeezed
from kronlaplace.layers import Layer, LayerGradients

__all__ = ["Full"]


@dataclass(frozen=True)
class Full(Estimator):
    """K-FOC from all examples, which are kept until their best Kronecker product is found at the end.

    Args:
        iteration: Power iteration, which continues until the relative residual of the singular pair is below ``tol²``.
    """

    name: ClassVar[str] = "kfoc"
    iteration: PowerIteration

    def start(self, layer: Layer) -> State:
        return {"examples": []}

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        state["examples"].append(kept_examples(gradients).copied())  # the loader may reuse the memory of its batches

    def decay(self, state: State, factor: float) -> None:
        state["examples"] = [examples.scaled(factor) for examples in state["examples"]]

    def to_plain(self, state: State) -> dict[str, Any]:
        return super().to_plain({"examples": [examples.tensors() for examples in state["examples"]]})

    def from_plain(self, saved: Mapping[str, Any], layer: Layer) -> State:
        return {"examples": [from_tensors(some) for some in super().from_plain(saved, layer)["examples"]]}

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        name = factors_of(layer.name)
        examples = joined(state["examples"], same_inputs=False)
        size, gradient, activation = self.iteration.to_rounding(examples, name)
        gradient = size.to(gradient.dtype).view(-1, 1, 1) * gradient
        gradient, activation = made_psd(gradient, name), made_psd(activation, name)
        return KroneckerBlock(squeezed(gradient / weight), squeezed(activation), name=layer.name)
