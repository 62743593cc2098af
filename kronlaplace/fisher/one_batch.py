"""Accumulation of a network's outputs in one batch.

`accumulate_batch` is the building block for any code that runs the network: passes over data, an optimizer, the training
loop of another library.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.layers import Layer, LayerBatch, LayerGradients, MomentExamples, SquaredGradients, UnusableLayersError
from kronlaplace.likelihoods import Likelihood, Sampling
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.observer import NetworkObserver, Receiver

__all__ = ["accumulate_batch", "squared_layer"]


@in_full_precision
def accumulate_batch(
    observer: NetworkObserver,
    outputs: Tensor,
    likelihood: Likelihood,
    sampling: DirectionSampling,
    accumulation: Accumulation,
    *,
    targets: Tensor | None = None,
    index: int = 0,
    retain_graph: bool = False,
    n_examples: int | None = None,
    moment_examples: Callable[[LayerBatch], MomentExamples] | None = None,
) -> None:
    """Add one batch to an accumulation, from a forward pass that the observer has seen.

    The gradients of the parameters are not touched. With ``retain_graph=True`` the caller can keep using the outputs, as
    in ``loss(outputs, targets).backward()``.

    Args:
        observer: The observer of the forward pass.
        outputs: Outputs of the network, with their graph; the first axis counts examples.
        likelihood: The likelihood.
        sampling: How directions are chosen.
        accumulation: Accumulation for the observer's layers.
        targets: Targets in the data, if there are any; required for ``"empirical"`` sampling.
        index: Number of the batch or of the training step; label draws depend only on it and on the seed.
        retain_graph: Whether the graph of the outputs is needed afterwards.
        n_examples: Number of examples, the first ones of the batch, that count; None means all.
        moment_examples: Function that returns from how many of these a layer's moments are taken; None means from all.

    Raises:
        RuntimeError: If no forward pass was observed.
        UnusableLayersError: If a layer cannot have a block in the network as it runs. If the reason is that the outputs do
            not depend on it, all other layers have been accumulated.
        ValueError: If outputs or targets do not fit the likelihood.
    """
    detached = outputs.detach()
    likelihood.check_outputs(detached)
    batches = observer.layer_batches(len(outputs))
    if n_examples is not None and n_examples < len(outputs):
        batches = {name: batch.first(n_examples) for name, batch in batches.items()}
    if moment_examples is not None:
        batches = {name: batch.with_moments_of(moment_examples(batch)) for name, batch in batches.items()}

    def take(gradients: LayerGradients) -> None:
        if n_examples is not None and n_examples < len(outputs):
            gradients = gradients.first(n_examples)
        accumulation.add_gradients(gradients.with_moments_of(batches[gradients.layer.name].moment_examples))

    receive: Receiver = take
    accumulation.begin_batch(batches)
    squared = squared_layer(observer, outputs, accumulation)
    squares = None if squared is None else sampling.squares(likelihood, detached, targets)
    if squared is not None and squares is not None:
        batch = batches[squared.name]
        accumulation.add_gradients(SquaredGradients(batch, [squares[: batch.n_examples].sqrt()]))
        receive = _all_but(squared, receive)
    n_directions = sampling.count(likelihood, detached, targets)
    signs = None
    if observer.sums_over_batch and sampling.settled(likelihood, detached, targets).kind is Sampling.EXACT:
        signs = sampling.generator(index, outputs.device)
    unused: UnusableLayersError | None = None
    directions = sampling.directions(likelihood, detached, targets, index)
    if squares is not None and len(observer.layers) == 1:
        directions = iter(())  # nothing else needs any
    for v, direction in enumerate(directions, start=1):
        if signs is not None:  # which makes the examples independent, and changes nothing else
            direction = direction * _random_signs(outputs, signs)
        try:
            observer.backward(outputs, direction, receive, retain_graph=retain_graph or v < n_directions)
        except UnusableLayersError as error:  # some layers received no gradient; all others were accumulated
            unused = error
    accumulation.end_batch(batches, len(outputs) if n_examples is None else min(n_examples, len(outputs)))
    if unused is not None:
        raise unused


def squared_layer(observer: NetworkObserver, outputs: Tensor, accumulation: Accumulation) -> Layer | None:
    """Return the layer whose outputs are the network's, if its estimator takes the squares of its gradients alone."""
    layer = observer.output_layer(outputs)
    return layer if layer is not None and accumulation.only_squares(layer.name) else None


def _all_but(layer: Layer, receive: Receiver) -> Receiver:
    """Return a receiver that passes on the gradients of all other layers."""

    def others(gradients: LayerGradients) -> None:
        if gradients.layer is not layer:
            receive(gradients)

    return others


def _random_signs(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random sign for each example."""
    shape = (len(outputs), *[1] * (outputs.ndim - 1))
    drawn = torch.randint(2, shape, generator=generator, device=outputs.device)
    return (2 * drawn - 1).to(outputs.dtype)
