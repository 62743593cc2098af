"""Orthogonal bases of one side of a block, of which only the leading columns may be known.

A truncated side ``U diag(d) Uᵀ + α (I − U Uᵀ)`` has the eigenvectors ``U``, shape ``(n, k)``, and the eigenvalue ``α`` on
all that is orthogonal to them, the **rest**. Any orthonormal basis of the rest will do. The one used here is that of the
Householder reflections which make ``U``: ``Q = I − V T Vᵀ`` with ``V`` of shape ``(n, k)`` is orthogonal, and its last ``k``
columns are ``U`` up to signs. So products with ``Q`` cost ``n k`` per vector, and nothing of size ``n × n`` is formed.

The rest comes first in the order of the columns, since eigenvalues ascend. Values by eigenvector (eigenvalues, weights) have
one entry for the whole rest, then one for each column of ``U``: the **compact** form, of size ``k + 1``.

A side may also be diagonal, ``diag(d)``, with ``k`` different eigenvalues (`CoordinateBasis`). Its basis is the identity,
and its compact form has one entry for each of them.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from kronlaplace._dense import check_size
from kronlaplace._precision import in_full_precision

__all__ = ["Basis", "CoordinateBasis"]


class Basis:
    """Basis of one side for each group of rows: a square matrix ``Q``, or the leading columns ``U`` of an orthogonal one.

    Args:
        vectors: ``Q``, shape ``(K, n, n)``, which need not be orthogonal, or ``U``, shape ``(K, n, k)`` with ``k < n``.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def __len__(self) -> int:
        """Return the number ``K`` of groups."""
        return len(self.vectors)

    def equals(self, other: Basis) -> bool:
        """Return whether another basis has the same columns."""
        return not isinstance(other, CoordinateBasis) and torch.equal(self.vectors, other.vectors)

    @property
    def size(self) -> int:
        """``n``."""
        return self.vectors.shape[1]

    @property
    def truncated(self) -> bool:
        """Whether only the leading columns are known."""
        return self.vectors.shape[2] < self.vectors.shape[1]

    @property
    def rest(self) -> int:
        """The number ``n − k`` of columns that are not known."""
        return self.vectors.shape[1] - self.vectors.shape[2]

    @property
    def multiplicities(self) -> Tensor:
        """How many columns each compact value stands for, shape ``(k + 1,)`` or ``(n,)``, float64."""
        counts = torch.ones(self.vectors.shape[2] + self.truncated, dtype=torch.float64, device=self.vectors.device)
        if self.truncated:
            counts[0] = self.rest
        return counts

    def expand(self, values: Tensor) -> Tensor:
        """Repeat compact values for each column: ``(..., k + 1)`` to ``(..., n)``."""
        if not self.truncated:
            return values
        return torch.cat([values[..., :1].expand(*values.shape[:-1], self.rest), values[..., 1:]], dim=-1)

    def split(self, values: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split compact values into that of the rest, ``(..., 1)``, None if there is none, and those of the columns."""
        return (values[..., :1], values[..., 1:]) if self.truncated else (None, values)

    def gather(self, values: Tensor) -> Tensor:
        """Sum values of the columns in the rest: ``(..., n)`` to ``(..., k + 1)``."""
        if not self.truncated:
            return values
        return torch.cat([values[..., : self.rest].sum(-1, keepdim=True), values[..., self.rest :]], dim=-1)

    def coordinates(self, x: Tensor) -> Tensor:
        """Return ``x Q`` for rows ``x``, shape ``(..., K, m, n)``, in the same shape."""
        if not self.truncated:
            return _times(x, self.vectors)
        V, T = self._reflections
        return x - _times(_times(x, V @ T), V.mT)

    def combined(self, coordinates: Tensor) -> Tensor:
        """Return ``c Qᵀ`` for coordinates of rows, shape ``(..., K, m, n)``, in the same shape."""
        if not self.truncated:
            return _times(coordinates, self.vectors.mT)
        V, T = self._reflections
        return coordinates - _times(_times(coordinates, V @ T.mT), V.mT)

    def full(self) -> Tensor:
        """Return ``Q`` as a matrix, shape ``(K, n, n)``: ``n²`` numbers even if the side is truncated."""
        if not self.truncated:
            return self.vectors
        check_size(self.size, "this operation needs a whole eigenbasis")
        V, T = self._reflections
        whole = -(V @ T) @ V.mT
        whole.diagonal(dim1=-2, dim2=-1).add_(1)
        return whole

    def some_of_rest(self, count: int) -> Tensor:
        """Return the first ``count`` columns of the rest, shape ``(K, n, count)``."""
        V, T = self._reflections
        columns = -(V @ (T @ V[:, :count].mT))
        columns.diagonal(dim1=-2, dim2=-1).add_(1)
        return columns

    @cached_property
    def squares(self) -> Tensor:
        """Squares of the entries of ``Q``, compact: row sums over the rest, then ``U ∘ U``; shape ``(K, n, k + 1)``."""
        if not self.truncated:
            return self.vectors.square()
        known = self._precise.square()
        return torch.cat([(1 - known.sum(2, keepdim=True)).clamp_min(0), known], dim=2).to(self.vectors.dtype)

    def centered_squares(self) -> Tensor:
        """Return `squares` of the rows of ``Q`` minus their mean, for one group, shape ``(n, k + 1)``."""
        if not self.truncated:
            (Q,) = self.vectors
            return (Q - Q.mean(0)).square()
        (U,) = self._precise
        known = (U - U.mean(0)).square()
        # An example's unit vector minus the mean has the squared length 1 − 1/n.
        rest = (1 - 1 / self.size - known.sum(1, keepdim=True)).clamp_min(0)
        return torch.cat([rest, known], dim=1).to(self.vectors.dtype)

    def to_rows(self, values: Tensor) -> Tensor:
        """Return ``Σ_i Q_ci² s_i`` for compact values ``s`` on the last axis: ``(..., K, m, k')`` to ``(..., K, m, n)``."""
        return _times(values, self.squares.mT)

    def from_rows(self, values: Tensor) -> Tensor:
        """Return ``Σ_c Q_ci² s_c``, ``(..., K, m, n)`` to ``(..., K, m, k')``, summed over the rest."""
        return _times(values, self.squares)

    # -- Covariances Q diag(s) Qᵀ of one group's rows, for compact values s on the last axis -----------------------

    def covariances(self, values: Tensor) -> Tensor:
        """Return ``Q diag(s) Qᵀ``, ``(..., k')`` to ``(..., n, n)``."""
        rest, leading = self.split(values)
        (Q,) = self.vectors
        if rest is None:
            return (Q * leading.unsqueeze(-2)) @ Q.T
        covariance = (Q * (leading - rest).unsqueeze(-2)) @ Q.T
        return covariance + torch.diag_embed(rest.expand(*rest.shape[:-1], len(Q)))

    def margin_variances(self, values: Tensor, centered: Tensor, top: Tensor) -> Tensor:
        """Return the variances of the rows less one of them, ``(..., n)``.

        All three terms are of centered rows: a shift common to all would drown the margins in rounding.

        Args:
            values: ``s``, shape ``(..., k')``.
            centered: The variances of the rows less their mean, ``(..., n)``.
            top: The index of the row that is subtracted, ``(...)``.
        """
        (Q,) = self.vectors
        shift = Q.mean(0)
        rest, leading = self.split(values)
        of_top = (leading if rest is None else leading - rest) * (Q[top] - shift)
        with_top = of_top @ Q.T - (of_top @ shift).unsqueeze(-1)
        if rest is not None:  # times the inner product of both rows' unit vectors, less their mean
            n = len(Q)
            with_top = (with_top - rest / n).scatter_add(-1, top.unsqueeze(-1), rest)
        return (centered + centered.gather(-1, top.unsqueeze(-1)) - 2 * with_top).clamp_min(0)

    @cached_property
    def _precise(self) -> Tensor:
        """``U`` in float64, orthonormal to its rounding, so that what is left of a row's length is exact."""
        return torch.linalg.qr(self.vectors.double()).Q

    @cached_property
    def _reflections(self) -> tuple[Tensor, Tensor]:
        """``V``, shape ``(K, n, k)``, and the upper triangular ``T``, shape ``(K, k, k)``, with ``Q = I − V T Vᵀ``."""
        with torch.inference_mode(False), torch.no_grad():
            # Of the flipped matrix, so that the columns of Q which are U come last.
            packed, tau = torch.geqrf(self.vectors.flip(1, 2))
            k = tau.shape[-1]
            V = packed.tril(-1)
            V.diagonal(dim1=-2, dim2=-1)[..., :k] = 1
            # T⁻¹ + T⁻ᵀ = VᵀV; a column without a reflection has τ = 0, and does not count.
            alive = tau != 0
            inverse = (V.mT @ V).triu(1) * (alive.unsqueeze(-1) & alive.unsqueeze(-2))
            inverse.diagonal(dim1=-2, dim2=-1).copy_(torch.where(alive, tau, 1.0).reciprocal())
            identity = torch.eye(k, dtype=V.dtype, device=V.device)
            T = torch.linalg.solve_triangular(inverse, identity.expand_as(inverse), upper=True) * alive.unsqueeze(-2)
            return V.flip(1), T


@in_full_precision
def _times(x: Tensor, matrices: Tensor) -> Tensor:
    """Compute ``x M`` by groups, for shapes ``(..., K, m, n)`` and ``(K, n, k)``."""
    if len(matrices) == 1:
        return x @ matrices[0]
    return x @ matrices


class CoordinateBasis(Basis):
    """The coordinates themselves, as the basis of a diagonal side; groups of them share an eigenvalue.

    Args:
        index: The number of the eigenvalue that belongs to each coordinate, shape ``(n,)``, integers from 0 to ``k − 1``.
        count: ``k``.
        groups: The number ``K`` of groups of rows, which all have the same index.
        dtype: The dtype of the identity, if it is made.
    """

    def __init__(self, index: Tensor, count: int, groups: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.index = index
        self._count = count
        self._groups = groups
        self._dtype = dtype

    def __len__(self) -> int:
        return self._groups

    def equals(self, other: Basis) -> bool:
        return isinstance(other, CoordinateBasis) and self.size == other.size

    @property
    def size(self) -> int:
        return len(self.index)

    @property
    def truncated(self) -> bool:
        return True

    @property
    def rest(self) -> int:
        return 0

    @property
    def multiplicities(self) -> Tensor:
        return torch.bincount(self.index, minlength=self._count).double()

    def expand(self, values: Tensor) -> Tensor:
        return values.index_select(-1, self.index)

    def gather(self, values: Tensor) -> Tensor:
        return values.new_zeros(*values.shape[:-1], self._count).index_add(-1, self.index, values)

    def coordinates(self, x: Tensor) -> Tensor:
        return x

    def combined(self, coordinates: Tensor) -> Tensor:
        return coordinates

    def full(self) -> Tensor:
        check_size(self.size, "this operation needs a whole eigenbasis")
        return torch.eye(self.size, dtype=self._dtype, device=self.index.device).expand(self._groups, -1, -1)

    def to_rows(self, values: Tensor) -> Tensor:
        return self.expand(values)

    def from_rows(self, values: Tensor) -> Tensor:
        return self.gather(values)

    def covariances(self, values: Tensor) -> Tensor:
        return torch.diag_embed(self.expand(values))

    def centered_variances(self, values: Tensor) -> Tensor:
        """Return the variances of the rows less their mean, ``(..., k)`` to ``(..., n)``."""
        n = self.size
        total = (values * self.multiplicities.to(values.dtype)).sum(-1, keepdim=True)
        return self.expand(values) * (1 - 2 / n) + total / n**2

    def margin_variances(self, values: Tensor, centered: Tensor, top: Tensor) -> Tensor:
        variances = self.expand(values)
        margins = variances + variances.gather(-1, top.unsqueeze(-1))
        return margins.scatter(-1, top.unsqueeze(-1), 0.0)
