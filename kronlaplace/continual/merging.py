"""Sums of the blocks of several tasks, kept exactly or as fewer blocks. All of them are sums over data.

A new block is only merged with blocks of its own kind, so that what is kept is positive semidefinite, always.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronlaplace.blocks import Block, DenseBlock, DiagonalBlock, EigenBlock, KroneckerBlock
from kronlaplace.blocks.base import two_sided
from kronlaplace.blocks.eigendecomposition import eigendecompose, trace
from kronlaplace.continual.options import Merge
from kronlaplace.estimators.kfoc.nearest import merged_to
from kronlaplace.estimators.second_moments import factors_by_group, squeezed

__all__ = ["added", "merged", "with_block"]


@torch.no_grad()
def with_block(kept: Sequence[Block], new: Block, merge: Merge, rank: int) -> tuple[Block, ...]:
    """Return the blocks to keep for the sum of those that were kept and a new one.

    Args:
        kept: What was kept of earlier tasks.
        new: The block of a new task, of the same shape.
        merge: What becomes of Kronecker products, and of blocks in a Kronecker eigenbasis.
        rank: Number of products to keep with ``"kfoc"``.

    Raises:
        NotImplementedError: If blocks of this kind cannot be merged in this way.
    """
    same = [block for block in kept if _mergeable(block, new)]
    others = [block for block in kept if not _mergeable(block, new)]
    return *others, *merged([*same, new], merge, rank)


def merged(blocks: Sequence[Block], merge: Merge, rank: int) -> list[Block]:
    """Return as many blocks as are to be kept for the sum of blocks of one kind.

    Raises:
        NotImplementedError: As `with_block`.
    """
    first = blocks[0]
    if isinstance(first, (DiagonalBlock, DenseBlock)):
        return [added(blocks)]
    if merge is Merge.SUM:
        return list(blocks)
    if merge is Merge.KFOC:
        products = [block for block in blocks if isinstance(block, KroneckerBlock)]
        if len(products) == len(blocks):
            return list(merged_to(products, rank))
    elif isinstance(first, (KroneckerBlock, EigenBlock)):
        if len(blocks) == 1:
            return [first]
        return [_marginal_product(blocks) if isinstance(first, KroneckerBlock) else _in_common_basis(blocks)]
    ways_out = ' or merge="factors"' if isinstance(first, EigenBlock) else ""
    raise NotImplementedError(
        f"the {first.kind} blocks of layer {first.name!r} cannot be merged by merge={merge.value!r}, which takes Kronecker "
        f'products. Use merge="sum"{ways_out}, or kl.KFAC(), kl.TKFAC() or kl.KFOC().'
    )


def added(blocks: Sequence[Block]) -> Block:
    """Return the sum of diagonal or dense blocks as one."""
    first = blocks[0]
    total: Block
    if all(isinstance(block, DiagonalBlock) for block in blocks):
        values = [block.values for block in blocks if isinstance(block, DiagonalBlock)]
        total = DiagonalBlock(torch.stack(values).sum(0), first.name)
    else:
        dense = first.to_dense().clone()
        for block in blocks[1:]:
            dense += block.to_dense()
        total = DenseBlock(dense, first.shape, name=first.name)
    total.shares_weights_over_space = first.shares_weights_over_space
    return total


def _mergeable(block: Block, other: Block) -> bool:
    """Return whether two blocks are of one kind, with the same groups of rows."""
    if type(block) is not type(other):
        return False
    one, two = ([t.shape for t in b.to_tensors().values() if t.ndim > 1] for b in (block, other))
    return one == two


def _marginal_product(blocks: Sequence[Block]) -> KroneckerBlock:
    """Return the Kronecker product with the trace and both partial traces of the sum.

    The partial traces of ``Σ_t s_t G_t ⊗ A_t`` are ``M_G = Σ s_t tr(A_t) G_t`` and ``M_A = Σ s_t tr(G_t) A_t``, both with
    its trace ``τ``, and the product is ``M_G ⊗ M_A / τ``. So the factors are averages of the tasks' factors of unit trace,
    weighted by the traces of the tasks' blocks. The order of the tasks does not matter.
    """
    gradient_sum: Tensor | None = None
    activation_sum: Tensor | None = None
    total: Tensor | None = None
    for block in blocks:
        assert isinstance(block, KroneckerBlock)
        gradient, activation, scale = factors_by_group(block)
        traces = [trace(factor).view(-1, 1, 1) for factor in (gradient, activation)]
        parts = scale * traces[1] * gradient, scale * traces[0] * activation, scale * traces[0] * traces[1]
        gradient_sum = parts[0] if gradient_sum is None else gradient_sum + parts[0]
        activation_sum = parts[1] if activation_sum is None else activation_sum + parts[1]
        total = parts[2] if total is None else total + parts[2]
    assert gradient_sum is not None and activation_sum is not None and total is not None
    safe = total.clamp_min(torch.finfo(total.dtype).tiny)
    first = blocks[0]
    assert isinstance(first, KroneckerBlock)
    factors = gradient_sum / safe, activation_sum / safe
    if first.gradient_factor.ndim == 2:
        result = KroneckerBlock(squeezed(factors[0]), squeezed(factors[1]), total[0, 0, 0], first.name)
    else:
        result = KroneckerBlock(*factors, total[:, 0, 0], first.name)
    result.shares_weights_over_space = first.shares_weights_over_space
    return result


def _in_common_basis(blocks: Sequence[Block]) -> EigenBlock:
    """Return the sum of blocks in Kronecker eigenbases in one such basis, without what is not diagonal in it.

    The basis is that of the sum's partial traces. The trace is that of the sum.
    """
    parts = [block for block in blocks if isinstance(block, EigenBlock)]
    groups = len(parts[0].gradient_basis)
    moments: list[Tensor] = []
    for side, axis in ((0, 2), (1, 1)):
        total = None
        for block in parts:
            basis, values = block.bases()[side].vectors, block.values.unflatten(0, (groups, -1)).sum(axis)
            moment = (basis * values.unsqueeze(1)) @ basis.mT
            total = moment if total is None else total + moment
        assert total is not None
        moments.append(total)
    name = parts[0].name
    named = [(f"the partial traces of layer {name!r}", matrix) for moment in moments for matrix in moment]
    vectors = [part.vectors for part in eigendecompose(named)]
    new = [torch.stack(vectors[:groups]), torch.stack(vectors[groups:])]
    values = torch.zeros_like(parts[0].values)
    for block in parts:
        turns = [(basis.mT @ old.vectors).square() for basis, old in zip(new, block.bases(), strict=True)]
        values += two_sided(turns[0], block.values, turns[1].mT)
    result = EigenBlock(new[0], new[1], values, name)
    result.shares_weights_over_space = parts[0].shares_weights_over_space
    return result
