"""Passes through the user's network in which the wanted layers report their inputs and output gradients.

The mechanism is BackPACK's: a `BackpropExtension` that runs, layer by layer, during the backward pass. It is called
from a hook on the layer's output *tensor*, not from a module's full backward hook as `backpack.extend` would install,
so networks work unmodified: in-place activations, residual connections, any code between the layers. Modules that hide
their layers in one fused call (recurrent layers, attention) run written out while a pass is recorded.

Only output gradients are computed, never weight gradients, and each is handed on and freed as soon as it is there.
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

from kronlaplace.batches import Inputs, device_of, tensors_of, with_one_more
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


class _UnknownAxisError(Exception):
    """A call's shapes do not tell which axis the examples are on."""


class Recorder:
    """One forward pass at a time, and any number of backward passes through it. Made by `recording`."""

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], receive: Receiver, *, differentiable: bool = False
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
        self._copies: list[Tensor] = []
        self._grads: dict[str, dict[int, Tensor]] = {}
        self._reported: set[str] = set()
        self._muted = False
        self._n_examples = 0
        self._axes: _Axes | None = None
        self._shapes: list[tuple[str, Tensor]] | None = None
        self._input_storages: set[int] = set()

    @property
    def input_axis(self) -> int:
        """The axis of the inputs that counts the examples."""
        return 0 if self._axes is None else self._axes.inputs

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
            except _UnknownAxisError:
                self._axes, plain = self._look_for_axes(inputs)
                try:
                    outputs = self._record_with_copies(inputs, self._axes, plain)
                except _UnknownAxisError as error:
                    raise NotImplementedError(str(error)) from None
        if outputs.ndim == 0 or len(outputs) != self._n_examples:
            raise ValueError(
                f"the model must return one row of outputs per example; for {self._n_examples} examples it returned "
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
            self._sources,
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
        self._muted = True
        try:
            grads = torch.autograd.grad(
                outputs,
                parameters,
                grad_outputs=direction.reshape(outputs.shape),
                retain_graph=True,
                allow_unused=True,
            )
        finally:
            self._muted = False
        filled = iter(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True))
        del grads
        return (
            (layer.name, layer.assemble({name: next(filled) for name in layer.parameters})) for layer in self._layers
        )

    def clear(self) -> None:
        """Forget the last pass."""
        self._calls = {}
        self._sources = []
        self._copies = []
        self._outputs = {}
        self._grads = {}

    def stop(self) -> None:
        """Forget everything and take nothing more; the user may still differentiate through a graph that was recorded."""
        self._muted = True
        self.clear()

    def _record(self, inputs: Inputs) -> Tensor:
        self.clear()
        self._calls = {layer.name: [] for layer in self._layers}
        self._n_examples = inputs.count(self.input_axis)
        self._input_storages = {t.untyped_storage().data_ptr() for t in tensors_of(inputs)}
        return self._run(inputs)

    def _record_with_copies(self, inputs: Inputs, axes: _Axes, plain: Tensor) -> Tensor:
        """`_record`, where some calls may be the same for all examples and each example gets a copy of its own.

        The copies go on a new first axis, or on one of length 1 that is there. Which of them the network means is seen in
        its outputs: they must not change, and depend on no other example's copies.
        """
        if not axes.shared():
            return self._record(inputs)
        for axes.copies_on_new_axis in (False, True):
            try:
                outputs = self._record(inputs)
            except (RuntimeError, ValueError, IndexError):
                continue  # the network does not bear copies there
            same = outputs.shape == plain.shape and torch.allclose(outputs, plain, rtol=1e-3, atol=1e-5, equal_nan=True)
            if same and self._copies_are_their_own(outputs):
                return outputs
        raise NotImplementedError(
            f"layers {axes.shared()} get an input that is the same for all examples, and the network does not bear a copy "
            "for each of them on the first axis. Give them inputs with the examples on the first axis (such as "
            "positions.expand(len(x), -1)), or leave them out with layers=[...] or freeze them."
        )

    def _copies_are_their_own(self, outputs: Tensor) -> bool:
        """Whether the first example's outputs depend on no other example's copies."""
        self._muted = True
        try:
            grads = torch.autograd.grad(outputs[0].sum(), self._copies, retain_graph=True, allow_unused=True)
        finally:
            self._muted = False
        return not any(bool(grad[1:].any()) for grad in grads if grad is not None)

    def _run(self, inputs: Inputs) -> Tensor:
        try:
            return inputs.run(self._model)
        except RuntimeError as error:
            dtype = next(iter(self._layers[0].parameters.values())).dtype
            given = [t.dtype for t in tensors_of(inputs) if t.is_floating_point()]
            if not given or given[0] == dtype:
                raise
            raise ValueError(
                f"the model failed on inputs of dtype {given[0]}; its parameters are {dtype}. Use inputs.to({dtype})."
            ) from error

    def _observe(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Forward hook: report the call, with the examples on the first axis; may have to give the output that axis."""
        x = args[0] if args else kwargs["input"]
        if self._shapes is not None:
            self._shapes.append((layer.name, x.detach()))
            return None
        axis, fold = self._example_axis(layer, x)
        if axis is None:  # the same for all examples: each gets a copy of its own
            assert self._axes is not None
            if output.shape[0] != 1 or self._axes.copies_on_new_axis:
                x, output = x[None], output[None]
            copies = output.expand(self._n_examples, *output.shape[1:])
            self._report(layer, x.expand(self._n_examples, *x.shape[1:]), copies, module)
            self._copies.append(copies)
            return copies
        self._report(layer, x, output, module, axis, fold)
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
        if is_source or self._differentiable or not x.requires_grad:
            self._sources.append(get_gradient_edge(output))
        if index == 0 and axis == 0 and fold == 1 and isinstance(layer.module, nn.Linear) and layer.factors:
            self._outputs[layer.name] = weakref.ref(output), output._version
        else:
            self._outputs.pop(layer.name, None)
        hand_on = partial(self._take, layer, index, axis)
        output.register_hook(lambda grad: self._extension.report(module, hand_on, grad))

    def _take(self, layer: Layer, index: int, axis: int, grad: Tensor) -> None:
        if self._muted:
            return
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
        if self._shapes is not None:
            return
        if len(x) != self._n_examples:
            raise _UnknownAxisError(
                f"layer {layer.name!r} ran on {len(x)} sequences in a batch of {self._n_examples} examples. Keep the "
                f"examples on the axis that batch_first={getattr(module, 'batch_first', None)} says, or leave it out "
                "with layers=[...]."
            )
        self._report(layer, x, output, module, is_source=True)

    def _example_axis(self, layer: Layer, x: Tensor) -> tuple[int | None, int]:
        """On which axis the examples are (None: the input is the same for all), and how many rows there are for each."""
        n = self._n_examples
        index = len(self._calls[layer.name])
        complaint = (
            f"layer {layer.name!r} ({type(layer.module).__name__}) got an input of shape {tuple(x.shape)} in a batch of "
            f"{n} examples; it must be {layer.input_shape()}, so that gradients belong to examples. Keep the examples on "
            "the first axis (x[None] for one), or leave the layer out with layers=[...]."
        )
        if not layer.is_input(x):
            raise NotImplementedError(complaint)
        if self._axes is not None and (layer.name, index) in self._axes.calls:
            axis, fold = self._axes.calls[layer.name, index]
            if axis is None or x.shape[axis] == n * fold:
                return axis, fold
        candidates = layer.example_axes(x)
        lookup = not x.is_floating_point()
        clear = candidates and x.shape[candidates[0]] == n and all(x.shape[axis] != n for axis in candidates[1:])
        # Whatever comes neither from the inputs nor from a layer that was seen may be the same for all examples.
        unknown = not x.requires_grad and x.untyped_storage().data_ptr() not in self._input_storages
        if not clear or unknown or (lookup and x.ndim == 1):
            raise _UnknownAxisError(complaint)
        return candidates[0], 1

    def _look_for_axes(self, inputs: Inputs) -> tuple[_Axes, Tensor]:
        """Run the network on one example more: the axes that grow are those of the examples. Also returns its outputs."""
        before, outputs = self._shapes_of(inputs)
        n = len(outputs)
        for input_axis in (0, 1):
            if tensors_of(inputs)[0].ndim <= input_axis or inputs.count(input_axis) != n:
                continue
            after, more = self._shapes_of(with_one_more(inputs, input_axis))
            if len(more) == n + 1:
                break
        else:
            raise ValueError(
                f"the model must return one row of outputs per example; for inputs of shape "
                f"{[tuple(t.shape) for t in tensors_of(inputs)]} it returned outputs of shape {tuple(outputs.shape)}."
            )
        axes = _Axes(input_axis, {})
        if [name for name, _ in before] != [name for name, _ in after]:
            return axes, outputs  # control flow that depends on the data: only what is clear from shapes can be used
        counts: dict[str, int] = {}
        for (name, x), (_, y) in zip(before, after, strict=True):
            index = counts.get(name, 0)
            counts[name] = index + 1
            grown = [axis for axis in range(x.ndim) if x.shape[axis] != y.shape[axis]]
            if not grown:
                axes.calls[name, index] = None, 1
            elif len(grown) == 1 and x.shape[grown[0]] % n == 0:
                fold = x.shape[grown[0]] // n
                first = y.narrow(grown[0], 0, x.shape[grown[0]])
                if fold == 1 or (grown[0] == 0 and torch.allclose(first, x, rtol=1e-3, equal_nan=True)):
                    axes.calls[name, index] = grown[0], fold
        return axes, outputs

    def _shapes_of(self, inputs: Inputs) -> tuple[list[tuple[str, Tensor]], Tensor]:
        self._shapes = []
        try:
            return self._shapes, self._run(inputs).detach()
        finally:
            self._shapes = None


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


class _Axes:
    """Where the examples are: the axis of the inputs, and for every call of every layer the axis and the fold."""

    def __init__(self, inputs: int, calls: dict[tuple[str, int], tuple[int | None, int]]) -> None:
        self.inputs = inputs
        self.calls = calls
        self.copies_on_new_axis = False

    def shared(self) -> list[str]:
        """Layers with a call whose input is the same for all examples."""
        return list(dict.fromkeys(name for (name, _), (axis, _) in self.calls.items() if axis is None))


@contextmanager
def recording(
    model: nn.Module, layers: Sequence[Layer], receive: Receiver, *, differentiable: bool = False
) -> Iterator[Recorder]:
    """Let the layers of ``model`` report to ``receive`` while the context lasts.

    With ``differentiable`` all that is reported, inputs and output gradients, can be differentiated with respect to the
    network's inputs. Hooks are taken off and the ``requires_grad`` of all parameters is as before when the context ends,
    however it ends. Parameters' ``.grad`` is never touched.
    """
    recorder = Recorder(model, layers, receive, differentiable=differentiable)
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
