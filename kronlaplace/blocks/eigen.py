"""Blocks that are diagonal in a Kronecker eigenbasis."""

from __future__ import annotations

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks.base import RotatedBlock, ValuesBlock, shown_size
from kronlaplace.blocks.basis import Basis

__all__ = ["EigenBlock"]


class EigenBlock(ValuesBlock, RotatedBlock):
    """A block ``(Q_G ⊗ Q_A) diag(λ) (Q_G ⊗ Q_A)ᵀ``: a Kronecker eigenbasis with unrestricted eigenvalues (EKFAC).

    Args:
        gradient_basis: The orthogonal ``Q_G``, shape ``(K, q/K, q/K)``, for ``K`` groups of rows (1 for most layers).
        activation_basis: The orthogonal ``Q_A``, shape ``(K, p, p)``.
        values: The nonnegative ``λ``, shape ``(q, p)``.
        name: The layer's name, for errors.
    """

    kind = "eigen"

    def __init__(self, gradient_basis: Tensor, activation_basis: Tensor, values: Tensor, name: str = "block") -> None:
        super().__init__(values, name)
        self.gradient_basis = gradient_basis
        self.activation_basis = activation_basis

    def __repr__(self) -> str:
        return f"EigenBlock({self.name!r}, {shown_size(self.values)} eigenvalues)"

    def bases(self) -> tuple[Basis, Basis]:
        return Basis(self.gradient_basis), Basis(self.activation_basis)

    def matmul(self, matrices: Tensor) -> Tensor:
        return self.from_eigenbasis(self.values * self.to_eigenbasis(matrices))

    @in_full_precision
    def to_dense(self) -> Tensor:
        parts = zip(
            self.gradient_basis, self.activation_basis, self.values.chunk(len(self.gradient_basis)), strict=True
        )
        dense = []
        for gradient, activation, values in parts:
            basis = torch.kron(gradient.contiguous(), activation.contiguous())
            dense.append((basis * values.flatten()) @ basis.T)
        return torch.block_diag(*dense)

    def scaled(self, factor: Tensor | float) -> EigenBlock:
        block = EigenBlock(self.gradient_basis, self.activation_basis, self.values * factor, self.name)
        block._take_layer_facts(self, factor)
        return block

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "gradient_basis": self.gradient_basis,
            "activation_basis": self.activation_basis,
            "values": self.values,
        }
