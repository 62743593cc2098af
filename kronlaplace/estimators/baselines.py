"""Baselines: the diagonal of the Fisher's block, and the block itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kronlaplace._arguments import positive_integer
from kronlaplace.blocks import Block, DenseBlock, DiagonalBlock
from kronlaplace.estimators.base import Estimator, State, kind_of, weighted_mean
from kronlaplace.layers import Layer, LayerGradients

__all__ = ["Diagonal", "ExactBlock"]


@dataclass(frozen=True)
class Diagonal(Estimator):
    """Exact diagonal of each block, ``E[Σ_v X ∘ X]``."""

    name: ClassVar[str] = "diagonal"
    for_any_layer: ClassVar[bool] = True

    def start(self, layer: Layer) -> State:
        return {"values": torch.zeros(layer.shape, dtype=layer.dtype, device=layer.device)}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        return {"values": weight * kind_of(block, DiagonalBlock, layer).values.to(layer.device, layer.dtype)}

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        gradients.add_squared_weight_gradients(state["values"])

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        return DiagonalBlock(state["values"].div_(weight), layer.name)

    def peek(self, state: State, layer: Layer, weight: float) -> Block:
        return DiagonalBlock(state["values"] / weight, layer.name)

    def combine(self, first: Block, second: Block, weights: tuple[float, float]) -> Block:
        assert isinstance(first, DiagonalBlock) and isinstance(second, DiagonalBlock)
        return DiagonalBlock(weighted_mean(first.values, second.values, weights), first.name)


@dataclass(frozen=True)
class ExactBlock(Estimator):
    """Exact block ``E[Σ_v vec(X) vec(X)ᵀ]``, the ground truth for small layers.

    Args:
        max_size: Maximum number of parameters of a layer; the memory of a block grows with the square of that number.

    Raises:
        ValueError: If a layer is larger, before any work is done; the message gives the memory that its block would take.
    """

    name: ClassVar[str] = "exact"
    for_any_layer: ClassVar[bool] = True
    max_size: int = 5000

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_size", positive_integer(self.max_size, "max_size"))

    def start(self, layer: Layer) -> State:
        q, p = layer.shape
        size = q * p
        if size > self.max_size:
            memory = size**2 * torch.finfo(layer.dtype).bits / 8 / 2**30
            raise ValueError(
                f"the exact block of layer {layer.name!r} is a matrix of {size} x {size} numbers and would take "
                f"{memory:.1f} GiB; ExactBlock allows up to max_size={self.max_size} parameters. Leave the layer out with "
                f"layers=[...], use a Kronecker estimator such as KFOC(), or pass ExactBlock(max_size={size})."
            )
        return {"matrix": torch.zeros(size, size, dtype=layer.dtype, device=layer.device)}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        return {"matrix": weight * kind_of(block, DenseBlock, layer).to_dense().to(layer.device, layer.dtype)}

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        for part in gradients.parts():
            x = part.vectors()
            state["matrix"].addmm_(x.T, x)

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        return DenseBlock(state["matrix"].div_(weight), layer.shape, name=layer.name)

    def combine(self, first: Block, second: Block, weights: tuple[float, float]) -> Block:
        return DenseBlock(weighted_mean(first.to_dense(), second.to_dense(), weights), first.shape, name=first.name)
