"""The Laplace posterior that a memory stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kronlaplace._arguments import warn
from kronlaplace.blocks import Block, DiagonalBlock, EigenBlock, KroneckerBlock
from kronlaplace.continual.merging import added, merged
from kronlaplace.continual.options import Merge
from kronlaplace.continual.state import MemoryState
from kronlaplace.damping.plus_diagonal import LARGEST_DENSE
from kronlaplace.estimators import Estimator
from kronlaplace.estimators.kfoc.nearest import nearest_kronecker
from kronlaplace.fisher.estimation import with_metadata
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.likelihoods import Likelihood
from kronlaplace.priors.kronecker import KroneckerPrior
from kronlaplace.priors.prior import IsotropicPrior, LayerwisePrior, Prior

if TYPE_CHECKING:
    from kronlaplace.laplace.posterior import KronLaplace

__all__ = ["as_few", "posterior_of", "warn_of_nearest"]


def posterior_of(
    state: MemoryState, model: nn.Module, likelihood: Likelihood, estimator: Estimator, prior: Prior
) -> KronLaplace:
    """Return the posterior with the precision of a memory, around the network's weights.

    Args:
        state: The memory, of at least one task, on the network's device.
        model: The network.
        likelihood: The likelihood.
        estimator: The estimator.
        prior: The prior over the layers of the posterior.

    Raises:
        NotImplementedError: If the precision of a large layer is a sum of blocks of different kinds.

    Warns:
        UserWarning: If the precision of a large layer is an approximation.
    """
    from kronlaplace.laplace.posterior import KronLaplace  # only here does the memory need the posterior

    pairs = isinstance(prior, (IsotropicPrior, LayerwisePrior))
    parts: dict[str, list[Block]] = {}
    approximate = []
    for name in prior.means:
        with torch.no_grad():
            parts[name], exact = as_few([term.block for term in state.layers[name].terms], pairs)
        if not exact:
            approximate.append(name)
    warn_of_nearest(approximate, "the posterior")
    latest = {name: blocks[-1].scaled(1 / state.n_examples) for name, blocks in parts.items()}
    if any(len(blocks) > 1 for blocks in parts.values()):
        prior = _with_first_parts(parts, state, prior)
    fisher = KroneckerFisher(latest, state.n_examples, None, state.statistics)
    fisher = with_metadata(fisher, model, likelihood, estimator)
    options: dict[str, Any] = {"prior_precision": prior, "layers": list(latest), "truncation": None}
    return KronLaplace(model, likelihood, estimator, **options).fit(fisher=fisher)


def warn_of_nearest(layers: Sequence[str], consumer: str) -> None:
    """Warn that the sum of products of these layers, if any, is not what a consumer has."""
    if layers:
        warn(
            f"the curvature of the layers {layers} is a sum of several Kronecker products, of which {consumer} has the "
            f"nearest single one. Sums are exact for up to {LARGEST_DENSE:,} weights and for diagonal blocks; with "
            'merge="kfoc" or "factors" a single product is kept from the start.'
        )


def as_few(blocks: Sequence[Block], pairs: bool) -> tuple[list[Block], bool]:
    """Return the sum of some blocks as one block, or two if pairs are allowed; and whether that is exact."""
    first = blocks[0]
    if len(blocks) == 1:
        return [first], True
    if all(isinstance(block, DiagonalBlock) for block in blocks) or math.prod(first.shape) <= LARGEST_DENSE:
        return [added(blocks)], True
    products = [block for block in blocks if isinstance(block, KroneckerBlock)]
    if len(products) == len(blocks):
        if pairs and len(blocks) == 2:
            return list(blocks), True
        return [nearest_kronecker(products)], False
    if all(isinstance(block, EigenBlock) for block in blocks):
        return merged(blocks, Merge.FACTORS, 1), False
    raise NotImplementedError(
        f"the curvature of layer {first.name!r} is a sum of blocks of the kinds {sorted({b.kind for b in blocks})} with "
        f"{math.prod(first.shape):,} weights, which no single block equals; sums are exact for up to {LARGEST_DENSE:,} "
        "weights. Use one estimator for all tasks."
    )


def _with_first_parts(parts: Mapping[str, Sequence[Block]], state: MemoryState, prior: Prior) -> KroneckerPrior:
    """Return a prior that has the first of two parts of the curvature in addition."""
    none = {name: blocks[0].scaled(0.0) for name, blocks in parts.items()}  # in the same basis as the other part
    first = {name: blocks[0] if len(blocks) > 1 else none[name] for name, blocks in parts.items()}
    return KroneckerPrior(
        KroneckerFisher(first, state.n_examples),
        mean={name: state.layers[name].center for name in parts},
        scale=1.0,
        plus={name: prior.least(name) for name in parts},
    )
