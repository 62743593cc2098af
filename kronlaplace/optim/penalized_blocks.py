"""A Fisher block plus the curvature of a penalty, as one block of the Fisher's kind, for a preconditioner.

| Fisher block | the penalty's blocks are added | |
| --- | --- | --- |
| `DiagonalBlock` | by their diagonals | exact if they are diagonal |
| `DenseBlock` | densely | exact |
| `KroneckerBlock` | as products: the nearest product to the sum (K-FOC Eq. 10) | exact if products share a factor |
| `EigenBlock` | as products: their diagonals in the Fisher's eigenbasis | exact if they share the basis |

A block that is no product counts as the product with its partial traces, ``M_G ⊗ M_A / τ``. Everything stays positive
semidefinite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks import Block, DenseBlock, DiagonalBlock, EigenBlock, KroneckerBlock
from kronlaplace.estimators.kfoc.nearest import nearest_kronecker
from kronlaplace.estimators.second_moments import factors_by_group, squeezed

__all__ = ["penalized"]


@torch.no_grad()
@in_full_precision
def penalized(block: Block, terms: Sequence[Block]) -> Block:
    """Return ``F + Σ_i Λ_i`` as one block.

    Args:
        block: The Fisher block ``F``.
        terms: The penalty's blocks ``Λ_i`` of the same shape, on the same device.

    Raises:
        NotImplementedError: If the Fisher block is of a kind of the user's own.
    """
    if not terms:
        return block
    result: Block
    if isinstance(block, DiagonalBlock):
        result = DiagonalBlock(block.values + torch.stack([_diagonal(term) for term in terms]).sum(0), block.name)
    elif isinstance(block, DenseBlock):
        dense = block.to_dense() + torch.stack([term.to_dense() for term in terms]).sum(0)
        result = DenseBlock(dense, block.shape, name=block.name)
    elif isinstance(block, KroneckerBlock):
        groups, ndim = len(factors_by_group(block)[0]), block.gradient_factor.ndim
        result = nearest_kronecker([block, *(_as_product(term, groups, ndim) for term in terms)])
    elif isinstance(block, EigenBlock):
        bases = block.gradient_basis, block.activation_basis
        added = [_in_basis(bases, _as_product(term, len(bases[0]), 3)) for term in terms]
        result = EigenBlock(*bases, block.values + torch.stack(added).sum(0), block.name)
    else:
        raise NotImplementedError(
            f"the curvature of a prior cannot be added to the {block.kind} block of layer {block.name!r}. Use one of the "
            'library\'s estimators, such as estimator="kfac".'
        )
    result.shares_weights_over_space = block.shares_weights_over_space
    return result


def _diagonal(block: Block) -> Tensor:
    """Return a block's diagonal, ``(q, p)``."""
    if isinstance(block, DiagonalBlock):
        return block.values
    if isinstance(block, KroneckerBlock):
        gradient, activation, scale = factors_by_group(block)
        diagonals = [factor.diagonal(dim1=-2, dim2=-1) for factor in (gradient, activation)]
        return (scale * diagonals[0].unsqueeze(2) * diagonals[1].unsqueeze(1)).flatten(0, 1)
    return block.diagonal_of(block.eigenvalues().to(block.dtype))


def _as_product(block: Block, groups: int, ndim: int) -> KroneckerBlock:
    """Return the Kronecker product with a block's partial traces, for each group of rows; a product itself."""
    if isinstance(block, KroneckerBlock) and len(factors_by_group(block)[0]) == groups:
        return block
    q, p = block.shape
    rows = q // groups
    if isinstance(block, DiagonalBlock):
        values = block.values.unflatten(0, (groups, rows))
        sums = torch.diag_embed(values.sum(2)), torch.diag_embed(values.sum(1))
    elif isinstance(block, EigenBlock) and len(block.gradient_basis) == groups:
        values = block.eigenvalues().to(block.dtype).unflatten(0, (groups, rows))
        parts = (block.gradient_basis, values.sum(2)), (block.activation_basis, values.sum(1))
        gradient, activation = ((basis * sizes.unsqueeze(1)) @ basis.mT for basis, sizes in parts)
        sums = gradient, activation
    else:
        dense = block.to_dense().view(groups, rows, p, groups, rows, p)
        sums = torch.einsum("kiakja->kij", dense), torch.einsum("kiakib->kab", dense)
    total = sums[0].diagonal(dim1=-2, dim2=-1).sum(-1)
    scale = torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 0.0)
    if ndim == 2:
        return KroneckerBlock(squeezed(sums[0]), squeezed(sums[1]), scale[0], block.name)
    return KroneckerBlock(*sums, scale, block.name)


def _in_basis(bases: tuple[Tensor, Tensor], block: KroneckerBlock) -> Tensor:
    """Return the diagonal of ``Uᵀ (s G ⊗ A) U``, ``(q, p)``."""
    gradient, activation, scale = factors_by_group(block)
    diagonals = [(basis * (factor @ basis)).sum(1) for basis, factor in zip(bases, (gradient, activation), strict=True)]
    return (scale * diagonals[0].unsqueeze(2) * diagonals[1].unsqueeze(1)).flatten(0, 1)
