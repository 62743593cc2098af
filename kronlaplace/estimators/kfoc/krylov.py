"""Best pair that can be obtained from two passes over the data with the rearranged Fisher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronlaplace.estimators.kfoc.power_iteration import linear_combination
from kronlaplace.estimators.kfoc.truncation import batched_eigen, leading_eigenvector

__all__ = ["best_of_krylov"]

_RIDGE = 0.03
"""Share of the corner's norm below which its singular values count as noise when the missing entry is estimated."""

_LARGE_GUESS = 1 / 3
"""Share of the corner's norm above which a guess is shrunk, because it then results from dividing by a small number."""


def best_of_krylov(
    gradients: Sequence[Tensor],
    activations: Sequence[Tensor],
    name: str,
    length_activation: Tensor,
    length_gradient: Tensor,
    new_length_activation: Tensor,
    new_length_gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """Find the best pair in the span of three successive iterates of two passes with the operator ``R``.

    With unit iterates ``u_0, u_1, u_2`` (activations) and ``v_0, v_1, v_2`` (gradients), a pass gives ``R u_i = l v_{i+1}``
    and ``Rᵀ v_i = l' u_{i+1}``. So all entries ``v_iᵀ R u_j`` are known except the one for the two newest iterates, which is
    estimated as far as the others do not imply it (`_completion`). The leading singular pair of that 3x3 matrix is closer
    to that of the operator than the newest iterates are.

    Args:
        gradients: Iterates ``v_0, v_1, v_2``, shape ``(K, q/K, q/K)``.
        activations: Iterates ``u_0, u_1, u_2``, shape ``(K, p, p)``.
        name: Name of the factors in error messages.
        length_activation: Norm ``|Rᵀ v_0|``, shape ``(K, 1, 1)``, float64.
        length_gradient: Norm ``|R u_0|``.
        new_length_activation: Norm ``|Rᵀ v_1|``.
        new_length_gradient: Norm ``|R u_1|``.

    Returns:
        ``G``, which includes the scale, and ``A`` of unit norm.
    """
    gram_u, gram_v = _gram(activations), _gram(gradients)
    known = torch.zeros_like(gram_u)
    known[:, :, 0] = length_gradient[:, 0] * gram_v[:, :, 1]
    known[:, :, 1] = new_length_gradient[:, 0] * gram_v[:, :, 2]
    known[:, 0, 2] = length_activation[:, 0, 0] * gram_u[:, 1, 2]
    known[:, 1, 2] = new_length_activation[:, 0, 0]
    tolerance = torch.finfo(activations[0].dtype).eps ** (1 / 3)
    to_u, to_v = _orthonormal(gram_u, tolerance), _orthonormal(gram_v, tolerance)
    inner = to_v @ known @ to_u.mT
    inner[:, 2, 2] = _completion(inner)
    start = inner.new_tensor([1.0, 0.0, 0.0]).expand(len(inner), 3)  # u_1, which is positive semidefinite
    right = leading_eigenvector(*batched_eigen(inner.mT @ inner, name), start)
    left = (inner @ right.unsqueeze(2)).mT  # includes the size
    return linear_combination((left @ to_v)[:, 0], gradients), linear_combination(
        (right.unsqueeze(1) @ to_u)[:, 0], activations
    )


def _completion(inner: Tensor) -> Tensor:
    """Estimate the last entry of matrices ``(K, 3, 3)`` as the one that gives them rank two, shrunk if it is large.

    A value that is large relative to the singular value results from dividing by a small number; then zero, the value of
    least norm, is the better guess.
    """
    corner = inner[:, :2, :2]
    size = torch.linalg.matrix_norm(corner, keepdim=True).clamp_min(1e-140)  # so that its square does not underflow
    ridge = (_RIDGE * size) ** 2 * torch.eye(2, dtype=inner.dtype, device=inner.device)
    guess = inner[:, 2:, :2] @ corner.mT @ torch.linalg.solve(corner @ corner.mT + ridge, inner[:, :2, 2:])
    guess = guess[:, 0, 0]
    return guess / (1 + (guess / (_LARGE_GUESS * size[:, 0, 0])) ** 2)


def _orthonormal(gram: Tensor, tolerance: float) -> Tensor:
    """Return coefficients ``(K, 3, 3)`` that orthonormalize three unit vectors with this Gram matrix, in the order 1, 0, 2.

    The last row belongs to the newest vector. If it is hardly a new direction, rounding would be amplified: rows shorter
    than the tolerance fade out smoothly, so that the result is continuous in the rounding error.
    """
    rows: list[Tensor] = []
    for index in (1, 0, 2):
        row = torch.zeros_like(gram[:, 0])
        row[:, index] = 1
        for earlier in rows:
            row = row - earlier * torch.einsum("ki,kij,kj->k", earlier, gram, row).unsqueeze(1)
        square = torch.einsum("ki,kij,kj->k", row, gram, row).clamp_min(0).unsqueeze(1)
        floor = tolerance**4 if rows else torch.finfo(square.dtype).tiny
        rows.append(row * square**1.5 / (square.square() + floor))
    return torch.stack(rows, dim=1)


def _gram(matrices: Sequence[Tensor]) -> Tensor:
    """Compute inner products of ``m`` matrices ``(K, ·, ·)`` of about unit norm, shape ``(K, m, m)``, float64.

    The products are summed in the dtype of the matrices.
    """
    m = len(matrices)
    gram = torch.empty(len(matrices[0]), m, m, dtype=torch.float64, device=matrices[0].device)
    for i in range(m):
        for j in range(i, m):
            gram[:, i, j] = gram[:, j, i] = torch.linalg.vecdot(matrices[i].flatten(1), matrices[j].flatten(1)).double()
    return gram
