"""An observer of the forward passes of a network that somebody else runs.

While it is attached, every observed layer reports its inputs, and afterwards the gradients at its outputs along any
direction can be taken from the graph of the pass. Nothing else about the network changes: the observer runs nothing and
freezes nothing, and the outputs, the gradients and the random numbers of a training loop are the same as without it.
Modules that hide their layers in one fused call (recurrent layers, attention) run written out while they are observed,
which gives the same results up to rounding.

Gradients come from hooks on the output *tensors* of layers, not from full backward hooks of modules, which do not allow
in-place activations. Only gradients of outputs are computed, never those of weights, and each is passed on and freed as
soon as it is available.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kronlaplace._memory_layout import with_contiguous_gradient
from kronlaplace._precision import autocast_dtype
from kronlaplace._wrappers import unwrapped
from kronlaplace.data.inputs import Inputs, tensors_of
from kronlaplace.layers import (
    BatchGradient,
    Layer,
    LayerBatch,
    LayerCall,
    LayerGradients,
    ModuleLayer,
    NetworkLayer,
    Report,
    UnusableLayersError,
    written_out,
)
from kronlaplace.layers.base import LinearLayer
from kronlaplace.layers.embedding import EmbeddingLayer
from kronlaplace.layers.unusable import NO_EFFECT, NOT_CALLED
from kronlaplace.network.example_axes import Doubt, Layout, ObservedInput, Place, copy_for_each_example, places_of
from kronlaplace.network.hooks import Hook, WrittenOut
from kronlaplace.network.last_layer import LOG_SOFTMAX, can_be_last, maker_of
from kronlaplace.network.padding import padding_mask

__all__ = ["NetworkObserver", "PerExampleGradients", "Receiver"]


Receiver = Callable[[LayerGradients], None]
"""Function that takes the inputs of one layer together with the gradients at its outputs."""

PerExampleGradients = Callable[[Tensor, bool], Mapping[str, Tensor | None]]
"""Function of a direction and of whether another one follows: each example's gradients, ``(N, q, p)`` by layer name."""


@dataclass
class _ObservedCall(ObservedInput):
    """Record of one call of a layer: its input, and what the observer needs for the backward pass."""

    output_shape: torch.Size = field(default_factory=torch.Size)
    edge: GradientEdge | None = None
    is_source: bool = False
    maker: Any = None
    output: weakref.ref[Tensor] | None = None
    output_version: int = 0
    source: Tensor | None = None
    source_version: int = 0
    autocast: torch.dtype | None = None


