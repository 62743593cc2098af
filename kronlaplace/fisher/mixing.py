"""Convex combinations of two Fishers of the same network, estimator and data: damped steps from one toward the other."""

from __future__ import annotations

import torch

from kronlaplace.blocks import Block, EigenBlock, KroneckerBlock
from kronlaplace.blocks.base import two_sided
from kronlaplace.estimators import Estimator
from kronlaplace.estimators.kfoc.nearest import nearest_kronecker
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.fisher.merging import estimators_of

__all__ = ["mix_fishers"]


@torch.no_grad()
def mix_fishers(first: KroneckerFisher, second: KroneckerFisher, share: float) -> KroneckerFisher:
    """Return ``(1 − share)`` times one Fisher plus ``share`` times another, block by block, with the metadata of the second.

    The blocks of `KFAC`, `TKFAC`, `Diagonal` and `ExactBlock` are what the estimator would make of the mixture
    (`Estimator.combine`). Of other estimators a sum of two Kronecker products is replaced by the nearest single one, and a
    block that is diagonal in a Kronecker eigenbasis (`EKFAC`) keeps the basis of the second, with the diagonal of the
    mixture in it. Where both Fishers are equal, so is the result.

    Args:
        first: The one Fisher.
        second: The other, with blocks of the same layers and kinds.
        share: Weight of the second, from 0 to 1.

    Raises:
        NotImplementedError: If blocks of a class of your own cannot be added.
    """
    if share == 1:
        return second
    estimators = estimators_of(second)
    blocks = {}
    for name, block in second.items():
        mixed = _mixed(estimators[name], first[name], block, share)
        mixed.shares_weights_over_space = block.shares_weights_over_space
        blocks[name] = mixed
    return KroneckerFisher(blocks, second.n_examples, second.metadata, second.statistics)


def _mixed(estimator: Estimator, first: Block, second: Block, share: float) -> Block:
    if type(estimator).combine is not Estimator.combine:
        return estimator.combine(first, second, (1 - share, share))
    if isinstance(first, KroneckerBlock) and isinstance(second, KroneckerBlock):
        return nearest_kronecker([first.scaled(1 - share), second.scaled(share)])
    if isinstance(first, EigenBlock) and isinstance(second, EigenBlock):
        gradient = (second.gradient_basis.mT @ first.gradient_basis).square()
        activation = (second.activation_basis.mT @ first.activation_basis).square()
        earlier = two_sided(gradient, first.values, activation.mT)
        values = (1 - share) * earlier + share * second.values
        return EigenBlock(second.gradient_basis, second.activation_basis, values, second.name)
    raise NotImplementedError(
        f"the blocks of the estimator {estimator.name!r} cannot be mixed: it does not define how finished blocks add up "
        "(Estimator.combine). Define that method, or use kl.KFAC(), kl.TKFAC(), kl.KFOC() or kl.EKFAC()."
    )
