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

from kronlaplace.linalg import Eigen, Named, eigendecompose_moments, trace
from kronlaplace.precision import in_full_precision
from kronlaplace.registry import Registry

__all__ = [
    "BLOCKS",
    "Block",
    "DenseBlock",
    "DiagonalBlock",
    "EigenBlock",
    "KroneckerBlock",
    "RotatedBlock",
    "block_from_tensors",
    "decompose",
]


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
        return _two_sided(gradient.mT, matrices, activation)

    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        gradient, activation = self.bases()
        return _two_sided(gradient, matrices, activation.mT)

    def diagonal_of(self, weights: Tensor) -> Tensor:
        gradient, activation = self.bases()
        return _two_sided(gradient.square(), weights, activation.square().mT)

    def projected_diagonal(self, values: Tensor) -> Tensor:
        """The diagonal of ``Uᵀ diag(d) U`` for ``d`` of shape ``(q, p)``; same shape."""
        gradient, activation = self.bases()
        return _two_sided(gradient.square().mT, values, activation.square())


class KroneckerBlock(RotatedBlock):
    """``scale · G ⊗ A``, acting on a ``(q, p)`` matrix as ``scale · G M A``.

    Layers with ``K`` groups of rows (grouped convolutions, attention's input projections) are block diagonal over the
    groups, with factors of their own.

    Args:
        gradient_factor: ``G``, symmetric positive semidefinite, shape ``(q, q)``, or ``(K, q/K, q/K)``.
        activation_factor: ``A``, symmetric positive semidefinite, shape ``(p, p)``, or ``(K, p, p)``.
        scale: A factor in front: a number, 0-dim tensor, or one for each group, shape ``(K,)``.
        name: The layer's name, for errors.
    """

    kind = "kronecker"

    def __init__(
        self, gradient_factor: Tensor, activation_factor: Tensor, scale: Tensor | float = 1.0, name: str = "block"
    ) -> None:
        super().__init__(name)
        self.gradient_factor = gradient_factor
        self.activation_factor = activation_factor
        self.scale = torch.as_tensor(scale, dtype=gradient_factor.dtype, device=gradient_factor.device)
        self._eigen: list[Eigen] | None = None

    def __repr__(self) -> str:
        return f"KroneckerBlock({self.name!r}, G: {_size(self.gradient_factor)}, A: {_size(self.activation_factor)})"

    @property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """With the axis of the groups."""
        if self.gradient_factor.ndim == 2:
            return self.gradient_factor.unsqueeze(0), self.activation_factor.unsqueeze(0)
        return self.gradient_factor, self.activation_factor

    @property
    def _scales(self) -> Tensor:
        """One for each group, shape ``(K, 1, 1)``."""
        return self.scale.expand(len(self._factors[0])).view(-1, 1, 1)

    @property
    def shape(self) -> tuple[int, int]:
        gradient, activation = self._factors
        return len(gradient) * gradient.shape[-1], activation.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.gradient_factor.dtype

    @property
    def device(self) -> torch.device:
        return self.gradient_factor.device

    def matmul(self, matrices: Tensor) -> Tensor:
        gradient, activation = self._factors
        return _two_sided(self._scales * gradient, matrices, activation)

    def to_dense(self) -> Tensor:
        gradient, activation = self._factors
        parts = zip(self._scales * gradient, activation, strict=True)
        return torch.block_diag(*(torch.kron(g.contiguous(), a.contiguous()) for g, a in parts))

    def trace(self) -> Tensor:
        """``scale · tr G · tr A``, 0-dim."""
        return self.group_traces().sum()

    def group_traces(self) -> Tensor:
        """``scale · tr G · tr A`` of each group, shape ``(K,)``."""
        gradient, activation = self._factors
        return self._scales[:, 0, 0] * trace(gradient) * trace(activation)

    def frobenius_norm(self) -> Tensor:
        """``|scale| · ‖G‖ · ‖A‖``, 0-dim."""
        gradient, activation = self._factors
        by_group = self._scales[:, 0, 0] * torch.linalg.matrix_norm(gradient) * torch.linalg.matrix_norm(activation)
        return torch.linalg.norm(by_group)

    def scaled(self, factor: Tensor | float) -> KroneckerBlock:
        block = KroneckerBlock(self.gradient_factor, self.activation_factor, self.scale * factor, self.name)
        block._take_layer_facts(self, factor)
        block._eigen = self._eigen
        return block

    def undecomposed(self) -> list[Named]:
        if self._eigen is not None:
            return []
        gradient, activation = self._factors
        suffixes = [f", group {k}" for k in range(len(gradient))] if len(gradient) > 1 else [""]
        return [
            (f"the {which} factor of layer {self.name!r}{suffix}", factor)
            for which, factors in (("gradient", gradient), ("activation", activation))
            for suffix, factor in zip(suffixes, factors, strict=True)
        ]

    def adopt(self, parts: Sequence[Eigen]) -> None:
        half = len(parts) // 2
        self._eigen = [
            Eigen(*(torch.stack([part for part in parts if part is not None]) for parts in zip(*some, strict=True)))
            for some in (parts[:half], parts[half:])
        ]

    def eigen(self) -> tuple[Eigen, Eigen]:
        """Eigendecompositions of ``G`` and of ``A``, computed once, with an axis of groups in front.

        Raises:
            ValueError: If a factor has NaN or infinite entries.
        """
        if self._eigen is None:
            decompose([self])
        assert self._eigen is not None
        return self._eigen[0], self._eigen[1]

    def unresolved(self) -> Tensor:
        gradient, activation = self.eigen()
        assert gradient.unresolved is not None and activation.unresolved is not None
        by_gradient = gradient.unresolved * activation.values[:, -1]
        by_activation = activation.unresolved * gradient.values[:, -1]
        return (self._scales[:, 0, 0] * torch.maximum(by_gradient, by_activation)).amax().detach()

    def bases(self) -> tuple[Tensor, Tensor]:
        gradient, activation = self.eigen()
        return gradient.vectors, activation.vectors

    def eigenvalues(self) -> Tensor:
        gradient, activation = self.eigen()
        # In float64: the smallest eigenvalues and the damping often differ from the largest by 1e10 and more.
        outer = gradient.values.double().unsqueeze(2) * activation.values.double().unsqueeze(1)
        return (self._scales.double() * outer).flatten(0, 1)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "gradient_factor": self.gradient_factor,
            "activation_factor": self.activation_factor,
            "scale": self.scale,
        }


