"""Robust symmetric eigendecompositions with checked results.

For some finite, moderate matrices of low rank with many zero rows, ``torch.linalg.eigh`` does not converge, and for a few
of them it returns infinite or wrong results without an error. So rows and columns of zeros are removed first, every result
is checked against its matrix, and matrices without a correct result are decomposed by other routines, one by one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from kronlaplace._arguments import warn

__all__ = [
    "Eigen",
    "Named",
    "eigendecompose",
    "eigendecompose_moments",
    "eigendecompose_symmetric",
    "rounding",
    "rounding_of_sum",
    "sizes_of_used",
    "trace",
    "used_order",
    "used_rows",
]

Named = tuple[str, Tensor]
"""A matrix, preceded by its name for errors."""

_ROUNDING = 16
"""Error that a correct result may have, in units of ``n · eps``; observed errors are below 1 for ``n > 1``."""

_UNEVEN = 16.0
"""Largest ratio of diagonal entries of a matrix for which one bound on its rounding is used."""

_MARGIN = 4
"""Size up to which positive eigenvalues of ``Σ x xᵀ`` may be rounding, relative to the most negative one, which is."""

_DRIVERS = ("evd", "evr", "ev")
"""Drivers of ``scipy.linalg.eigh``, in the order in which they are tried."""


class Eigen(NamedTuple):
    """Eigendecomposition ``M = Q diag(d) Qᵀ``: ascending ``d``, shape ``(n,)``, and orthogonal ``Q``, shape ``(n, n)``.

    ``unresolved``, a 0-dim tensor from `eigendecompose_moments`, is the mean of the eigenvalues that are too small relative
    to the others to be distinguished from rounding; zero if this mean may be rounding, too.
    """

    values: Tensor
    vectors: Tensor
    unresolved: Tensor | None = None


def trace(matrices: Tensor) -> Tensor:
    """Return the traces over the last two axes."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def eigendecompose(matrices: Sequence[Named]) -> list[Eigen]:
    """Return the eigendecompositions of named positive semidefinite matrices.

    This is `eigendecompose_symmetric`, but eigenvalues that are negative due to rounding become zero.
    """
    return [Eigen(part.values.clamp_min(0), part.vectors) for part in eigendecompose_symmetric(matrices)]


def eigendecompose_moments(matrices: Sequence[Named]) -> list[Eigen]:
    """Return the eigendecompositions of named second moments ``Σ x xᵀ``, accumulated in their dtype.

    This is `eigendecompose_symmetric`, but eigenvalues that may be nothing but rounding are replaced by their mean, or by
    zero if the mean may be rounding, too. (Rounding has no preferred sign: what it adds to one eigenvalue it takes from
    another, so their sum is known better than each of them.) If the diagonal entries differ widely in size, as with features
    in different units, this alone would mistake well-determined small eigenvalues for rounding, since entries are rounded
    relative to ``√(M_ii M_jj)``. In that case, the rounding is first removed from the matrix with unit diagonal,
    ``M_ij / √(M_ii M_jj)``.
    """
    freed = _freed_of_rounding(matrices)
    todo = [(name, freed[i][0] if i in freed else matrix) for i, (name, matrix) in enumerate(matrices)]
    results = []
    for i, (part, (_, matrix)) in enumerate(zip(eigendecompose_symmetric(todo), matrices, strict=True)):
        floor = len(matrix) * torch.finfo(torch.float64).eps * part.values[-1]  # of the decomposition
        if i in freed:
            values, unresolved = torch.where(part.values > floor, part.values, 0.0), freed[i][1]
        else:
            largest, eps = matrix.diagonal().amax().to(part.values), torch.finfo(matrix.dtype).eps
            floor = floor + rounding(part.values, largest, eps)
            values, unresolved = _smoothed(part.values, floor, rounding_of_sum(part.values, largest, eps))
        results.append(Eigen(values.to(matrix), part.vectors.to(matrix), unresolved.double()))
    return results


