"""Fisher blocks: one layer's part of the Fisher, and the algebra that all kinds of blocks share.

A block acts on matrices of the layer's shape ``(q, p)``; ``vec`` is row-major. Blocks of every kind have an eigenbasis
``U`` in which they are diagonal, ``F = U diag(λ) Uᵀ``, which is all that the damped inverse needs.

| block | ``F`` | ``U`` | ``λ`` |
| --- | --- | --- | --- |
| `KroneckerBlock` | ``scale · G ⊗ A`` | ``Q_G ⊗ Q_A`` | ``scale · d_G d_Aᵀ`` |
| `TruncatedBlock` | ``scale · G ⊗ A``, ``A = U diag(d) Uᵀ + α (I − U Uᵀ)`` | ``Q_G ⊗ Q_A`` | ``scale · d_G d_Aᵀ`` |
| `EigenBlock` (EKFAC) | ``U diag(λ) Uᵀ`` | ``Q_G ⊗ Q_A`` | any |
| `DiagonalBlock` | ``diag(λ)`` | the identity | any |
| `DenseBlock` | any | from the whole block | from the whole block |

Where a factor is truncated, ``λ`` is **compact**: one row or column stands for all eigenvectors of which only the common
eigenvalue is known. `Block.multiplicities` tells how many, and `Block.expand` repeats values for each of them.

Blocks are means over examples; multiply by ``n_examples`` to get sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks.basis import Basis
from kronlaplace.blocks.eigendecomposition import Eigen, Named, eigendecompose_moments
from kronlaplace.data.deferred_checks import all_finite

__all__ = ["Block", "RotatedBlock", "ValuesBlock", "decompose", "finite_values", "shown_size", "two_sided"]


class Block(ABC):
    """One layer's part of the Fisher, symmetric positive semidefinite.

    Attributes:
        name: The layer's name, for errors.
        shares_weights_over_space: Whether the layer is a convolution, which some dampings treat differently.
        least_trace: The smallest trace of a Kronecker block (or group of rows) in the layer's network, 0-dim, for
            `kronlaplace.damping.TraceRestrictedAuto`; None for convolutions, and for blocks that do not come from a network.
    """

    kind: ClassVar[str]
    """The kind's name in saved files and in `KroneckerFisher.coverage`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shares_weights_over_space = False
        self.least_trace: Tensor | None = None

    def _take_layer_facts(self, block: Block, factor: Tensor | float) -> None:
        """Copy what a block knows about its layer, given that this block is ``factor`` times that block."""
        self.shares_weights_over_space = block.shares_weights_over_space
        self.least_trace = None if block.least_trace is None else block.least_trace * factor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape ``(q, p)`` of the matrices on which the block acts."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the block's tensors."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the block's tensors."""

    @abstractmethod
    def matmul(self, matrices: Tensor) -> Tensor:
        """Return the block times ``vec(M)``, for ``M`` of shape ``(..., q, p)``, in the same shape."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return the block as one matrix of shape ``(q·p, q·p)``."""

    @abstractmethod
    def trace(self) -> Tensor:
        """Return the trace, 0-dim."""

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, 0-dim."""

    @abstractmethod
    def scaled(self, factor: Tensor | float) -> Block:
        """Return the block times a number, which may carry a gradient; factors and decompositions are shared, not copied."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Return ``λ``, shape ``(q, p)``, in float64; fewer rows or columns if a factor is truncated (see `multiplicities`).

        Raises:
            ValueError: If the block has NaN or infinite entries.
        """

    def spectrum(self) -> tuple[Tensor, Tensor | None]:
        """Return `eigenvalues` and `multiplicities` to sum over; None where all are one.

        Where eigenvalues are stored they are these, in the block's dtype: a copy in float64 may be larger than the network.
        """
        return self.eigenvalues(), self.multiplicities() if self.truncated else None

    @property
    def truncated(self) -> bool:
        """Whether some of the `eigenvalues` stand for several eigenvectors."""
        return False

    def multiplicities(self) -> Tensor:
        """Return how many eigenvectors each of the `eigenvalues` stands for, in their shape, float64."""
        return torch.ones(1, 1, dtype=torch.float64, device=self.device).expand(self.shape)

    def expand(self, values: Tensor) -> Tensor:
        """Repeat values of the shape of `eigenvalues` for each eigenvector, shape ``(q, p)``."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """Sum values of the shape of `eigenvalues` over all eigenvectors, 0-dim."""
        return values.sum()

    @abstractmethod
    def to_eigenbasis(self, matrices: Tensor) -> Tensor:
        """Return ``Uᵀ vec(M)``, for ``M`` of shape ``(..., q, p)``, in the same shape."""

    @abstractmethod
    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        """Return ``U vec(M)``, for ``M`` of shape ``(..., q, p)``, in the same shape."""

    @abstractmethod
    def diagonal_of(self, weights: Tensor) -> Tensor:
        """Return the diagonal of ``U diag(w) Uᵀ``, shape ``(q, p)``, for ``w`` of the shape of `eigenvalues`."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the block's tensors by name, for saving; `block_from_tensors` is the inverse."""
        return self._tensors() if self.least_trace is None else {**self._tensors(), "least_trace": self.least_trace}

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors specific to this kind of block."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Block:
        """Return a copy on another device, optionally in another dtype; decompositions are not copied."""
        dtype = self.dtype if dtype is None else dtype
        tensors = {key: t.to(device, dtype if t.is_floating_point() else None) for key, t in self._tensors().items()}
        block = type(self)._from_tensors(tensors, self.name)
        block.shares_weights_over_space = self.shares_weights_over_space
        block.least_trace = None if self.least_trace is None else self.least_trace.to(device, dtype)
        return block

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> Block:
        """Make a block from its tensors, as the inverse of `_tensors`."""
        return cls(**tensors, name=name)

    def unresolved(self) -> Tensor:
        """Return the mean of the eigenvalues that float32 only resolves in sum, 0-dim, float64; zero if there are none."""
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def undecomposed(self) -> list[Named]:
        """Return the matrices whose eigendecompositions are still missing, with names for messages."""
        return []

    def adopt(self, parts: Sequence[Eigen]) -> None:
        """Store the eigendecompositions of the matrices from `undecomposed`, in the same order."""
        assert not parts


