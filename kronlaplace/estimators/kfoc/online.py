"""K-FOC by one step of the power iteration per batch, from the factors so far: for training, at the price of TKFAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.blocks.eigendecomposition import trace
from kronlaplace.estimators.base import Estimator, State, kind_of
from kronlaplace.estimators.second_moments import add_pair_sums, add_row_sums, factors_by_group, frobenius, squeezed
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["OnlineSweeps"]

_KEYS = ("activation", "gradient")


@dataclass(frozen=True)
class OnlineSweeps(Estimator):
    """K-FOC with a power iteration that goes on from batch to batch, one step with each (K-FOC Algorithm 1).

    With the unit factors ``g`` and ``a`` so far, a batch adds ``R a = Σ X a Xᵀ`` to ``U`` and ``Rᵀ g = Σ Xᵀ g X`` to ``V``,
    where ``R`` is its rearranged Fisher; then ``g = U/‖U‖`` and ``a = V/‖V‖``. They begin with the multiples of the
    identity. The block ``U ⊗ V / Σ gᵀ R a`` has the same inner product with ``g ⊗ a`` as the Fisher: after one batch it is
    TKFAC's, and if all batches are equal it converges to the best Kronecker product. No step waits for the device.
    """

    name: ClassVar[str] = "kfoc"
    constants: ClassVar[frozenset[str]] = frozenset({"unit activation", "unit gradient"})

    def start(self, layer: Layer) -> State:
        return {}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        gradient, activation, scale = (
            t.to(layer.device, layer.dtype) for t in factors_by_group(kind_of(block, KroneckerBlock, layer))
        )
        lengths = frobenius(gradient), frobenius(activation)
        state: State = {
            "gradient": weight * scale * lengths[1] * gradient,
            "activation": weight * scale * lengths[0] * activation,
            "inner": weight * scale * lengths[0] * lengths[1],
        }
        _renew(state)
        return state

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        add_pair_sums(state, gradients, state.get("unit activation"), state.get("unit gradient"))

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        add_row_sums(state, batch)
        gradient = state["gradient"]
        if "inner" in state:
            state["inner"] += _inner(state["unit gradient"], gradient) - state.pop("before")
        else:  # the first batch was multiplied by the identity, which is not of unit norm
            gradient /= state["activation"].shape[-1] ** 0.5
            size = gradient.shape[-1] ** 0.5
            state["activation"] /= size
            state["inner"] = trace(gradient).view(-1, 1, 1) / size
        _renew(state)

    def merge(self, state: State, other: State) -> State:
        if "inner" not in state or "inner" not in other:
            return state if "inner" in state else other
        merged = {key: state[key] + other[key] for key in (*_KEYS, "inner")}
        _renew(merged)
        return merged

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        gradient, activation, inner = state["gradient"], state["activation"], state["inner"]
        tiny = torch.finfo(gradient.dtype).tiny
        sizes = trace(gradient).view(-1, 1, 1), trace(activation).view(-1, 1, 1)
        scale = sizes[0] / inner.clamp_min(tiny) * (sizes[1] / weight)
        gradient, activation = gradient / sizes[0].clamp_min(tiny), activation / sizes[1].clamp_min(tiny)
        return KroneckerBlock(squeezed(gradient), squeezed(activation), squeezed(scale[:, 0, 0]), layer.name)

    def peek(self, state: State, layer: Layer, weight: float) -> Block:
        return self.finish(state, layer, weight)  # the factors are new tensors


def _renew(state: State) -> None:
    """Set the unit factors to those of the sums so far, and note the inner product with which the next batch begins.

    Without any gradient so far, as below a layer of zeros, they are multiples of the identity.
    """
    for key in _KEYS:
        total = state[key]
        size = total.shape[-1]
        length = frobenius(total, torch.float64).to(total.dtype)
        identity = torch.eye(size, dtype=total.dtype, device=total.device) / size**0.5
        state[f"unit {key}"] = torch.where(
            length > 0, total / length.clamp_min(torch.finfo(total.dtype).tiny), identity
        )
    state["before"] = _inner(state["unit gradient"], state["gradient"])


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner products of matrices ``(K, n, n)``, shape ``(K, 1, 1)``."""
    return (first * second).sum((1, 2), keepdim=True)
