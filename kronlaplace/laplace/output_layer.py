"""The contribution of a last linear layer to the covariance of the outputs, which are its own.

Where the layer's output is the network's own, ``g_c`` is the unit vector ``e_c``: nothing is propagated back, and the
variances are ``Σ_j u_cj b_j²`` with ``u_cj = Σ_i (Q_G)_ci² w_ij``, which is made once. With ``s_i = Σ_j w_ij b_j²`` the
margin between ``c`` and ``t`` has the variance ``Σ_i ((Q_G)_ci − (Q_G)_ti)² s_i``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronlaplace.blocks.basis import Basis, CoordinateBasis
from kronlaplace.damping import DampedInverse
from kronlaplace.laplace.layer_covariance import projected
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.layers import LayerBatch

__all__ = ["factored_part", "output_layer_part", "tied_part"]


def output_layer_part(
    inverse: DampedInverse, batch: LayerBatch, outputs: Tensor, wanted: OutputCovariance
) -> Tensor | None:
    """Return what a linear layer adds to the covariance of its own outputs, or None where that takes backward passes.

    Args:
        inverse: The layer's posterior covariance.
        batch: The inputs of its one call.
        outputs: Its outputs, ``(N, ..., C)``.
        wanted: Which covariances are wanted.

    Returns:
        Variances of the shape of the outputs, or covariances ``(N, ..., C, C)`` between the last axis.
    """
    bases = inverse.bases()
    positions = outputs.ndim > 2
    if bases is None or wanted is OutputCovariance.JOINT or (positions and wanted is OutputCovariance.BY_EXAMPLE):
        return None
    gradient_basis, activation_basis = bases
    squares = activation_basis.gather(projected(batch, activation_basis).square())  # (N, T, p), compact
    if wanted.variances:
        variances = inverse.row_variances(squares, centered=wanted is not OutputCovariance.VARIANCES)  # (N, T, C)
        if wanted is OutputCovariance.MARGIN_VARIANCES:
            top = outputs.reshape(variances.shape).argmax(-1)
            variances = gradient_basis.margin_variances(squares @ inverse.weights.T, variances, top)
        return variances.reshape(outputs.shape)
    spread = (squares @ inverse.weights.T).reshape(*outputs.shape[:-1], -1)  # (N, ..., q), compact
    return gradient_basis.covariances(spread)


def factored_part(inverse: DampedInverse, batch: LayerBatch) -> tuple[Basis, Tensor, Tensor]:
    """Return ``Q`` and ``s`` of the part ``Q diag(s) Qᵀ`` that a linear layer adds to the covariance of its own outputs.

    Args:
        inverse: The layer's posterior covariance.
        batch: The inputs of its one call.

    Returns:
        ``Q``; ``s``, compact, shape ``(N·T, k')``; and the variances, shape ``(N·T, C)``.
    """
    bases = inverse.bases()
    assert bases is not None
    gradient_basis, activation_basis = bases
    squares = activation_basis.gather(projected(batch, activation_basis).square()).flatten(0, 1)
    return gradient_basis, squares @ inverse.weights.T, inverse.row_variances(squares)


def tied_part(inverse: DampedInverse, features: Tensor) -> tuple[Basis, Tensor]:
    """Return ``Q`` and ``s`` of the part ``Q diag(s) Qᵀ`` that a table adds to the covariance of its products with features.

    Args:
        inverse: The posterior covariance of the table, which is diagonal.
        features: The features, shape ``(N, T, d)``.

    Returns:
        ``Q``, the identity; and ``s``, shape ``(N·T, C)``.
    """
    rows = len(inverse.weights)
    basis = CoordinateBasis(torch.arange(rows, device=features.device), rows, dtype=inverse.weights.dtype)
    return basis, features.flatten(0, 1).square() @ inverse.weights.T
