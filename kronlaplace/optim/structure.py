"""Structures of the approximate inverse Fisher: what is accumulated for them, and how they are inverted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from kronlaplace._arguments import resolve
from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.damping import Damping
from kronlaplace.estimators import Estimator
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.layers import Layer
from kronlaplace.network.observer import NetworkObserver
from kronlaplace.optim.chain import find_chain
from kronlaplace.optim.chain_accumulation import ChainAccumulation
from kronlaplace.optim.preconditioner import (
    Amount,
    BlockDiagonalInverse,
    Inverse,
    InverseInProgress,
    block_diagonal_inverse,
)
from kronlaplace.optim.tridiagonal import TridiagonalInverse

__all__ = ["BlockDiagonal", "BlockTridiagonal", "Structure", "structure_of"]


class Structure(ABC):
    """Base class of the structures."""

    takes_no_prior: ClassVar[str] = ""
    """Why the curvature of a prior cannot be added, with the way out; empty if it can."""

    def check_prior(self, prior: object) -> None:
        """Check that the curvature of a prior can be added to the blocks; None is no prior.

        Raises:
            NotImplementedError: If it cannot, with the way out.
        """
        if prior is not None and self.takes_no_prior:
            raise NotImplementedError(self.takes_no_prior)

    @abstractmethod
    def accumulation(self, estimator: Estimator, layers: Sequence[Layer]) -> Accumulation:
        """Return an empty accumulation of what the inverse needs.

        Raises:
            ValueError: If the structure is not for this estimator.
        """

    @abstractmethod
    def examine(self, observer: NetworkObserver, accumulation: Accumulation, n_examples: int) -> None:
        """Check that the structure is for the network as it ran, before the first batch is accumulated.

        Args:
            observer: The observer of the pass.
            accumulation: The accumulation, which may learn from the pass how the layers are connected.
            n_examples: Number of examples in the pass.

        Raises:
            ValueError: If it is not, naming a layer.
        """

    @abstractmethod
    def inversion(
        self, accumulation: Accumulation, blocks: Mapping[str, Block], damping: Damping, added: Mapping[str, Amount]
    ) -> Callable[[], InverseInProgress]:
        """Return a function that begins to compute the inverse as the accumulation is now, whatever happens to it meanwhile.

        Args:
            accumulation: The accumulation.
            blocks: Its blocks by layer.
            damping: The damping.
            added: A number by layer that is added to the damping, such as the weight decay.
        """

    @abstractmethod
    def inverse_from(self, tensors: Mapping[str, Mapping[str, Any]]) -> Inverse:
        """Restore an inverse from its tensors by layer, bit for bit.

        Raises:
            ValueError: If it is an inverse of another structure.
        """


class BlockDiagonal(Structure):
    """Inverse of every layer's block by itself, for any network and estimator (K-FAC section 3.2)."""

    def __repr__(self) -> str:
        return "BlockDiagonal()"

    def accumulation(self, estimator: Estimator, layers: Sequence[Layer]) -> Accumulation:
        return Accumulation(estimator, layers)

    def examine(self, observer: NetworkObserver, accumulation: Accumulation, n_examples: int) -> None:
        return

    def inversion(
        self, accumulation: Accumulation, blocks: Mapping[str, Block], damping: Damping, added: Mapping[str, Amount]
    ) -> Callable[[], InverseInProgress]:
        return lambda: block_diagonal_inverse(blocks, damping, added)

    def inverse_from(self, tensors: Mapping[str, Mapping[str, Any]]) -> Inverse:
        if any("kind" not in part for part in tensors.values()):
            raise ValueError(
                "the checkpoint has an inverse with blocks between adjacent layers. Load it into an optimizer with "
                'structure="block-tridiagonal".'
            )
        return BlockDiagonalInverse.from_tensors(tensors)


class BlockTridiagonal(Structure):
    """Inverse with blocks between adjacent layers, for chains of linear layers with K-FAC (K-FAC section 3.3).

    See `kronlaplace.optim.tridiagonal`. The damping must be one of factors, such as `FactoredTikhonov`. In a start from
    given blocks, adjacent layers count as uncorrelated.
    """

    takes_no_prior = (
        "the curvature of a prior is that of single layers, and cannot be added to the block-tridiagonal inverse. Use "
        'structure="block-diagonal", or leave out prior=.'
    )

    def __repr__(self) -> str:
        return "BlockTridiagonal()"

    def accumulation(self, estimator: Estimator, layers: Sequence[Layer]) -> Accumulation:
        return ChainAccumulation(estimator, layers)

    def examine(self, observer: NetworkObserver, accumulation: Accumulation, n_examples: int) -> None:
        assert isinstance(accumulation, ChainAccumulation)
        accumulation.order(find_chain(observer, n_examples))

    def inversion(
        self, accumulation: Accumulation, blocks: Mapping[str, Block], damping: Damping, added: Mapping[str, Amount]
    ) -> Callable[[], InverseInProgress]:
        assert isinstance(accumulation, ChainAccumulation)
        chain = [block for name in accumulation.chain if isinstance(block := blocks[name], KroneckerBlock)]
        cross, dampings = accumulation.cross_moments(), [damping.with_added(added[block.name]) for block in chain]

        def compute() -> InverseInProgress:
            inverse = TridiagonalInverse(chain, cross, dampings)
            return InverseInProgress(lambda: inverse)

        return compute

    def inverse_from(self, tensors: Mapping[str, Mapping[str, Any]]) -> Inverse:
        return TridiagonalInverse.from_tensors(tensors)


def structure_of(value: Structure | str) -> Structure:
    """Return the structure that is meant by ``"block-diagonal"``, ``"block-tridiagonal"``, or itself.

    Raises:
        ValueError, TypeError: For anything else.
    """
    shorthands = {"block-diagonal": BlockDiagonal, "block-tridiagonal": BlockTridiagonal}
    return resolve(value, Structure, shorthands, "structure")  # type: ignore[type-abstract]
