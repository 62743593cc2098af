"""Diagonal blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kronlaplace.blocks.base import ValuesBlock, shown_size

__all__ = ["DiagonalBlock"]

_CHUNK = 2**18
"""Numbers that are converted to float64 at a time."""


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

    def parts(self) -> Iterator[Tensor]:
        """Yield ``λ`` in float64, some rows at a time: a whole copy of a large table may be larger than the network."""
        for rows in self.values.split(max(1, _CHUNK // max(self.shape[1], 1))):
            yield rows.double()

    def to_eigenbasis(self, matrices: Tensor) -> Tensor:
        return matrices

    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        return matrices

    def diagonal_of(self, weights: Tensor) -> Tensor:
        return weights

    def _tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}
