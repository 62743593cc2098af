"""Symmetric eigendecompositions that do not fail quietly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Eigen", "eigendecompose", "eigendecompose_symmetric", "trace"]


class Eigen(NamedTuple):
    """``M = Q diag(d) Qᵀ`` of a symmetric matrix: ``d`` ascending, shape ``(n,)``, ``Q`` ``(n, n)``."""

    values: Tensor
    vectors: Tensor


def trace(matrices: Tensor) -> Tensor:
    """Traces over the last two axes."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def eigendecompose(matrices: Mapping[str, Tensor]) -> dict[str, Eigen]:
    """Eigendecompositions of named positive semidefinite matrices.

    As `eigendecompose_symmetric`; eigenvalues below zero by rounding become zero.
    """
    parts = eigendecompose_symmetric(matrices)
    return {name: Eigen(part.values.clamp_min(0), part.vectors) for name, part in parts.items()}


def eigendecompose_symmetric(matrices: Mapping[str, Tensor]) -> dict[str, Eigen]:
    """Eigendecompositions of named symmetric matrices.

    The matrices are symmetrised first and decomposed in float64, equal shapes in one batched call. The results have the
    dtype of the matrices. If a decomposition fails on an accelerator, it is tried once more on the CPU.

    Args:
        matrices: Square matrices by name; the names are for the errors.

    Raises:
        ValueError: If a matrix has NaN or infinite entries, naming it, before any work is done.
        RuntimeError: If a decomposition fails everywhere, naming the matrices.
    """
    _refuse_non_finite(matrices)
    groups: dict[tuple[int, torch.dtype, torch.device], list[str]] = defaultdict(list)
    for name, matrix in matrices.items():
        groups[len(matrix), matrix.dtype, matrix.device].append(name)
    result: dict[str, Eigen] = {}
    for (_, dtype, device), names in groups.items():
        stack = torch.stack([matrices[name] for name in names])
        values, vectors = _eigh((stack + stack.mT) / 2, names)
        values, vectors = values.to(device, dtype), vectors.to(device, dtype)
        result.update({name: Eigen(values[i], vectors[i]) for i, name in enumerate(names)})
    return {name: result[name] for name in matrices}


def _refuse_non_finite(matrices: Mapping[str, Tensor]) -> None:
    """One question to the device for all matrices; a second one only if the answer is bad."""
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for matrix in matrices.values():
        by_device[matrix.device].append(torch.isfinite(matrix).all())
    if all(bool(torch.stack(flags).all()) for flags in by_device.values()):
        return
    bad = [name for name, matrix in matrices.items() if not torch.isfinite(matrix).all()]
    raise ValueError(
        f"NaN or infinite entries in {', '.join(bad)}: nothing can be inverted. They come from activations or "
        "gradients that overflowed; look at the network's outputs on this data."
    )


def _eigh(stack: Tensor, names: list[str]) -> Eigen:
    if stack.device.type == "mps":  # has no float64
        stack = stack.cpu()
    try:
        return Eigen(*torch.linalg.eigh(stack.double()))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if stack.device.type != "cpu":
            return _eigh(stack.cpu(), names)
        raise RuntimeError(
            f"the eigendecomposition did not converge, in float64 on the CPU, for one of {', '.join(names)} "
            f"(size {stack.shape[-1]}, largest entry {stack.abs().max():.3g}). Rescale the network's inputs."
        ) from None
