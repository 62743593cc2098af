"""Solvers: what an optimizer needs of a damped inverse, and no more.

| solver | inverse | from |
| --- | --- | --- |
| `KroneckerSolver` | ``G⁻¹ ⊗ A⁻¹`` | factored dampings of Kronecker blocks, by Cholesky |
| `EigenSolver` | ``U diag(w) Uᵀ``, ``U = Q_G ⊗ Q_A`` | other dampings of Kronecker blocks, EKFAC |
| `DiagonalSolver` | ``diag(w)`` | diagonal blocks |
| `DenseSolver` | one matrix | dense blocks, and a separate damping for every weight of a small block |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace._registry import Registry
from kronlaplace.blocks import DenseBlock, DiagonalBlock, RotatedBlock
from kronlaplace.blocks.base import two_sided
from kronlaplace.damping.inverse import DampedInverse

__all__ = [
    "DenseSolver",
    "DiagonalSolver",
    "EigenSolver",
    "KroneckerSolver",
    "Solver",
    "solver_from_tensors",
    "solver_of",
]


class Solver(ABC):
    """Inverse of one layer's damped block, for solving only.

    Args:
        name: The layer's name, for errors.
    """

    kind: ClassVar[str]
    """The kind's name in checkpoints."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        q, p = self.shape
        return f"{type(self).__name__}({self.name!r}, {q}x{p})"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape ``(q, p)`` of the matrices on which the inverse acts."""

    def solve(self, matrices: Tensor) -> Tensor:
        """Multiply the inverse with ``vec(M)``, for ``M`` of shape ``(..., q, p)``; same shape (KFC Eq. 42–44).

        Raises:
            ValueError: If the shape does not fit.
        """
        if matrices.shape[-2:] != self.shape:
            q, p = self.shape
            raise ValueError(
                f"matrices for layer {self.name!r} must have shape (..., {q}, {p}), its weight flattened to a matrix, with "
                f"the bias as the last column if it has one; got {tuple(matrices.shape)}."
            )
        return self._solve(matrices)

    @abstractmethod
    def _solve(self, matrices: Tensor) -> Tensor:
        """Multiply the inverse with matrices of the right shape."""

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """Return the solver's tensors by name, for checkpoints; `solver_from_tensors` is the inverse."""


class KroneckerSolver(Solver):
    """Inverse ``G⁻¹ ⊗ A⁻¹`` for each group of rows.

    Args:
        gradient_inverse: Inverse of the damped ``G``, shape ``(K, q/K, q/K)``.
        activation_inverse: Inverse of the damped ``A``, shape ``(K, p, p)``.
        name: The layer's name, for errors.
    """

    kind = "kronecker"

    def __init__(self, gradient_inverse: Tensor, activation_inverse: Tensor, name: str) -> None:
        super().__init__(name)
        self.gradient_inverse = gradient_inverse
        self.activation_inverse = activation_inverse

    @property
    def shape(self) -> tuple[int, int]:
        groups, rows, _ = self.gradient_inverse.shape
        return groups * rows, self.activation_inverse.shape[-1]

    def _solve(self, matrices: Tensor) -> Tensor:
        return two_sided(self.gradient_inverse, matrices, self.activation_inverse)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"gradient_inverse": self.gradient_inverse, "activation_inverse": self.activation_inverse}


class EigenSolver(Solver):
    """Inverse ``U diag(w) Uᵀ`` with ``U = Q_G ⊗ Q_A`` for each group of rows.

    Args:
        gradient_basis: Orthogonal ``Q_G``, shape ``(K, q/K, q/K)``.
        activation_basis: Orthogonal ``Q_A``, shape ``(K, p, p)``.
        weights: Eigenvalues ``w`` of the inverse, shape ``(q, p)``.
        name: The layer's name, for errors.
    """

    kind = "eigen"

    def __init__(self, gradient_basis: Tensor, activation_basis: Tensor, weights: Tensor, name: str) -> None:
        super().__init__(name)
        self.gradient_basis = gradient_basis
        self.activation_basis = activation_basis
        self.weights = weights

    @property
    def shape(self) -> tuple[int, int]:
        q, p = self.weights.shape
        return q, p

    def _solve(self, matrices: Tensor) -> Tensor:
        G, A = self.gradient_basis, self.activation_basis
        return two_sided(G, two_sided(G.mT, matrices, A) * self.weights, A.mT)

    def to_tensors(self) -> dict[str, Tensor]:
        return {
            "gradient_basis": self.gradient_basis,
            "activation_basis": self.activation_basis,
            "weights": self.weights,
        }


class DiagonalSolver(Solver):
    """Inverse ``diag(w)``.

    Args:
        weights: Entries ``w``, shape ``(q, p)``.
        name: The layer's name, for errors.
    """

    kind = "diagonal"

    def __init__(self, weights: Tensor, name: str) -> None:
        super().__init__(name)
        self.weights = weights

    @property
    def shape(self) -> tuple[int, int]:
        q, p = self.weights.shape
        return q, p

    def _solve(self, matrices: Tensor) -> Tensor:
        return matrices * self.weights

    def to_tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights}


class DenseSolver(Solver):
    """Inverse that is any matrix.

    Args:
        inverse: The inverse by rows and columns of the weight, shape ``(q, p, q, p)``.
        name: The layer's name, for errors.
    """

    kind = "dense"

    def __init__(self, inverse: Tensor, name: str) -> None:
        super().__init__(name)
        self.inverse = inverse

    @property
    def shape(self) -> tuple[int, int]:
        q, p = self.inverse.shape[:2]
        return q, p

    @in_full_precision
    def _solve(self, matrices: Tensor) -> Tensor:
        return (matrices.flatten(-2) @ self.inverse.flatten(0, 1).flatten(1)).unflatten(-1, self.shape)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"inverse": self.inverse}


_KINDS: Registry[str, type[Solver]] = Registry()

for _kind in (KroneckerSolver, EigenSolver, DiagonalSolver, DenseSolver):
    _KINDS.add(_kind.kind, _kind)


def solver_from_tensors(tensors: Mapping[str, Tensor], kind: str, name: str) -> Solver:
    """Make a solver from its tensors, as the inverse of `Solver.to_tensors`, bit for bit.

    Args:
        tensors: The tensors by name; they are not copied.
        kind: The solver's `Solver.kind`.
        name: The layer's name, for errors.

    Raises:
        ValueError: If the kind of solver is unknown.
    """
    if kind not in _KINDS:
        raise ValueError(
            f"the solver of layer {name!r} is of unknown kind {kind!r}; the known kinds are {list(_KINDS)}."
        )
    return _KINDS[kind](**tensors, name=name)


@in_full_precision
def solver_of(inverse: DampedInverse) -> Solver:
    """Return a solver with only what `DampedInverse.solve` needs.

    Raises:
        TypeError: If the block is of a kind without a solver.
    """
    block, weights = inverse.block, inverse.weights.detach()
    if isinstance(block, DiagonalBlock):
        return DiagonalSolver(weights, block.name)
    if isinstance(block, DenseBlock):
        vectors = block.eigen().vectors
        matrix = (vectors * weights.flatten()) @ vectors.T
        return DenseSolver(matrix.unflatten(0, block.shape).unflatten(-1, block.shape), block.name)
    if isinstance(block, RotatedBlock):
        gradient, activation = (basis.full() for basis in block.bases())
        return EigenSolver(gradient, activation, inverse.expand(weights), block.name)
    raise TypeError(f"no solver for the block of layer {block.name!r}, a {type(block).__name__}.")
