"""Damped inverse: a single object for everything that is computed from a damped block.

Every damping strategy changes the eigenvalues of a block but not its eigenbasis, so a change of damping needs no new
eigendecomposition: that of the undamped block is cached there. The only exception is a separate damping for each weight
(`PlusDiagonal`), which has a different eigenbasis.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from kronlaplace.blocks import Block, RotatedBlock
from kronlaplace.blocks.basis import Basis, CoordinateBasis

__all__ = ["DampedInverse", "DiagonalInverse"]


class DampedInverse:
    """Exact inverse of a damped block, from its eigendecomposition (KFC Eq. 39–44).

    It is created by damping strategies (see `kronlaplace.damping`).

    Args:
        block: Block with the eigenbasis of the damped block.
        eigenvalues: Eigenvalues of the damped block, float64, in the shape of `Block.eigenvalues`: ``(q, p)``, or compact if
            a factor is truncated; they may carry a gradient.
        damping: Damping to show in the repr, or None if no strategy was used.
    """

    def __init__(self, block: Block, eigenvalues: Tensor, damping: object = None) -> None:
        self.block = block
        self._eigenvalues = eigenvalues
        self._damping = damping

    def __repr__(self) -> str:
        size = "x".join(map(str, self.block.shape))
        by = "" if self._damping is None else f", {self._damping!r}"
        return f"{type(self).__name__}({self.block.name!r}, {size}, {self.block.kind}{by})"

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the damped block, ``λ + γ`` with Tikhonov damping, shape ``(q, p)`` or compact, float64."""
        return self._eigenvalues

    @cached_property
    def weights(self) -> Tensor:
        """Eigenvalues of the inverse, shape ``(q, p)`` or compact, in the block's dtype."""
        return self._eigenvalues.reciprocal().to(self.block.dtype)

    def bases(self) -> tuple[Basis, Basis] | None:
        """Return the factors of the basis ``B`` in which the inverse is ``B diag(w) Bᵀ``.

        Returns:
            ``B_G``, of size ``q/K``, and ``B_A``, of size ``p``, if ``B`` is a Kronecker product ``B_G ⊗ B_A`` for each of
            ``K`` groups of rows; otherwise None.
        """
        return self.block.bases() if isinstance(self.block, RotatedBlock) else None

    def coordinates(self, matrices: Tensor) -> Tensor:
        """Return ``Bᵀ vec(M)`` for ``M`` of shape ``(..., q, p)``, in the same shape."""
        return self.block.to_eigenbasis(matrices)

    def expand(self, values: Tensor) -> Tensor:
        """Repeat values of the shape of `eigenvalues` for each coordinate, shape ``(q, p)``."""
        return self.block.expand(values)

    def _combined(self, coordinates: Tensor) -> Tensor:
        """Return ``B vec(C)`` for ``C`` of shape ``(..., q, p)``, in the same shape."""
        return self.block.from_eigenbasis(coordinates)

    def solve(self, matrices: Tensor) -> Tensor:
        """Multiply the inverse with ``vec(M)``, for ``M`` of shape ``(..., q, p)``; same shape (KFC Eq. 42–44)."""
        return self._apply(matrices, self.weights)

    def sqrt_solve(self, matrices: Tensor) -> Tensor:
        """Multiply the symmetric square root of the inverse with ``vec(M)``, which turns white noise into samples.

        Args:
            matrices: Matrices ``M``, shape ``(..., q, p)``.
        """
        return self._apply(matrices, self.weights.sqrt())

    def logdet(self) -> Tensor:
        """Return ``log det`` of the damped block (not of its inverse), 0-dim, float64."""
        return self.block.total(self._eigenvalues.log())

    def diagonal(self) -> Tensor:
        """Return the diagonal of the inverse, as a ``(q, p)`` matrix."""
        return self.block.diagonal_of(self.weights)

    def row_variances(self, squares: Tensor, *, centered: bool = False) -> Tensor:
        """Return the variances of the outputs of a linear layer without groups, ``Σ_ij (Q_G)_ki² w_ij b_j²``.

        Args:
            squares: ``b²`` for ``b = Q_Aᵀ a``, compact, ``(..., p')``.
            centered: Whether the outputs are taken less the mean of all outputs.

        Returns:
            Shape ``(..., q)``.
        """
        bases = self.bases()
        assert bases is not None
        gradient = bases[0]
        if isinstance(gradient, CoordinateBasis):
            spread = squares @ self.weights.T
            return gradient.centered_variances(spread) if centered else gradient.expand(spread)
        if gradient.truncated and len(self.weights) < self.weights.shape[1]:  # the cheaper order
            of_rows = gradient.centered_squares() if centered else gradient.squares[0]
            return squares @ self.weights.T @ of_rows.T
        return squares @ (self._centered_row_weights if centered else self._row_weights).T

    @cached_property
    def _row_weights(self) -> Tensor:
        """Eigenvalues of the inverse weighted for each row: ``u_kj = Σ_i (Q_G)_ki² w_ij``, ``(q, p)``, compact columns."""
        bases = self.bases()
        assert bases is not None
        return bases[0].squares[0] @ self.weights

    @cached_property
    def _centered_row_weights(self) -> Tensor:
        """The `_row_weights` of each row minus the mean of all rows."""
        bases = self.bases()
        assert bases is not None
        return bases[0].centered_squares() @ self.weights

    def _apply(self, matrices: Tensor, weights: Tensor) -> Tensor:
        return self._combined(self.coordinates(self._checked(matrices)) * self.expand(weights))

    def _checked(self, matrices: Tensor) -> Tensor:
        q, p = self.block.shape
        if matrices.shape[-2:] != (q, p):
            raise ValueError(
                f"matrices for layer {self.block.name!r} must have shape (..., {q}, {p}), its weight flattened to a "
                f"matrix, with the bias as the last column if it has one; got {tuple(matrices.shape)}."
            )
        return matrices


class DiagonalInverse(DampedInverse):
    """Inverse of a damped diagonal block, of which only `weights` are kept, in the block's dtype.

    The `eigenvalues` are made of them at every access, with their rounding.

    Args:
        block: The block, whose eigenbasis is the identity.
        weights: Eigenvalues of the inverse, shape ``(q, p)``.
        damping: Damping to show in the repr.
    """

    def __init__(self, block: Block, weights: Tensor, damping: object) -> None:
        self.block = block
        self.weights = weights
        self._damping = damping

    @property
    def eigenvalues(self) -> Tensor:
        return self.weights.double().reciprocal()

    def logdet(self) -> Tensor:
        return self.block.total(self.eigenvalues.log())
