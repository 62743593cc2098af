"""Fisher blocks: what one layer's part of the Fisher is, and the algebra that all kinds of blocks share.

A block acts on matrices of the layer's shape ``(q, p)``; ``vec`` is row-major. Whatever its kind, it has an eigenbasis
``U`` in which it is diagonal, ``F = U diag(λ) Uᵀ``: that is all that the damped inverse needs.

| block | ``F`` | ``U`` | ``λ`` |
| --- | --- | --- | --- |
| `KroneckerBlock` | ``scale · G ⊗ A`` | ``Q_G ⊗ Q_A`` | ``scale · d_G d_Aᵀ`` |
| `EigenBlock` (EKFAC) | ``U diag(λ) Uᵀ`` | ``Q_G ⊗ Q_A`` | any |
| `DiagonalBlock` | ``diag(λ)`` | the identity | any |
| `DenseBlock` | any | of the whole block | of the whole block |

Blocks are means over examples; whoever needs the sum multiplies by ``n_examples``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks.eigendecomposition import Eigen, Named, eigendecompose_moments

__all__ = ["Block", "RotatedBlock", "ValuesBlock", "decompose", "finite_values", "shown_size", "two_sided"]


class Block(ABC):
    """One layer's part of the Fisher, symmetric positive semidefinite.

    Attributes:
        name: The layer's name, for errors.
        shares_weights_over_space: Whether the layer is a convolution, which some dampings treat differently.
        least_trace: The smallest trace of a Kronecker block (or group of rows) in the layer's network, 0-dim, for
            `kronlaplace.damping.TraceRestrictedAuto`; None for convolutions, and for blocks that are of no network.
    """

    kind: ClassVar[str]
    """Name in saved files and in `KroneckerFisher.coverage`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shares_weights_over_space = False
        self.least_trace: Tensor | None = None

    def _take_layer_facts(self, block: Block, factor: Tensor | float) -> None:
        """Take what a block knows of its layer, for that block times a number."""
        self.shares_weights_over_space = block.shares_weights_over_space
        self.least_trace = None if block.least_trace is None else block.least_trace * factor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(q, p)``, the shape of the matrices that the block acts on."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of its tensors."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of its tensors."""

    @abstractmethod
    def matmul(self, matrices: Tensor) -> Tensor:
        """The block times ``vec(M)``, for ``M`` of shape ``(..., q, p)``; same shape."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The block as one matrix of shape ``(q·p, q·p)``."""

    @abstractmethod
    def trace(self) -> Tensor:
        """Its trace, 0-dim."""

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """Its Frobenius norm, 0-dim."""

    @abstractmethod
    def scaled(self, factor: Tensor | float) -> Block:
        """The block times a number, which may carry a gradient; factors and decompositions are shared, not copied."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """``λ``, shape ``(q, p)``, float64.

        Raises:
            ValueError: If the block has NaN or infinite entries.
        """

    @abstractmethod
    def to_eigenbasis(self, matrices: Tensor) -> Tensor:
        """``Uᵀ vec(M)``, for ``M`` of shape ``(..., q, p)``; same shape."""

    @abstractmethod
    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        """``U vec(M)``, for ``M`` of shape ``(..., q, p)``; same shape."""

    @abstractmethod
    def diagonal_of(self, weights: Tensor) -> Tensor:
        """The diagonal of ``U diag(w) Uᵀ`` for ``w`` of shape ``(q, p)``; same shape."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, for saving; `block_from_tensors` is the inverse."""
        return self._tensors() if self.least_trace is None else {**self._tensors(), "least_trace": self.least_trace}

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """Those of this kind of block."""

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> Block:
        """Inverse of `_tensors`."""
        return cls(**tensors, name=name)

    def unresolved(self) -> Tensor:
        """How large eigenvalues are whose sum is all that float32 tells of them, 0-dim, float64; zero if there are none."""
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def undecomposed(self) -> list[Named]:
        """Matrices whose eigendecompositions are still missing, with names for messages."""
        return []

    def adopt(self, parts: Sequence[Eigen]) -> None:
        """Take the eigendecompositions of `undecomposed`, in its order."""
        assert not parts


def decompose(blocks: Iterable[Block]) -> None:
    """Compute the eigendecompositions that the blocks still miss, equal sizes in one batched call, and keep them.

    Raises:
        ValueError: If a factor has NaN or infinite entries, naming its layer.
    """
    todo = [(block, block.undecomposed()) for block in blocks]
    parts = iter(eigendecompose_moments([named for _, missing in todo for named in missing]))
    for block, missing in todo:
        if missing:
            block.adopt([next(parts) for _ in missing])


class RotatedBlock(Block):
    """A block whose eigenbasis is a Kronecker product ``Q_G ⊗ Q_A``, by groups of rows."""

    @abstractmethod
    def bases(self) -> tuple[Tensor, Tensor]:
        """``Q_G`` of shape ``(K, q/K, q/K)`` and ``Q_A`` of shape ``(K, p, p)``."""

    def to_eigenbasis(self, matrices: Tensor) -> Tensor:
        gradient, activation = self.bases()
        return two_sided(gradient.mT, matrices, activation)

    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        gradient, activation = self.bases()
        return two_sided(gradient, matrices, activation.mT)

    def diagonal_of(self, weights: Tensor) -> Tensor:
        gradient, activation = self.bases()
        return two_sided(gradient.square(), weights, activation.square().mT)

    def projected_diagonal(self, values: Tensor) -> Tensor:
        """The diagonal of ``Uᵀ diag(d) U`` for ``d`` of shape ``(q, p)``; same shape."""
        gradient, activation = self.bases()
        return two_sided(gradient.square().mT, values, activation.square())


class ValuesBlock(Block):
    """A block whose eigenvalues are kept as they are: ``λ`` as a ``(q, p)`` matrix."""

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


def finite_values(values: Tensor, name: str) -> Tensor:
    """Return the values, which must be finite.

    Raises:
        ValueError: If they are not, naming the layer.
    """
    if not torch.isfinite(values).all():
        raise ValueError(
            f"NaN or infinite entries in the block of layer {name!r}: nothing can be inverted. They come from activations "
            "or gradients that overflowed; look at the network's outputs on this data."
        )
    return values


def shown_size(tensor: Tensor) -> str:
    """Return a shape as it is shown, such as ``50x13``."""
    return "x".join(map(str, tensor.shape))


@in_full_precision
def two_sided(left: Tensor, matrices: Tensor, right: Tensor) -> Tensor:
    """``L M R`` by groups of rows: ``(K, r, r)``, ``(..., K·r, p)``, ``(K, p, p)``."""
    if len(left) == 1:
        return left[0] @ matrices @ right[0]
    return (left @ matrices.unflatten(-2, (len(left), -1)) @ right).flatten(-3, -2)
