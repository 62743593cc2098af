"""The gradients of each example with respect to parameters of which nothing else is known.

The network runs once more, with a copy of these parameters for each example: all examples at once by `torch.func.vmap`, or
one after the other where that fails, as with data-dependent control flow. Along any direction, the gradients of the copies
are then those of the examples. Everything else about the network is constant, so that only these parameters cost memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import vmap

from kronlaplace._precision import alike
from kronlaplace._replica import Replica
from kronlaplace.data.inputs import Inputs, leaves
from kronlaplace.layers import NetworkLayer, UnusableLayersError
from kronlaplace.network.example_axes import Layout

__all__ = ["OneByOne"]


class OneByOne:
    """A forward pass with parameters for each example.

    Args:
        model: The network, which is not changed.
        layers: The layers whose gradients are wanted.
        inputs: The inputs of the pass.
        layout: Where the examples are in the inputs.
        differentiable: Whether the gradients carry a graph to the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[NetworkLayer],
        inputs: Inputs,
        layout: Layout,
        *,
        differentiable: bool,
    ) -> None:
        self._model = model
        self._layers = layers
        self._inputs = inputs
        self._layout = layout
        self._differentiable = differentiable
        self._n = inputs.count(layout.input_axis)
        self._copies = {
            name: p.detach().expand(self._n, *p.shape).requires_grad_()
            for layer in layers
            for name, p in layer.parameters.items()
        }

    def run(self, outputs: Tensor) -> bool:
        """Run the network.

        Args:
            outputs: The outputs of the same examples together.

        Returns:
            Whether all examples ran at once.

        Raises:
            UnusableLayersError: If the outputs of the examples one by one are other ones.
        """
        expected = outputs.detach()
        reason = "the network does not run on one example"
        cause: Exception | None = None
        for at_once in (True, False) if self._layout.at_once else (False,):
            try:
                found = self._at_once() if at_once else self._one_after_the_other()
            except (
                Exception
            ) as error:  # what a network may raise has no bounds, and the second way has fewer reasons to
                cause = error
                continue
            if alike(found.detach(), expected, rtol=1e-2, atol=1e-4 * float(expected.abs().max())):
                self._outputs = found
                return at_once
            cause = None
            reason = "the outputs of one example alone are others than in the batch"
        names = [layer.name for layer in self._layers]
        why = "" if cause is None else f" ({type(cause).__name__}: {cause})"
        raise UnusableLayersError(
            f"no gradients of single examples for the layers {names}: {reason}{why}. Either outputs are random, or the "
            "forward pass mixes examples.",
            dict.fromkeys(names, reason),
        ) from cause

    def gradients(self, direction: Tensor, retain_graph: bool) -> Mapping[str, Tensor | None]:
        """Return the gradients along a direction, ``(N, q, p)`` by layer name; None for parameters without any effect."""
        if not self._outputs.requires_grad:
            return {layer.name: None for layer in self._layers}
        found = torch.autograd.grad(
            self._outputs,
            list(self._copies.values()),
            direction.reshape(self._outputs.shape),
            retain_graph=retain_graph or self._differentiable,
            create_graph=self._differentiable,
            allow_unused=True,
        )
        grads = dict(zip(self._copies, found, strict=True))
        result: dict[str, Tensor | None] = {}
        for layer in self._layers:
            mine = {name: grads[name] for name in layer.parameters}
            if all(grad is None for grad in mine.values()):
                result[layer.name] = None
                continue
            filled = {
                name: torch.zeros_like(self._copies[name]) if grad is None else grad for name, grad in mine.items()
            }
            result[layer.name] = layer.assembled(filled)
        return result

    def _at_once(self) -> Tensor:
        run = self._runner()
        axis = self._layout.input_axis
        by_example = self._inputs.by_example(axis, self._layout.shared_inputs)
        tensors = {path: t for path, t in leaves(self._inputs.value) if path in by_example}

        def one(copies: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
            return run(copies, self._inputs.map_by_path(lambda t, p: tensors[p].unsqueeze(axis) if p in tensors else t))

        with _quiet():
            return vmap(one, in_dims=(0, axis))(self._copies, tensors)

    def _one_after_the_other(self) -> Tensor:
        run = self._runner()
        axis, shared = self._layout.input_axis, self._layout.shared_inputs
        split = [copies.unbind() for copies in self._copies.values()]
        rows = []
        for i, parts in enumerate(zip(*split, strict=True)):
            example = self._inputs.examples(axis, i, i + 1, shared)
            rows.append(run(dict(zip(self._copies, parts, strict=True)), example))
        return torch.stack(rows)

    def _runner(self) -> Callable[[Mapping[str, Tensor], Inputs], Tensor]:
        """Return the function of parameters and one example that runs the network; its copy may keep what it computed."""
        replica = Replica(self._model).model

        def run(parameters: Mapping[str, Tensor], example: Inputs) -> Tensor:
            return example.map(torch.clone).run(replica, dict(parameters))[0]

        return run


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield
