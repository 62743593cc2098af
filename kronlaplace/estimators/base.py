"""What an estimator is: sums over a layer's inputs and output gradients, and the block they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from kronlaplace.blocks import Block
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["Estimator", "State", "kind_of", "weighted_mean"]

_Block = TypeVar("_Block", bound=Block)

State = dict[str, Any]
"""What an estimator accumulates for one layer: named sums over examples (tensors), or lists that grow."""


class Estimator(ABC):
    """Turns what flows through a layer into its block.

    An estimator holds settings only; what it accumulates is a `State` that the caller keeps. For each batch `add_inputs`
    comes once, then `add_gradients` once per direction, then `end_batch`. A new estimator is a subclass with `start`,
    `add_gradients` and `finish`, and what else it needs of the following.
    """

    name: ClassVar[str]
    """Shorthand and name in saved files."""

    for_any_layer: ClassVar[bool] = False
    """Whether it also suits layers without Kronecker structure; those get a diagonal block from all others."""

    constants: ClassVar[frozenset[str]] = frozenset()
    """Keys of the state that are no sums over the data of this pass."""

    not_combinable: ClassVar[str] = "it does not say how finished blocks add up (Estimator.combine)"
    """Why `combine` refuses, for its error."""

    @property
    def passes(self) -> int:
        """How many times it needs to see the data."""
        return 1

    @abstractmethod
    def start(self, layer: Layer) -> State:
        """The state before any data."""

    def add_inputs(self, state: State, batch: LayerBatch) -> None:
        """Take a layer's inputs of one batch."""
        return

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        """Make the state that data with a known block would have left, to go on from there.

        Args:
            block: The mean over the examples of these data.
            layer: The layer.
            weight: Number of the examples that the block is to count for.

        Raises:
            NotImplementedError: If finished blocks do not determine the state.
            TypeError: For a block of another kind than the estimator makes.
        """
        raise NotImplementedError(
            f"the estimator {self.name!r} cannot start from a given block: that does not determine the sums that it "
            'accumulates. Use KFAC(), TKFAC(), KFOC(aggregation="running"), Diagonal() or ExactBlock().'
        )

    @abstractmethod
    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        """Take the gradients at a layer's outputs along one direction ``d_v``.

        Args:
            state: The layer's state, changed in place.
            gradients: The layer's inputs in this batch, with the gradient of each example's own negative log-likelihood at
                the output of every call.
        """

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        """All directions of a batch have come."""
        return

    def merge(self, state: State, other: State) -> State:
        """The state of both data sets together. Sums add up; a state that is not a sum overrides this."""
        merged = dict(state)
        for key, value in other.items():
            if key not in merged:
                merged[key] = value
            elif key not in self.constants:
                merged[key] = merged[key] + value  # lists grow, tensors add up
        return merged

    def decay(self, state: State, factor: float) -> None:
        """Make all that was seen so far count ``factor`` times as much, in place; for moving averages."""
        for key, value in state.items():
            if key not in self.constants:
                assert isinstance(value, Tensor), f"{type(self).__name__} must say how its {key!r} decays"
                value.mul_(factor)

    def next_pass(self, state: State, layer: Layer, weight: float) -> State:
        """The state to begin the next pass over the data with, after a pass that is not the last.

        Args:
            state: The state at the end of the pass.
            layer: The layer.
            weight: Number of examples in the pass (their total weight in a moving average).
        """
        raise NotImplementedError(f"{type(self).__name__} makes one pass only.")

    @abstractmethod
    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        """The block, a mean over examples. The state is used up; its tensors may become the block's.

        Args:
            state: The state.
            layer: The layer.
            weight: Number of examples (their total weight in a moving average).
        """

    def combine(self, first: Block, second: Block, weights: tuple[float, float]) -> Block:
        """The block of two data sets together, from the finished block of each.

        For estimators whose finished blocks still hold all their sums over examples; the others refuse.

        Args:
            first: A layer's block on one data set, untouched.
            second: The same layer's block on the other, untouched.
            weights: Shares of the two data sets in all examples; they sum to one.

        Returns:
            What `finish` makes of the data of both, up to rounding.

        Raises:
            NotImplementedError: If the finished blocks do not determine it, with the ways out.
        """
        raise NotImplementedError(
            f"finished Fishers of the estimator {self.name!r} cannot be combined: {self.not_combinable}. Estimate from all "
            "data at once, such as DataLoader(torch.utils.data.ConcatDataset([first, second]), batch_size=...), or use "
            "KFAC() or TKFAC(), whose blocks hold sums that add up."
        )


def kind_of(block: Block, kind: type[_Block], layer: Layer) -> _Block:
    """Return the block, which must be of a kind.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(block, kind):
        raise TypeError(f"layer {layer.name!r} needs a {kind.__name__} to start from, got a {type(block).__name__}.")
    return block


def weighted_mean(first: Tensor, second: Tensor, weights: tuple[float, float]) -> Tensor:
    """``w_1 x_1 + w_2 x_2``, of one shape, as a new tensor."""
    return first * weights[0] + second * weights[1]
