"""K-FAC, and KFC on convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kronlaplace.estimators.base import Estimator, State
from kronlaplace.kronecker import KroneckerBlock
from kronlaplace.layers import Layer

__all__ = ["KFAC"]


@dataclass(frozen=True)
class KFAC(Estimator):
    """Kronecker-factored approximate curvature (K-FAC Eq. 1), on shared weights by the rule of KFC (Eq. 30–32).

    ``A = E_n[Σ_t a_t a_tᵀ]`` and ``G = 1/T · E_n[Σ_v Σ_t g_t g_tᵀ]``, means over examples, ``scale = 1``. On a plain
    linear layer ``T = 1``. If ``T`` differs between batches, each batch is weighted with its own ``1/T``.
    """

    name: ClassVar[str] = "kfac"

    def start(self, layer: Layer) -> State:
        q, p = layer.shape
        weight = next(layer.module.parameters(recurse=False))
        return {
            "activation": torch.zeros(p, p, dtype=layer.dtype, device=weight.device),
            "gradient": torch.zeros(q, q, dtype=layer.dtype, device=weight.device),
        }

    def add_inputs(self, state: State, layer: Layer, x: Tensor) -> None:
        layer.add_activation_moment(x, state["activation"])

    def add_gradients(self, state: State, layer: Layer, x: Tensor, grad: Tensor) -> None:
        layer.add_gradient_moment(grad, state["gradient"])

    def finish(self, state: State, layer: Layer, n_examples: int) -> KroneckerBlock:
        # In place: the factors of a wide layer are larger than all else in a pass.
        return KroneckerBlock(
            state["gradient"].div_(n_examples), state["activation"].div_(n_examples), scale=1.0, name=layer.name
        )
