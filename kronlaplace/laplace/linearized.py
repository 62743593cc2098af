"""The linearized model without Jacobians: the outputs' covariance, layer by layer in the eigenbasis.

One forward pass, and one backward pass for each output, whose gradients every layer turns into its part of the covariance
(`kronlaplace.laplace.layer_covariance`). No tensor has the shape ``(N, C, P)``. Inputs are processed in chunks, which bounds
the memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kronlaplace.damping import DampedInverse
from kronlaplace.data.inputs import Inputs, tensors_of
from kronlaplace.laplace import layer_covariance
from kronlaplace.laplace.layer_covariance import (
    LayerCovariance,
    OutputCovariance,
    covariance_of_layer,
    output_layer_part,
)
from kronlaplace.layers import Layer, LayerGradients
from kronlaplace.likelihoods import Likelihood
from kronlaplace.network.example_axes import Layout
from kronlaplace.network.forward import NetworkForward
from kronlaplace.network.observer import NetworkObserver, Receiver

__all__ = ["ShapeCache", "Linearized"]

_MAX_CHUNK = 256
_FIRST_CHUNK = 16


class ShapeCache:
    """A cache of what a call learns about inputs of given shapes. Threads may share it.

    Args:
        layout: What is known from the fit.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        """Where the examples are."""
        self.kept_per_example: int | None = None
        """The number of values kept per example."""

    def chunk(self, budget: int | None = None) -> int:
        """Return the number of examples to process at a time, which keep at most ``budget`` numbers."""
        kept = self.kept_per_example
        budget = layer_covariance.BUDGET if budget is None else budget
        return _FIRST_CHUNK if kept is None else max(1, min(_MAX_CHUNK, budget // max(kept, 1)))


class Linearized:
    """A network, linear in its parameters around their trained values, with a Gaussian over them.

    Args:
        model: The network.
        layers: The layers that have a posterior.
        inverses: Their posterior covariances, by layer name.
        likelihood: Tells which axis of the outputs holds the classes.
        layout: Where the examples are in the inputs, from the fit.
        known: What earlier calls have found out, by what they were asked for; kept by the caller.
        budget: How many numbers a chunk of examples may keep; None for `layer_covariance.BUDGET`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        inverses: Mapping[str, DampedInverse],
        likelihood: Likelihood,
        layout: Layout,
        known: dict[Hashable, ShapeCache],
        budget: int | None = None,
    ) -> None:
        self._model = model
        self._layers = layers
        self._inverses = inverses
        self._likelihood = likelihood
        self._layout = layout
        self._known = known
        self._budget = budget

    def outputs_and_covariance(
        self, x: Inputs, wanted: OutputCovariance, *, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the network's outputs and the wanted part of their covariance.

        Args:
            x: Inputs.
            wanted: Which covariances.
            differentiable: Whether both carry a graph to the inputs.

        Returns:
            The outputs as the network gives them, and, with ``M`` outputs per example: variances of the outputs' shape
            (``OutputCovariance.VARIANCES``, ``CENTERED_VARIANCES``, ``MARGIN_VARIANCES``), ``(N, ..., C, C)``
            (``BY_POSITION``; without the class axis in the middle), ``(N, M, M)`` (``BY_EXAMPLE``), or ``(N·M, N·M)``
            (``JOINT``).
        """
        outputs, covariances = [], []
        axis, shared = self._layout.input_axis, self._layout.shared_inputs
        n = x.count(axis)
        one = x.examples(axis, 0, 1, shared)
        shapes = tuple(tuple(t.shape) for t in tensors_of(one))
        known = self._known.setdefault((wanted, differentiable, shapes), ShapeCache(self._layout))
        start = 0
        while start < n:
            count = n if wanted is OutputCovariance.JOINT else known.chunk(self._budget)
            part = x.examples(axis, start, start + count, shared)
            f, covariance = self._chunk(part, wanted, differentiable, known)
            outputs.append(f)
            covariances.append(covariance)
            start += count
        if len(outputs) == 1:
            return outputs[0], covariances[0]
        return torch.cat(outputs), torch.cat(covariances)

    def _chunk(
        self, x: Inputs, wanted: OutputCovariance, differentiable: bool, known: ShapeCache
    ) -> tuple[Tensor, Tensor]:
        terms: dict[str, LayerCovariance] = {}
        done: str | None = None

        def receive(gradients: LayerGradients) -> None:
            name = gradients.layer.name
            if name == done:
                return
            if name not in terms:
                terms[name] = covariance_of_layer(self._inverses[name], gradients.batch, wanted)
            terms[name].add(gradients)

        with NetworkForward(self._model, self._layers, differentiable=differentiable, layout=known.layout) as forward:
            f = forward(x)
            observer = forward.observer
            class_axis = self._likelihood.class_axis_of(f) if wanted.by_class else None
            covariance: Tensor | None = None
            last = observer.output_layer(f)
            if last is not None and class_axis in (None, f.ndim - 1):
                covariance = output_layer_part(
                    self._inverses[last.name], observer.layer_batches(len(f))[last.name], f, wanted
                )
                if covariance is not None:
                    done = last.name
            kept = 0
            if done is None or len(self._layers) > 1:
                rest, kept = self._propagated(observer, receive, f, terms, wanted, class_axis)
                covariance = rest if covariance is None else covariance + rest
            known.layout, known.kept_per_example = forward.layout, kept
        assert covariance is not None
        return (f if differentiable else f.detach()), (covariance if differentiable else covariance.detach())

    def _propagated(
        self,
        observer: NetworkObserver,
        receive: Receiver,
        f: Tensor,
        terms: Mapping[str, LayerCovariance],
        wanted: OutputCovariance,
        class_axis: int | None,
    ) -> tuple[Tensor, int]:
        """Return the parts of all layers that need gradients, and the number of numbers that they kept per example."""
        n, shape = len(f), f.shape[1:]
        elements = torch.arange(shape.numel()).view(shape)
        if class_axis is None:
            groups = elements.reshape(1, -1)
        else:
            groups = elements.movedim(class_axis - 1, -1).reshape(-1, f.shape[class_axis])
        parts = []
        passes = groups.numel()
        for group in groups.tolist():
            base = _subtracted(f.detach().reshape(n, -1)[:, group], wanted)
            for element in group:
                passes -= 1
                direction = torch.zeros(n, elements.numel(), dtype=f.dtype, device=f.device)
                if base is not None:
                    direction[:, group] = -base
                direction[:, element] += 1
                observer.backward(f, direction, receive, retain_graph=passes > 0)
            results = [term.result() for term in terms.values()]
            parts.append(sum(results[1:], results[0]))
        kept = sum(term.kept_per_example(groups.shape[1]) for term in terms.values())
        if wanted is OutputCovariance.VARIANCES:
            return parts[0].view(f.shape), kept
        if class_axis is None:
            return parts[0], kept
        positions = [size for axis, size in enumerate(f.shape) if axis not in (0, class_axis)]
        by_position = torch.stack(parts, dim=1)
        by_position = by_position.view(n, *positions, *by_position.shape[2:])
        return (by_position.movedim(-1, class_axis) if wanted.variances else by_position), kept


def _subtracted(f: Tensor, wanted: OutputCovariance) -> Tensor | None:
    """Return the weights of what is subtracted from each of the outputs ``f``, ``(N, C)``, or None if nothing is."""
    if wanted is OutputCovariance.CENTERED_VARIANCES:
        return torch.full_like(f, 1 / f.shape[1])
    if wanted is OutputCovariance.MARGIN_VARIANCES:
        return torch.zeros_like(f).scatter_(1, f.argmax(1, keepdim=True), 1)
    return None
