"""Base class of the estimators, which turn sums over a layer's inputs and output gradients into a block."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from kronlaplace.blocks import Block
from kronlaplace.estimators.plain import moved_copy, plain_copy
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["Estimator", "State", "kind_of", "weighted_mean"]

_Block = TypeVar("_Block", bound=Block)

State = dict[str, Any]
"""State that an estimator accumulates for one layer: named sums over examples (tensors), or lists that grow."""


class Estimator(ABC):
    """Base class of the estimators, which compute a layer's block from its inputs and output gradients.

    An estimator holds only settings; what it accumulates is a `State` that the caller keeps. For each batch, `add_inputs`
    is called once, then `add_gradients` once per direction, then `end_batch`. To define an estimator, derive a class with
    `start`, `add_gradients` and `finish`, and override further methods as needed.
    """

    name: ClassVar[str]
    """Shorthand, and name in saved files."""

    for_any_layer: ClassVar[bool] = False
    """Whether layers without Kronecker structure are supported too; otherwise they get a diagonal block."""

    constants: ClassVar[frozenset[str]] = frozenset()
    """Keys of state entries that are constant during a pass and must not be merged or decayed."""

    not_combinable: ClassVar[str] = "it does not define how finished blocks add up (Estimator.combine)"
    """Reason given in the error that `combine` raises."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "finish" in vars(cls) and "peek" not in vars(cls):  # an inherited one would not know of the new `finish`
            cls.peek = Estimator.peek  # type: ignore[method-assign]

    @property
    def passes(self) -> int:
        """Number of passes over the data that are needed."""
        return 1

    def online(self) -> Estimator:
        """Return the version of this estimator for training, which sees every batch once and whose state does not grow.

        It is the estimator itself if it makes only one pass, unless overridden.

        Raises:
            NotImplementedError: If there is no such version; the message lists alternatives.
        """
        if self.passes > 1:
            raise self._not_online(f"it makes {self.passes} passes over the same data")
        return self

    def _not_online(self, reason: str) -> NotImplementedError:
        return NotImplementedError(
            f"{self!r} cannot be used in training, where every batch is seen once: {reason}. Use KFAC(), TKFAC(), KFOC(), "
            "EKFAC(), SUA(), Diagonal() or ExactBlock()."
        )

    @abstractmethod
    def start(self, layer: Layer) -> State:
        """Return the state before any data."""

    def only_squares(self, layer: Layer) -> bool:
        """Return whether of a layer whose outputs are the network's own only the squares of the gradients count.

        Then it gets `SquaredGradients`, once, in place of its gradients along each direction.
        """
        return False

    def add_inputs(self, state: State, batch: LayerBatch) -> None:
        """Add a layer's inputs in one batch to its state."""
        return

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        """Return the state that data with a known block would have left, so that accumulation can continue from it.

        Args:
            block: Mean over the examples of these data.
            layer: The layer.
            weight: Number of examples that the block stands for.

        Raises:
            NotImplementedError: If finished blocks do not determine the state.
            TypeError: If the block is not of the kind that the estimator makes.
        """
        raise NotImplementedError(
            f"the estimator {self.name!r} cannot start from a given block, which does not determine the sums that it "
            'accumulates. Use KFAC(), TKFAC(), KFOC(aggregation="running"), Diagonal() or ExactBlock().'
        )

    @abstractmethod
    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        """Add the gradients at a layer's outputs along one direction ``d_v`` to its state.

        Args:
            state: The layer's state, modified in place.
            gradients: The layer's inputs in this batch, with the gradient of each example's own negative log-likelihood at
                the output of every call.
        """

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        """Finish a batch; called after its last direction."""
        return

    def merge(self, state: State, other: State) -> State:
        """Return the state of both data sets together.

        The default adds the entries; estimators whose states are not sums override it.
        """
        merged = dict(state)
        for key, value in other.items():
            if key not in merged:
                merged[key] = value
            elif key not in self.constants:
                merged[key] = merged[key] + value  # lists grow, tensors add up
        return merged

    def decay(self, state: State, factor: float) -> None:
        """Multiply the weight of everything seen so far by ``factor``, in place; for moving averages."""
        for key, value in state.items():
            if key not in self.constants:
                assert isinstance(value, Tensor), f"{type(self).__name__} must define how its {key!r} decays"
                value.mul_(factor)

    def next_pass(self, state: State, layer: Layer, weight: float) -> State:
        """Return the state with which the next pass over the data begins, after a pass that is not the last.

        Args:
            state: The state at the end of the pass.
            layer: The layer.
            weight: Number of examples in the pass (their total weight in a moving average).
        """
        raise NotImplementedError(f"{type(self).__name__} makes only one pass.")

    @abstractmethod
    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        """Return the block, a mean over examples.

        The state cannot be used afterwards: its tensors may become those of the block.

        Args:
            state: The state.
            layer: The layer.
            weight: Number of examples (their total weight in a moving average).
        """

    def refresh(self, state: State, layer: Layer, weight: float) -> State:
        """Return the state with what is renewed from time to time only, such as an eigenbasis; by default unchanged.

        In training it is called before the block is inverted.

        Args:
            state: The state after a batch; the result may contain its tensors.
            layer: The layer.
            weight: Number of examples (their total weight in a moving average).
        """
        return state

    def peek(self, state: State, layer: Layer, weight: float) -> Block:
        """Return the block as `finish` does, but leave the state as it is, so that accumulation can continue.

        The default finishes a copy of the state; estimators whose sums are large override it.
        """
        return self.finish(copy.deepcopy(state), layer, weight)

    def to_plain(self, state: State) -> dict[str, Any]:
        """Return a copy of a state, between two batches, that consists of dicts, lists, tuples, numbers and tensors.

        Estimators whose states hold other objects override it and `from_plain`.

        Raises:
            TypeError: If the state holds other objects.
        """
        return plain_copy(state, type(self).__name__)

    def from_plain(self, saved: Mapping[str, Any], layer: Layer) -> State:
        """Return the state of which `to_plain` made the copy, on the layer's device; the copy stays as it is."""
        return moved_copy(saved, layer.device)

    def combine(self, first: Block, second: Block, weights: tuple[float, float]) -> Block:
        """Return the block of two data sets together, from the finished block of each.

        Only estimators whose finished blocks still hold all their sums over examples define it; the others raise.

        Args:
            first: A layer's block on one data set; left unchanged.
            second: The same layer's block on the other; left unchanged.
            weights: Shares of the two data sets in all examples; they sum to one.

        Returns:
            The block that `finish` would return for both data sets, up to rounding.

        Raises:
            NotImplementedError: If the finished blocks do not determine it; the message lists alternatives.
        """
        raise NotImplementedError(
            f"finished Fishers of the estimator {self.name!r} cannot be combined: {self.not_combinable}. Estimate from all "
            "data at once, for example with DataLoader(torch.utils.data.ConcatDataset([first, second]), batch_size=...), or "
            "use KFAC() or TKFAC(), whose blocks hold sums that add up."
        )


def kind_of(block: Block, kind: type[_Block], layer: Layer) -> _Block:
    """Return the block after checking that it is of the given kind.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(block, kind):
        raise TypeError(f"layer {layer.name!r} needs a {kind.__name__} to start from, got a {type(block).__name__}.")
    return block


def weighted_mean(first: Tensor, second: Tensor, weights: tuple[float, float]) -> Tensor:
    """Return ``w_1 x_1 + w_2 x_2`` for tensors of one shape, as a new tensor."""
    return first * weights[0] + second * weights[1]
