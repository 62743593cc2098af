"""EKFAC: a Kronecker eigenbasis with the exact second moments of the gradient in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kronlaplace._dense import check_size
from kronlaplace.blocks import Block, EigenBlock, KroneckerBlock
from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.kfac import KFAC
from kronlaplace.estimators.online_ekfac import OnlineEKFAC
from kronlaplace.estimators.rotated_squares import add_pending_squares, add_rotated_squares
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["EKFAC"]


@dataclass(frozen=True)
class EKFAC(Estimator):
    """Eigenvalue-corrected K-FAC (George et al. 2018): ``λ_ij = E[(Q_Gᵀ X Q_A)_ij²]`` in the eigenbasis of ``basis``.

    It needs one more pass over the data than ``basis``. Its trace equals that of the Fisher, and its error is never larger
    than that of the Kronecker factors from which the basis comes.

    Args:
        basis: Estimator of the Kronecker factors, such as ``KFAC()``, ``TKFAC()`` or ``KFOC()``.

    Raises:
        TypeError: If ``basis`` does not make Kronecker factors.
    """

    name: ClassVar[str] = "ekfac"
    not_combinable: ClassVar[str] = (
        "its eigenvalues refer to the eigenbasis of their own data, and they are different in the eigenbasis of all data"
    )
    constants: ClassVar[frozenset[str]] = frozenset({"gradient basis", "activation basis"})
    basis: Estimator = field(default_factory=KFAC)

    def __post_init__(self) -> None:
        if not isinstance(self.basis, Estimator) or self.basis.for_any_layer or isinstance(self.basis, EKFAC):
            raise TypeError(
                f"basis must be an estimator of Kronecker factors, such as KFAC() or KFOC(); got {self.basis!r}."
            )

    @property
    def passes(self) -> int:
        return self.basis.passes + 1

    def online(self) -> Estimator:
        return OnlineEKFAC(self.basis.online())

    def start(self, layer: Layer) -> State:
        check_size(
            max(layer.shape[0] // layer.groups, layer.shape[1]), f"EKFAC of layer {layer.name!r} needs an eigenbasis"
        )
        return {"basis": self.basis.start(layer), "passes": 1}

    def add_inputs(self, state: State, batch: LayerBatch) -> None:
        if "basis" in state:
            self.basis.add_inputs(state["basis"], batch)

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        if "basis" in state:
            self.basis.add_gradients(state["basis"], gradients)
        else:
            add_rotated_squares(state, gradients)

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        if "basis" in state:
            self.basis.end_batch(state["basis"], batch)
        else:
            add_pending_squares(state, batch)

    def merge(self, state: State, other: State) -> State:
        if "basis" in state:
            return {"basis": self.basis.merge(state["basis"], other["basis"]), "passes": state["passes"]}
        return super().merge(state, other)

    def decay(self, state: State, factor: float) -> None:
        if "basis" in state:
            self.basis.decay(state["basis"], factor)
        else:
            super().decay(state, factor)

    def to_plain(self, state: State) -> dict[str, Any]:
        if "basis" not in state:
            return super().to_plain(state)
        return {**state, "basis": self.basis.to_plain(state["basis"])}

    def from_plain(self, saved: Mapping[str, Any], layer: Layer) -> State:
        if "basis" not in saved:
            return super().from_plain(saved, layer)
        return {**saved, "basis": self.basis.from_plain(saved["basis"], layer)}

    def next_pass(self, state: State, layer: Layer, weight: float) -> State:
        if state["passes"] < self.basis.passes:
            return {"basis": self.basis.next_pass(state["basis"], layer, weight), "passes": state["passes"] + 1}
        block = self.basis.finish(state["basis"], layer, weight)
        assert isinstance(block, KroneckerBlock)
        gradient, activation = block.bases()
        (q, p), groups = layer.shape, layer.groups
        values = torch.zeros(groups, q // groups, p, dtype=layer.dtype, device=layer.device)
        return {
            "gradient basis": gradient.full().contiguous(),
            "activation basis": activation.full().contiguous(),
            "values": values,
        }

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        values = state["values"].flatten(0, 1).div_(weight)
        return EigenBlock(state["gradient basis"], state["activation basis"], values, layer.name)
