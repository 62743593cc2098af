"""Chains of linear layers, the networks to which the block-tridiagonal inverse applies (K-FAC section 1.1)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from kronlaplace.layers import Layer, LayerBatch
from kronlaplace.network.observer import NetworkObserver

__all__ = ["find_chain"]


def find_chain(observer: NetworkObserver, n_examples: int) -> list[Layer]:
    """Return the observed layers from the first to the last, after checking that they form a chain of linear layers.

    In a chain, each layer is an `nn.Linear` that is used once per example, and its inputs are a function of the outputs of
    the layer before it, and of nothing else that depends on parameters. An activation function, dropout, or a fixed
    affine map as in K-FAC Theorem 1 may stand between two layers.

    Args:
        observer: The observer, after a forward pass and before its graph is freed.
        n_examples: Number of examples in the pass, which is the length of the outputs.

    Raises:
        ValueError: If the layers do not form a chain, naming the first layer that does not fit, and why.
        RuntimeError: If no pass was observed.
        UnusableLayersError: If a layer cannot have a block in the network as it runs.
    """
    batches = observer.layer_batches(n_examples)
    chain = [batches[name] for name in observer.inputs]
    for batch in chain:
        _check_use(batch)
    nodes = {edges[0].node: name for name, edges in observer.edges.items() if edges[0] is not None}
    by_name = {name: node for node, name in nodes.items()}
    for before, after in pairwise(chain):
        _check_link(before, after, nodes, by_name[after.layer.name])
    return [batch.layer for batch in chain]


def _check_use(batch: LayerBatch) -> None:
    """Check that a layer is linear and used once per example."""
    layer, x = batch.layer, batch.calls[0].x
    if not isinstance(layer.module, nn.Linear):
        raise _refusal(layer, f"is not an nn.Linear but of type {type(layer.module).__name__}")
    if len(batch.calls) > 1 or layer.tied_modules:
        raise _refusal(layer, "is called several times in a forward pass, or shares its weight with another module")
    if x.ndim != 2 or batch.calls[0].fold > 1:
        raise _refusal(
            layer,
            f"is used at several positions of an example: its input has shape {tuple(x.shape)}, not (examples, features)",
        )


def _check_link(before: LayerBatch, after: LayerBatch, names: dict[Any, str], start: Any) -> None:
    """Check that the inputs of a layer come from the outputs of the layer before it, and from no other layer's.

    Args:
        before: The layer before.
        after: The layer.
        names: Layer names by the node of the graph that computed their outputs.
        start: The node of the layer.
    """
    first, layer = before.layer, after.layer
    found, seen, todo = set(), set(), [start]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in names:
                found.add(names[node])
            else:
                todo.append(node)
    if others := sorted(found - {first.name}):
        raise _refusal(
            layer, f"also gets outputs of {others} that do not pass through {first.name!r}, the layer before it"
        )
    if not found:
        raise _refusal(layer, f"does not get its inputs from {first.name!r}, the layer before it")
    if first.shape[0] != after.calls[0].x.shape[1]:
        raise _refusal(
            layer,
            f"has {after.calls[0].x.shape[1]} inputs, but {first.name!r}, the layer before it, has {first.shape[0]} outputs",
        )


def _refusal(layer: Layer, reason: str) -> ValueError:
    return ValueError(
        f"layer {layer.name!r} {reason}. The block-tridiagonal inverse is for chains of linear layers, each of which is "
        "called once, on inputs of shape (examples, features) that only the layer before it determines. Use structure="
        '"block-diagonal", which is for any network.'
    )
