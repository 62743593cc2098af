"""Second moments of so many rows that they are never formed: a sketch, summed over batches, or the diagonal alone.

Of a factor ``A = Σ x xᵀ`` of size ``n`` above a limit two things are accumulated: its diagonal, and the product
``Y = A Ω = Σ x (xᵀ Ω)`` with a fixed random matrix ``Ω`` of ``l`` columns. Both are sums over batches, so that neither the
size of the batches nor their order, nor how often sums are merged, changes the result (except for rounding). At the end the
factor becomes the one of two matrices with the trace of ``A`` that is closer to it:

- ``U diag(d) Uᵀ + α (I − U Uᵀ)``, with the ``l`` eigenpairs of the Nyström approximation ``Y (Ωᵀ Y)⁻¹ Yᵀ`` (Tropp,
  Yurtsever, Udell and Cevher 2017, Algorithm 3). It is positive semidefinite and never larger than ``A``. With the
  eigenvalues ``λ`` of ``A`` the trace of what it lacks is on average at most ``(1 + k / (l − k − 1)) Σ_{j>k} λ_j``, for
  every ``k < l − 1``, and zero if the rank of ``A`` is at most ``l``;
- ``diag(A)``, with its entries in groups of nearly equal ones, which are replaced by their mean. Entries of one group differ
  by a factor of at most ``10^{12/510} = 1.06``.

In both the eigenvalues are means of those of ``A`` (they are majorized by them), so that the determinant of the result plus
a damping is never smaller than that of ``A``, and the smaller determinant is closer. They are compared at a damping of the
mean eigenvalue.

Inputs and hidden units are correlated, and are best described by a few eigenpairs. Counts of words are not, nor are the
derivatives at the outputs of a network: there ``G`` is the mean of the output metric, which is diagonal for all likelihoods
but `Categorical`, and for many classes nearly so (`experiments.huge_layers` measures it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronlaplace._arguments import positive_integer, seed_number
from kronlaplace._precision import in_full_precision
from kronlaplace.blocks.eigendecomposition import Eigen, rounding
from kronlaplace.blocks.truncation import Truncation, cut

__all__ = [
    "DEFAULT_SKETCH",
    "Sketch",
    "checked_sketch",
    "grouped_diagonal",
    "leading_of_sketch",
    "side_of_sketch",
    "random_columns",
]

_GROUPS = 511
"""Number of groups of the positive entries of a diagonal."""

_RANGE = math.log(1e12)
"""Logarithm of the ratio of the largest entry to the smallest that is told from those below it."""

_ROUNDING = 32
"""Size up to which eigenvalues of ``Ωᵀ Y`` may be rounding, in units of the rounding of the largest."""

_CHUNK = 2**22
"""Numbers that are converted to float64 at a time."""


@dataclass(frozen=True)
class Sketch:
    """Which factors are so large that they are never formed, and how much is known of them; see `kronlaplace.blocks.sketch`.

    Args:
        limit: Number of rows up to which a factor is accumulated whole.
        rank: Largest number of eigenpairs of a larger factor. Sums of ``2 · rank`` columns are kept during the pass, or
            fewer where the layer's other side is small: at most a quarter of its rows, and at least 8.
        seed: Seed of the random matrices; the global random state is neither used nor changed.

    Raises:
        TypeError, ValueError: If a number is of the wrong type or out of range, naming it.
    """

    limit: int = 8192
    rank: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        positive_integer(self.limit, "limit")
        positive_integer(self.rank, "rank")
        seed_number(self.seed)

    def columns(self, rows: int, other_rows: int) -> int:
        """Return ``l`` for a side with so many rows, where the other side has ``other_rows``."""
        return min(self.rank, rows - 1, max(8, other_rows // 4))


DEFAULT_SKETCH = Sketch()


def checked_sketch(sketch: Sketch | Mapping[str, Any] | None) -> Sketch | None:
    """Return a `Sketch`, also from its values in a file, or None, after checking that it is one of these.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(sketch, Mapping):
        return Sketch(**sketch)
    if sketch is not None and not isinstance(sketch, Sketch):
        raise TypeError(
            "sketch must be a kl.Sketch, such as kl.Sketch(rank=64), or None to form all factors whole; got "
            f"{sketch!r}."
        )
    return sketch


