"""Forward passes where there is no user to run them: over a private replica of the network, with an observer attached.

The network itself carries no hook meanwhile, and other threads may use it. Where shapes do not tell on which axis the
examples are in a layer's input, `NetworkForward` runs the network a few times more to find out.
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
from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.inputs import Inputs, tensors_of, with_one_more
from kronlaplace.layers import Layer, UnusableLayersError, find_layers
from kronlaplace.network.example_axes import Doubt, Layout, ObservedInput, has_constant_calls, layout_from
from kronlaplace.network.observer import NetworkObserver

__all__ = ["NetworkForward", "find_layout"]

_ATTENTION_KERNEL = threading.RLock()
"""Torch's choice of an attention kernel belongs to the process, and only one pass at a time may change it."""


class NetworkForward:
    """Runs a network and observes its layers; to be used in a ``with`` block.

    Args:
        model: The network; it is never changed, and no hook is put on it.
        layers: The layers to observe.
        differentiable: Whether all that is observed can be differentiated with respect to the network's inputs.
        layout: What earlier passes over the same network have found out.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        *,
        differentiable: bool = False,
        layout: Layout | None = None,
    ) -> None:
        self._model = model
        self._differentiable = differentiable
        self._first_layout = Layout() if layout is None else layout
        self._observer: NetworkObserver | None = None
        self.observe(layers)

    def __enter__(self) -> NetworkForward:
        return self

    def __exit__(self, *error: object) -> None:
        """Forget everything; the user may still differentiate through a graph that was observed."""
        self.observer.close()

    @property
    def observer(self) -> NetworkObserver:
        """The observer of the last pass."""
        assert self._observer is not None
        return self._observer

    @property
    def layers(self) -> list[Layer]:
        """The layers that are observed."""
        return list(self.observer.layers)

    @property
    def layout(self) -> Layout:
        """What the passes have found out about the network."""
        return self.observer.layout

    def observe(self, layers: Sequence[Layer]) -> None:
        """Observe these layers from now on, in a new replica of the network; the last pass is forgotten."""
        layout = self._first_layout
        if self._observer is not None:
            layout = self.layout
            self._observer.close()
        wanted = [p for layer in layers for m in layer.modules for p in m.parameters(recurse=False)]
        self._replica = Replica(self._model, wanted)
        self._observer = NetworkObserver(
            self._model, layers, layout=layout, differentiable=self._differentiable, module_of=self._replica
        )

    def leave_out(self, names: Collection[str]) -> None:
        """Go on without some of the layers; the last pass is forgotten."""
        self.observe([layer for layer in self.layers if layer.name not in names])

    def __call__(self, inputs: Inputs) -> Tensor:
        """Run the network with its graph.

        Returns:
            The outputs as the network gives them; the first axis counts examples.

        Raises:
            TypeError: If the output is not a tensor, nor an object with a tensor ``logits``.
            ValueError: If its first axis does not count the examples.
            UnusableLayersError: If a layer did not run, ran without gradients, or is used in a way that is not supported.
            RuntimeError: If the outputs carry no gradients, or the network changes its inputs only now and then.
        """
        with torch.inference_mode(False), torch.enable_grad():  # gradients on, wherever the caller is
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
        return outputs

    def run_plainly(self, inputs: Inputs) -> Tensor:
        """Return the outputs alone: nothing is observed, and the last pass stays."""
        self.observer.enabled = False
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._run(inputs.map(_ordinary))
        finally:
            self.observer.enabled = True

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
                self.observer.layout = self.layout.with_shared_inputs(shared)
                return
        raise ValueError(
            f"the outputs of {n // 2} examples change when the other {n - n // 2} are taken away, so that predictions "
            "would depend on what else is in a batch. The forward pass mixes examples, or an input is the same for all "
            "examples; keep such an input as a buffer of the model."
        )

    def parameter_gradients(self, outputs: Tensor, direction: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield autograd's own gradients of all blocks' parameters along a direction, as ``W̄``; the graph is kept."""
        parameters = [self._replica(p) for layer in self.layers for p in layer.parameters.values()]
        grads = _gradients(outputs, parameters, direction.reshape(outputs.shape))
        filled = iter(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True))
        del grads
        return (
            (layer.name, layer.assemble({name: next(filled) for name in layer.parameters})) for layer in self.layers
        )

    def bypassed(self, outputs: Tensor) -> list[str]:
        """Find layers on which the outputs depend through the user's own parameters, past the replica; the graph is kept."""
        names = [(layer.name, p) for layer in self.layers for p in layer.parameters.values()]
        grads = _gradients(outputs, [p for _, p in names], torch.zeros_like(outputs))
        return list(dict.fromkeys(name for (name, _), g in zip(names, grads, strict=True) if g is not None))

    def _observed(self, inputs: Inputs) -> tuple[Tensor, Doubt | None]:
        """Run the network with the observer, and find out whether it is clear where the examples are."""
        given = self._given(inputs)
        axis = self.layout.input_axis
        self.observer.layout = self.layout.with_shared_inputs(given.of_other_length(axis))
        outputs = self._run(given)
        return outputs, self.observer.doubt(given.count(axis))

    def _watched(self, inputs: Inputs) -> tuple[Mapping[str, Sequence[ObservedInput]], Tensor]:
        """Run the network for the inputs of its calls only."""
        outputs = self._run(self._given(inputs)).detach()
        seen = self.observer.inputs
        self.observer.clear()
        return seen, outputs

    def _run_in_doubt(self, inputs: Inputs) -> Tensor:
        """Find out where the examples are by running the network in other ways, then run it once more."""
        plain = self._look(inputs)
        if not self.layout.shared_layers:
            return self._settled(inputs)
        # Copies go on a new first axis, or on one of length 1 that is there. Which of them the network means is seen in its
        # outputs: they must not change, and must not depend on other examples' copies.
        for on_new_axis in (False, True):
            self.observer.layout = replace(self.layout, copies_on_new_axis=on_new_axis)
            try:
                outputs = self._settled(inputs)
            except (RuntimeError, ValueError, IndexError):
                continue  # the network does not allow for copies there
            grads = _gradients(outputs[0].sum(), self.observer.copies, None)
            own = not any(bool(grad[1:].any()) for grad in grads if grad is not None)
            if own and alike(outputs, plain, rtol=1e-3, atol=1e-5):
                return outputs
        shared = self.layout.shared_layers
        raise UnusableLayersError(
            f"layers {shared} get an input that is the same for all examples, and the network does not bear a copy "
            "for each of them on the first axis. Give them inputs with the examples on the first axis (such as "
            "positions.expand(len(x), -1)).",
            dict.fromkeys(shared, "its input is the same for all examples"),
        )

    def _settled(self, inputs: Inputs) -> Tensor:
        outputs, doubt = self._observed(inputs)
        if doubt is not None:
            raise doubt.error(self.layout)
        return outputs

    def _look(self, inputs: Inputs) -> Tensor:
        """Run the network on one example more, and with the examples in the opposite order, and note what that shows.

        Returns:
            The outputs for ``inputs``, without a graph.

        Raises:
            ValueError: If the outputs do not grow with the inputs.
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
        """Return what the network is called with: copies, unless it is known to leave its inputs as they are."""
        return inputs if self.layout.changes_inputs is False else inputs.map(torch.clone)

    def _run(self, inputs: Inputs) -> Tensor:
        versions = [t._version for t in tensors_of(inputs)]
        with _differentiable_attention() if self._differentiable else nullcontext():
            outputs = inputs.run(self._replica.model)
        changed = versions != [t._version for t in tensors_of(inputs)]
        if changed and self.layout.changes_inputs is False:
            raise RuntimeError(
                "the model changed its inputs in place, which it did not do in the first batch, and these were not a copy. "
                "Let its forward begin with a clone of what it changes."
            )
        if self.layout.changes_inputs is None:
            self.observer.layout = replace(self.layout, changes_inputs=changed)
        return outputs


@in_full_precision
def find_layout(model: nn.Module, inputs: Any, layers: Sequence[Layer] | None = None) -> Layout:
    """Find out on which axis the examples are in the inputs and in every call of the layers.

    The network runs on a copy of its modules in evaluation mode, a few times if shapes do not tell; the network itself and
    the random state stay as they are. A `NetworkObserver` needs the result for networks in which shapes do not tell.

    Args:
        model: The network.
        inputs: What it is called with: a tensor, or a tuple, list or mapping of tensors, with at least two examples.
        layers: The layers to be observed; None means all of `find_layers`.

    Returns:
        The layout, for `NetworkObserver`.

    Raises:
        UnusableLayersError: If a layer is used in a way that is not supported.
        ValueError: If the outputs do not have one row for each example.
    """
    layers = find_layers(model) if layers is None else layers
    with preserved_random_state(device_of(model)), NetworkForward(model, layers) as forward:
        forward._replica.model.eval()
        forward(Inputs(inputs))
        return forward.layout


def _gradients(outputs: Tensor, tensors: Sequence[Tensor], direction: Tensor | None) -> Sequence[Tensor | None]:
    """Return gradients as autograd has them; the graph is kept, and an observer takes nothing."""
    return torch.autograd.grad(outputs, tensors, grad_outputs=direction, retain_graph=True, allow_unused=True)


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Let attention run by torch's own formulas: fused kernels have no second derivatives."""
    with _ATTENTION_KERNEL, sdpa_kernel(SDPBackend.MATH):
        yield


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd can keep, without a graph of its own."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
