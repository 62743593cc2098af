"""The damped inverse: one object answers everything that the consumers ask of ``scale · G ⊗ A + γ I``."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from kronlaplace.kronecker import KroneckerBlock

__all__ = ["DampedInverse", "check_damping"]


def check_damping(damping: float | Tensor) -> float:
    """The value of ``γ``.

    Raises:
        ValueError: If it is not one finite number, or negative.
    """
    is_number = isinstance(damping, (int, float)) or (isinstance(damping, Tensor) and damping.ndim == 0)
    value = float(damping.detach() if isinstance(damping, Tensor) else damping) if is_number else float("nan")
    if not 0 <= value < float("inf"):
        raise ValueError(f"damping must be one finite number that is not negative, got {damping!r}.")
    return value


class DampedInverse:
    """Inverse of ``scale · G ⊗ A + γ I``, exactly, from the eigendecompositions of ``G`` and ``A`` (KFC Eq. 39–44).

    Changing ``γ`` costs no new decomposition: they are of the undamped factors and kept by the block.

    Args:
        block: The block.
        damping: ``γ``, not negative; a number or a 0-dim tensor, which may carry a gradient.

    Raises:
        ValueError: If ``γ`` is negative or not finite, or zero while the block is singular, or if a factor has NaN or
            infinite entries.
    """

    def __init__(self, block: KroneckerBlock, damping: float | Tensor) -> None:
        gradient, activation = block.eigen()
        self.gradient_basis = gradient.vectors
        self.activation_basis = activation.vectors
        value = check_damping(damping)
        damping = torch.as_tensor(damping, dtype=torch.float64, device=block.scale.device)
        # In float64: the smallest eigenvalues and the damping often differ from the largest by 1e10 and more.
        self._eigenvalues = (
            block.scale.double() * torch.outer(gradient.values.double(), activation.values.double()) + damping
        )
        if value == 0 and not (self._eigenvalues > 0).all():
            raise ValueError(f"the block of layer {block.name!r} is singular; give a damping larger than 0.")

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues ``scale · d_G,i d_A,j + γ`` of the damped block, shape ``(q, p)``, float64."""
        return self._eigenvalues

    @cached_property
    def weights(self) -> Tensor:
        """Eigenvalues of the inverse, ``1 / (scale · d_G,i d_A,j + γ)``, shape ``(q, p)``, in the factors' dtype."""
        return self._eigenvalues.reciprocal().to(self.gradient_basis.dtype)

    def solve(self, matrices: Tensor) -> Tensor:
        """The inverse times ``vec(M)``, for ``M`` of shape ``(..., q, p)``; same shape (KFC Eq. 42–44)."""
        return self._apply(matrices, self.weights)

    def sqrt_solve(self, matrices: Tensor) -> Tensor:
        """The symmetric square root of the inverse times ``vec(M)``: turns white noise into samples.

        Args:
            matrices: ``M``, shape ``(..., q, p)``.
        """
        return self._apply(matrices, self.weights.sqrt())

    def logdet(self) -> Tensor:
        """``log det`` of the damped block (not of its inverse), 0-dim, float64."""
        return self._eigenvalues.log().sum()

    def diagonal(self) -> Tensor:
        """Diagonal of the inverse, as a ``(q, p)`` matrix."""
        return self.gradient_basis.square() @ self.weights @ self.activation_basis.square().T

    def _apply(self, matrices: Tensor, eigenvalues: Tensor) -> Tensor:
        inner = self.gradient_basis.T @ matrices @ self.activation_basis
        return self.gradient_basis @ (inner * eigenvalues) @ self.activation_basis.T