@dataclass
class _Pass:
    """Record of one forward pass."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    storages: frozenset[int] = frozenset()
    n_inputs: int | None = None
    all_edges: bool = False
    calls: dict[str, list[_ObservedCall]] = field(default_factory=dict)
    copies: list[Tensor] = field(default_factory=list)
    differentiated: list[str] = field(default_factory=list)
    places: Mapping[tuple[str, int], Place] | None = None

    @property
    def all_calls(self) -> list[_ObservedCall]:
        """The calls of all layers."""
        return [call for by_layer in self.calls.values() for call in by_layer]


class NetworkObserver:
    """Observer of the forward passes of a network; directions can be propagated back through the last observed pass.

    The observer is attached when it is constructed, and removes its hooks with `close` or at the end of a ``with`` block.
    `enabled` switches it off and on between passes; passes without gradients are not observed.

    Args:
        model: The network. Its parameters and flags stay as they are.
        layers: The layers to observe, from `find_layers`.
        layout: Where the examples are in inputs and calls, from `find_layout`. Needed only for networks whose shapes
            are ambiguous; an error says so.
        differentiable: Whether inputs and gradients carry graphs to the network's inputs.
        module_of: Function that maps each module of ``model`` to the one that runs in its place, if a copy of the network
            is run.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        *,
        layout: Layout | None = None,
        differentiable: bool = False,
        module_of: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        model = unwrapped(model)
        self.layers = list(layers)
        """The observed layers."""
        self.layout = Layout() if layout is None else layout
        """Where the examples are in inputs and calls."""
        self.enabled = True
        """Whether forward passes are observed."""
        self.per_example: PerExampleGradients | None = None
        """The gradients of each example with respect to the parameters of a `NetworkLayer`, in the last pass.

        None where somebody else runs the network: then these layers receive the gradient of the whole batch as if it were
        that of one example. With drawn labels its square has the right mean, since the gradients of different examples are
        independent and have the mean zero."""
        self._by_network = [layer for layer in self.layers if isinstance(layer, NetworkLayer)]
        self._differentiable = differentiable
        self._receive: Receiver | None = None
        self._depth = 0
        self._pending: dict[str, dict[int, Tensor]] = {}
        self._reported: set[str] = set()
        self._pass = _Pass()
        self._undo: list[Callable[[], None]] = []
        self._model = module_of(model)
        self._module_of: Callable[[Any], Any] = module_of
        parameters = (p for la in self.layers for p in (*la.parameters.values(), *la.merged_parameters.values()))
        self._n_parameters = len(set(map(id, parameters)))
        self._attach(model, module_of)

    def __repr__(self) -> str:
        state = "closed" if not self._undo else "enabled" if self.enabled else "disabled"
        return f"NetworkObserver({[layer.name for layer in self.layers]}, {state})"

    def __enter__(self) -> NetworkObserver:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks and forget the last pass; graphs of observed passes stay intact."""
        while self._undo:
            self._undo.pop()()
        self.enabled = False
        self._receive = None
        self.clear()

    def clear(self) -> None:
        """Forget the last pass."""
        for call in self._pass.all_calls:  # the graph's hooks hold the calls: a cycle that no garbage collector finds
            call.edge = call.maker = call.source = None
        self._pass = _Pass()
        self._pending = {}
        self.per_example = None

    # -- Results of the last forward pass --------------------------------------------------------------------------

    @property
    def sums_over_batch(self) -> bool:
        """Whether a `NetworkLayer` receives the gradient of the whole batch, so that examples must be independent."""
        return bool(self._by_network) and self.per_example is None

    @property
    def inputs(self) -> Mapping[str, Sequence[ObservedInput]]:
        """The inputs of all calls in the last forward pass, by layer name."""
        return self._pass.calls

    @property
    def edges(self) -> Mapping[str, Sequence[GradientEdge | None]]:
        """The place in the graph of the output of every call in the last forward pass, by layer name; None without one."""
        return {name: [call.edge for call in calls] for name, calls in self._pass.calls.items()}

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The positional and keyword arguments of the last forward pass, or None; they are released with it."""
        return self._pass.arguments

    @property
    def copies(self) -> Sequence[Tensor]:
        """The outputs that are the same for all examples and were copied for each example in the last pass."""
        return self._pass.copies

    def doubt(self, n_examples: int) -> Doubt | None:
        """Determine where the examples are in each call of the last pass.

        Args:
            n_examples: Number of examples in the pass.

        Returns:
            The first ambiguity, or None if all places are clear.

        Raises:
            UnusableLayersError: If a layer cannot have inputs of the shape that it had, or ran without gradients.
        """
        calls = self._pass.all_calls
        without = next((call.layer.name for call in calls if call.edge is None), None)
        if without is not None:
            raise UnusableLayersError(
                f"layer {without!r} ran without gradients (inside torch.no_grad()?).",
                {without: "it runs without gradients, inside torch.no_grad() for example"},
            )
        places, doubt = places_of(calls, n_examples, self.layout, self._pass.storages)
        self._pass.places = places
        return doubt

    def layer_batches(self, n_examples: int) -> dict[str, LayerBatch]:
        """Return the inputs of every layer in the last forward pass, by layer name.

        Args:
            n_examples: Number of examples in the pass, which is the length of the outputs.

        Raises:
            RuntimeError: If no pass was observed.
            UnusableLayersError: If layers did not run, took part in derivatives inside the forward pass, or have inputs
                whose example axis is ambiguous.
        """
        if self._pass.places is None:
            if self._pass.arguments is None:
                raise RuntimeError(
                    "no forward pass was observed: call the model with gradients enabled, while the observer is attached "
                    "and enabled, before its outputs are used."
                )
            doubt = self.doubt(n_examples)
            if doubt is not None:
                raise doubt.error(self.layout, hint=True)
        self.check_calls()
        return {
            layer.name: self._rows(layer, n_examples) if isinstance(layer, NetworkLayer) else self._batch(layer)
            for layer in self.layers
        }

    def check_calls(self) -> None:
        """Check that every layer ran as a module, and that no derivatives were taken inside the last forward pass.

        Raises:
            UnusableLayersError: If either condition fails.
        """
        if self._pass.differentiated:
            name = self._pass.differentiated[0]
            reason = "the network takes derivatives inside its forward pass, through it"
            raise UnusableLayersError(
                f"the network takes derivatives inside its forward pass, through layer {name!r}: its outputs then "
                "depend on the weights in ways that the layers' inputs and outputs do not show. Fit a network that returns "
                "the quantity that is differentiated, and differentiate its predictions: predict(x, differentiable=True).",
                {name: reason},
            )
        missing = [
            layer.name
            for layer in self.layers
            if not self._pass.calls.get(layer.name) and not isinstance(layer, NetworkLayer)
        ]
        if missing:
            raise UnusableLayersError(
                f"these layers have trainable parameters but were not called as modules in the forward pass: {missing}. "
                "Their parameters are used by a function, or not at all.",
                dict.fromkeys(missing, NOT_CALLED),
            )

    def output_layer(self, outputs: Tensor) -> Layer | None:
        """Return the linear layer whose unmodified output is the network's in the last pass, or None if there is none."""
        for layer in self.layers:
            calls = self._pass.calls.get(layer.name, ())
            if len(calls) != 1 or not can_be_last(layer) or layer.shares_weights_over_space:
                continue
            if self._makes(calls[0], outputs):
                return layer
        return None

    def tied_output_layer(self, outputs: Tensor) -> Layer | None:
        """Return the embedding that is looked up once, and whose table then makes the network's outputs by a product."""
        for layer in self.layers:
            calls = self._pass.calls.get(layer.name, ())
            products = [call for call in calls if call.x.is_floating_point()]
            twice = isinstance(layer, EmbeddingLayer) and len(calls) == 2 and len(products) == 1
            if twice and self._makes(products[0], outputs):
                return layer
        return None

    def _makes(self, call: _ObservedCall, outputs: Tensor) -> bool:
        """Return whether the unmodified output of a call is the network's."""
        place = (self._pass.places or {}).get((call.layer.name, call.index))
        untouched = call.output is not None and call.output() is outputs and outputs._version == call.output_version
        return place == (0, 1) and not call.copied and untouched

    def features(self, layer: Layer) -> Tensor | None:
        """Return the input of the layer that makes the outputs, with its graph.

        All else acts on the outputs through it alone. None if directions cannot be propagated back from there.
        """
        call = next(call for call in self._pass.calls[layer.name] if call.x.is_floating_point())
        if self._by_network or call.source is None or call.source._version != call.source_version:
            return None
        return call.source

    def last_layer(self, outputs: Tensor) -> Layer | None:
        """Return the observed layer whose output, possibly rearranged, is the network's in the last pass, or None."""
        maker = maker_of(outputs, also=(LOG_SOFTMAX,))
        for layer in self.layers:
            if can_be_last(layer) and any(call.maker is maker for call in self._pass.calls.get(layer.name, ())):
                return layer
        return None

    # -- Backward passes -------------------------------------------------------------------------------------------

    def backward(
        self,
        outputs: Tensor,
        direction: Tensor,
        receive: Receiver,
        *,
        retain_graph: bool,
        behind: Layer | None = None,
    ) -> None:
        """Propagate one direction ``d`` back through the last pass, and pass every layer's gradients to the receiver.

        `layer_batches` or `doubt` must have been called since the pass.

        Args:
            outputs: The outputs of the last forward pass.
            direction: The direction ``d``, with as many numbers as ``outputs``.
            receive: Function that takes the gradients, layer by layer.
            retain_graph: Whether the graph will be needed again.
            behind: The output layer, which receives nothing, if the direction starts at its `features`, in place of outputs.

        Raises:
            UnusableLayersError: If the outputs do not depend on a layer. The gradients of all other layers have then been
                received. (A `NetworkLayer` receives nothing if they do not depend on it.)
        """
        edges = [(call.edge, call.is_source) for call in self._pass.all_calls if call.edge is not None]
        # Asking for the gradients of calls that have no other layer before them visits all calls, and the engine skips
        # everything else, above all the gradients of the weights.
        sources = [] if self._pass.all_edges else [edge for edge, is_source in edges if is_source]
        sources = sources or [edge for edge, _ in edges]
        # Parameters that are anywhere before a layer make its inputs carry gradients, so it is not a source because of them.
        direct = {layer.name: self._direct_parameters(layer) for layer in self._by_network}
        n_sources = len(sources)
        self._pending = {name: {} for name, by_layer in self._pass.calls.items() if len(by_layer) > 1}
        self._reported.clear()
        self._receive = receive
        try:
            wanted: list[Any] = [*sources, *(p for parameters in direct.values() for p in parameters)]
            found = torch.autograd.grad(
                outputs,
                wanted,
                grad_outputs=direction.reshape(outputs.shape),
                retain_graph=retain_graph or self._differentiable,
                create_graph=self._differentiable,
                allow_unused=True,
            )
            for layer in self.layers:
                grads = self._pending.pop(layer.name, None)
                if grads:  # the outputs may not depend on some of the calls
                    indices = sorted(grads)
                    receive(self._batch(layer, indices).along([grads[i] for i in indices]))
            self._receive_by_network(len(outputs), direction, found[n_sources:], retain_graph)
        finally:
            self._receive = None
        silent = [la.name for la in self.layers if la.name not in self._reported and la not in self._by_network]
        silent = [name for name in silent if behind is None or name != behind.name]
        if silent:
            raise UnusableLayersError(
                f"the network's outputs do not depend on these layers: {silent}. A detach() or an unused branch may cut "
                "them off.",
                dict.fromkeys(silent, NO_EFFECT),
            )

    def _direct_parameters(self, layer: Layer) -> list[Tensor]:
        """Return the parameters of a layer in the network that runs, if they carry gradients there."""
        return [p for original in layer.parameters.values() if (p := self._module_of(original)).requires_grad]

    def _receive_by_network(
        self, n_examples: int, direction: Tensor, direct: Sequence[Tensor | None], retain_graph: bool
    ) -> None:
        """Pass the gradients of all layers that are not observed in calls to the receiver, if there are any."""
        assert self._receive is not None
        if not self._by_network:
            return
        if self.per_example is not None:
            grads = self.per_example(direction, retain_graph)
        else:
            rest = iter(direct)
            grads = {layer.name: _whole(layer, [next(rest) for _ in layer.parameters]) for layer in self._by_network}
        for layer in self._by_network:
            grad = grads[layer.name]
            if grad is None:
                continue
            if self.per_example is not None:
                self._receive(self._rows(layer, n_examples).along([grad]))
            else:
                self._receive(BatchGradient(self._rows(layer, 1), [grad], n_examples))

    def _rows(self, layer: Layer, n_examples: int) -> LayerBatch:
        """Return the batch of a layer whose inputs are not observed, and which needs none."""
        parameter = next(iter(layer.parameters.values()))
        return LayerBatch(layer, [LayerCall(parameter.new_empty(n_examples, 0))])

    def _batch(self, layer: Layer, indices: Sequence[int] | None = None) -> LayerBatch:
        assert self._pass.places is not None
        calls = []
        for index, call in enumerate(self._pass.calls[layer.name]):
            if indices is None or index in indices:
                axis, rows = self._pass.places[layer.name, index] or (0, 1)
                x = call.x.movedim(axis, 0)
                mask = padding_mask(self._pass.arguments, x) if rows == 1 and isinstance(layer, LinearLayer) else None
                calls.append(LayerCall(x, rows, call.autocast, mask))
        return LayerBatch(layer, calls)

    def _take(self, call: _ObservedCall, observed: _Pass, grad: Tensor) -> None:
        """Take the gradient at the output of a call, as the hook on that output."""
        layer = call.layer
        if self._receive is None or observed is not self._pass:  # somebody else's backward pass
            if self._depth and observed is self._pass and layer.name not in observed.differentiated:
                observed.differentiated.append(layer.name)
            return
        assert observed.places is not None
        axis, _ = observed.places[layer.name, call.index] or (0, 1)
        grad = self._kept(grad).reshape(call.output_shape).movedim(axis, 0)
        self._reported.add(layer.name)
        if layer.name in self._pending:
            self._pending[layer.name][call.index] = grad
        else:
            self._receive(self._batch(layer).along([grad]))

    # -- Forward passes --------------------------------------------------------------------------------------------

    def _attach(self, model: nn.Module, module_of: Callable[[nn.Module], nn.Module]) -> None:
        begin = self._model.register_forward_pre_hook(Hook(self, "_begin"), with_kwargs=True, prepend=True)
        end = self._model.register_forward_hook(Hook(self, "_end"), always_call=True)
        self._undo += [begin.remove, end.remove]
        layers_of: dict[nn.Module, dict[int, Layer]] = {}
        for layer in self.layers:
            if layer in self._by_network:
                continue
            for owner in layer.modules:
                layers_of.setdefault(owner, {})[layer.block_index] = layer
        for original in model.modules():
            module: Any = module_of(original)
            forward = written_out(original)
            mine = layers_of.get(original, {})
            if forward is not None:
                # Needed even if only a child is observed: attention calls its output projection as a function.
                inside = set(original.modules())
                names = [
                    la.name for la in self.layers if la not in self._by_network and inside.intersection(la.modules)
                ]
                if names:
                    self._undo.append(WrittenOut(self, module, names, forward, mine).attach())
            elif mine:
                handle = module.register_forward_hook(Hook(self, "_observe", mine[0]), with_kwargs=True)
                self._undo.append(handle.remove)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record that a forward pass of the network begins."""
        if not self.observes():
            return
        self._depth += 1
        if self._depth > 1:  # the network calls itself
            return
        self.clear()
        self._pass.arguments = args, kwargs
        tensors = tensors_of(Inputs([*args, kwargs]))
        self._pass.storages = frozenset(t.untyped_storage().data_ptr() for t in tensors)
        axis = self.layout.input_axis
        self._pass.n_inputs = tensors[0].shape[axis] if tensors and tensors[0].ndim > axis else None
        # No layer is the first if the inputs carry a gradient, nor if it comes after parameters that are not observed.
        trainable = sum(p.requires_grad for p in self._model.parameters())
        self._pass.all_edges = trainable > self._n_parameters or any(t.requires_grad for t in tensors)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record that a forward pass of the network has ended, with or without an error."""
        self._depth = max(0, self._depth - 1)

    def observes(self) -> bool:
        """Return whether a call made now would be observed."""
        return self.enabled and (self._depth > 0 or torch.is_grad_enabled())

    def report_for(self, layers: Mapping[int, Layer]) -> Report:
        """Return the callback to which a module that runs written out reports."""
        return _BlockReport(self, layers)

    def _observe(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Record the call of a module; return the output to use instead, or None to keep it."""
        if not self.observes():
            return None
        x = next(iter((*args, *kwargs.values())), None)  # other types call it hidden_states, for example
        several = isinstance(layer, ModuleLayer) and len(args) + len(kwargs) > 1
        if several or not isinstance(x, Tensor) or not isinstance(output, Tensor):
            reason = "its module does not map one tensor to another"
            raise UnusableLayersError(f"layer {layer.name!r} cannot be observed: {reason}.", {layer.name: reason})
        index = len(self._pass.calls.get(layer.name, ()))
        place = self.layout.places.get((layer.name, index), (0, 1))
        if place is None and self._pass.n_inputs is not None:
            x, output = copy_for_each_example(x, output, self._pass.n_inputs, self.layout)
            self._pass.copies.append(output)
            return self._note(layer, x, output, copied=True)
        return self._note(layer, x, output)

    def _note(
        self, layer: Layer, x: Tensor, output: Tensor, *, copied: bool = False, written_out: bool = False
    ) -> Tensor:
        """Record the input of a call, and register for the gradient at its output.

        Returns:
            The output with which the network must continue.
        """
        calls = self._pass.calls.setdefault(layer.name, [])
        call = _ObservedCall(
            layer,
            len(calls),
            self._kept(x),
            x.requires_grad,
            x.untyped_storage().data_ptr(),
            copied,
            written_out,
            output_shape=output.shape,
            autocast=autocast_dtype(x.device),
        )
        calls.append(call)
        if not output.requires_grad:
            return output
        call.output, call.output_version = weakref.ref(output), output._version
        if x.requires_grad:
            call.source, call.source_version = x, x._version
        hooked = output
        if output._is_view() and 0 not in output.stride():  # expanded tensors cannot be changed in place
            # If a view is changed in place, autograd rewrites its history, and a hook on it is never called again. A hook
            # on its base is, provided that the base has the same numbers in the same order; otherwise, clone the view.
            base = output._base
            if base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
                hooked = base
            elif not written_out:
                hooked = output = output.clone()
                call.output = None
        call.is_source = written_out or self._differentiable or not x.requires_grad
        call.edge = get_gradient_edge(hooked)
        call.maker = maker_of(output)
        hooked.register_hook(partial(self._take, call, self._pass))
        return output

    def _kept(self, tensor: Tensor) -> Tensor:
        return with_contiguous_gradient(tensor) if self._differentiable else tensor.detach()


def _whole(layer: Layer, grads: Sequence[Tensor | None]) -> Tensor | None:
    """Return the gradient of a batch as that of one example, ``(1, q, p)``; None if no parameter has one."""
    if all(grad is None for grad in grads):
        return None
    filled = {
        name: torch.zeros_like(p) if grad is None else grad.detach()
        for (name, p), grad in zip(layer.parameters.items(), grads, strict=True)
    }
    return layer.assemble(filled).to(layer.dtype).unsqueeze(0)


class _BlockReport:
    """Callback to which a module that runs written out reports."""

    def __init__(self, observer: NetworkObserver, layers: Mapping[int, Layer]) -> None:
        self._observer = observer
        self._layers = layers

    def __call__(self, block_index: int, x: Tensor, output: Tensor) -> None:
        if block_index in self._layers:
            self._observer._note(self._layers[block_index], x, output, written_out=True)

    def probe(self, block_index: int, zeros: Tensor) -> Tensor:
        return zeros.requires_grad_() if block_index in self._layers else zeros
