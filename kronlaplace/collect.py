"""Passes through the user's network in which the wanted layers report their inputs and output gradients.

The mechanism is BackPACK's: a `BackpropExtension` that runs, layer by layer, during the backward pass. It is called
from a hook on the layer's output *tensor*, not from a module's full backward hook as `backpack.extend` would install,
so networks work unmodified: in-place activations, residual connections, any code between the layers. Modules that hide
their layers in one fused call (recurrent layers, attention) run written out while a pass is recorded.

Only output gradients are computed, never weight gradients, and each is handed on and freed as soon as it is there. On
which axis of a call the examples are is found out in `example_axes`.

All of this happens on a private `Replica` of the network: its own modules carry no hook, and other threads may use it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from kronlaplace.batches import Inputs, device_of, tensors_of
from kronlaplace.example_axes import ExampleAxes, Layout, UnknownAxisError
from kronlaplace.last_layer import LOG_SOFTMAX, can_be_last, maker_of
from kronlaplace.layers import Call, Calls, Layer, UnusableLayersError, written_out
from kronlaplace.memory_layout import with_contiguous_gradient
from kronlaplace.precision import alike, autocast_dtype
from kronlaplace.replica import Replica

__all__ = ["Receiver", "Recorder", "check_mode", "check_model", "recording"]

Receiver = Callable[[Calls, list[Tensor]], None]
"""Takes all calls of a layer in the forward pass and, call by call, the gradients at their outputs, examples first."""

_ATTENTION_KERNEL = threading.RLock()
"""Torch's choice of an attention kernel belongs to the process, and only one pass at a time may change it."""


class _HandOn(ModuleExtension):  # type: ignore[misc]  # BackPACK is not typed
    """BackPACK's rule for one layer type: hand the output gradient on."""

    def __call__(
        self,
        extension: BackpropExtension,
        module: nn.Module,
        g_inp: tuple[Tensor, ...],
        g_out: tuple[Tensor, ...],
    ) -> None:
        assert isinstance(extension, OutputGradients)
        extension.hand_on(g_out[0])


class OutputGradients(BackpropExtension):  # type: ignore[misc]  # BackPACK is not typed
    """BackPACK extension that hands each layer's output gradient to a function and keeps nothing."""

    def __init__(self, module_types: set[type[nn.Module]]) -> None:
        super().__init__(savefield="", module_exts=dict.fromkeys(module_types, _HandOn()))
        self.hand_on: Callable[[Tensor], None]

    def report(self, module: nn.Module, hand_on: Callable[[Tensor], None], grad: Tensor) -> None:
        """Run the extension for one output gradient of ``module``."""
        self.hand_on = hand_on
        self(module, (), (grad,))

    def expects_backpropagation_quantities(self) -> bool:
        return False


