"""Blocks without structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks.base import Block, decompose, shown_size
from kronlaplace.blocks.eigendecomposition import Eigen, Named

__all__ = ["DenseBlock"]


class DenseBlock(Block):
    """Any symmetric positive semidefinite matrix.

    Args:
        matrix: The matrix, shape ``(q·p, q·p)``.
        shape: The shape ``(q, p)`` of the matrices on which the block acts.
        scale: A factor in front, as a 0-dim tensor or a number.
        name: The layer's name, for errors.
    """

    kind = "dense"

    def __init__(
        self, matrix: Tensor, shape: tuple[int, int], scale: Tensor | float = 1.0, name: str = "block"
    ) -> None:
        super().__init__(name)
        self.matrix = matrix
        self.scale = torch.as_tensor(scale, dtype=matrix.dtype, device=matrix.device)
        self._shape = shape
        self._eigen: Eigen | None = None

    def __repr__(self) -> str:
        return f"DenseBlock({self.name!r}, {shown_size(self.matrix)})"

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @in_full_precision
    def matmul(self, matrices: Tensor) -> Tensor:
        return self.scale * (matrices.flatten(-2) @ self.matrix).unflatten(-1, self._shape)

    def to_dense(self) -> Tensor:
        return self.scale * self.matrix

    def trace(self) -> Tensor:
        return self.scale * self.matrix.trace()

    def frobenius_norm(self) -> Tensor:
        return self.scale.abs() * torch.linalg.norm(self.matrix)

    def scaled(self, factor: Tensor | float) -> DenseBlock:
        block = DenseBlock(self.matrix, self._shape, self.scale * factor, self.name)
        block._take_layer_facts(self, factor)
        block._eigen = self._eigen
        return block

    def undecomposed(self) -> list[Named]:
        return [] if self._eigen is not None else [(f"the block of layer {self.name!r}", self.matrix)]

    def adopt(self, parts: Sequence[Eigen]) -> None:
        (self._eigen,) = parts

    def eigen(self) -> Eigen:
        """Return the eigendecomposition, which is computed once."""
        if self._eigen is None:
            decompose([self])
        assert self._eigen is not None
        return self._eigen

    def unresolved(self) -> Tensor:
        unresolved = self.eigen().unresolved
        assert unresolved is not None
        return (self.scale.double() * unresolved).detach()

    def eigenvalues(self) -> Tensor:
        return (self.scale.double() * self.eigen().values.double()).unflatten(0, self._shape)

    @in_full_precision
    def to_eigenbasis(self, matrices: Tensor) -> Tensor:
        return (matrices.flatten(-2) @ self.eigen().vectors).unflatten(-1, self._shape)

    @in_full_precision
    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        return (matrices.flatten(-2) @ self.eigen().vectors.T).unflatten(-1, self._shape)

    @in_full_precision
    def diagonal_of(self, weights: Tensor) -> Tensor:
        return (self.eigen().vectors.square() @ weights.flatten()).unflatten(0, self._shape)

    def _tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix, "scale": self.scale, "shape": torch.tensor(self._shape)}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> DenseBlock:
        q, p = tensors["shape"].tolist()
        return cls(tensors["matrix"], (q, p), tensors["scale"], name)