class _Values(Block):
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
        return _finite(self.values, self.name).double()


class EigenBlock(_Values, RotatedBlock):
    """``(Q_G ⊗ Q_A) diag(λ) (Q_G ⊗ Q_A)ᵀ``: a Kronecker eigenbasis with eigenvalues of its own (EKFAC).

    Args:
        gradient_basis: ``Q_G``, orthogonal, shape ``(K, q/K, q/K)`` (``K`` groups of rows; 1 for most layers).
        activation_basis: ``Q_A``, orthogonal, shape ``(K, p, p)``.
        values: ``λ``, not negative, shape ``(q, p)``.
        name: The layer's name, for errors.
    """

    kind = "eigen"

    def __init__(self, gradient_basis: Tensor, activation_basis: Tensor, values: Tensor, name: str = "block") -> None:
        super().__init__(values, name)
        self.gradient_basis = gradient_basis
        self.activation_basis = activation_basis

    def __repr__(self) -> str:
        return f"EigenBlock({self.name!r}, {_size(self.values)} eigenvalues)"

    def bases(self) -> tuple[Tensor, Tensor]:
        return self.gradient_basis, self.activation_basis

    def matmul(self, matrices: Tensor) -> Tensor:
        return self.from_eigenbasis(self.values * self.to_eigenbasis(matrices))

    @in_full_precision
    def to_dense(self) -> Tensor:
        parts = zip(
            self.gradient_basis, self.activation_basis, self.values.chunk(len(self.gradient_basis)), strict=True
        )
        dense = []
        for gradient, activation, values in parts:
            basis = torch.kron(gradient.contiguous(), activation.contiguous())
            dense.append((basis * values.flatten()) @ basis.T)
        return torch.block_diag(*dense)

    def scaled(self, factor: Tensor | float) -> EigenBlock:
        block = EigenBlock(self.gradient_basis, self.activation_basis, self.values * factor, self.name)
        block._take_layer_facts(self, factor)
        return block

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "gradient_basis": self.gradient_basis,
            "activation_basis": self.activation_basis,
            "values": self.values,
        }


class DiagonalBlock(_Values):
    """``diag(λ)``.

    Args:
        values: ``λ``, not negative, as a ``(q, p)`` matrix.
        name: The layer's name, for errors.
    """

    kind = "diagonal"

    def __repr__(self) -> str:
        return f"DiagonalBlock({self.name!r}, {_size(self.values)})"

    def matmul(self, matrices: Tensor) -> Tensor:
        return self.values * matrices

    def to_dense(self) -> Tensor:
        return torch.diag(self.values.flatten())

    def scaled(self, factor: Tensor | float) -> DiagonalBlock:
        block = DiagonalBlock(self.values * factor, self.name)
        block._take_layer_facts(self, factor)
        return block

    def to_eigenbasis(self, matrices: Tensor) -> Tensor:
        return matrices

    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        return matrices

    def diagonal_of(self, weights: Tensor) -> Tensor:
        return weights

    def _tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}


