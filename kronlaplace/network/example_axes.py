"""The axis on which the examples are in each call of each layer.

Usually the shapes determine it. If they are ambiguous, the network runs again, once as it is and once with one more
example, and the axes that grow are the example axes: `layout_from` compares such passes. Positions folded into the first
axis (``x.reshape(N * T, F)``) are distinguished from time-first inputs by their values. An input that does not grow is the
same for all examples (position embeddings of ``arange(T)``); each example then gets its own copy of the call's output, so
that gradients belong to examples there as well.

The functions here work on what was observed; they do not run the network.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor, nn

from kronlaplace._precision import alike
from kronlaplace.layers import Layer, UnusableLayersError

__all__ = [
    "Doubt",
    "Layout",
    "ObservedInput",
    "Place",
    "copy_for_each_example",
    "has_constant_calls",
    "layout_from",
    "places_of",
]

Place = tuple[int, int] | None
"""The example axis in a call and the number of its rows per example; None if the call is the same for all examples."""


@dataclass(frozen=True)
class Layout:
    """What earlier passes over a network found out about it, for later passes; immutable, so threads may share it.

    Attributes:
        input_axis: The axis of the inputs that indexes the examples.
        shared_inputs: Paths of the input tensors that are the same for all examples.
        changes_inputs: Whether the network changes its inputs in place; None if this is not known yet.
        places: Where the examples are in each call, by layer name and index of the call.
        copies_on_new_axis: Whether copies of an output that is the same for all examples go on a new axis.
        partial: Layers whose inputs are not the same for all examples, but do not grow in proportion to their number either.
        at_once: Whether the network runs on one example under `torch.func.vmap`; see `kronlaplace.network.one_by_one`.
    """

    input_axis: int = 0
    shared_inputs: tuple[str, ...] = ()
    changes_inputs: bool | None = None
    places: Mapping[tuple[str, int], Place] = field(default_factory=lambda: MappingProxyType({}))
    copies_on_new_axis: bool = False
    partial: frozenset[str] = frozenset()
    at_once: bool = True

    def with_shared_inputs(self, paths: Iterable[str]) -> Layout:
        """Return a copy in which these input tensors are also the same for all examples."""
        new = [path for path in paths if path not in self.shared_inputs]
        return replace(self, shared_inputs=(*self.shared_inputs, *new)) if new else self

    @property
    def shared_layers(self) -> list[str]:
        """The layers with a call that is the same for all examples."""
        return list(dict.fromkeys(name for (name, _), place in self.places.items() if place is None))


@dataclass
class ObservedInput:
    """The input of one call of a layer.

    Attributes:
        layer: The layer.
        index: Index of the call among the layer's calls.
        x: The input.
        depends_on_layers: Whether the input depends on parameters, or on inputs that carry gradients.
        storage: Address of the input's memory.
        copied: Whether the input is the same for all examples and was copied for each of them.
        examples_first: Whether the examples are always on the first axis.
    """

    layer: Layer
    index: int
    x: Tensor
    depends_on_layers: bool
    storage: int
    copied: bool = False
    examples_first: bool = False


@dataclass(frozen=True)
class Doubt:
    """A call in which it is not clear where the examples are.

    Attributes:
        layer: The layer's name.
        message: Description of the problem, for the user.
    """

    layer: str
    message: str

    def error(self, layout: Layout, *, hint: bool = False) -> UnusableLayersError:
        """Make the error for the user.

        Args:
            layout: What is known about the network.
            hint: Whether to suggest `find_layout`, because its passes have not been run yet.
        """
        if self.layer in layout.partial:
            reason = (
                "it does not see a fixed number of rows per example, like an expert that sees only part of the batch"
            )
            return UnusableLayersError(f"layer {self.layer!r} cannot have a block: {reason}.", {self.layer: reason})
        way_out = " Or determine once where they are: layout=kl.find_layout(model, inputs)." if hint else ""
        return UnusableLayersError(self.message + way_out, {self.layer: self.message.partition("; ")[0]})


def places_of(
    calls: Iterable[ObservedInput], n_examples: int, layout: Layout, input_storages: Collection[int]
) -> tuple[dict[tuple[str, int], Place], Doubt | None]:
    """Find where the examples are in every call of a forward pass, from shapes and from what is already known.

    Args:
        calls: The calls.
        n_examples: Number of examples in the pass.
        layout: What earlier passes found.
        input_storages: Addresses of the memory of the network's inputs.

    Returns:
        The places by layer name and index of the call, and the first ambiguity, or None if there is none. Places from the
        first ambiguous call on are missing.

    Raises:
        UnusableLayersError: If a layer does not support the shape of its input.
    """
    places: dict[tuple[str, int], Place] = {}
    for call in calls:
        layer, x, key = call.layer, call.x, (call.layer.name, call.index)
        if call.copied:
            places[key] = None
        elif call.examples_first:
            if len(x) != n_examples:
                return places, _sequence_doubt(layer, x, n_examples)
            places[key] = 0, 1
        elif not layer.is_input(x):
            raise _shape_doubt(layer, x, n_examples).error(layout)
        elif (known := layout.places.get(key)) is not None and x.shape[known[0]] == n_examples * known[1]:
            places[key] = known
        else:
            candidates = layer.example_axes(x)
            told = candidates and x.shape[candidates[0]] == n_examples
            told = told and all(x.shape[axis] != n_examples for axis in candidates[1:])
            # An input that comes neither from the network's inputs nor from a layer may be the same for all examples.
            unknown = not call.depends_on_layers and call.storage not in input_storages
            lookup = not x.is_floating_point()
            if not told or unknown or (lookup and x.ndim == 1):
                return places, _shape_doubt(layer, x, n_examples)
            places[key] = candidates[0], 1
    return places, None


def copy_for_each_example(x: Tensor, output: Tensor, n_examples: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Give the input and output of a call that is the same for all examples a first axis with one copy per example."""
    if output.shape[0] != 1 or layout.copies_on_new_axis:
        x, output = x[None], output[None]
    x, output = (t.expand(n_examples, *t.shape[1:]) for t in (x, output))
    return x, output


