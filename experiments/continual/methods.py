"""Methods: what the experiment does to remember earlier tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import kronlaplace as kl

ESTIMATORS = {"K-FAC": "kfac", "TKFAC": "tkfac", "K-FOC": "kfoc"}
MERGES = [merge.value for merge in (kl.Merge.SUM, kl.Merge.FACTORS, kl.Merge.KFOC)]
RANKS = (2, 4)
BY_EVIDENCE = " by evidence"
NONE, JOINT, SYNAPTIC = "none", "joint", "Synaptic Intelligence"


@dataclass(frozen=True)
class Method:
    """A memory with a penalty.

    Attributes:
        create: Makes it of `(model, strength, args)`.
        load: Reads it back, of `(path, model)`.
        observe: What it does in every step between the backward pass of the loss and that of the penalty, if anything.
        after_epoch: What it does after each epoch of a task, of `(memory, examples, args)`, if anything.
        consolidate: Adds a task, of `(memory, examples, args)`.
        finds_strength: Whether it sets its strength itself, so that no grid is tried.
    """

    create: Callable
    load: Callable
    consolidate: Callable
    observe: Callable = lambda memory: None
    after_epoch: Callable = lambda memory, examples, args: None
    finds_strength: bool = False


def laplace(by_evidence=False, **options):
    """`ContinualLaplace` with some options, and the strength of the grid or by the evidence of each new task."""

    def create(model, strength, args):
        return kl.ContinualLaplace(
            model, "classification", strength=strength, prior_precision=args.prior_precision, **options
        )

    def consolidate(memory, examples, args):
        memory.consolidate(examples.in_order(args.fisher_batch_size), sampling=args.sampling)

    def tune(memory, examples, args):
        if memory.tasks:
            memory.tune_strength(examples.in_order(args.fisher_batch_size), sampling=args.sampling)

    method = Method(create, kl.ContinualLaplace.load, consolidate)
    return replace(method, after_epoch=tune, finds_strength=True) if by_evidence else method


METHODS = {
    NONE: None,
    "EWC": laplace(estimator="diagonal", mode="per-task"),
    "online diagonal": laplace(estimator="diagonal"),
    SYNAPTIC: Method(
        lambda model, strength, args: kl.SynapticIntelligence(model, strength=strength),
        kl.SynapticIntelligence.load,
        lambda memory, examples, args: memory.consolidate(len(examples)),
        kl.SynapticIntelligence.observe,
    ),
    **{
        f"{name}, {merge}": laplace(estimator=estimator, merge=merge)
        for name, estimator in ESTIMATORS.items()
        for merge in MERGES
    },
    **{
        f"{name}, kfoc rank {rank}": laplace(estimator=estimator, merge="kfoc", rank=rank)
        for name, estimator in ESTIMATORS.items()
        for rank in RANKS
    },
    **{
        f"{name}, kfoc{BY_EVIDENCE}": laplace(by_evidence=True, estimator=estimator, merge="kfoc")
        for name, estimator in ESTIMATORS.items()
    },
    JOINT: None,
}
BY_DEFAULT = (
    NONE,
    "EWC",
    "online diagonal",
    SYNAPTIC,
    *(f"K-FAC, {merge}" for merge in MERGES),
    f"K-FAC, kfoc rank {RANKS[-1]}",
    "TKFAC, kfoc",
    "K-FOC, kfoc",
    JOINT,
)
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def has_penalty(name):
    return METHODS[name] is not None


def has_grid(name):
    """Whether strengths are tried for a method."""
    return has_penalty(name) and not METHODS[name].finds_strength
