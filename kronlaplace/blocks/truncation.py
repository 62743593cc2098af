"""The leading eigenpairs of large second moments, and one eigenvalue for the rest.

A factor ``A`` of size ``n`` above a limit becomes ``U diag(d) Uᵀ + α (I − U Uᵀ)``: its ``k`` leading eigenpairs, and the
mean ``α = (tr A − Σ d) / (n − k)`` of all other eigenvalues, so that the trace is that of ``A``. The logarithm is concave,
so the determinant of the result plus a damping is never smaller than that of ``A``, and the evidence never larger; the
error shrinks with every eigenpair more.

The eigenpairs come from a randomized subspace iteration (Halko, Martinsson and Tropp 2011, Algorithms 4.4 and 5.3), which
costs ``n² k`` per step. If the rank of ``A`` is smaller than the subspace, as with few examples, it finds the whole range of
``A``, and is exact to rounding. Rows and columns of zeros are removed first; where few others are left, these are decomposed
exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronlaplace._arguments import positive_integer, seed_number
from kronlaplace._precision import in_full_precision, wide_dtype
from kronlaplace.blocks.eigendecomposition import (
    Eigen,
    Named,
    eigendecompose_moments,
    rounding,
    rounding_of_sum,
    sizes_of_used,
    used_order,
    used_rows,
)

__all__ = ["Truncation", "checked_truncation", "cut", "kept_count", "leading_eigenpairs"]

_ITERATIONS = 2
"""Products with the matrix after the first, each of which makes the subspace more accurate."""

_OVERSAMPLING = 0.125
"""Columns of the subspace beyond the wanted rank, as a share of it."""

_ROUNDING_OF_PAIRS = 4
"""Size up to which the sum of all eigenvalues that are not kept may be rounding, in units of that of the trace."""

_ORTHOGONAL = 32
"""Largest error of ``UᵀU``, in units of the rounding of its dtype, for which a result is accepted."""


@dataclass(frozen=True)
class Truncation:
    """Which factors of Kronecker blocks count as large, and how much of them is kept.

    A factor with more rows than ``limit`` keeps its leading eigenpairs, and one value for all its other eigenvalues, their
    mean. The trace stays exact, and no full eigendecomposition is needed. It keeps as few eigenpairs as hold ``share`` of
    its trace, but no more than ``rank``.

    Args:
        limit: Number of rows up to which a factor is kept whole.
        rank: Largest number of eigenpairs that are kept of a larger factor, at most ``limit``.
        share: Share of the trace that the kept eigenpairs need not exceed, from 0 (excluded) to 1.
        seed: Seed of the random subspaces; the global random state is neither used nor changed.

    Raises:
        TypeError, ValueError: If a number is of the wrong type or out of range, naming it.
    """

    limit: int = 1024
    rank: int = 512
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive_integer(self.limit, "limit")
        positive_integer(self.rank, "rank")
        seed_number(self.seed)
        if self.rank > self.limit:
            raise ValueError(f"rank must be at most limit, got rank={self.rank} and limit={self.limit}.")
        if not (isinstance(self.share, (int, float)) and 0 < self.share <= 1):
            raise ValueError(f"share must be a number above 0 and up to 1, got {self.share!r}.")


def checked_truncation(truncation: Truncation | None) -> Truncation | None:
    """Return a truncation, or None for no truncation, after checking that it is one of them.

    Raises:
        TypeError: If it is not.
    """
    if truncation is not None and not isinstance(truncation, Truncation):
        raise TypeError(
            "truncation must be a kl.Truncation, such as kl.Truncation(rank=256), or None to keep all factors whole; got "
            f"{truncation!r}."
        )
    return truncation


@torch.no_grad()
@in_full_precision
def leading_eigenpairs(matrices: Sequence[Named], truncation: Truncation) -> list[Eigen]:
    """Return the leading eigenpairs of named second moments ``Σ x xᵀ``, accumulated in their dtype.

    Args:
        matrices: Names, for errors, and square matrices with more than one row.
        truncation: How many pairs are kept.

    Returns:
        For each matrix: values of shape ``(k + 1,)``, first the one of the rest, then the others, ascending; vectors of
        shape ``(n, k)``. ``unresolved`` is zero, or at most the value of the rest, if it contains eigenvalues that are too
        small to be distinguished from rounding. Eigenvalues that may be nothing but rounding are never kept, and if the
        rest as a whole may be rounding, its value is zero.

    Raises:
        ValueError: If a matrix has NaN or infinite entries, naming it, before any work is done.
    """
    used = [used_rows(matrix) for _, matrix in matrices]
    sizes = sizes_of_used(matrices, used)
    parts = [
        (name, _used_part(matrix, rows, size)) for (name, matrix), rows, size in zip(matrices, used, sizes, strict=True)
    ]
    small = [i for i, size in enumerate(sizes) if 0 < size <= truncation.limit]
    whole = dict(zip(small, eigendecompose_moments([parts[i] for i in small]), strict=True))
    results = []
    for i, (_, matrix) in enumerate(matrices):
        if not sizes[i]:
            results.append(_of_zeros(matrix))
        elif i in whole:
            floor = whole[i].values.new_zeros(())
            results.append(_spread(cut(whole[i], floor, matrix.diagonal(), truncation), matrix, used[i]))
        else:
            found = _by_subspace(*parts[i], truncation)
            eps = torch.finfo(matrix.dtype).eps
            floor = rounding(found.values.double(), matrix.diagonal().amax(), eps, size=sizes[i])
            results.append(_spread(cut(found, floor, matrix.diagonal(), truncation), matrix, used[i]))
    return results


def _used_part(matrix: Tensor, used: Tensor, size: int) -> Tensor:
    """Return the symmetric part of the used rows and columns, shape ``(size, size)``, in at least float32."""
    if size < len(matrix):
        rows = used_order(used)[:size]
        matrix = matrix[rows.unsqueeze(1), rows]
    matrix = matrix.to(wide_dtype(matrix.dtype))
    return (matrix + matrix.T).div_(2)  # a new tensor, since large ones are copied only once


def _by_subspace(name: str, matrix: Tensor, truncation: Truncation) -> Eigen:
    """Return approximations of the leading eigenpairs, somewhat more than are kept, ascending.

    They are computed in the dtype of the matrix, and again in float64 if the vectors are not orthonormal to its rounding.
    The matrix is overwritten.
    """
    n = len(matrix)
    count = min(n, truncation.rank + max(10, round(_OVERSAMPLING * truncation.rank)))
    size = matrix.diagonal().amax()
    matrix.div_(size)  # so that products neither overflow nor underflow
    generator = torch.Generator().manual_seed(truncation.seed)
    start = torch.randn(n, count, generator=generator, dtype=torch.float64).to(matrix.device)
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        found = _subspace_iteration(matrix.to(dtype), start.to(dtype))
        gram = found.vectors.T @ found.vectors
        gram.diagonal().sub_(1)
        if bool(gram.abs().amax() <= _ORTHOGONAL * torch.finfo(dtype).eps * n**0.5):
            return found._replace(values=found.values * size.double())
    raise RuntimeError(
        f"the leading eigenpairs of {name} could not be computed in float64, though its entries are finite. Decompose it "
        'whole, with truncation=None, leave the layer out (layers=), or use the estimator "diagonal".'
    )


def _subspace_iteration(matrix: Tensor, start: Tensor) -> Eigen:
    """Return the Ritz pairs of a subspace that contains the leading eigenvectors approximately, ascending.

    Args:
        matrix: The matrix, with 1 as its largest diagonal entry.
        start: Random columns.
    """
    total = matrix.diagonal().double().sum()
    negligible = torch.finfo(matrix.dtype).eps * len(matrix) ** 0.5
    product = matrix @ start
    for _ in range(1 + _ITERATIONS):
        basis = torch.linalg.qr(product).Q
        product = matrix @ basis
        small = (basis.T @ product).double()
        if bool(total - small.trace() <= negligible):  # the subspace contains the whole range
            break
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    return Eigen(values, basis @ vectors.to(basis.dtype))


def _of_zeros(matrix: Tensor) -> Eigen:
    """Return one pair, since there must be one, of a matrix of zeros."""
    vectors = matrix.new_zeros(len(matrix), 1)
    vectors[0] = 1
    return Eigen(matrix.new_zeros(2), vectors, matrix.new_zeros((), dtype=torch.float64))


def cut(found: Eigen, floor: Tensor, diagonal: Tensor, truncation: Truncation) -> Eigen:
    """Keep the leading pairs of those that are more than rounding, and put all others into one value.

    Args:
        found: Pairs, ascending, at least one of them; the vectors may lack rows of zeros.
        floor: Size up to which eigenvalues may be rounding, 0-dim.
        diagonal: The diagonal of the whole matrix, ``(n,)``, in the dtype in which it was accumulated.
        truncation: How many are kept.
    """
    n, eps = len(diagonal), torch.finfo(diagonal.dtype).eps
    total = diagonal.double().sum()
    descending = found.values.double().flip(0)
    certain = (descending > floor)[: min(truncation.rank, n - 1)]
    k = kept_count(descending[: len(certain)], total, truncation, certain)
    kept = descending[:k].clamp_min(0).flip(0)
    rest = total - kept.sum()
    error = _ROUNDING_OF_PAIRS * rounding_of_sum(kept, diagonal.double().amax(), eps, size=n)
    rest = torch.where(rest > error, rest / (n - k), 0.0)
    unresolved = (
        torch.where(certain.all(), 0.0, torch.minimum(rest, floor.double()))
        if found.unresolved is None
        else found.unresolved
    )
    values = torch.cat([rest.unsqueeze(0), kept]).to(diagonal.dtype)
    return Eigen(values, found.vectors[:, -k:].to(diagonal.dtype), unresolved.double())


def kept_count(descending: Tensor, total: Tensor, truncation: Truncation, certain: Tensor | bool = True) -> int:
    """Return how many of some eigenvalues are kept: at least one, at most the rank, and no more than hold the share.

    Args:
        descending: The largest eigenvalues.
        total: The trace.
        truncation: The rank and the share.
        certain: Which of them are more than rounding.
    """
    before = descending.cumsum(0) - descending  # what the pairs in front of each hold
    wanted = certain & (before < truncation.share * total)
    return max(int(wanted[: truncation.rank].sum()), 1)


def _spread(eigen: Eigen, matrix: Tensor, used: Tensor) -> Eigen:
    """Give the vectors of the used rows their places in the whole matrix."""
    vectors = matrix.new_zeros(len(matrix), eigen.vectors.shape[1])
    vectors[used_order(used)[: len(eigen.vectors)]] = eigen.vectors.to(matrix)
    return eigen._replace(vectors=vectors)