def _smoothed(values: Tensor, floor: Tensor, rounding_of_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Replace eigenvalues up to the floor by their mean, or by zero if the mean may be rounding; return both."""
    small = values <= floor
    count = small.sum().clamp_min(1)
    total = torch.where(small, values, 0.0).sum()
    certain = total > (1 + 2 / count) * rounding_of_sum
    mean = torch.where(certain, torch.minimum(total / count, floor), 0.0)
    return torch.where(small, mean, values), mean


def rounding_of_sum(values: Tensor, largest: Tensor | float, eps: float, size: int | None = None) -> Tensor:
    """Return the largest rounding error of a sum of many eigenvalues; for the arguments, see `rounding`."""
    return eps * (math.sqrt(size or len(values)) * largest + values[-1])


def rounding(values: Tensor, largest: Tensor | float, eps: float, size: int | None = None) -> Tensor:
    """Return a bound on eigenvalues of ``M = Σ x xᵀ`` that are mere rounding: at least ``(10 + √n) ε max M_ii``.

    Entries have errors of a few ``ε √(M_ii M_jj)`` that are effectively random. In sums over up to 100 batches, the
    resulting eigenvalues were below this value, and below a third of it for ``n ≥ 30``. Over more batches they are larger,
    but half of them are negative, so the most negative one shows how large they are.

    Args:
        values: All eigenvalues, ascending, or the largest of them.
        largest: ``max M_ii``.
        eps: The ``ε`` of the dtype in which the sum was accumulated.
        size: ``n``, if some eigenvalues are missing.
    """
    return (-_MARGIN * values[0]).clamp_min((10 + math.sqrt(size or len(values))) * eps * largest)


def _freed_of_rounding(matrices: Sequence[Named]) -> dict[int, tuple[Tensor, Tensor]]:
    """Return second moments with uneven diagonals, in float64 and free of rounding, and unresolved eigenvalues, by index."""
    coarse = [i for i, (_, matrix) in enumerate(matrices) if matrix.dtype != torch.float64]
    uneven = [i for i, flag in zip(coarse, _asked([_is_uneven(matrices[i][1]) for i in coarse]), strict=True) if flag]
    roots, evened = [], []
    for name, matrix in (matrices[i] for i in uneven):
        # Smaller entries, such as those of nearly dead units, may have underflowed and are negligible next to the largest.
        least = torch.finfo(matrix.dtype).eps ** 2
        matrix = _double(matrix)
        root = matrix.diagonal().clamp_min(least * matrix.diagonal().amax()).sqrt()
        roots.append(root)
        evened.append((name, matrix / root / root.unsqueeze(1)))
    freed = {}
    for i, root, part in zip(uneven, roots, eigendecompose_symmetric(evened), strict=True):
        eps = torch.finfo(matrices[i][1].dtype).eps
        floor = rounding(part.values, 1.0, eps)
        values, mean = _smoothed(part.values, floor, rounding_of_sum(part.values, 1.0, eps))
        half = root.unsqueeze(1) * part.vectors
        small = part.values <= floor
        unresolved = mean * (half.square().sum(0) * small).sum() / small.sum().clamp_min(1)
        half = half * values.sqrt()
        freed[i] = half @ half.T, unresolved
    return freed


def _is_uneven(matrix: Tensor) -> Tensor:
    diagonal = matrix.diagonal()
    return diagonal.amax() > _UNEVEN * torch.where(diagonal > 0, diagonal, torch.inf).amin()


def eigendecompose_symmetric(matrices: Sequence[Named]) -> list[Eigen]:
    """Return the eigendecompositions of named symmetric matrices.

    The matrices are first symmetrized, then decomposed in float64 without their rows and columns of zeros (which correspond
    to exact eigenvectors with eigenvalue zero), with one batched call per size. The results have the dtype of the matrices.
    If ``torch.linalg.eigh`` returns no result or a wrong one, ``scipy.linalg.eigh`` decomposes the matrix on the CPU, and a
    warning names it. Apart from the waits in ``torch.linalg.eigh`` itself, this waits for an accelerator twice: before, for
    the sizes, and afterwards, for all checks.

    Args:
        matrices: Names, for messages, and square matrices.

    Raises:
        ValueError: If a matrix has NaN or infinite entries, naming it, before any work is done.
        RuntimeError: If all routines fail for some matrices, naming them.
    """
    used = [used_rows(matrix) for _, matrix in matrices]
    sizes = sizes_of_used(matrices, used)
    groups: dict[tuple[int, torch.device], list[int]] = defaultdict(list)
    for index, (_, matrix) in enumerate(matrices):
        groups[sizes[index], matrix.device].append(index)
    results: dict[int, Eigen] = {}
    order: list[int] = []
    right: list[Tensor] = []
    for (size, _), members in groups.items():
        stack = torch.stack([_used_part(matrices[index][1], used[index], size) for index in members])
        parts = _eigh(stack)
        order.extend(members)
        right.extend(_is_right(stack, parts))
        for i, index in enumerate(members):
            results[index] = _whole(Eigen(parts.values[i], parts.vectors[i]), matrices[index][1], used[index])
    if failed := [index for index, flag in zip(order, _asked(right), strict=True) if not flag]:
        todo = [(matrices[i][0], _used_part(matrices[i][1].cpu(), used[i].cpu(), sizes[i])) for i in failed]
        for index, part in zip(failed, _by_other_drivers(todo), strict=True):
            results[index] = _whole(part, matrices[index][1], used[index])
    return [results[index] for index in range(len(matrices))]


def used_rows(matrix: Tensor) -> Tensor:
    """Return which rows and columns are not entirely zero, shape ``(n,)``."""
    filled = matrix != 0
    return filled.any(0) | filled.any(1)


def sizes_of_used(matrices: Sequence[Named], used: Sequence[Tensor]) -> list[int]:
    """Return the number of used rows of each matrix, and check that entries are finite, with one wait per device."""
    counts = [torch.where(torch.isfinite(m).all(), rows.sum(), -1) for (_, m), rows in zip(matrices, used, strict=True)]
    sizes = _asked(counts)
    if bad := [name for (name, _), size in zip(matrices, sizes, strict=True) if size < 0]:
        raise ValueError(
            f"NaN or infinite entries in {', '.join(bad)}, which therefore cannot be inverted. They come from activations "
            "or gradients that overflowed; look at the network's outputs on this data."
        )
    return sizes


def _asked(numbers: Sequence[Tensor]) -> list[int]:
    """Return the values of 0-dim tensors of one dtype, with one wait per device."""
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for number in numbers:
        by_device[number.device].append(number)
    values = {device: iter(torch.stack(some).tolist()) for device, some in by_device.items()}
    return [next(values[number.device]) for number in numbers]


def _double(matrix: Tensor) -> Tensor:
    """Convert to float64, on the CPU if the device does not support it."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()


def used_order(used: Tensor) -> Tensor:
    """Return the indices of the used rows, then of the others, each in order, without waiting for the device."""
    return used.to(torch.uint8).argsort(descending=True, stable=True)


def _used_part(matrix: Tensor, used: Tensor, size: int) -> Tensor:
    """Return the symmetric part of the used rows and columns, shape ``(size, size)``, in float64."""
    if size < len(matrix):
        rows = used_order(used)[:size]
        matrix = matrix[rows.unsqueeze(1), rows]
    matrix = _double(matrix)
    return (matrix + matrix.T) / 2


def _whole(part: Eigen, matrix: Tensor, used: Tensor) -> Eigen:
    """Extend the decomposition of the used part to the whole matrix, on its device and in its dtype."""
    values, vectors = part.values.to(matrix.device, matrix.dtype), part.vectors.to(matrix.device, matrix.dtype)
    n, size = len(used), len(values)
    if size == n:
        return Eigen(values, vectors)
    rows = used_order(used)
    whole = vectors.new_zeros(n, n)
    whole[rows[:size], :size] = vectors
    whole[rows[size:], torch.arange(size, n, device=whole.device)] = 1
    values, ascending = torch.cat([values, values.new_zeros(n - size)]).sort(stable=True)
    return Eigen(values, whole[:, ascending])


def _eigh(stack: Tensor) -> Eigen:
    """Return the eigendecompositions of a stack ``(k, n, n)``, with NaN where they do not converge."""
    try:
        return Eigen(*torch.linalg.eigh(stack))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(stack) == 1:
            nowhere = torch.full_like(stack, torch.nan)
            return Eigen(nowhere[..., 0], nowhere)
        parts = [_eigh(matrix.unsqueeze(0)) for matrix in stack]  # one failure makes the whole batch fail
        return Eigen(torch.cat([part.values for part in parts]), torch.cat([part.vectors for part in parts]))


@torch.no_grad()
def _is_right(stack: Tensor, parts: Eigen) -> Tensor:
    """Return whether ``Q diag(d) Qᵀ`` is the matrix, ``Q`` orthogonal (up to rounding), and ``d`` ascending, shape ``(k,)``.

    Errors are measured by largest entries and row sums, since squares could overflow. Comparisons with NaN are false.
    """
    values, vectors, _ = parts
    count, n = values.shape
    if not n:
        return torch.ones(count, dtype=torch.bool, device=stack.device)
    bound = _ROUNDING * n * torch.finfo(stack.dtype).eps
    norm = stack.abs().sum(2).amax(1)
    residual = (vectors * values.unsqueeze(1)) @ vectors.mT
    close = residual.sub_(stack).abs_().amax((1, 2)) <= bound * norm
    gram = vectors.mT @ vectors
    gram.diagonal(dim1=1, dim2=2).sub_(1)
    return close & (gram.abs_().amax((1, 2)) <= bound) & (values.diff(dim=1) >= 0).all(1)


def _by_other_drivers(matrices: Sequence[Named]) -> list[Eigen]:
    """Decompose matrices on which ``torch.linalg.eigh`` failed with ``scipy.linalg.eigh``, and warn."""
    results, failed, drivers = [], [], []
    for name, matrix in matrices:
        part, driver = _by_scipy(matrix)
        if part is None:
            failed.append(name)
            continue
        results.append(part)
        drivers.append(f"{name} ({driver})")
    if failed:
        raise RuntimeError(
            f"no eigendecomposition of {', '.join(failed)} in float64: the entries are finite, but torch.linalg.eigh and "
            f"scipy.linalg.eigh (drivers {', '.join(_DRIVERS)}; not tried for matrices that carry a gradient, which it "
            "would lose) did not converge or gave wrong results. Leave the layer out (layers=), use the estimator "
            '"diagonal", which decomposes nothing, or try torch.set_num_threads(1), which sums in a different order.'
        )
    if not matrices:
        return results
    warn(
        f"torch.linalg.eigh did not converge or gave a wrong result for {', '.join(name for name, _ in matrices)}. "
        f"scipy.linalg.eigh decomposed on the CPU, in float64, with the driver in parentheses: {', '.join(drivers)}. These "
        "results were checked and are correct."
    )
    return results


def _by_scipy(matrix: Tensor) -> tuple[Eigen | None, str]:
    """Return the first correct result, or None if there is none, and the driver that gave it."""
    if matrix.requires_grad:
        return None, ""
    for driver in _DRIVERS:
        try:
            found = scipy.linalg.eigh(matrix.numpy(), driver=driver)
        except np.linalg.LinAlgError:
            continue
        part = Eigen(*(torch.from_numpy(np.ascontiguousarray(array)) for array in found))
        if bool(_is_right(matrix.unsqueeze(0), Eigen(part.values.unsqueeze(0), part.vectors.unsqueeze(0)))):
            return part, driver
    return None, ""
