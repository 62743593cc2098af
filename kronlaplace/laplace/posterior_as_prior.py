"""The posterior of one task as the prior of the next: its precision as one Fisher, plus a multiple of the identity."""

from __future__ import annotations

import math

import torch

from kronlaplace._arguments import warn
from kronlaplace.blocks import Block, DenseBlock, DiagonalBlock, KroneckerBlock
from kronlaplace.damping.plus_diagonal import LARGEST_DENSE
from kronlaplace.estimators.kfoc.nearest import nearest_kronecker
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.laplace.state import State
from kronlaplace.priors.kronecker import KroneckerPrior
from kronlaplace.priors.prior import IsotropicPrior, LayerwisePrior

__all__ = ["posterior_as_prior"]


@torch.no_grad()
def posterior_as_prior(state: State) -> KroneckerPrior:
    """Return a prior with a fitted posterior's precision ``c F + D`` and its mean.

    Raises:
        RuntimeError: If the posterior is not fitted.
        NotImplementedError: If ``c F + D`` of a large layer is not one block plus a multiple of the identity.

    Warns:
        UserWarning: If it is a sum of two large Kronecker products, of which only the nearest one is kept.
    """
    fit, prior, scale = state.fitted, state.prior, torch.as_tensor(state.scale).detach()
    if isinstance(prior, (IsotropicPrior, LayerwisePrior)):
        plus = {name: prior.least(name) for name in fit.fisher}
        return KroneckerPrior(fit.fisher, mean=fit.mean, scale=scale, plus=plus).over(state.layers)
    blocks, plus, truncations = {}, {}, []
    for name, block in fit.fisher.items():
        earlier, plus[name] = prior.block_and_identity(name)
        blocks[name], exact = _sum(block.scaled(scale), earlier)
        if not exact:
            truncations.append(f"{name!r}")
    if truncations:
        warn(
            f"the posterior precision of {', '.join(truncations)} contains a sum of two Kronecker products; the prior has "
            f"the nearest single one. Sums are kept exactly for up to {LARGEST_DENSE:,} weights, and for diagonal blocks."
        )
    fisher = KroneckerFisher(blocks, fit.fisher.n_examples, fit.fisher.metadata)
    return KroneckerPrior(fisher, mean=fit.mean, scale=1.0, plus=plus).over(state.layers)


def _sum(block: Block, earlier: Block) -> tuple[Block, bool]:
    """Return the sum of two blocks as one, and whether it is exact."""
    if isinstance(block, DiagonalBlock) and isinstance(earlier, DiagonalBlock):
        return DiagonalBlock(block.values + earlier.values, block.name), True
    if math.prod(block.shape) <= LARGEST_DENSE:
        return DenseBlock(block.to_dense() + earlier.to_dense(), block.shape, name=block.name), True
    if not (
        isinstance(block, KroneckerBlock)
        and isinstance(earlier, KroneckerBlock)
        and block.gradient_factor.shape == earlier.gradient_factor.shape
    ):
        raise NotImplementedError(
            f"the posterior precision of layer {block.name!r} is a sum of a {block.kind} and a {earlier.kind} block with "
            f"{math.prod(block.shape):,} weights, which no single block equals; sums are kept exactly for up to "
            f"{LARGEST_DENSE:,} weights. Use Kronecker products for both tasks (kl.KFAC), or kl.Diagonal for both."
        )
    return nearest_kronecker([block, earlier]), False