Inputs = Mapping[str, Sequence[ObservedInput]]
"""Type of the inputs of all calls in a pass, by layer name."""


def has_constant_calls(before: Inputs, after: Inputs) -> bool:
    """Return whether some call has an input of the same shape in both passes."""
    pairs = (zip(calls, after.get(name, ()), strict=False) for name, calls in before.items())
    return any(a.x.shape == b.x.shape and not a.examples_first for calls in pairs for a, b in calls)


def layout_from(before: Inputs, after: Inputs, reordered: Inputs | None, n_examples: int, layout: Layout) -> Layout:
    """Compare passes to find out where the examples are.

    Args:
        before: Inputs of a pass over ``n_examples`` examples.
        after: Inputs of a pass with the first example repeated at the end.
        reordered: Inputs of a pass over the examples in reverse order; None unless `has_constant_calls`.
        n_examples: The number of examples in ``before``.
        layout: What is already known; its ``input_axis`` is the axis that grew.

    Returns:
        The layout with all places that could be determined.
    """
    n = n_examples
    if counts_examples(before) != counts_examples(
        after
    ):  # control flow depends on the data, so only shapes can be used
        return replace(layout, places=MappingProxyType({}), partial=frozenset())
    same_calls = reordered is not None and counts_examples(before) == counts_examples(reordered)
    places: dict[tuple[str, int], Place] = {}
    partial: set[str] = set()
    for name, calls in before.items():
        for index, (call, longer) in enumerate(zip(calls, after[name], strict=True)):
            if call.examples_first:
                continue
            x, y = call.x, longer.x
            grown = [axis for axis in range(x.ndim) if x.shape[axis] != y.shape[axis]]
            if not grown:
                other = reordered[name][index].x if reordered is not None and same_calls else x.new_zeros(0)
                if alike(x, other, rtol=1e-3):
                    places[name, index] = None
                else:
                    partial.add(name)
            elif len(grown) == 1 and x.shape[grown[0]] % n:
                partial.add(name)
            elif len(grown) == 1:
                rows = x.shape[grown[0]] // n
                first = y.narrow(grown[0], 0, x.shape[grown[0]])
                if rows == 1 or (grown[0] == 0 and alike(first, x, rtol=1e-3)):
                    places[name, index] = grown[0], rows
    return replace(layout, places=MappingProxyType(places), partial=frozenset(partial))


def counts_examples(inputs: Inputs) -> dict[str, int]:
    """Return the number of calls of each layer."""
    return {name: len(calls) for name, calls in inputs.items()}


def _shape_doubt(layer: Layer, x: Tensor, n_examples: int) -> Doubt:
    return Doubt(
        layer.name,
        f"layer {layer.name!r} ({type(layer.module).__name__}) got an input of shape {tuple(x.shape)} in a batch of "
        f"{n_examples} examples; it must be {layer.input_shape()}, so that each gradient belongs to one example. Keep the "
        "examples on the first axis (use x[None] for a single one).",
    )


def _sequence_doubt(layer: Layer, x: Tensor, n_examples: int) -> Doubt:
    module: nn.Module = layer.module
    return Doubt(
        layer.name,
        f"layer {layer.name!r} ran on {len(x)} sequences in a batch of {n_examples} examples. Keep the examples on the axis "
        f"given by batch_first={getattr(module, 'batch_first', None)}.",
    )
