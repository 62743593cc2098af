"""The strength of a penalty by the evidence of the new task, given the posterior of the earlier ones.

With the Fisher ``F`` of the new task (a mean over its ``N`` examples) at the weights ``θ`` now, and the posterior
``N(θ*, (λ Λ)⁻¹)`` of the earlier tasks as the prior, the Laplace evidence is

    log p(D) ≈ log p(D | θ) − λ/2 (θ − θ*)ᵀ Λ (θ − θ*) − ½ log det(N F + λ Λ) + ½ log det(λ Λ).

With the eigenvalues ``κ`` of ``N F`` relative to ``Λ`` the determinants are ``−½ Σ log(1 + κ / λ)``, and at the maximum
``λ (θ − θ*)ᵀ Λ (θ − θ*) = Σ κ / (κ + λ)``: as many weights as the new task has determined (MacKay 1992).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kronlaplace.blocks import Block
from kronlaplace.continual.options import PenaltyMode
from kronlaplace.continual.penalty import SeenNetwork
from kronlaplace.continual.posterior import as_few, warn_of_nearest
from kronlaplace.continual.state import MemoryState
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.priors.kronecker import KroneckerPrior
from kronlaplace.priors.penalty import layer_precision

if TYPE_CHECKING:
    from kronlaplace.laplace.evidence import Evidence

__all__ = ["best_strength", "check_has_best_strength", "evidence_of_strength"]


@torch.no_grad()
def evidence_of_strength(network: SeenNetwork, fisher: KroneckerFisher) -> Evidence:
    """Return the evidence of a new task as a function of ``λ``, over the layers that it shares with earlier ones.

    All other layers add the same for every ``λ``.

    Args:
        network: The network, at the weights ``θ``, and what is kept of the earlier tasks.
        fisher: Fisher of the new task there, with its targets seen.

    Raises:
        ValueError: If no layer is shared, or the Fisher saw no targets.
        NotImplementedError: If the likelihood has no evidence, or blocks of large layers are of kinds whose sum has none.

    Warns:
        UserWarning: If the precision of a large layer is an approximation.
    """
    from kronlaplace.laplace.evidence import Evidence  # only here does the memory need the evidence

    shared = [layer for layer in network.layers if layer.name in network.memories and layer.name in fisher]
    if not shared:
        raise ValueError(
            "the new task uses none of the layers of earlier tasks, so its evidence does not depend on the strength."
        )
    blocks: dict[str, Block] = {}
    plus, centers = {}, {}
    approximate: list[str] = []
    for layer in shared:
        memory, of_prior = network.memories[layer.name], layer_precision(network.prior, layer.name)
        few, is_exact = as_few([*(term.block for term in memory.terms), *of_prior.blocks], pairs=False)
        approximate += [] if is_exact else [layer.name]
        blocks[layer.name], plus[layer.name] = few[0], of_prior.identity
        centers[layer.name] = memory.center
    warn_of_nearest(approximate, "the evidence")
    earlier = KroneckerFisher(blocks, network.state.n_examples)
    prior = KroneckerPrior(earlier, mean=centers, scale=1.0, plus=plus).over(shared)
    weights = {layer.name: layer.matrix().to(layer.dtype) for layer in shared}
    return Evidence(fisher.restricted_to(list(weights)), weights, prior)


def check_has_best_strength(state: MemoryState, mode: PenaltyMode) -> None:
    """Check that a memory has a strength that the evidence of a new task depends on.

    Raises:
        RuntimeError, NotImplementedError: If it has not.
    """
    if not state.tasks:
        raise RuntimeError("the memory has no task yet, so the penalty is the prior's, which has no strength.")
    if mode is PenaltyMode.PER_TASK:
        raise NotImplementedError(
            'the strength by the evidence is for mode="latest", in which all curvature is around the same weights. Set '
            "memory.strength yourself."
        )


def best_strength(network: SeenNetwork, fisher: KroneckerFisher) -> float:
    """Return the ``λ`` with the largest evidence.

    Raises:
        ValueError, NotImplementedError: As `evidence_of_strength`; a ValueError also if there is no largest evidence.
    """
    from kronlaplace.laplace.tuning import maximize_evidence
    from kronlaplace.priors.prior import PriorStructure

    evidence = evidence_of_strength(network, fisher)
    tuned = maximize_evidence(evidence, PriorStructure.SCALAR, 1.0, evidence.likelihood.noise_std)
    if tuned.at_the_edge:
        raise ValueError(
            "the evidence of the new task has no maximum in the strength, as before training, when the weights are still "
            "those of the earlier tasks. Train on the new task first."
        )
    return float(tuned.multiples)
