"""Passes through the user's network in which the wanted layers report their inputs and output gradients.

The mechanism is BackPACK's: a `BackpropExtension` that runs, layer by layer, during the backward pass. It is called
from a hook on the layer's output *tensor*, not from a module's full backward hook as `backpack.extend` would install,
so networks work unmodified: in-place activations, residual connections, any code between the layers.

Only output gradients are computed, never weight gradients, and each is handed on and freed as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kronlaplace.batches import device_of
from kronlaplace.layers import Layer

__all__ = ["Receiver", "Recorder", "check_mode", "check_model", "recording"]

Receiver = Callable[[Layer, Tensor, Tensor], None]
"""Takes a layer, its input and the gradient at its output, both in the module's own layout."""


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
        extension.hand_on(module, g_out[0])


class OutputGradients(BackpropExtension):  # type: ignore[misc]  # BackPACK is not typed
    """BackPACK extension that hands each layer's output gradient to a function and keeps nothing."""

    def __init__(self, module_types: set[type[nn.Module]], hand_on: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__(savefield="", module_exts=dict.fromkeys(module_types, _HandOn()))
        self.hand_on = hand_on

    def expects_backpropagation_quantities(self) -> bool:
        return False


class Recorder:
    """One forward pass at a time, and any number of backward passes through it. Made by `recording`."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], receive: Receiver) -> None:
        self.inputs: dict[str, Tensor] = {}
        """Input of each layer in the last forward pass, by layer name."""
        self._model = model
        self._layers = {layer.module: layer for layer in layers}
        self._receive = receive
        self._extension = OutputGradients({type(layer.module) for layer in layers}, self._hand_on)
        self._sources: list[GradientEdge] = []
        self._reported: set[str] = set()
        self._n_examples = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the network with its graph.

        Returns:
            The outputs as the network gives them, shape ``(N, C)`` or ``(N,)``.

        Raises:
            TypeError: If the output is not a tensor.
            NotImplementedError: If it has another shape, or a layer is used in a way that is not supported.
            RuntimeError: If a wanted layer did not run, or ran without gradients.
        """
        self.inputs.clear()
        self._sources.clear()
        self._n_examples = len(inputs)
        with torch.inference_mode(False):  # gradients on, wherever the caller is
            outputs = self._run(inputs.clone() if inputs.is_inference() else inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"the model must return a tensor of outputs, it returned {type(outputs).__name__}.")
        if outputs.ndim not in (1, 2) or len(outputs) != len(inputs):
            raise NotImplementedError(
                f"the model must return outputs of shape (N, C) or (N,) for N examples; for inputs of shape "
                f"{tuple(inputs.shape)} it returned {tuple(outputs.shape)}. Outputs with more axes are not supported yet."
            )
        if not outputs.requires_grad:
            raise RuntimeError(
                "the model's outputs carry no gradients: it detaches them, or runs under torch.no_grad()."
            )
        missing = [layer.name for layer in self._layers.values() if layer.name not in self.inputs]
        if missing:
            raise RuntimeError(
                f"these layers have trainable parameters but were not called as modules in the forward pass: {missing}. "
                "Their parameters are used by a function, or not at all; leave them out with layers=[...] or freeze them."
            )
        return outputs

    def _run(self, inputs: Tensor) -> Any:
        try:
            return self._model(inputs)
        except RuntimeError as error:
            dtype = next(iter(self._layers)).weight.dtype
            if inputs.dtype == dtype:
                raise
            raise ValueError(
                f"the model failed on inputs of dtype {inputs.dtype}; its parameters are {dtype}. "
                f"Use inputs.to({dtype})."
            ) from error

    def backward(self, outputs: Tensor, direction: Tensor, *, retain_graph: bool) -> None:
        """Propagate one direction ``d``, of the outputs' shape, back; every layer's gradient goes to the receiver.

        Raises:
            RuntimeError: If the outputs do not depend on a wanted layer.
        """
        self._reported.clear()
        # The graph starts at the wanted layers. Asking for the gradients of those that have none of the others before
        # them visits all, and the engine skips everything else, above all the gradients of the weights.
        torch.autograd.grad(
            outputs,
            self._sources,
            grad_outputs=direction.reshape(outputs.shape),
            retain_graph=retain_graph,
            allow_unused=True,
        )
        silent = [layer.name for layer in self._layers.values() if layer.name not in self._reported]
        if silent:
            raise RuntimeError(
                f"the network's outputs do not depend on these layers: {silent}. A detach() or an unused branch may cut "
                "them off; leave them out with layers=[...] or freeze them."
            )

    def _hand_on(self, module: nn.Module, grad: Tensor) -> None:
        layer = self._layers[module]
        self._reported.add(layer.name)
        self._receive(layer, self.inputs[layer.name], grad)

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Forward hook: keep the input, and have the extension run when the gradient of the output is there."""
        layer = self._layers[module]
        if layer.name in self.inputs:
            raise NotImplementedError(
                f"layer {layer.name!r} is used more than once in one forward pass, which is not supported yet; leave it "
                "out with layers=[...] or freeze it."
            )
        x = args[0] if args else kwargs["input"]
        if not layer.kind.accepts(module, x, self._n_examples):
            raise NotImplementedError(
                f"layer {layer.name!r} ({type(module).__name__}) got an input of shape {tuple(x.shape)} in a batch of "
                f"{self._n_examples} examples; it must be {layer.kind.input_shape(module)}, so that gradients belong to "
                "examples. Keep the examples on the first axis (x[None] for one), or leave the layer out with layers=[...]."
            )
        if not output.requires_grad:
            raise RuntimeError(
                f"layer {layer.name!r} ran without gradients (inside torch.no_grad()?); leave it out with layers=[...] or "
                "freeze it."
            )
        self.inputs[layer.name] = x.detach()
        if not x.requires_grad:
            self._sources.append(get_gradient_edge(output))
        output.register_hook(lambda grad: self._extension(module, (), (grad,)))


@contextmanager
def recording(model: nn.Module, layers: Sequence[Layer], receive: Receiver) -> Iterator[Recorder]:
    """Let the layers of ``model`` report to ``receive`` while the context lasts.

    Hooks are taken off and the ``requires_grad`` of all parameters is as before when the context ends, however it
    ends. Parameters' ``.grad`` is never touched.
    """
    recorder = Recorder(model, layers, receive)
    wanted = {id(p) for layer in layers for p in layer.module.parameters(recurse=False)}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in wanted]
    handles = []
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        for layer in layers:
            handles.append(layer.module.register_forward_hook(recorder._observe, with_kwargs=True))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
        for parameter in others:
            parameter.requires_grad_(True)
        recorder.inputs.clear()
        recorder._sources.clear()


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
        if isinstance(module, _DROPOUTS) and module.training and module.p > 0:
            raise ValueError(f"{where} is in training mode, so the outputs are random. Call model.eval() first.")
