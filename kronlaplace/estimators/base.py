"""What an estimator is: sums over a layer's inputs and output gradients, and the block they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from kronlaplace.kronecker import KroneckerBlock
from kronlaplace.layers import Layer

__all__ = ["Estimator", "State"]

State = dict[str, Tensor]
"""What an estimator accumulates for one layer: named sums over examples."""


class Estimator(ABC):
    """Turns what flows through a layer into its block.

    An estimator holds settings only; what it accumulates is a `State` that the caller keeps, so states can be
    merged across data loaders. For each batch `add_inputs` comes once and then `add_gradients` once per direction.
    """

    name: ClassVar[str]
    """Shorthand and name in saved files."""

    @abstractmethod
    def start(self, layer: Layer) -> State:
        """The state before any data."""

    @abstractmethod
    def add_inputs(self, state: State, layer: Layer, x: Tensor) -> None:
        """Take the layer's input of one batch, in the module's own layout."""

    @abstractmethod
    def add_gradients(self, state: State, layer: Layer, x: Tensor, grad: Tensor) -> None:
        """Take the gradient at the layer's output along one direction, in the module's own layout.

        Args:
            state: The layer's state, changed in place.
            layer: The layer.
            x: Its input of the same batch.
            grad: Gradient of each example's own negative log-likelihood along one direction ``d_v``.
        """

    def merge(self, state: State, other: State) -> State:
        """The state of both data sets together. Sums add up; an estimator whose state is not a sum overrides this."""
        return {key: value + other[key] for key, value in state.items()}

    @abstractmethod
    def finish(self, state: State, layer: Layer, n_examples: int) -> KroneckerBlock:
        """The block: the mean over ``n_examples``. The state is used up; its tensors may become the block's."""
