"""The damped inverse: one object answers everything that the consumers ask of ``scale · G ⊗ A + γ I``."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from kronlaplace.blocks import Block

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
    """Inverse of ``F + γ I`` for a block ``F``, exactly, from its eigendecomposition (KFC Eq. 39–44).

    Changing ``γ`` costs no new decomposition: that is of the undamped block, which keeps it.

    Args:
        block: The block, of any kind.
        damping: ``γ``, not negative; a number or a 0-dim tensor, which may carry a gradient.

    Raises:
        ValueError: If ``γ`` is negative or not finite, or zero while the block is singular, or if a factor has NaN or
            infinite entries.
    """

    def __init__(self, block: Block, damping: float | Tensor) -> None:
        self.block = block
        value = check_damping(damping)
        damping = torch.as_tensor(damping, dtype=torch.float64, device=block.device)
        self._eigenvalues = block.eigenvalues() + damping
        if value == 0 and not (self._eigenvalues > 0).all():
            raise ValueError(f"the block of layer {block.name!r} is singular; give a damping larger than 0.")

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues ``λ + γ`` of the damped block, shape ``(q, p)``, float64."""
        return self._eigenvalues

    @cached_property
    def weights(self) -> Tensor:
        """Eigenvalues of the inverse, ``1 / (λ + γ)``, shape ``(q, p)``, in the block's dtype."""
        return self._eigenvalues.reciprocal().to(self.block.dtype)

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
        return self.block.diagonal_of(self.weights)

    def _apply(self, matrices: Tensor, weights: Tensor) -> Tensor:
        return self.block.from_eigenbasis(self.block.to_eigenbasis(matrices) * weights)