class Recorder:
    """One forward pass at a time, and any number of backward passes through it. Made by `recording`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        receive: Receiver,
        *,
        differentiable: bool = False,
        layout: Layout | None = None,
    ) -> None:
        self._model = model
        self._receive = self._receiver = receive
        self._grads: dict[str, dict[int, Tensor]] = {}
        self._output_layer: Layer | None = None
        self._differentiable = differentiable
        self._axes = ExampleAxes(Layout() if layout is None else layout)
        self._muted = False
        self._running = False
        self.observe(layers)

    def observe(self, layers: Sequence[Layer]) -> None:
        """Let these layers report from now on, in a new replica of the network; the last pass is forgotten."""
        self._layers = list(layers)
        self._extension = OutputGradients({type(m) for layer in layers for m in layer.modules})
        wanted = [p for layer in layers for m in layer.modules for p in m.parameters(recurse=False)]
        self._replica = Replica(self._model, wanted)
        slots: dict[nn.Module, dict[int, Layer]] = {}
        for layer in layers:
            for module in layer.modules:
                slots.setdefault(module, {})[layer.slot] = layer
        for module in self._model.modules():
            replica: Any = self._replica(module)
            forward = written_out(module)
            mine = slots.get(module, {})
            if forward is not None:
                # Also where only a child is wanted: attention calls its output projection as a function.
                inside = set(module.modules())
                names = [layer.name for layer in layers if inside.intersection(layer.modules)]
                if names:
                    report = _BlockReport(self, mine)
                    replica.forward = partial(self._run_written_out, names, partial(forward, replica, report))
            elif mine:
                replica.register_forward_hook(partial(self._observe, mine[0]), with_kwargs=True)
        self.clear()

    @property
    def layout(self) -> Layout:
        """What the passes have found out about the network."""
        return self._axes.layout

    @property
    def layers(self) -> list[Layer]:
        """The layers that report."""
        return list(self._layers)

    def leave_out(self, names: Collection[str]) -> None:
        """Go on without some of the layers; the last pass is forgotten."""
        self.observe([layer for layer in self._layers if layer.name not in names])

    @property
    def calls(self) -> dict[str, Calls]:
        """The calls of the last forward pass, by layer name."""
        return {layer.name: Calls(layer, self._calls[layer.name]) for layer in self._layers}

    @property
    def output_layer(self) -> Layer | None:
        """The linear layer whose output is the network's own in the last forward pass, untouched, if there is one."""
        return self._output_layer

    def last_layer(self, outputs: Tensor) -> Layer | None:
        """The layer whose output in the last pass is the network's, as it is or arranged anew, if it is one of these."""
        maker = maker_of(outputs, also=(LOG_SOFTMAX,))
        return next((layer for layer in self._layers if can_be_last(layer) and maker in self._makers[layer.name]), None)

    def forward(self, inputs: Inputs) -> Tensor:
        """Run the network with its graph.

        Returns:
            The outputs as the network gives them; the first axis counts examples.

        Raises:
            TypeError: If the output is not a tensor, nor an object with a tensor ``logits``.
            ValueError: If its first axis does not count the examples.
            UnusableLayersError: If a wanted layer did not run, ran without gradients, or is used in a way that is not
                supported.
            RuntimeError: If the outputs carry no gradients, or the network changes its inputs only now and then.
        """
        with torch.inference_mode(False), torch.enable_grad():  # gradients on, wherever the caller is
            inputs = inputs if self._differentiable else inputs.map(_ordinary)
            try:
                outputs = self._record(inputs)
            except UnknownAxisError:
                outputs = self._record_in_doubt(inputs)
        if outputs.ndim == 0 or len(outputs) != self._axes.n_examples:
            raise ValueError(
                f"the model must return one row of outputs per example; for {self._axes.n_examples} examples it returned "
                f"outputs of shape {tuple(outputs.shape)}. Keep the examples on the first axis of inputs and outputs."
            )
        missing = [layer.name for layer in self._layers if not self._calls[layer.name]]
        if missing:
            raise UnusableLayersError(
                f"these layers have trainable parameters but were not called as modules in the forward pass: {missing}. "
                "Their parameters are used by a function, or not at all.",
                dict.fromkeys(missing, "its module is not called: a function uses its parameters, or nothing does"),
            )
        if not outputs.requires_grad:
            raise RuntimeError(
                "the model's outputs carry no gradients: it detaches them, or runs under torch.no_grad()."
            )
        self._output_layer = self._find_output_layer(outputs)
        return outputs

    def run_plainly(self, inputs: Inputs) -> Tensor:
        """The outputs alone: nothing is recorded, and the last pass stays."""
        with torch.inference_mode(False), torch.no_grad():
            return self._axes.unseen(self._run, inputs.map(_ordinary))

    def find_shared_inputs(self, inputs: Inputs, outputs: Tensor) -> None:
        """Find input tensors that are the same for all examples though they have as many rows as there are examples.

        Where several tensors count the examples, the network is run on the first half of them: its outputs must be the
        first half of ``outputs``. Where they are not, the tensors behind the first are left whole, all and one by one.

        Raises:
            ValueError: If the outputs of an example depend on the other examples however the inputs are cut.
        """
        axis, n = self.layout.input_axis, len(outputs)
        by_example = inputs.by_example(axis, self.layout.shared_inputs)
        if len(by_example) < 2 or n < 2:
            return
        expected = outputs[: n // 2]

        def fits(shared: tuple[str, ...]) -> bool:
            half = inputs.examples(axis, 0, n // 2, (*self.layout.shared_inputs, *shared))
            try:
                found = self.run_plainly(half)
            except (RuntimeError, ValueError, IndexError):
                return False
            return alike(found, expected, rtol=1e-2, atol=1e-4)

        behind = by_example[1:]
        for shared in ((), *((path,) for path in behind), tuple(behind)):
            if fits(shared):
                self._axes.add_shared_inputs(shared)
                return
        raise ValueError(
            f"the outputs of {n // 2} examples change when the other {n - n // 2} are taken away, so that predictions "
            "would depend on what else is in a batch. The forward pass mixes examples, or an input is the same for all "
            "examples; keep such an input as a buffer of the model."
        )

    def _find_output_layer(self, outputs: Tensor) -> Layer | None:
        for layer in self._layers:
            reference, version = self._outputs.get(layer.name, (None, 0))
            if reference is not None and reference() is outputs and outputs._version == version:
                return layer
        return None

    def backward(
        self, outputs: Tensor, direction: Tensor, *, retain_graph: bool, receive: Receiver | None = None
    ) -> None:
        """Propagate one direction ``d``, of the outputs' shape, back; every layer's gradients go to the receiver.

        Args:
            outputs: The outputs of the last forward pass.
            direction: ``d``.
            retain_graph: Whether another direction follows.
            receive: Another receiver for this direction.

        Raises:
            UnusableLayersError: If the outputs do not depend on a wanted layer. All others have been received.
        """
        self._receiver = self._receive if receive is None else receive
        self._grads = {layer.name: {} for layer in self._layers if len(self._calls[layer.name]) > 1}
        self._reported.clear()
        # The graph starts at the wanted layers. Asking for the gradients of those that have none of the others before
        # them visits all, and the engine skips everything else, above all the gradients of the weights.
        torch.autograd.grad(
            outputs,
            self._sources or self._others,  # no layer is first if the network itself asks for gradients of its inputs
            grad_outputs=direction.reshape(outputs.shape),
            retain_graph=retain_graph or self._differentiable,
            create_graph=self._differentiable,
            allow_unused=True,
        )
        for layer in self._layers:
            grads = self._grads.pop(layer.name, None)
            if grads:  # the outputs may not depend on some of the calls
                calls = self._calls[layer.name]
                self._receiver(Calls(layer, [calls[i] for i in sorted(grads)]), [grads[i] for i in sorted(grads)])
        silent = [layer.name for layer in self._layers if layer.name not in self._reported]
        if silent:
            raise UnusableLayersError(
                f"the network's outputs do not depend on these layers: {silent}. A detach() or an unused branch may cut "
                "them off.",
                dict.fromkeys(silent, "the network's outputs do not depend on it"),
            )

    def parameter_gradients(self, outputs: Tensor, direction: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Gradients of all blocks' parameters along a direction as autograd has them, by block as ``W̄``; keeps the graph."""
        parameters = [self._replica(p) for layer in self._layers for p in layer.parameters.values()]
        grads = self._unreported(outputs, parameters, direction.reshape(outputs.shape))
        filled = iter(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True))
        del grads
        return (
            (layer.name, layer.assemble({name: next(filled) for name in layer.parameters})) for layer in self._layers
        )

    def bypassed(self, outputs: Tensor) -> list[str]:
        """Layers that the outputs depend on past the replica, through the user's own parameters; keeps the graph."""
        names = [(layer.name, p) for layer in self._layers for p in layer.parameters.values()]
        grads = self._unreported(outputs, [p for _, p in names], torch.zeros_like(outputs))
        return list(dict.fromkeys(name for (name, _), g in zip(names, grads, strict=True) if g is not None))

    def clear(self) -> None:
        """Forget the last pass."""
        self._calls: dict[str, list[Call]] = {layer.name: [] for layer in self._layers}
        self._makers: dict[str, list[Any]] = {layer.name: [] for layer in self._layers}
        self._sources: list[GradientEdge] = []
        self._others: list[GradientEdge] = []
        self._outputs: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._output_layer = None
        self._grads = {}
        self._reported: set[str] = set()
        self._axes.clear()

    def stop(self) -> None:
        """Forget everything and take nothing more; the user may still differentiate through a graph that was recorded."""
        self._muted = True
        self.clear()

    def _record(self, inputs: Inputs) -> Tensor:
        self.clear()
        given = self._given(inputs)
        self._axes.begin(given)
        return self._run(given)

    def _record_in_doubt(self, inputs: Inputs) -> Tensor:
        """`_record`, after a look at where the examples are."""
        plain = self._axes.look(lambda some: self._run(self._given(some)), inputs)
        try:
            return self._axes.record(partial(self._record, inputs), self._unreported, plain)
        except UnknownAxisError as error:
            raise self._axes.unusable(error) from None

    def _given(self, inputs: Inputs) -> Inputs:
        """What the network is called with: copies, unless it is known to leave its inputs as they are."""
        return inputs if self.layout.changes_inputs is False else inputs.map(torch.clone)

    def _unreported(
        self, outputs: Tensor, tensors: Sequence[Tensor], direction: Tensor | None = None
    ) -> Sequence[Tensor | None]:
        """Gradients as autograd has them, past the receiver; keeps the graph."""
        self._muted = True
        try:
            return torch.autograd.grad(outputs, tensors, grad_outputs=direction, retain_graph=True, allow_unused=True)
        finally:
            self._muted = False

    def _run(self, inputs: Inputs) -> Tensor:
        versions = [t._version for t in tensors_of(inputs)]
        self._running = True
        try:
            with _differentiable_attention() if self._differentiable else nullcontext():
                outputs = inputs.run(self._replica.model)
        finally:
            self._running = False
        changed = versions != [t._version for t in tensors_of(inputs)]
        if changed and self.layout.changes_inputs is False:
            raise RuntimeError(
                "the model changed its inputs in place, which it did not do in the first batch, and these were not a copy. "
                "Let its forward begin with a clone of what it changes."
            )
        if self.layout.changes_inputs is None:
            self._axes.note_change_of_inputs(changed)
        return outputs

    def _observe(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Forward hook: report the call, with the examples on the first axis; may have to give another output."""
        x = args[0] if args else kwargs["input"]
        if self._axes.watching:
            self._axes.see(layer, x)
            return None
        place = self._axes.of_call(layer, len(self._calls[layer.name]), x)
        if place is None:
            x, output = self._axes.copied(x, output)
            return self._report(layer, x, output, module)
        return self._report(layer, x, output, module, *place)

    def _report(
        self,
        layer: Layer,
        x: Tensor,
        output: Tensor,
        module: nn.Module,
        axis: int = 0,
        fold: int = 1,
        *,
        is_source: bool = False,
    ) -> Tensor:
        """Keep the input, and have the extension run when the gradient of the output is there.

        Returns:
            The output that the network must go on with.
        """
        if not output.requires_grad:
            raise UnusableLayersError(
                f"layer {layer.name!r} ran without gradients (inside torch.no_grad()?).",
                {layer.name: "it runs without gradients, inside torch.no_grad() for example"},
            )
        calls = self._calls[layer.name]
        index = len(calls)
        calls.append(Call(self._kept(x).movedim(axis, 0), fold, autocast_dtype(x.device)))
        if index == 0 and axis == 0 and fold == 1 and isinstance(layer.module, nn.Linear) and layer.factors:
            self._outputs[layer.name] = weakref.ref(output), output._version
        else:
            self._outputs.pop(layer.name, None)
        hooked = output
        if output._is_view() and 0 not in output.stride():  # what was expanded cannot be changed in place
            # If a view is changed in place, autograd rewrites the history that it has, and a hook on it is never called
            # again; one on its base is, if the base has the same numbers in the same order. Else the view is given up.
            base = output._base
            if base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
                hooked = base
            elif not is_source:
                hooked = output = output.clone()
        # With inputs that carry a gradient no layer is the first, and all must be asked for.
        first = is_source or self._differentiable or not x.requires_grad
        (self._sources if first else self._others).append(get_gradient_edge(hooked))
        hand_on = partial(self._take, layer, index, axis, output.shape)
        self._makers[layer.name].append(maker_of(output))
        hooked.register_hook(lambda grad: self._extension.report(module, hand_on, grad))
        return output

    def _take(self, layer: Layer, index: int, axis: int, shape: torch.Size, grad: Tensor) -> None:
        if self._muted:
            return
        if self._running:
            reason = "the network takes derivatives inside its forward pass, through it"
            raise UnusableLayersError(
                f"the network takes derivatives inside its forward pass, through layer {layer.name!r}: its outputs then "
                "depend on the weights in ways that the layers' inputs and outputs do not show. Fit a network that returns "
                "what is differentiated, and differentiate its predictions, predict(x, differentiable=True).",
                {layer.name: reason},
            )
        grad = self._kept(grad).reshape(shape).movedim(axis, 0)
        self._reported.add(layer.name)
        if layer.name in self._grads:
            self._grads[layer.name][index] = grad
        else:
            self._receiver(Calls(layer, self._calls[layer.name]), [grad])

    def _kept(self, tensor: Tensor) -> Tensor:
        return with_contiguous_gradient(tensor) if self._differentiable else tensor.detach()

    @staticmethod
    def _run_written_out(names: list[str], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward pass of a module that runs written out, with these layers in it."""
        try:
            return forward(*args, **kwargs)
        except UnusableLayersError:
            raise
        except NotImplementedError as error:
            raise UnusableLayersError(
                f"layers {names}: {error}", dict.fromkeys(names, str(error).partition(":")[0].rstrip("."))
            ) from None

    def _report_block(self, layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Report a call from a module that runs written out; its examples are on the first axis."""
        if self._axes.watching:
            return
        self._axes.check_first(layer, module, x)
        self._report(layer, x, output, module, is_source=True)


class _BlockReport:
    """What a module that runs written out reports to."""

    def __init__(self, recorder: Recorder, layers: Mapping[int, Layer]) -> None:
        self._recorder = recorder
        self._layers = layers

    def __call__(self, slot: int, x: Tensor, output: Tensor) -> None:
        if slot in self._layers:
            layer = self._layers[slot]
            self._recorder._report_block(layer, layer.module, x, output)

    def probe(self, slot: int, zeros: Tensor) -> Tensor:
        return zeros.requires_grad_() if slot in self._layers else zeros


@contextmanager
def recording(
    model: nn.Module,
    layers: Sequence[Layer],
    receive: Receiver,
    *,
    differentiable: bool = False,
    layout: Layout | None = None,
) -> Iterator[Recorder]:
    """Let the layers of ``model`` report to ``receive`` while the context lasts.

    With ``differentiable`` all that is reported, inputs and output gradients, can be differentiated with respect to the
    network's inputs. ``layout`` is what earlier passes over the same network have found out; what is found in this one is
    in the recorder's. Passes run on a replica of the network: the model itself, its parameters, and other threads that use
    it never notice, and there is nothing to be undone when the context ends.
    """
    recorder = Recorder(model, layers, receive, differentiable=differentiable, layout=layout)
    try:
        yield recorder
    finally:
        recorder.stop()


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Fused attention kernels have no second derivatives; torch's own formulas have."""
    with _ATTENTION_KERNEL, sdpa_kernel(SDPBackend.MATH):
        yield


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd can keep, without a graph of its own."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def check_model(model: nn.Module) -> None:
    """Refuse a model that has no Fisher as it stands: see `check_mode`, and its parameters must be finite.

    Raises:
        TypeError: If it is not a module.
        ValueError: Otherwise, with what to do; or if its parameters are not on one device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    device_of(model)
    inference = [name for name, p in model.named_parameters() if p.is_inference()]
    if inference:
        raise ValueError(
            f"these parameters were made under torch.inference_mode() and cannot be differentiated: {inference}. Make and "
            "load the model outside of it (copy.deepcopy(model) there will do)."
        )
    check_mode(model)
    finite = torch.stack([torch.isfinite(p).all() for p in model.parameters()])
    if not finite.all():
        bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
        raise ValueError(
            f"these parameters have NaN or infinite values: {bad}. The training diverged, or a file is bad."
        )


def check_mode(model: nn.Module) -> None:
    """Refuse a model whose outputs are random or depend on the rest of the batch; looks at no tensor.

    Raises:
        ValueError: Naming the module, with what to do.
    """
    for name, module in model.named_modules():
        where = f"module {name!r} ({type(module).__name__})"
        if isinstance(module, _BATCH_NORMS) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{where} normalises with the statistics of the batch, so one example's output depends on the others and "
                "there is no per-example Fisher. Call model.eval() first"
                + (" and give the module running statistics." if module.running_mean is None else ".")
            )
        if module.training and _dropout_probability(module) > 0:
            raise ValueError(f"{where} is in training mode, so the outputs are random. Call model.eval() first.")


def _dropout_probability(module: Any) -> float:
    if isinstance(module, _DROPOUTS):
        return float(module.p)
    return float(module.dropout) if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) else 0.0
