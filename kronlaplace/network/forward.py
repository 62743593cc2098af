"""Forward passes that the package runs itself: over a private replica of the network, with an observer attached.

The network itself carries no hooks meanwhile, and other threads may use it. If shapes leave it ambiguous on which axis the
examples are in a layer's input, `NetworkForward` runs the network a few more times to find out.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kronlaplace._precision import alike, in_full_precision
from kronlaplace._replica import Replica
from kronlaplace._wrappers import unwrapped
from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.inputs import Inputs, tensors_of, with_one_more
from kronlaplace.layers import Layer, NetworkLayer, UnusableLayersError, find_layers
from kronlaplace.network.example_axes import Doubt, Layout, ObservedInput, has_constant_calls, layout_from
from kronlaplace.network.observer import NetworkObserver, PerExampleGradients
from kronlaplace.network.one_by_one import OneByOne

__all__ = ["NetworkForward", "differentiable_attention", "find_layout"]

_ATTENTION_KERNEL = threading.RLock()
"""Lock around torch's choice of an attention kernel, which is process-wide: only one pass at a time may change it."""


class NetworkForward:
    """Runner of a network that observes its layers, for use in a ``with`` block.

    Args:
        model: The network, which is never changed and gets no hooks.
        layers: The layers to observe.
        differentiable: Whether everything observed can be differentiated with respect to the network's inputs.
        layout: The layout found by earlier passes over the same network.
        checking: Whether the gradients of all parameters are wanted, to check the layers with them, until `checked`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        *,
        differentiable: bool = False,
        layout: Layout | None = None,
        checking: bool = False,
    ) -> None:
        self._model = model
        self._checking = checking
        self._differentiable = differentiable
        self._first_layout = Layout() if layout is None else layout
        self._observer: NetworkObserver | None = None
        self._after = False
        self.observe(layers)

    def __enter__(self) -> NetworkForward:
        return self

    def __exit__(self, *error: object) -> None:
        """Forget everything; the user may still differentiate through an observed graph."""
        self.observer.close()

    @property
    def observer(self) -> NetworkObserver:
        """The observer of the last pass."""
        assert self._observer is not None
        return self._observer

    @property
    def layers(self) -> list[Layer]:
        """The observed layers."""
        return list(self.observer.layers)

    @property
    def layout(self) -> Layout:
        """The network's layout, as found by the passes so far."""
        return self.observer.layout

    def observe(self, layers: Sequence[Layer]) -> None:
        """Observe these layers from now on, in a new replica of the network, and forget the last pass."""
        layout = self._first_layout
        if self._observer is not None:
            layout = self.layout
            self._observer.close()
        by_network = [layer for layer in layers if isinstance(layer, NetworkLayer)]
        constant = () if self._checking or len(by_network) == len(layers) else by_network
        wanted = [p for la in layers if la not in constant for m in la.modules for p in m.parameters(recurse=False)]
        self._by_network = by_network
        self._replica = Replica(self._model, wanted)
        self._observer = NetworkObserver(
            self._model, layers, layout=layout, differentiable=self._differentiable, module_of=self._replica
        )

    @property
    def runs_one_by_one(self) -> bool:
        """Whether the network also runs on single examples, for layers that nothing else is known of."""
        return bool(self._by_network)

    def checked(self) -> None:
        """Note that the layers are right, so that later passes need not keep what only the check needs."""
        if self._checking:
            self._checking = False
            if self._by_network:
                self._after = True

    def leave_out(self, names: Collection[str]) -> None:
        """Continue without some of the layers, and forget the last pass."""
        self.observe([layer for layer in self.layers if layer.name not in names])

    def __call__(self, inputs: Inputs) -> Tensor:
        """Run the network and record its graph.

        Returns:
            The outputs as the network returns them, with examples on the first axis.

        Raises:
            TypeError: If it is not clear which tensor is the output.
            ValueError: If the first axis of the output does not index the examples.
            UnusableLayersError: If a layer did not run, ran without gradients, or is used in a way that is not supported.
            RuntimeError: If the outputs carry no gradients, or if the network changes its inputs in some passes but not in
                the first.
        """
        if self._after:
            self._after = False
            self.observe(self.layers)
        with torch.inference_mode(False), torch.enable_grad():  # gradients on, whatever the caller's mode
            inputs = inputs if self._differentiable else inputs.map(_ordinary)
            outputs, doubt = self._observed(inputs)
            if doubt is not None:
                outputs = self._run_in_doubt(inputs)
        n = inputs.count(self.layout.input_axis)
        if outputs.ndim == 0 or len(outputs) != n:
            raise ValueError(
                f"the model must return one row of outputs per example; for {n} examples it returned "
                f"outputs of shape {tuple(outputs.shape)}. Keep the examples on the first axis of inputs and outputs."
            )
        self.observer.check_calls()
        if not outputs.requires_grad:
            raise RuntimeError(
                "the model's outputs carry no gradients: it detaches them, or runs under torch.no_grad()."
            )
        if self._by_network:
            self.observer.per_example = self._per_example(inputs, outputs)
        return outputs

    def _per_example(self, inputs: Inputs, outputs: Tensor) -> PerExampleGradients:
        """Return the gradients of single examples in this pass, which make the network run again when they are wanted."""
        single: OneByOne | None = None

        def gradients(direction: Tensor, retain_graph: bool) -> Mapping[str, Tensor | None]:
            nonlocal single
            if single is None:
                new = OneByOne(self._model, self._by_network, inputs, self.layout, differentiable=self._differentiable)
                with torch.inference_mode(False), torch.enable_grad(), differentiable_attention():
                    at_once = new.run(outputs)
                if at_once is not self.layout.at_once:
                    self.observer.layout = replace(self.layout, at_once=at_once)
                single = new
            return single.gradients(direction, retain_graph)

        return gradients

    def run_plainly(self, inputs: Inputs) -> Tensor:
        """Return only the outputs, without observing anything; the last pass is kept."""
        self.observer.enabled = False
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._run(inputs.map(_ordinary))
        finally:
            self.observer.enabled = True

    def find_shared_inputs(self, inputs: Inputs, outputs: Tensor) -> None:
        """Find input tensors that are the same for all examples although they have as many rows as there are examples.

        If several tensors have one row per example, the network is run on the first half of the examples, and its outputs
        must be the first half of ``outputs``. If they are not, the tensors after the first are left whole: first each of
        them alone, then all together.

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
                self.observer.layout = self.layout.with_shared_inputs(shared)
                return
        raise ValueError(
            f"the outputs of {n // 2} examples change when the other {n - n // 2} are removed, so predictions would depend "
            "on the rest of the batch. Either the forward pass mixes examples, or an input is the same for all examples; "
            "keep such an input as a buffer of the model."
        )

    def parameter_gradients(self, outputs: Tensor, direction: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield autograd's gradients of all blocks' parameters along a direction, in the layout of ``W̄``; keep the graph."""
        parameters = [self._replica(p) for layer in self.layers for p in layer.parameters.values()]
        grads = _gradients(outputs, parameters, direction.reshape(outputs.shape))
        filled = iter(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True))
        del grads
        return (
            (layer.name, layer.assemble({name: next(filled) for name in layer.parameters})) for layer in self.layers
        )

    def bypassed(self, outputs: Tensor) -> list[str]:
        """Find layers whose original parameters, rather than the replica's, affect the outputs; keep the graph."""
        names = [(layer.name, p) for layer in self.layers for p in layer.parameters.values()]
        grads = _gradients(outputs, [p for _, p in names], torch.zeros_like(outputs))
        return list(dict.fromkeys(name for (name, _), g in zip(names, grads, strict=True) if g is not None))

    def _observed(self, inputs: Inputs) -> tuple[Tensor, Doubt | None]:
        """Run the network with the observer, and determine whether it is clear where the examples are."""
        given = self._given(inputs)
        axis = self.layout.input_axis
        self.observer.layout = self.layout.with_shared_inputs(given.of_other_length(axis))
        outputs = self._run(given)
        return outputs, self.observer.doubt(given.count(axis))

    def _watched(self, inputs: Inputs) -> tuple[Mapping[str, Sequence[ObservedInput]], Tensor]:
        """Run the network only to see the inputs of its calls."""
        outputs = self._run(self._given(inputs)).detach()
        seen = self.observer.inputs
        self.observer.clear()
        return seen, outputs

    def _run_in_doubt(self, inputs: Inputs) -> Tensor:
        """Find out where the examples are by running the network on modified inputs, then run it once more."""
        plain = self._look(inputs)
        if not self.layout.shared_layers:
            return self._settled(inputs)
        # Copies go on a new first axis, or on an existing one of length 1. The outputs show which of these suits the
        # network: they must not change, and must not depend on other examples' copies.
        for on_new_axis in (False, True):
            self.observer.layout = replace(self.layout, copies_on_new_axis=on_new_axis)
            try:
                outputs = self._settled(inputs)
            except (RuntimeError, ValueError, IndexError):
                continue  # the network does not allow copies there
            grads = _gradients(outputs[0].sum(), self.observer.copies, None)
            own = not any(bool(grad[1:].any()) for grad in grads if grad is not None)
            if own and alike(outputs, plain, rtol=1e-3, atol=1e-5):
                return outputs
        shared = self.layout.shared_layers
        raise UnusableLayersError(
            f"layers {shared} get an input that is the same for all examples, and the network does not support a copy "
            "for each example on the first axis. Give them inputs with the examples on the first axis (such as "
            "positions.expand(len(x), -1)).",
            dict.fromkeys(shared, "its input is the same for all examples"),
        )

    def _settled(self, inputs: Inputs) -> Tensor:
        outputs, doubt = self._observed(inputs)
        if doubt is not None:
            raise doubt.error(self.layout)
        return outputs

    def _look(self, inputs: Inputs) -> Tensor:
        """Run the network with one more example, and with the examples in reverse order, and record the resulting layout.

        Returns:
            The outputs for ``inputs``, without a graph.

        Raises:
            ValueError: If the number of output rows does not grow with the number of examples.
        """
        shared = self.layout.shared_inputs
        self.observer.layout = replace(self.layout, places=MappingProxyType({}))
        before, outputs = self._watched(inputs)
        n = len(outputs) if outputs.ndim else 0
        for axis in (0, 1):
            if tensors_of(inputs)[0].ndim <= axis or inputs.count(axis) != n:
                continue
            after, more = self._watched(with_one_more(inputs, axis, shared))
            if len(more) == n + 1:
                break
        else:
            raise ValueError(
                f"the model must return one row of outputs per example; for inputs of shape "
                f"{[tuple(t.shape) for t in tensors_of(inputs)]} it returned outputs of shape {tuple(outputs.shape)}."
            )

        def turned(t: Tensor, path: str) -> Tensor:
            return t.flip(axis) if path not in shared and t.ndim > axis and t.shape[axis] == n else t

        constant = has_constant_calls(before, after)
        reordered = self._watched(inputs.map_by_path(turned))[0] if constant else None
        self.observer.layout = layout_from(before, after, reordered, n, replace(self.layout, input_axis=axis))
        return outputs

    def _given(self, inputs: Inputs) -> Inputs:
        """Return what to call the network with: copies, unless the network is known to leave its inputs unchanged."""
        return inputs if self.layout.changes_inputs is False else inputs.map(torch.clone)

    def _run(self, inputs: Inputs) -> Tensor:
        versions = [t._version for t in tensors_of(inputs)]
        with differentiable_attention() if self._differentiable else nullcontext():
            outputs = inputs.run(self._replica.model)
        changed = versions != [t._version for t in tensors_of(inputs)]
        if changed and self.layout.changes_inputs is False:
            raise RuntimeError(
                "the model changed its inputs in place, which it did not do in the first batch, and these inputs were not "
                "a copy. Clone what it changes at the beginning of its forward."
            )
        if self.layout.changes_inputs is None:
            self.observer.layout = replace(self.layout, changes_inputs=changed)
        return outputs


