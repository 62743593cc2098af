"""Sums of finished Kronecker products, replaced by fewer: the nearest ones, or positive semidefinite ones.

Rearranged, ``Σ_i s_i G_i ⊗ A_i`` is a matrix of rank ``m``, and the nearest sum of ``r`` products consists of its ``r``
leading singular triples (K-FOC Eq. 10, Algorithm 1; Van Loan and Pitsianis 1993). The first of them is positive semidefinite
if all products are. The others are not, and neither is the sum of the first ``r > 1`` in general: where the whole sum has
little curvature, the truncation can have negative curvature. So what must stay positive semidefinite, such as a penalty, is
merged pair by pair instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, overload

import torch
from torch import Tensor

from kronlaplace._arguments import positive_integer
from kronlaplace.blocks import KroneckerBlock
from kronlaplace.estimators.kfoc.truncation import Terms, concatenated, terms_of, truncated

__all__ = ["merged_to", "nearest_kronecker"]


@overload
def nearest_kronecker(blocks: Sequence[KroneckerBlock], rank: Literal[1] = 1) -> KroneckerBlock: ...
@overload
def nearest_kronecker(blocks: Sequence[KroneckerBlock], rank: int) -> KroneckerBlock | list[KroneckerBlock]: ...
@torch.no_grad()
def nearest_kronecker(blocks: Sequence[KroneckerBlock], rank: int = 1) -> KroneckerBlock | list[KroneckerBlock]:
    """Return the Kronecker product nearest to a sum of Kronecker products in Frobenius norm, or the nearest sum of several.

    There is no iteration: the problem of ``m`` products is one of ``m x m`` matrices (K-FOC Eq. 10, with the limit of
    Algorithm 1). For layers with groups of rows it is solved for each group.

    Args:
        blocks: Kronecker products of one shape, with as many groups of rows. Blocks are means over examples: multiply each
            by its number of examples (`Block.scaled`) for a sum over data.
        rank: Number of products in the result.

    Returns:
        With ``rank=1`` a block, both of whose factors are positive semidefinite if those of all ``blocks`` are, of unit
        Frobenius norm. Otherwise a list of ``rank`` blocks (of ``m``, if there are fewer) in descending order of their
        scales, whose sum is the nearest. They are orthogonal to one another; those after the first are indefinite, and
        even their sum can have small negative eigenvalues.

    Raises:
        TypeError: If ``blocks`` are not Kronecker blocks, or ``rank`` is not an integer.
        ValueError: If there are none, their shapes differ, or ``rank`` is less than 1.
    """
    rank = positive_integer(rank, "rank")
    blocks = _checked(blocks)
    terms = concatenated([terms_of(block) for block in blocks])
    found = truncated(terms, [], min(rank, len(blocks)), f"layer {blocks[0].name!r}")
    results = _blocks(found, blocks[0])
    return results[0] if rank == 1 else results


@torch.no_grad()
def merged_to(blocks: Sequence[KroneckerBlock], rank: int) -> list[KroneckerBlock]:
    """Merge a sum of positive semidefinite Kronecker products to at most ``rank``, all of them positive semidefinite.

    As long as there are too many, the two are merged, by the product nearest to their sum, for which that loses the least
    in Frobenius norm. For ``rank=1`` and two blocks this is `nearest_kronecker`.

    Args:
        blocks: Kronecker products of one shape.
        rank: Number of products to keep, at least 1.
    """
    blocks = list(blocks)
    while len(blocks) > rank:
        i, j = _cheapest_pair(concatenated([terms_of(block) for block in _checked(blocks)]))
        pair = nearest_kronecker([blocks[i], blocks[j]])
        blocks = [*(block for k, block in enumerate(blocks) if k not in (i, j)), pair]
    return blocks


def _cheapest_pair(terms: Terms) -> tuple[int, int]:
    """Return the two terms with the least distance between their sum and the product nearest to it.

    The rearranged sum of two terms has two singular values. Their squares have the sum ``s² + t² + 2 s t g a`` and the
    product ``s² t² (1 − g²)(1 − a²)``, for sizes ``s``, ``t`` and inner products ``g``, ``a`` of the factors. The smaller
    one is what is lost.
    """
    gradients, activations = (factors.double().flatten(2) for factors in (terms.gradients, terms.activations))
    g, a = ((some @ some.mT).clamp(0, 1) for some in (gradients, activations))  # (K, m, m)
    s, t = terms.sizes.unsqueeze(2), terms.sizes.unsqueeze(1)
    total = s.square() + t.square() + 2 * s * t * g * a
    product = (s * t).square() * (1 - g.square()) * (1 - a.square())
    root = (total.square() - 4 * product).clamp_min(0).sqrt()
    lost = (2 * product / (total + root).clamp_min(torch.finfo(total.dtype).tiny)).sum(0).tolist()
    return min(combinations(range(len(lost)), 2), key=lambda pair: lost[pair[0]][pair[1]])


def _checked(blocks: Sequence[KroneckerBlock]) -> list[KroneckerBlock]:
    """Check that there are blocks, that they are Kronecker products, and that their factors have the same shapes."""
    if isinstance(blocks, KroneckerBlock) or not isinstance(blocks, Sequence):
        raise TypeError(f"blocks must be a list of Kronecker blocks, got a {type(blocks).__name__}.")
    if not blocks:
        raise ValueError("there are no blocks; give at least one.")
    for block in blocks:
        if not isinstance(block, KroneckerBlock):
            raise TypeError(
                f"blocks must be Kronecker products (kl.KroneckerBlock), got a {type(block).__name__}. Those of kl.KFAC, "
                "kl.TKFAC and kl.KFOC are; diagonal and dense blocks simply add up."
            )
        shapes = [(b.gradient_factor.shape, b.activation_factor.shape) for b in (blocks[0], block)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"blocks must have factors of the same shapes; got {shapes[0]} and {shapes[1]}.")
    return list(blocks)


def _blocks(terms: Terms, like: KroneckerBlock) -> list[KroneckerBlock]:
    """Return each term as a block of the layer of another one."""
    results = []
    for i in range(terms.sizes.shape[1]):
        parts: list[Tensor] = [terms.gradients[:, i], terms.activations[:, i], terms.sizes[:, i].to(like.dtype)]
        if like.gradient_factor.ndim == 2:
            parts = [part[0] for part in parts]
        block = KroneckerBlock(parts[0], parts[1], parts[2], like.name)
        block.shares_weights_over_space = like.shares_weights_over_space
        results.append(block)
    return results
