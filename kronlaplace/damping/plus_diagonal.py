"""A block plus a separate number for every weight."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from kronlaplace.blocks import Block, DenseBlock, DiagonalBlock, RotatedBlock
from kronlaplace.blocks.eigendecomposition import Eigen, eigendecompose_symmetric
from kronlaplace.damping.inverse import DampedInverse

__all__ = ["LARGEST_DENSE", "PlusDiagonal"]

LARGEST_DENSE = 2048
"""Maximum number of weights of a block that is made dense so that each weight can have its own damping."""


class PlusDiagonal:
    """Sum ``c F + diag(d)`` for a block ``F``, with one entry of ``d`` per weight.

    It is exact for diagonal and dense blocks, and for all others of up to `LARGEST_DENSE` weights, which become dense.
    Larger Kronecker and EKFAC blocks keep their eigenbasis ``U``, and the diagonal of ``Uᵀ diag(d) U`` is added to their
    eigenvalues: this is the nearest matrix in Frobenius norm with that basis, exact if all ``d`` are equal, and its
    determinant is never too small (Hadamard).

    Args:
        block: Block ``F``.
    """

    def __init__(self, block: Block) -> None:
        self._block = block

    @property
    def exact(self) -> bool:
        """Whether the sum is exact."""
        return isinstance(self._block, (DiagonalBlock, DenseBlock)) or math.prod(self._block.shape) <= LARGEST_DENSE

    def damped(self, diagonal: Tensor) -> DampedInverse:
        """Return the inverse for ``c = 1`` and positive ``d`` of shape ``(q, p)``."""
        block = self._block
        diagonal = diagonal.to(block.device, torch.float64)
        if isinstance(block, DiagonalBlock):
            return DampedInverse(block, block.eigenvalues() + diagonal)
        if not self.exact:
            return DampedInverse(block, self._projected(1.0, diagonal))
        name = f"the damped block of layer {block.name!r}"
        values, vectors, _ = eigendecompose_symmetric([(name, self._dense + torch.diag(diagonal.flatten()))])[0]
        values = values.clamp_min(diagonal.detach().min())  # a lower bound up to rounding
        basis = DenseBlock(self._dense.to(block.dtype), block.shape, name=block.name)
        basis.adopt([Eigen(values, vectors.to(block.dtype))])
        return DampedInverse(basis, values.unflatten(0, block.shape))

    def logdet(self, scale: Tensor, diagonal: Tensor) -> Tensor:
        """Compute ``log det (c F + diag(d))``, 0-dim, float64, differentiable in ``c`` and ``d``.

        No eigendecomposition is needed.
        """
        if isinstance(self._block, DiagonalBlock):
            return (scale * self._block.eigenvalues() + diagonal).log().sum()
        if not self.exact:
            return self._block.total(self._projected(scale, diagonal).log())
        matrix = scale * self._dense + torch.diag(diagonal.flatten())
        root, failed = torch.linalg.cholesky_ex(matrix)
        pivots = root.diagonal()
        if failed or pivots.min() < 1e-6 * pivots.max():  # the smallest ones have lost most of their digits to rounding
            stacked = torch.cat([scale.sqrt() * self._root, torch.diag(diagonal.flatten().sqrt())])
            pivots = torch.linalg.qr(stacked).R.diagonal().abs()
        return 2 * pivots.log().sum()

    def _projected(self, scale: Tensor | float, diagonal: Tensor) -> Tensor:
        """Return the diagonal of ``Uᵀ (c F + diag(d)) U``, in the shape of the block's eigenvalues, float64."""
        assert isinstance(self._block, RotatedBlock)
        projected = self._block.projected_diagonal(diagonal.to(self._block.dtype)).double()
        return scale * self._block.eigenvalues() + projected

    @cached_property
    def _basis(self) -> Tensor:
        """Eigenbasis ``U`` as a float64 matrix, shape ``(q·p, q·p)``."""
        block = self._block
        if isinstance(block, RotatedBlock):
            parts = zip(*(basis.full().double() for basis in block.bases()), strict=True)
            return torch.block_diag(*(torch.kron(g.contiguous(), a.contiguous()) for g, a in parts))
        assert isinstance(block, DenseBlock)
        return block.eigen().vectors.double()

    @property
    def _root(self) -> Tensor:
        """Root ``R`` with ``Rᵀ R = F``, float64."""
        return self._eigenvalues.sqrt().unsqueeze(1) * self._basis.T

    @cached_property
    def _dense(self) -> Tensor:
        """Matrix ``F`` in float64, positive semidefinite up to float64 rounding, whatever the block's dtype."""
        return (self._basis * self._eigenvalues) @ self._basis.T

    @property
    def _eigenvalues(self) -> Tensor:
        """All eigenvalues of ``F``, shape ``(q·p,)``."""
        return self._block.expand(self._block.eigenvalues()).flatten()
