"""Passes through the user's network in which the wanted layers report their inputs and output gradients.

The mechanism is BackPACK's: a `BackpropExtension` that runs, layer by layer, during the backward pass. It is called
from a hook on the layer's output *tensor*, not from a module's full backward hook as `backpack.extend` would install,
so networks work unmodified: in-place activations, residual connections, any code between the layers. Modules that hide
their layers in one fused call (recurrent layers, attention) run written out while a pass is recorded.

Only output gradients are computed, never weight gradients, and each is handed on and freed as soon as it is there. On
which axis of a call the examples are is found out in `example_axes`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from kronlaplace.batches import Inputs, device_of
from kronlaplace.example_axes import ExampleAxes, UnknownAxisError
from kronlaplace.layers import Call, Calls, Layer, written_out

__all__ = ["Receiver", "Recorder", "check_mode", "check_model", "recording"]

Receiver = Callable[[Calls, list[Tensor]], None]
"""Takes all calls of a layer in the forward pass and, call by call, the gradients at their outputs, examples first."""


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
        axes: ExampleAxes | None = None,
    ) -> None:
        self._model = model
        self._layers = list(layers)
        self._receive = receive
        self._differentiable = differentiable
        self._outputs: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._output_layer: Layer | None = None
        self._extension = OutputGradients({type(m) for layer in layers for m in layer.modules})
        self._calls: dict[str, list[Call]] = {}
        self._sources: list[GradientEdge] = []
        self._others: list[GradientEdge] = []
        self._grads: dict[str, dict[int, Tensor]] = {}
        self._reported: set[str] = set()
        self._muted = False
        self._running = False
        self._axes = ExampleAxes() if axes is None else axes

    @property
    def input_axis(self) -> int:
        """The axis of the inputs that counts the examples."""
        return self._axes.input_axis

    @property
    def calls(self) -> dict[str, Calls]:
        """The calls of the last forward pass, by layer name."""
        return {layer.name: Calls(layer, self._calls[layer.name]) for layer in self._layers}

    @property
    def output_layer(self) -> Layer | None:
        """The linear layer whose output is the network's own in the last forward pass, untouched, if there is one."""
        return self._output_layer

    def forward(self, inputs: Inputs) -> Tensor:
        """Run the network with its graph.

        Returns:
            The outputs as the network gives them; the first axis counts examples.

        Raises:
            TypeError: If the output is not a tensor, nor an object with a tensor ``logits``.
            ValueError: If its first axis does not count the examples.
            NotImplementedError: If a layer is used in a way that is not supported.
            RuntimeError: If a wanted layer did not run, or ran without gradients.
        """
        with torch.inference_mode(False), torch.enable_grad():  # gradients on, wherever the caller is
            inputs = inputs if self._differentiable else _ordinary(inputs)
            try:
                outputs = self._record(inputs)
            except UnknownAxisError:
                outputs = self._record_in_doubt(inputs)
        if outputs.ndim == 0 or len(outputs) != self._axes.n_examples:
            raise ValueError(
                f"the model must return one row of outputs per example; for {self._axes.n_examples} examples it returned "
                f"outputs of shape {tuple(outputs.shape)}. Keep the examples on the first axis of inputs and outputs."
            )
        if not outputs.requires_grad:
            raise RuntimeError(
                "the model's outputs carry no gradients: it detaches them, or runs under torch.no_grad()."
            )
        missing = [layer.name for layer in self._layers if not self._calls[layer.name]]
        if missing:
            raise RuntimeError(
                f"these layers have trainable parameters but were not called as modules in the forward pass: {missing}. "
                "Their parameters are used by a function, or not at all; leave them out with layers=[...] or freeze them."
            )
        self._output_layer = self._find_output_layer(outputs)
        return outputs

    def _find_output_layer(self, outputs: Tensor) -> Layer | None:
        for layer in self._layers:
            reference, version = self._outputs.get(layer.name, (None, 0))
            if reference is not None and reference() is outputs and outputs._version == version:
                return layer
        return None

    def backward(self, outputs: Tensor, direction: Tensor, *, retain_graph: bool) -> None:
        """Propagate one direction ``d``, of the outputs' shape, back; every layer's gradients go to the receiver.

        Raises:
            RuntimeError: If the outputs do not depend on a wanted layer.
        """
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
                self._receive(Calls(layer, [calls[i] for i in sorted(grads)]), [grads[i] for i in sorted(grads)])
        silent = [layer.name for layer in self._layers if layer.name not in self._reported]
        if silent:
            raise RuntimeError(
                f"the network's outputs do not depend on these layers: {silent}. A detach() or an unused branch may cut "
                "them off; leave them out with layers=[...] or freeze them."
            )

    def parameter_gradients(self, outputs: Tensor, direction: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Gradients of all blocks' parameters along a direction as autograd has them, by block as ``W̄``; keeps the graph."""
        parameters = [p for layer in self._layers for p in layer.parameters.values()]
        grads = self._unreported(outputs, parameters, direction.reshape(outputs.shape))
        filled = iter(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True))
        del grads
        return (
            (layer.name, layer.assemble({name: next(filled) for name in layer.parameters})) for layer in self._layers
        )

    def clear(self) -> None:
        """Forget the last pass."""
        self._calls = {}
        self._sources, self._others = [], []
        self._axes.clear()
        self._outputs = {}
        self._grads = {}

    def stop(self) -> None:
        """Forget everything and take nothing more; the user may still differentiate through a graph that was recorded."""
        self._muted = True
        self.clear()

    def _record(self, inputs: Inputs) -> Tensor:
        self.clear()
        self._calls = {layer.name: [] for layer in self._layers}
        self._axes.begin(inputs)
        return self._run(inputs)

    def _record_in_doubt(self, inputs: Inputs) -> Tensor:
        """`_record`, after a look at where the examples are."""
        plain = self._axes.look(self._run, inputs)
        try:
            return self._axes.record(partial(self._record, inputs), self._unreported, plain)
        except UnknownAxisError as error:
            raise NotImplementedError(str(error)) from None

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
        self._running = True
        try:
            if not self._differentiable:
                return inputs.run(self._model)
            # Copies of the parameters take the gradients that are none of the user's; fused attention has no second ones.
            copies = {name: p.detach().requires_grad_(p.requires_grad) for name, p in self._model.named_parameters()}
            with sdpa_kernel(SDPBackend.MATH):
                return inputs.run(self._model, copies)
        finally:
            self._running = False

    def _observe(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Forward hook: report the call, with the examples on the first axis; may have to give the output that axis."""
        if not self._running:
            return None  # somebody else's call
        x = args[0] if args else kwargs["input"]
        if self._axes.looking:
            self._axes.see(layer, x)
            return None
        place = self._axes.of_call(layer, len(self._calls[layer.name]), x)
        if place is None:
            x, output = self._axes.copied(x, output)
            self._report(layer, x, output, module)
            return output
        self._report(layer, x, output, module, *place)
        return None

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
    ) -> None:
        """Keep the input, and have the extension run when the gradient of the output is there."""
        if not output.requires_grad:
            raise RuntimeError(
                f"layer {layer.name!r} ran without gradients (inside torch.no_grad()?); leave it out with layers=[...] or "
                "freeze it."
            )
        calls = self._calls[layer.name]
        index = len(calls)
        calls.append(Call(self._kept(x).movedim(axis, 0), fold))
        # With inputs that carry a gradient no layer is the first, and all must be asked for.
        first = is_source or self._differentiable or not x.requires_grad
        (self._sources if first else self._others).append(get_gradient_edge(output))
        if index == 0 and axis == 0 and fold == 1 and isinstance(layer.module, nn.Linear) and layer.factors:
            self._outputs[layer.name] = weakref.ref(output), output._version
        else:
            self._outputs.pop(layer.name, None)
        hand_on = partial(self._take, layer, index, axis)
        output.register_hook(lambda grad: self._extension.report(module, hand_on, grad))

    def _take(self, layer: Layer, index: int, axis: int, grad: Tensor) -> None:
        if self._muted:
            return
        if self._running:
            raise NotImplementedError(
                f"the network takes derivatives inside its forward pass, through layer {layer.name!r}: its outputs then "
                "depend on the weights in ways that the layers' inputs and outputs do not show. Fit a network that returns "
                "what is differentiated, and differentiate its predictions, predict(x, differentiable=True); or leave these "
                "layers out with layers=[...]."
            )
        grad = self._kept(grad).movedim(axis, 0)
        self._reported.add(layer.name)
        if layer.name in self._grads:
            self._grads[layer.name][index] = grad
        else:
            self._receive(Calls(layer, self._calls[layer.name]), [grad])

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor if self._differentiable else tensor.detach()

    def _report_block(self, layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Report a call from a module that runs written out; its examples are on the first axis."""
        if self._axes.looking or not self._running:
            return
        self._axes.check_first(layer, module, x)
        self._report(layer, x, output, module, is_source=True)


class _BlockReport:
    """What a module that runs written out reports to."""

    def __init__(self, recorder: Recorder, module: nn.Module, layers: Mapping[int, Layer]) -> None:
        self._recorder = recorder
        self._module = module
        self._layers = layers

    def __call__(self, slot: int, x: Tensor, output: Tensor) -> None:
        if slot in self._layers:
            self._recorder._report_block(self._layers[slot], self._module, x, output)

    def probe(self, slot: int, zeros: Tensor) -> Tensor:
        return zeros.requires_grad_() if slot in self._layers else zeros


@contextmanager
def recording(
    model: nn.Module,
    layers: Sequence[Layer],
    receive: Receiver,
    *,
    differentiable: bool = False,
    axes: ExampleAxes | None = None,
) -> Iterator[Recorder]:
    """Let the layers of ``model`` report to ``receive`` while the context lasts.

    With ``differentiable`` all that is reported, inputs and output gradients, can be differentiated with respect to the
    network's inputs. ``axes`` is where the examples were in earlier passes over the same network; what is found in
    this one is added. Hooks are taken off and the ``requires_grad`` of all parameters is as before when the context ends,
    however it ends. Parameters' ``.grad`` is never touched.
    """
    recorder = Recorder(model, layers, receive, differentiable=differentiable, axes=axes)
    wanted = {id(p) for layer in layers for m in layer.modules for p in m.parameters(recurse=False)}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in wanted]
    handles = []
    replaced: list[nn.Module] = []
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        blocks: dict[nn.Module, dict[int, Layer]] = {}
        for layer in layers:
            for module in layer.modules:
                blocks.setdefault(module, {})[layer.slot] = layer
        for module in model.modules():
            forward = written_out(module)
            mine = blocks.get(module, {})
            if forward is not None:
                # Also where only a child is wanted: attention calls its output projection as a function.
                if any(m in blocks for m in module.modules()):
                    replaced.append(module)
                    module.forward = partial(forward, module, _BlockReport(recorder, module, mine))
            elif mine:
                hook = partial(recorder._observe, mine[0])
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward
        for parameter in others:
            parameter.requires_grad_(True)
        recorder.stop()


def _ordinary(inputs: Inputs) -> Inputs:
    """Inputs that autograd can keep, without a graph of their own."""
    return inputs.map(lambda t: t.clone() if t.is_inference() else t.detach())


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
