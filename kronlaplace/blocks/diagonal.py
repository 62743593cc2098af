"""Diagonal blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from kronlaplace.blocks.base import ValuesBlock, shown_size

__all__ = ["DiagonalBlock"]


class DiagonalBlock(ValuesBlock):
    """A diagonal block ``diag(λ)``.

    Args:
        values: The nonnegative ``λ``, as a ``(q, p)`` matrix.
        name: The layer's name, for errors.
    """

    kind = "diagonal"

    def __repr__(self) -> str:
        return f"DiagonalBlock({self.name!r}, {shown_size(self.values)})"

    def matmul(self, matrices: Tensor) -> Tensor:
        return self.values * matrices

    def to_dense(self) -> Tensor:
        return torch.diag(self.values.flatten())

    def scaled(self, factor: Tensor | float) -> DiagonalBlock:
        block = DiagonalBlock(self.values * factor, self.name)
        block._take_layer_facts(self, factor)
        return block

    def to_eigenbasis(self, matrices: Tensor) -> Tensor:
        return matrices

    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        return matrices

    def diagonal_of(self, weights: Tensor) -> Tensor:
        return weights

    def _tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}
