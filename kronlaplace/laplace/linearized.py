"""The linearized model without Jacobians: the outputs' covariance, layer by layer in the eigenbasis.

One forward pass, and one backward pass for each output, whose gradients every layer turns into its part of the covariance
(`kronlaplace.laplace.layer_covariance`). No tensor has the shape ``(N, C, P)``. Inputs are processed in chunks, which bounds
the memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kronlaplace.blocks import DiagonalBlock
from kronlaplace.damping import DampedInverse
from kronlaplace.data.inputs import Inputs, tensors_of
from kronlaplace.laplace import layer_covariance
from kronlaplace.laplace.features import FactoredCovariance, of_outputs
from kronlaplace.laplace.layer_covariance import LayerCovariance, covariance_of_layer
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.laplace.output_layer import factored_part, output_layer_part, tied_part
from kronlaplace.laplace.tied import TiedLookUps
from kronlaplace.layers import Layer, LayerGradients
from kronlaplace.likelihoods import Likelihood
from kronlaplace.network.example_axes import Layout
from kronlaplace.network.forward import NetworkForward
from kronlaplace.network.observer import NetworkObserver

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
            count = n if wanted is OutputCovariance.JOINT else min(n - start, known.chunk(self._budget))
            part = x.examples(axis, start, start + count, shared)
            try:
                f, covariance = self._chunk(part, wanted, differentiable, known)
            except _TooManyError as found:  # which shows after the first backward pass
                known.kept_per_example = found.kept_per_example
                continue
            outputs.append(f)
            covariances.append(covariance)
            start += count
        if len(outputs) == 1:
            return outputs[0], covariances[0]
        return torch.cat(outputs), torch.cat(covariances)

    def _chunk(
        self, x: Inputs, wanted: OutputCovariance, differentiable: bool, known: ShapeCache
    ) -> tuple[Tensor, Tensor]:
        done: str | None = None
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
            tied = None if differentiable or done is not None else self._tied(observer, f, wanted)
            if tied is not None:
                found, kept = self._of_tied(observer, tied, f.detach())
                covariance = found.of_kind(f.detach(), wanted)
            elif done is None or len(self._layers) > 1:
                few = None if done is None or differentiable else _few_features(observer, f)
                if few is None:
                    rest, kept = self._propagated(observer, f, wanted, class_axis, done)
                else:
                    of_features, kept = self._of_features(observer, few)
                    rest, kept = of_outputs(few.weight, of_features, f.detach(), wanted), kept + 2 * f[0].numel()
                covariance = rest if covariance is None else covariance + rest
            known.layout, known.kept_per_example = forward.layout, kept
        assert covariance is not None
        return (f if differentiable else f.detach()), (covariance if differentiable else covariance.detach())

    def factored(self, x: Inputs) -> tuple[Tensor, FactoredCovariance] | None:
        """Return the outputs, and their covariances at each position without forming them.

        None where the outputs are not those of a linear layer of the posterior with fewer features than outputs.

        Args:
            x: A few inputs.
        """
        try:
            return self._factored(x)
        except _TooManyError:
            axis, shared = self._layout.input_axis, self._layout.shared_inputs
            ones = [self._factored(x.examples(axis, i, i + 1, shared)) for i in range(x.count(axis))]
            parts = [one for one in ones if one is not None]
            return torch.cat([f for f, _ in parts]), FactoredCovariance.joined([covariance for _, covariance in parts])

    def _factored(self, x: Inputs) -> tuple[Tensor, FactoredCovariance] | None:
        with NetworkForward(self._model, self._layers, layout=self._layout) as forward:
            f = forward(x)
            observer = forward.observer
            tied = self._tied(observer, f, OutputCovariance.BY_POSITION)
            if tied is not None:
                found = self._of_tied(observer, tied, f.detach())[0]
                variances = found.of_kind(f.detach(), OutputCovariance.VARIANCES).view(found.spread.shape)
                return f.detach(), replace(found, diagonal=variances)
            last = self._wide_layer(observer, f)
            if last is None:
                return None
            layer, weight = last
            basis, spread, variances = factored_part(
                self._inverses[layer.name], observer.layer_batches(len(f))[layer.name]
            )
            features: Tensor | None = None
            if len(self._layers) > 1:
                few = _few_features(observer, f)
                assert few is not None
                features = self._of_features(observer, few)[0].detach().flatten(0, -3)
                variances = variances + of_outputs(weight, features, variances, OutputCovariance.VARIANCES)
            return f.detach(), FactoredCovariance(weight, features, basis, spread, variances)

    def n_features(self, x: Inputs) -> int | None:
        """Return the number of features where `factored` has a result, else None."""
        with NetworkForward(self._model, self._layers, layout=self._layout) as forward:
            f = forward(x)
            tied = self._tied(forward.observer, f, OutputCovariance.BY_POSITION)
            if tied is not None:
                return tied.weight.shape[1]
            last = self._wide_layer(forward.observer, f)
            return None if last is None else last[1].shape[1]

    def _wide_layer(self, observer: NetworkObserver, f: Tensor) -> tuple[Layer, Tensor] | None:
        """Return an output layer with fewer features than outputs, and its weight, if that is all that `factored` needs."""
        layer = observer.output_layer(f)
        weight = None if layer is None else layer.weight_of_inputs
        if layer is None or weight is None or self._likelihood.class_axis_of(f) not in (None, f.ndim - 1):
            return None
        others = len(self._layers) > 1 and _few_features(observer, f) is None
        if others or weight.shape[1] >= f.shape[-1] or self._inverses[layer.name].bases() is None:
            return None
        return layer, weight

    def _tied(self, observer: NetworkObserver, f: Tensor, wanted: OutputCovariance) -> _Features | None:
        """Return the features that a tied table makes outputs of, if the wanted covariances go through them."""
        if wanted is OutputCovariance.JOINT or (wanted is OutputCovariance.BY_EXAMPLE and f.ndim > 2):
            return None
        if wanted.by_class and self._likelihood.class_axis_of(f) != f.ndim - 1:
            return None
        few = _tied_features(observer, f)
        return few if few is not None and isinstance(self._inverses[few.layer.name].block, DiagonalBlock) else None

    def _of_tied(self, observer: NetworkObserver, few: _Features, f: Tensor) -> tuple[FactoredCovariance, int]:
        """Return the covariances of outputs that a tied table makes, and what was kept per example."""
        inverse = self._inverses[few.layer.name]
        h = few.features.detach().reshape(len(f), -1, few.features.shape[-1]).to(inverse.weights)
        look_ups = TiedLookUps(inverse, h)
        axis = None if few.features.ndim == 2 else few.features.ndim - 1
        wanted = OutputCovariance.BY_POSITION
        terms: dict[str, LayerCovariance] = {few.layer.name: look_ups}
        features, kept = self._propagated(observer, few.features, wanted, axis, None, few.layer, terms)
        basis, spread = tied_part(inverse, h)
        found = FactoredCovariance(
            few.weight, features.detach().flatten(0, -3), basis, spread, spread, look_ups.products()
        )
        return found, kept + 2 * f[0].numel()

    def _of_features(self, observer: NetworkObserver, few: _Features) -> tuple[Tensor, int]:
        """Return the covariances of the features at each position, ``(N, ..., d, d)``, and what was kept per example."""
        axis = None if few.features.ndim == 2 else few.features.ndim - 1
        wanted, layer = OutputCovariance.BY_POSITION, few.layer
        return self._propagated(observer, few.features, wanted, axis, layer.name, behind=layer)

    def _check_size(self, n: int, terms: Iterable[LayerCovariance], n_outputs: int) -> None:
        """Check that the terms will not keep several times what they should.

        Raises:
            _TooManyError: If they will.
        """
        kept = sum(term.kept_per_example(n_outputs) for term in terms)
        budget = layer_covariance.BUDGET if self._budget is None else self._budget
        if n * kept > budget:
            raise _TooManyError(kept)

    def _propagated(
        self,
        observer: NetworkObserver,
        f: Tensor,
        wanted: OutputCovariance,
        class_axis: int | None,
        done: str | None,
        behind: Layer | None = None,
        terms: dict[str, LayerCovariance] | None = None,
    ) -> tuple[Tensor, int]:
        """Return the parts of all layers that need gradients, and the number of numbers that they kept per example.

        Args:
            observer: The observer of the pass.
            f: The outputs, or the features behind a last layer.
            wanted: Which of their covariances are wanted.
            class_axis: The axis whose elements belong together.
            done: The layer whose part is known.
            behind: The last layer, if ``f`` are its features.
            terms: The terms of some of the layers, if they are special.
        """
        terms = {} if terms is None else terms

        def receive(gradients: LayerGradients) -> None:
            name = gradients.layer.name
            if name == done:
                return
            if name not in terms:
                terms[name] = covariance_of_layer(self._inverses[name], gradients.batch, wanted)
            terms[name].add(gradients)

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
                observer.backward(f, direction, receive, retain_graph=passes > 0, behind=behind)
                if behind is not None and n > 1 and element == group[0]:
                    self._check_size(n, terms.values(), len(group))
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


class _TooManyError(Exception):
    """Examples that are too many to be processed at once."""

    def __init__(self, kept_per_example: int) -> None:
        super().__init__()
        self.kept_per_example = kept_per_example


class _Features(NamedTuple):
    """An output layer, its input, and its weight."""

    layer: Layer
    features: Tensor
    weight: Tensor


def _tied_features(observer: NetworkObserver, f: Tensor) -> _Features | None:
    """Return the features that a tied table makes outputs of, if there are fewer of them than outputs at a position."""
    return _features_of(observer, observer.tied_output_layer(f), f)


def _few_features(observer: NetworkObserver, f: Tensor) -> _Features | None:
    """Return the features of the output layer if there are fewer of them than outputs at a position."""
    return _features_of(observer, observer.output_layer(f), f)


def _features_of(observer: NetworkObserver, layer: Layer | None, f: Tensor) -> _Features | None:
    h = None if layer is None else observer.features(layer)
    weight = None if layer is None else layer.weight_of_inputs
    if layer is None or h is None or weight is None or h.shape[-1] >= f.shape[-1] or h.ndim != f.ndim:
        return None
    return _Features(layer, h, weight)


def _subtracted(f: Tensor, wanted: OutputCovariance) -> Tensor | None:
    """Return the weights of what is subtracted from each of the outputs ``f``, ``(N, C)``, or None if nothing is."""
    if wanted is OutputCovariance.CENTERED_VARIANCES:
        return torch.full_like(f, 1 / f.shape[1])
    if wanted is OutputCovariance.MARGIN_VARIANCES:
        return torch.zeros_like(f).scatter_(1, f.argmax(1, keepdim=True), 1)
    return None
