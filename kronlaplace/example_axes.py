"""Finding out on which axis the examples are in each call of each layer.

Mostly the shapes tell. Where they leave a doubt the network runs once more as it is and once on one example more: the axes
that grow are the ones. Positions folded into the first axis (``x.reshape(N * T, F)``) are told apart from time-first ones
by their values. An input that does not grow is the same for all examples (position embeddings of ``arange(T)``), and
each example gets a copy of the call's output of its own, so that gradients belong to examples there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor, nn

from kronlaplace.batches import Inputs, tensors_of, with_one_more
from kronlaplace.layers import Layer, UnusableLayersError
from kronlaplace.precision import alike

__all__ = ["ExampleAxes", "Gradients", "Layout", "Place", "UnknownAxisError"]

Place = tuple[int, int] | None
"""The axis that the examples are on in a call, and how many rows of it each has; None if the call is the same for all."""

Gradients = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]]
"""Gives the gradients of a number with respect to tensors; the graph is kept."""


@dataclass(frozen=True)
class Layout:
    """What passes over a network have found out about it, for the passes that follow; immutable, so threads may share it.

    Attributes:
        input_axis: The axis of the inputs that counts the examples.
        shared_inputs: Paths of the input tensors that are the same for all examples.
        changes_inputs: Whether the network changes its inputs in place; None if that was not looked at yet.
        places: Where the examples are in a call, by layer name and number of the call.
        copies_on_new_axis: Whether copies of an output that is the same for all examples go on a new axis.
    """

    input_axis: int = 0
    shared_inputs: tuple[str, ...] = ()
    changes_inputs: bool | None = None
    places: Mapping[tuple[str, int], Place] = field(default_factory=lambda: MappingProxyType({}))
    copies_on_new_axis: bool = False


class UnknownAxisError(Exception):
    """A call's shapes do not tell which axis the examples are on.

    Attributes:
        layer: The layer's name.
    """

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(reason)
        self.layer = layer


class ExampleAxes:
    """Where the examples are in one forward pass at a time, in the inputs and in every call of every layer.

    A forward pass starts with `begin` and asks `of_call` for every call. If that raises `UnknownAxisError` the pass is given
    up, `look` finds out, and `record` does the pass again. What was found is in `layout`.

    Args:
        layout: What earlier passes have found.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.n_examples = 0
        """Number of examples in the pass."""
        self._input_storages: set[int] = set()
        self._copies: list[Tensor] = []
        self._seen: list[tuple[str, Tensor]] | None = None
        self._partial: set[str] = (
            set()
        )  # layers with inputs that are not the same for all and do not grow in proportion

    def begin(self, inputs: Inputs) -> None:
        """A forward pass on these inputs begins."""
        self.clear()
        axis = self.layout.input_axis
        self.n_examples = inputs.count(axis)
        self.add_shared_inputs(inputs.of_other_length(axis))
        self._input_storages = {t.untyped_storage().data_ptr() for t in tensors_of(inputs)}

    def clear(self) -> None:
        """Let go of the last pass."""
        self._copies = []

    def of_call(self, layer: Layer, index: int, x: Tensor) -> Place:
        """Where the examples are in a layer's call number ``index`` with input ``x``.

        Raises:
            UnusableLayersError: If the layer cannot have an input of this shape.
            UnknownAxisError: If it takes a look.
        """
        n = self.n_examples
        if not layer.is_input(x):
            raise self.unusable(UnknownAxisError(layer.name, self._complaint(layer, x)))
        if (layer.name, index) in self.layout.places:
            place = self.layout.places[layer.name, index]
            if place is None or x.shape[place[0]] == n * place[1]:
                return place
        candidates = layer.example_axes(x)
        told = candidates and x.shape[candidates[0]] == n and all(x.shape[axis] != n for axis in candidates[1:])
        # Whatever comes neither from the inputs nor from a layer that was seen may be the same for all examples.
        unknown = not x.requires_grad and x.untyped_storage().data_ptr() not in self._input_storages
        lookup = not x.is_floating_point()
        if not told or unknown or (lookup and x.ndim == 1):
            raise UnknownAxisError(layer.name, self._complaint(layer, x))
        return candidates[0], 1

    def check_first(self, layer: Layer, module: nn.Module, x: Tensor) -> None:
        """Make sure that the examples are on the first axis, for a call of a module that runs written out.

        Raises:
            UnknownAxisError: If the first axis has another length.
        """
        if len(x) != self.n_examples:
            raise UnknownAxisError(
                layer.name,
                f"layer {layer.name!r} ran on {len(x)} sequences in a batch of {self.n_examples} examples. Keep the "
                f"examples on the axis that batch_first={getattr(module, 'batch_first', None)} says.",
            )

    def copied(self, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of a call that is the same for all examples, with a copy for each on the first axis."""
        if output.shape[0] != 1 or self.layout.copies_on_new_axis:
            x, output = x[None], output[None]
        x, output = (t.expand(self.n_examples, *t.shape[1:]) for t in (x, output))
        self._copies.append(output)
        return x, output

    @property
    def watching(self) -> bool:
        """Whether the network is only watched: then calls are shown to `see` and nothing else is done."""
        return self._seen is not None

    def see(self, layer: Layer, x: Tensor) -> None:
        """Take note of a call's input while `watching`."""
        assert self._seen is not None
        self._seen.append((layer.name, x.detach()))

    def unseen(self, run: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
        """Run the network without recording anything."""
        return self._watched(run, inputs)[1]

    def note_change_of_inputs(self, changed: bool) -> None:
        """Remember whether the network changes its inputs in place."""
        self.layout = replace(self.layout, changes_inputs=changed)

    def add_shared_inputs(self, paths: Iterable[str]) -> None:
        """Remember input tensors that are the same for all examples."""
        new = [path for path in paths if path not in self.layout.shared_inputs]
        if new:
            self.layout = replace(self.layout, shared_inputs=(*self.layout.shared_inputs, *new))

    def look(self, run: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
        """Run the network on one example more: the axes that grow are those of the examples.

        Args:
            run: Calls the network; all calls of layers must come to `see`.
            inputs: The inputs.

        Returns:
            The outputs for ``inputs``, without a graph.

        Raises:
            ValueError: If the outputs do not grow with the inputs.
        """
        shared = self.layout.shared_inputs
        before, outputs = self._watched(run, inputs)
        n = len(outputs)
        for input_axis in (0, 1):
            if tensors_of(inputs)[0].ndim <= input_axis or inputs.count(input_axis) != n:
                continue
            after, more = self._watched(run, with_one_more(inputs, input_axis, shared))
            if len(more) == n + 1:
                break
        else:
            raise ValueError(
                f"the model must return one row of outputs per example; for inputs of shape "
                f"{[tuple(t.shape) for t in tensors_of(inputs)]} it returned outputs of shape {tuple(outputs.shape)}."
            )
        self.layout = replace(self.layout, input_axis=input_axis, places={})
        self._partial = set()
        if [name for name, _ in before] != [name for name, _ in after]:
            return outputs  # control flow that depends on the data: only what is clear from shapes can be used
        places: dict[tuple[str, int], Place] = {}
        constant: list[tuple[tuple[str, int], int]] = []
        counts: dict[str, int] = {}
        for position, ((name, x), (_, y)) in enumerate(zip(before, after, strict=True)):
            index = counts.get(name, 0)
            counts[name] = index + 1
            grown = [axis for axis in range(x.ndim) if x.shape[axis] != y.shape[axis]]
            if not grown:
                constant.append(((name, index), position))
            elif len(grown) == 1 and x.shape[grown[0]] % n:
                self._partial.add(name)
            elif len(grown) == 1:
                fold = x.shape[grown[0]] // n
                first = y.narrow(grown[0], 0, x.shape[grown[0]])
                if fold == 1 or (grown[0] == 0 and alike(first, x, rtol=1e-3)):
                    places[name, index] = grown[0], fold
        if constant:
            reordered = inputs.map_by_path(lambda t, path: t if path in shared else _reversed(t, input_axis, n))
            again, _ = self._watched(run, reordered)
            same_calls = [name for name, _ in before] == [name for name, _ in again]
            for call, position in constant:
                x = before[position][1]
                y = again[position][1] if same_calls else x.new_zeros(0)
                if alike(x, y, rtol=1e-3):
                    places[call] = None
                else:
                    self._partial.add(call[0])
        self.layout = replace(self.layout, places=MappingProxyType(places))
        return outputs

    def record(self, attempt: Callable[[], Tensor], gradients: Gradients, plain: Tensor) -> Tensor:
        """Do the forward pass with what `look` has found; where calls are the same for all examples, with copies.

        The copies go on a new first axis, or on one of length 1 that is there. Which of them the network means is seen in
        its outputs: they must not change, and depend on no other example's copies.

        Args:
            attempt: Does the forward pass.
            gradients: Gradients through that pass.
            plain: The outputs without copies.

        Raises:
            UnusableLayersError: If the network does not allow for copies.
        """
        shared = list(dict.fromkeys(name for (name, _), place in self.layout.places.items() if place is None))
        if not shared:
            return attempt()
        for on_new_axis in (False, True):
            self.layout = replace(self.layout, copies_on_new_axis=on_new_axis)
            try:
                outputs = attempt()
            except (RuntimeError, ValueError, IndexError):
                continue  # the network does not allow for copies there
            same = alike(outputs, plain, rtol=1e-3, atol=1e-5)
            if same and self._are_their_own(gradients(outputs[0].sum(), self._copies)):
                return outputs
        raise UnusableLayersError(
            f"layers {shared} get an input that is the same for all examples, and the network does not bear a copy "
            "for each of them on the first axis. Give them inputs with the examples on the first axis (such as "
            "positions.expand(len(x), -1)).",
            dict.fromkeys(shared, "its input is the same for all examples"),
        )

    @staticmethod
    def _are_their_own(grads: Sequence[Tensor | None]) -> bool:
        """Whether the first example's outputs, whose gradients at the copies these are, depend on its own only."""
        return not any(bool(grad[1:].any()) for grad in grads if grad is not None)

    def _watched(self, run: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[list[tuple[str, Tensor]], Tensor]:
        """Every call's layer and input, in order, and the outputs."""
        self._seen = []
        try:
            return self._seen, run(inputs).detach()
        finally:
            self._seen = None

    def unusable(self, error: UnknownAxisError) -> UnusableLayersError:
        """The error for the user, where a look did not help."""
        if error.layer in self._partial:
            reason = "it sees no fixed number of rows for each example, as an expert that sees a part of the batch"
            return UnusableLayersError(
                f"layer {error.layer!r} cannot have a block: {reason}.",
                {error.layer: reason},
            )
        return UnusableLayersError(str(error), {error.layer: str(error).partition("; ")[0]})

    def _complaint(self, layer: Layer, x: Tensor) -> str:
        return (
            f"layer {layer.name!r} ({type(layer.module).__name__}) got an input of shape {tuple(x.shape)} in a batch of "
            f"{self.n_examples} examples; it must be {layer.input_shape()}, so that gradients belong to examples. Keep the "
            "examples on the first axis (x[None] for one)."
        )


def _reversed(tensor: Tensor, axis: int, n: int) -> Tensor:
    """With the examples in the opposite order, if the axis counts them."""
    return tensor.flip(axis) if tensor.ndim > axis and tensor.shape[axis] == n else tensor
