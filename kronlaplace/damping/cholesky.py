"""Inverses of damped factors ``c M + s I`` by Cholesky, in batches, with a check that waits for nothing."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision

__all__ = ["DampedInverses", "damped_inverses"]

_LARGEST_RESIDUAL = 1e-2
"""Largest relative error of a solution for which an inverse is accepted."""


class DampedInverses(NamedTuple):
    """Inverses of ``k`` matrices, of size ``n``.

    Attributes:
        inverses: Inverses of the matrices divided by their sizes, shape ``(k, n, n)``.
        sizes: Mean eigenvalue of each damped matrix, shape ``(k,)``, float64.
        right: Whether each inverse is accurate, shape ``(k,)``, boolean.
    """

    inverses: Tensor
    sizes: Tensor
    right: Tensor


@in_full_precision
def damped_inverses(matrices: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> DampedInverses:
    """Invert ``c M + s I`` for ``k`` positive semidefinite matrices ``M`` by Cholesky.

    They are divided by their mean eigenvalues first, so that nothing overflows in single precision, however large it is.

    Each inverse ``X`` is checked by a few products with vectors: the residual of the solution for two fixed vectors ``z``,
    and for ``X z``, which points to the smallest eigenvalue, where the error is largest. It is not right either if what it
    inverts may be rounding: if the smallest eigenvalue is below the rounding of ``M`` in its own dtype.

    Args:
        matrices: Matrices ``M``, symmetric, shape ``(k, n, n)``.
        scale: Numbers ``c``, shape ``(k,)``, float64.
        shift: Numbers ``s``, shape ``(k,)``, float64.
        dtype: Dtype of the computation and of the inverses.
    """
    n = matrices.shape[-1]
    mean = matrices.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    unit = torch.where(mean > 0, mean, 1.0).to(dtype)
    scale = scale * unit.double()
    sizes = scale * mean / unit.double() + shift
    damped = matrices.to(dtype) / unit.view(-1, 1, 1)
    damped.mul_((scale / sizes).to(dtype).view(-1, 1, 1))
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    rounding = (10 + math.sqrt(n)) * torch.finfo(matrices.dtype).eps * diagonal.amax(-1)
    diagonal.add_((shift / sizes).to(dtype).unsqueeze(1))
    root, info = torch.linalg.cholesky_ex(damped)
    failed = info != 0
    identity = torch.eye(n, dtype=dtype, device=root.device)
    inverses = torch.cholesky_inverse(torch.where(failed.view(-1, 1, 1), identity, root))
    residual, smallest = _examined(damped, inverses)
    right = ~failed & (residual <= _LARGEST_RESIDUAL) & (smallest > rounding)
    return DampedInverses(inverses, sizes, right)


def _examined(matrices: Tensor, inverses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest relative residual of solutions, and the smallest eigenvalue as an inverse iteration finds it."""
    n = matrices.shape[-1]
    phases = 0.37 * torch.arange(1, n + 1, dtype=torch.float64, device=matrices.device).square()
    fixed = torch.stack([phases.sin(), phases.cos()], 1).to(matrices.dtype)
    fixed = (fixed / torch.linalg.vector_norm(fixed, dim=0)).expand(len(matrices), n, 2)
    first = inverses @ fixed
    start = first / torch.linalg.vector_norm(first, dim=1, keepdim=True)
    second = inverses @ start
    residuals = matrices @ torch.cat([first, second], 2) - torch.cat([fixed, start], 2)
    smallest = torch.linalg.vector_norm(second, dim=1).amax(1).reciprocal()
    return torch.linalg.vector_norm(residuals, dim=1).amax(1), smallest
