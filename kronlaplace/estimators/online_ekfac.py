"""EKFAC for training: second moments of the gradients in an eigenbasis that is renewed from time to time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kronlaplace._dense import check_size
from kronlaplace.blocks import Block, EigenBlock, KroneckerBlock
from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.rotated_squares import add_pending_squares, add_rotated_squares
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["OnlineEKFAC"]

_BASES = ("gradient basis", "activation basis")


@dataclass(frozen=True)
class OnlineEKFAC(Estimator):
    """EKFAC in one pass, as in training (George et al. 2018, Algorithm 1).

    The sums of ``basis`` go on all the time, and `refresh` takes the eigenbasis from them; in between, the second moments
    ``λ_ij = E[(Q_Gᵀ X Q_A)_ij²]`` go on in that basis. The first refresh starts them from the eigenvalues of the Kronecker
    product, with the weight of all data so far; each later one takes over the diagonal in the new basis of the matrix that
    they stood for, so that the moving average goes on. Before the first refresh the block is that of ``basis``.

    Args:
        basis: Estimator of the Kronecker factors, with one pass.
    """

    name: ClassVar[str] = "ekfac"
    basis: Estimator

    def start(self, layer: Layer) -> State:
        check_size(
            max(layer.shape[0] // layer.groups, layer.shape[1]), f"EKFAC of layer {layer.name!r} needs an eigenbasis"
        )
        return {"basis": self.basis.start(layer)}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        return {"basis": self.basis.state_from(block, layer, weight)}

    def add_inputs(self, state: State, batch: LayerBatch) -> None:
        self.basis.add_inputs(state["basis"], batch)

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        self.basis.add_gradients(state["basis"], gradients)
        if "values" in state:
            add_rotated_squares(state, gradients)

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        self.basis.end_batch(state["basis"], batch)
        add_pending_squares(state, batch)

    def refresh(self, state: State, layer: Layer, weight: float) -> State:
        block = self.basis.peek(state["basis"], layer, weight)
        assert isinstance(block, KroneckerBlock)
        gradient, activation = (basis.full().contiguous() for basis in block.bases())
        if "values" in state:
            rotations = (state[key].mT @ new for key, new in zip(_BASES, (gradient, activation), strict=True))
            of_gradient, of_activation = (rotation.square_() for rotation in rotations)
            values = of_gradient.mT @ state["values"] @ of_activation
        else:
            values = weight * block.eigenvalues().view(layer.groups, -1, layer.shape[1]).to(layer.dtype)
        return {"basis": state["basis"], "gradient basis": gradient, "activation basis": activation, "values": values}

    def merge(self, state: State, other: State) -> State:
        """Return the state of both data sets together.

        Raises:
            ValueError: If their second moments are in different bases.
        """
        merged = {**state, "basis": self.basis.merge(state["basis"], other["basis"])}
        if "values" in state or "values" in other:
            if not all(key in state and key in other and torch.equal(state[key], other[key]) for key in _BASES):
                raise ValueError(
                    "the second moments of EKFAC in different bases cannot be added. Merge accumulations that were copies "
                    "of one another at the last refresh."
                )
            merged["values"] = state["values"] + other["values"]
        return merged

    def decay(self, state: State, factor: float) -> None:
        self.basis.decay(state["basis"], factor)
        if "values" in state:
            state["values"].mul_(factor)

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        if "values" not in state:
            return self.basis.finish(state["basis"], layer, weight)
        values = state["values"].flatten(0, 1) / weight
        return EigenBlock(state["gradient basis"], state["activation basis"], values, layer.name)

    def peek(self, state: State, layer: Layer, weight: float) -> Block:
        if "values" not in state:
            return self.basis.peek(state["basis"], layer, weight)
        return self.finish(state, layer, weight)  # its eigenvalues are new tensors, and nothing changes the bases

    def to_plain(self, state: State) -> dict[str, Any]:
        moments = {key: value for key, value in state.items() if key != "basis"}
        return {"basis": self.basis.to_plain(state["basis"]), **super().to_plain(moments)}

    def from_plain(self, saved: Mapping[str, Any], layer: Layer) -> State:
        moments = {key: value for key, value in saved.items() if key != "basis"}
        return {"basis": self.basis.from_plain(saved["basis"], layer), **super().from_plain(moments, layer)}