def decompose(blocks: Iterable[Block]) -> None:
    """Compute and store the blocks' missing eigendecompositions, with one batched call per matrix size.

    Raises:
        ValueError: If a factor has NaN or infinite entries, naming its layer.
    """
    todo = [(block, block.undecomposed()) for block in blocks]
    parts = iter(eigendecompose_moments([named for _, missing in todo for named in missing]))
    for block, missing in todo:
        if missing:
            block.adopt([next(parts) for _ in missing])


class RotatedBlock(Block):
    """A block whose eigenbasis is a Kronecker product ``Q_G ⊗ Q_A`` for each group of rows."""

    @abstractmethod
    def bases(self) -> tuple[Basis, Basis]:
        """Return ``Q_G``, of ``K`` matrices of size ``q/K``, and ``Q_A``, of ``K`` matrices of size ``p``."""

    @property
    def truncated(self) -> bool:
        return any(basis.truncated for basis in self.bases())

    def multiplicities(self) -> Tensor:
        if not self.truncated:
            return super().multiplicities()
        gradient, activation = self.bases()
        return torch.outer(gradient.multiplicities.repeat(len(gradient)), activation.multiplicities)

    def expand(self, values: Tensor) -> Tensor:
        gradient, activation = self.bases()
        if gradient.truncated:
            by_group = values.unflatten(0, (len(gradient), -1))
            values = gradient.expand(by_group.mT).mT.flatten(0, 1)
        return activation.expand(values)

    def total(self, values: Tensor) -> Tensor:
        return (values * self.multiplicities()).sum() if self.truncated else values.sum()

    def to_eigenbasis(self, matrices: Tensor) -> Tensor:
        gradient, activation = self.bases()
        if not self.truncated:
            return two_sided(gradient.vectors.mT, matrices, activation.vectors)
        by_group = matrices.unflatten(-2, (len(gradient), -1))
        return activation.coordinates(gradient.coordinates(by_group.mT).mT).flatten(-3, -2)

    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        gradient, activation = self.bases()
        if not self.truncated:
            return two_sided(gradient.vectors, matrices, activation.vectors.mT)
        by_group = matrices.unflatten(-2, (len(gradient), -1))
        return activation.combined(gradient.combined(by_group.mT).mT).flatten(-3, -2)

    def diagonal_of(self, weights: Tensor) -> Tensor:
        gradient, activation = self.bases()
        by_column = activation.to_rows(weights.unflatten(0, (len(gradient), -1)))
        return gradient.to_rows(by_column.mT).mT.flatten(0, 1)

    def projected_diagonal(self, values: Tensor) -> Tensor:
        """Return the diagonal of ``Uᵀ diag(d) U``, for ``d`` of shape ``(q, p)``, in the shape of `eigenvalues`.

        It is averaged over the eigenvectors that share an eigenvalue.
        """
        gradient, activation = self.bases()
        by_column = activation.from_rows(values.unflatten(0, (len(gradient), -1)))
        total = gradient.from_rows(by_column.mT).mT.flatten(0, 1)
        return total / self.multiplicities().to(total.dtype) if self.truncated else total


class ValuesBlock(Block):
    """A block that stores its eigenvalues ``λ`` directly, as a ``(q, p)`` matrix."""

    def __init__(self, values: Tensor, name: str = "block") -> None:
        super().__init__(name)
        self.values = values

    @property
    def shape(self) -> tuple[int, int]:
        q, p = self.values.shape
        return q, p

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def trace(self) -> Tensor:
        return self.values.sum()

    def frobenius_norm(self) -> Tensor:
        return torch.linalg.norm(self.values)

    def eigenvalues(self) -> Tensor:
        return finite_values(self.values, self.name).double()

    def spectrum(self) -> tuple[Tensor, Tensor | None]:
        return finite_values(self.values, self.name), None


def finite_values(values: Tensor, name: str) -> Tensor:
    """Check that the values are finite and return them.

    Raises:
        ValueError: If they are not finite, naming the layer.
    """
    if not all_finite(values):
        raise ValueError(
            f"NaN or infinite entries in the block of layer {name!r}, which therefore cannot be inverted. They come from "
            "activations or gradients that overflowed; look at the network's outputs on this data."
        )
    return values


def shown_size(tensor: Tensor) -> str:
    """Return a tensor's shape for display, such as ``50x13``."""
    return "x".join(map(str, tensor.shape))


@in_full_precision
def two_sided(left: Tensor, matrices: Tensor, right: Tensor) -> Tensor:
    """Return ``L M R`` for each group of rows, for shapes ``(K, s, r)``, ``(..., K·r, p)`` and ``(K, p, t)``."""
    if len(left) == 1:
        return left[0] @ matrices @ right[0]
    return (left @ matrices.unflatten(-2, (len(left), -1)) @ right).flatten(-3, -2)
