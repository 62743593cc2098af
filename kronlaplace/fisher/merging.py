"""Merging of two finished Fishers of one network, estimated on different data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kronlaplace.blocks import KroneckerBlock
from kronlaplace.estimators import Diagonal, Estimator, estimator_from_json
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.network.fingerprint import difference

__all__ = ["estimators_of", "merge_fishers"]


def merge_fishers(first: KroneckerFisher, second: KroneckerFisher) -> KroneckerFisher:
    """Return the Fisher of two data sets together, from the finished Fisher of each.

    The result is the mean over the examples of both, and equals `estimate_fisher` on all of them up to rounding (and, in
    ``"mc"``, except for which labels are drawn). The order does not matter; merge several Fishers one after another.

    Args:
        first: The Fisher on one data set.
        second: The Fisher of the same network on other examples; an example in both data sets counts twice.

    Returns:
        A new Fisher with ``n_examples`` and statistics summed and the metadata of ``first``; both arguments are left
        unchanged.

    Raises:
        TypeError: If one of them is not a Fisher.
        ValueError: If they do not belong to the same network at the same weights, were not estimated in the same way, or
            if one is a moving average; the message names the first difference.
        NotImplementedError: If the estimator's finished blocks do not determine the block of all data (all estimators
            except `KFAC`, `TKFAC`, `Diagonal` and `ExactBlock`); the message lists alternatives.
    """
    for fisher in (first, second):
        if not isinstance(fisher, KroneckerFisher):
            raise TypeError(
                f"both arguments must be Fishers, as returned by estimate_fisher; got {type(fisher).__name__}."
            )
    _check_fit(first, second)
    n_examples = first.n_examples + second.n_examples
    weights = first.n_examples / n_examples, second.n_examples / n_examples
    estimators = estimators_of(first)
    blocks = {name: estimators[name].combine(first[name], second[name], weights) for name in first}
    for name, block in blocks.items():
        block.shares_weights_over_space = first[name].shares_weights_over_space
    statistics = None
    if first.statistics is not None and second.statistics is not None:
        statistics = first.statistics + second.statistics
    metadata = replace(first.metadata, rules=first.metadata.rules | second.metadata.rules)
    return KroneckerFisher(blocks, n_examples, metadata, statistics)


def estimators_of(fisher: KroneckerFisher) -> dict[str, Estimator]:
    """Return the estimator of each layer's block: the Fisher's own, or `Diagonal` on layers without factors."""
    estimator = estimator_from_json(fisher.metadata.settings)
    made_by = {row.layer: row.estimator for row in fisher.metadata.coverage if row.shape is not None}
    return {name: Diagonal() if made_by[name] == Diagonal.name else estimator for name in fisher}


def _check_fit(first: KroneckerFisher, second: KroneckerFisher) -> None:
    """Check that two Fishers belong to one network and were estimated in the same way.

    Raises:
        ValueError: If they differ; the message names the first difference.
    """
    for which, fisher in (("first", first), ("second", second)):
        if fisher.metadata.ema_decay is not None:
            raise ValueError(
                f"the {which} Fisher is a moving average (ema_decay={fisher.metadata.ema_decay}): its batches are weighted "
                "by age, so it cannot be part of a mean over examples. Estimate it with ema_decay=None."
            )
    if first.keys() != second.keys():
        raise ValueError(
            f"the first Fisher has blocks for {list(first)}, the second for {list(second)}. Estimate both with the same "
            "layers=[...], or select the layers that they share with restricted_to([...])."
        )
    changed = difference(first.metadata.weights, second.metadata.weights)
    if changed is not None:
        raise ValueError(
            f"the Fishers were estimated at different weights: {changed!r} differs. Their sum is a Fisher only if both were "
            "estimated at the same weights of one network; estimate both there, in the same dtype."
        )
    for (what, one), (_, other) in zip(_particulars(first), _particulars(second), strict=True):
        if one != other:
            raise ValueError(
                f"the Fishers were not estimated in the same way: {what} is {one} in the first and {other} in the second. "
                "Estimate both in the same way, on one device."
            )


def _particulars(fisher: KroneckerFisher) -> Iterator[tuple[str, Any]]:
    """Yield what must be equal in two Fishers with the same layers, each with a name for error messages."""
    metadata = fisher.metadata
    yield "the likelihood", metadata.likelihood
    yield "the estimator", estimator_from_json(metadata.settings)
    yield "the sampling", metadata.sampling.value
    yield "mc_samples", metadata.mc_samples
    yield "the curvature", "variational" if metadata.variational else "at the trained weights"
    yield "the axis of the inputs that counts the examples", metadata.input_axis
    yield "the content of the data", "inputs only" if fisher.statistics is None else "inputs and targets"
    for name in sorted(fisher):
        block = fisher[name]
        parameters = ", ".join(metadata.parameters.get(name, ()))
        kind = KroneckerBlock.kind if isinstance(block, KroneckerBlock) else block.kind  # one of both may be truncated
        yield (
            f"the block of layer {name!r}",
            f"{kind} of shape {tuple(block.shape)} for {parameters} in {block.dtype} on {block.device}",
        )