@in_full_precision
def find_layout(model: nn.Module, inputs: Any, layers: Sequence[Layer] | None = None) -> Layout:
    """Find out on which axis the examples are in the inputs and in every call of the layers.

    A copy of the network's modules runs in evaluation mode, a few times if shapes are ambiguous; the network itself and the
    random state stay as they are. A `NetworkObserver` needs the result for networks whose shapes are ambiguous.

    Args:
        model: The network.
        inputs: The network's inputs: a tensor, or a tuple, list or mapping of tensors, with at least two examples.
        layers: The layers to be observed; None means all layers from `find_layers`.

    Returns:
        The layout, for `NetworkObserver`.

    Raises:
        UnusableLayersError: If a layer is used in a way that is not supported.
        ValueError: If the outputs do not have one row per example.
    """
    model = unwrapped(model)
    layers = find_layers(model) if layers is None else layers
    with preserved_random_state(device_of(model)), NetworkForward(model, layers) as forward:
        forward._replica.model.eval()
        forward(Inputs(inputs))
        return forward.layout


def _gradients(outputs: Tensor, tensors: Sequence[Tensor], direction: Tensor | None) -> Sequence[Tensor | None]:
    """Return gradients as autograd computes them; the graph is kept, and an observer receives nothing."""
    return torch.autograd.grad(outputs, tensors, grad_outputs=direction, retain_graph=True, allow_unused=True)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Run attention with torch's math kernel, since fused kernels have neither second nor forward-mode derivatives."""
    with _ATTENTION_KERNEL, sdpa_kernel(SDPBackend.MATH):
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _ordinary(tensor: Tensor) -> Tensor:
    """Return the tensor, without its graph, in a form that autograd can keep."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