def random_columns(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Return ``Ω``, shape ``(n, l)``, in the dtype and on the device of another tensor; columns have about unit length."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(rows, columns)
    for column in drawn.unbind(1):  # one by one, so that the first do not depend on how many there are
        column.copy_(torch.randn(rows, generator=generator))
    return drawn.div_(math.sqrt(rows)).to(like)


def side_of_sketch(name: str, diagonal: Tensor, product: Tensor | None, test: Tensor | None) -> Eigen:
    """Return a side of a `TruncatedBlock`, with a leading axis of groups of rows, of length 1.

    Args:
        name: The name of the factor, for errors.
        diagonal: The diagonal of ``A``, shape ``(n,)``.
        product: ``Y``, shape ``(n, l)``; None if the side is diagonal in any case.
        test: ``Ω``, likewise.

    Raises:
        ValueError: If there are NaN or infinite entries, naming the factor.
    """
    finite = torch.isfinite(diagonal).all() if product is None else torch.isfinite(product.sum() + diagonal.sum())
    if not finite:
        raise ValueError(
            f"NaN or infinite entries in {name}, which therefore cannot be inverted. They come from activations or "
            "gradients that overflowed; look at the network's outputs on this data."
        )
    by_coordinate = grouped_diagonal(diagonal)
    if product is None or test is None or not bool(diagonal.any()):
        return _with_groups(by_coordinate)
    leading = leading_of_sketch(product, test, diagonal)
    mean = diagonal.double().mean()
    k = len(leading.values) - 1
    log_det = (leading.values.double() / mean).log1p()
    log_det = log_det[0] * (len(diagonal) - k) + log_det[1:].sum()
    return _with_groups(leading if log_det < (diagonal.double() / mean).log1p().sum() else by_coordinate)


@torch.no_grad()
@in_full_precision
def leading_of_sketch(product: Tensor, test: Tensor, diagonal: Tensor) -> Eigen:
    """Return the eigenpairs of the Nyström approximation and the value of the rest, as `leading_eigenpairs` does.

    Args:
        product: ``Y = A Ω``, shape ``(n, l)``.
        test: ``Ω``, shape ``(n, l)``.
        diagonal: The diagonal of ``A``, shape ``(n,)``, not all zero.
    """
    eps = torch.finfo(product.dtype).eps
    inner = torch.zeros(product.shape[1], product.shape[1], dtype=torch.float64, device=product.device)
    rows = max(1, _CHUNK // product.shape[1])
    for one, other in zip(test.split(rows), product.split(rows), strict=True):
        inner.addmm_(one.double().T, other.double())
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    certain = values > _ROUNDING * eps * values[-1]  # leaving out others is the same as having fewer columns
    roots = torch.where(certain, values.clamp_min(0).rsqrt(), 0.0)
    basis, triangle = torch.linalg.qr(product)
    half = triangle.double() @ (vectors * roots)
    values, vectors = torch.linalg.eigh(half @ half.T)
    values = values.clamp_min(0)
    total, n = diagonal.double().sum(), len(diagonal)
    kept = _above_the_mean_of_others(values.flip(0), total, n)
    values, vectors = values[-kept:].clamp_min(total / n if kept == 1 else 0.0), vectors[:, -kept:]
    floor = rounding(values, diagonal.double().amax(), eps, size=len(diagonal))
    found = Eigen(values, basis @ vectors.to(basis.dtype))
    return cut(found, floor, diagonal, Truncation(limit=len(diagonal), rank=len(values)))


def _above_the_mean_of_others(descending: Tensor, total: Tensor, size: int) -> int:
    """Return how many eigenvalues are larger than the mean of all that are not among them, at least one.

    Any other pair is closer to the matrix as a part of the rest.
    """
    before = descending.cumsum(0) - descending
    others = size - torch.arange(len(descending), device=descending.device)
    return max(1, int((descending > (total - before) / others).cumprod(0).sum()))


def grouped_diagonal(diagonal: Tensor) -> Eigen:
    """Return the entries of a diagonal in groups of nearly equal ones: their means, ascending, and each row's group."""
    entries = diagonal.double().clamp_min(0)
    largest = entries.amax()
    below = -(entries / torch.where(largest > 0, largest, 1.0)).log()  # from 0 on; infinite for zeros
    positive = entries > 0
    width = torch.where(positive, below, 0.0).amax().clamp(max=_RANGE)
    number = _GROUPS - (below / width.clamp_min(1e-300) * (_GROUPS - 1)).clamp(max=_GROUPS - 1).floor()
    number = torch.where(positive, number, 0.0).long()
    numbers, index, counts = number.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(numbers), dtype=torch.float64, device=entries.device).index_add_(0, index, entries)
    zero = torch.zeros((), dtype=torch.float64, device=entries.device)
    return Eigen((sums / counts).to(diagonal.dtype), index, zero)


def _with_groups(eigen: Eigen) -> Eigen:
    """Add the axis of groups of rows."""
    assert eigen.unresolved is not None
    vectors = eigen.vectors.unsqueeze(0) if eigen.vectors.is_floating_point() else eigen.vectors
    return Eigen(eigen.values.unsqueeze(0), vectors, eigen.unresolved.unsqueeze(0))