class DenseBlock(Block):
    """Any symmetric positive semidefinite matrix.

    Args:
        matrix: Shape ``(q·p, q·p)``.
        shape: ``(q, p)``.
        scale: A factor in front, 0-dim tensor or number.
        name: The layer's name, for errors.
    """

    kind = "dense"

    def __init__(
        self, matrix: Tensor, shape: tuple[int, int], scale: Tensor | float = 1.0, name: str = "block"
    ) -> None:
        super().__init__(name)
        self.matrix = matrix
        self.scale = torch.as_tensor(scale, dtype=matrix.dtype, device=matrix.device)
        self._shape = shape
        self._eigen: Eigen | None = None

    def __repr__(self) -> str:
        return f"DenseBlock({self.name!r}, {_size(self.matrix)})"

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @in_full_precision
    def matmul(self, matrices: Tensor) -> Tensor:
        return self.scale * (matrices.flatten(-2) @ self.matrix).unflatten(-1, self._shape)

    def to_dense(self) -> Tensor:
        return self.scale * self.matrix

    def trace(self) -> Tensor:
        return self.scale * self.matrix.trace()

    def frobenius_norm(self) -> Tensor:
        return self.scale.abs() * torch.linalg.norm(self.matrix)

    def scaled(self, factor: Tensor | float) -> DenseBlock:
        block = DenseBlock(self.matrix, self._shape, self.scale * factor, self.name)
        block._take_layer_facts(self, factor)
        block._eigen = self._eigen
        return block

    def undecomposed(self) -> list[Named]:
        return [] if self._eigen is not None else [(f"the block of layer {self.name!r}", self.matrix)]

    def adopt(self, parts: Sequence[Eigen]) -> None:
        (self._eigen,) = parts

    def eigen(self) -> Eigen:
        """The eigendecomposition, computed once."""
        if self._eigen is None:
            decompose([self])
        assert self._eigen is not None
        return self._eigen

    def unresolved(self) -> Tensor:
        unresolved = self.eigen().unresolved
        assert unresolved is not None
        return (self.scale.double() * unresolved).detach()

    def eigenvalues(self) -> Tensor:
        return (self.scale.double() * self.eigen().values.double()).unflatten(0, self._shape)

    @in_full_precision
    def to_eigenbasis(self, matrices: Tensor) -> Tensor:
        return (matrices.flatten(-2) @ self.eigen().vectors).unflatten(-1, self._shape)

    @in_full_precision
    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        return (matrices.flatten(-2) @ self.eigen().vectors.T).unflatten(-1, self._shape)

    @in_full_precision
    def diagonal_of(self, weights: Tensor) -> Tensor:
        return (self.eigen().vectors.square() @ weights.flatten()).unflatten(0, self._shape)

    def _tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix, "scale": self.scale, "shape": torch.tensor(self._shape)}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> DenseBlock:
        q, p = tensors["shape"].tolist()
        return cls(tensors["matrix"], (q, p), tensors["scale"], name)


BLOCKS: Registry[str, type[Block]] = Registry()
"""The kinds of blocks that files can name."""

for _kind in (KroneckerBlock, EigenBlock, DiagonalBlock, DenseBlock):
    BLOCKS.add(_kind.kind, _kind)


def block_from_tensors(kind: str, tensors: Mapping[str, Tensor], name: str) -> Block:
    """Inverse of `Block.to_tensors`.

    Raises:
        ValueError: If there is no such kind of block.
    """
    if kind not in BLOCKS:
        raise ValueError(f"the block of layer {name!r} is of kind {kind!r}; known are {list(BLOCKS)}.")
    parts = dict(tensors)
    least_trace = parts.pop("least_trace", None)
    block = BLOCKS[kind]._from_tensors(parts, name)
    block.least_trace = least_trace
    return block


@in_full_precision
def _two_sided(left: Tensor, matrices: Tensor, right: Tensor) -> Tensor:
    """``L M R`` by groups of rows: ``(K, r, r)``, ``(..., K·r, p)``, ``(K, p, p)``."""
    if len(left) == 1:
        return left[0] @ matrices @ right[0]
    return (left @ matrices.unflatten(-2, (len(left), -1)) @ right).flatten(-3, -2)


def _finite(values: Tensor, name: str) -> Tensor:
    if not torch.isfinite(values).all():
        raise ValueError(
            f"NaN or infinite entries in the block of layer {name!r}: nothing can be inverted. They come from activations "
            "or gradients that overflowed; look at the network's outputs on this data."
        )
    return values


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
