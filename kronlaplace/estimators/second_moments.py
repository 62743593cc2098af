"""Weighted second moments, of which all estimators consist.

With ``X_n = Σ_t g_t a_tᵀ`` and symmetric ``A``, ``G``, the two maps

    G ↦ Σ_n X_nᵀ G X_n        A ↦ Σ_n X_n A X_nᵀ

are the rearranged Fisher as an operator between the spaces of the two factors (DESIGN: weighted second moments; K-FOC
Eq. 13–15). Applied to the identity, they are TKFAC's sums; applied repeatedly, they are K-FOC's power iteration.

If each example uses the weights once, they are second moments of ``a`` with weights ``gᵀ G g`` and of ``g`` with weights
``aᵀ A a``. Otherwise ``X`` is formed or, if there are few positions, ``Σ_tt' (g_tᵀ G g_t') a_t a_t'ᵀ``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.blocks.eigendecomposition import trace
from kronlaplace.estimators.base import weighted_mean
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = [
    "activation_sum",
    "add_pair_sums",
    "add_row_sums",
    "factors_by_group",
    "frobenius",
    "gradient_sum",
    "mean_factors",
    "partial_traces",
    "squeezed",
]

_PENDING = "pending"


def add_pair_sums(
    sums: dict[str, Any],
    gradients: LayerGradients,
    activation_factor: Tensor | None = None,
    gradient_factor: Tensor | None = None,
) -> None:
    """Add ``Σ_n Xᵀ G X`` to ``sums["activation"]`` and ``Σ_n X A Xᵀ`` to ``sums["gradient"]``, for one direction.

    If the weights are used once per example, the first sum is deferred to `add_row_sums`, after all directions, so that
    the products of the inputs are formed once instead of once per direction.

    Args:
        sums: State of the estimator, modified in place.
        gradients: Inputs of the layer and gradients at its outputs.
        activation_factor: Factor ``A``, shape ``(K, p, p)``; None stands for the identity.
        gradient_factor: Factor ``G``, shape ``(K, q/K, q/K)``; None stands for the identity.
    """
    activation_out, gradient_out = (gradients.layer.sum_of(sums, key) for key in ("activation", "gradient"))
    if gradients.once_per_example:
        a, g = gradients.activations()[:, :, 0], gradients.gradients()[:, :, 0]
        pending = _quadratic_form(g, gradient_factor)
        sums[_PENDING] = pending if _PENDING not in sums else sums[_PENDING] + pending
        gradient_out.baddbmm_((g * _quadratic_form(a, activation_factor).unsqueeze(2)).mT, g)
        return
    gradients, weight = gradients.sampled()
    for part in gradients.parts():
        g = part.gradients()
        if g.shape[2] <= g.shape[3]:
            a = part.activations()
            activation, gradient = _mixed(a, g, gradient_factor), _mixed(g, a, activation_factor)
        else:
            x = part.weight_gradients()
            activation, gradient = activation_sum(x, gradient_factor), gradient_sum(x, activation_factor)
        activation_out.add_(activation, alpha=weight)
        gradient_out.add_(gradient, alpha=weight)


def add_row_sums(sums: dict[str, Any], batch: LayerBatch) -> None:
    """Add what `add_pair_sums` has deferred, after all directions of a batch."""
    weight = sums.pop(_PENDING, None)
    if weight is not None:
        a = batch.activations()[:, :, 0]
        sums["activation"].baddbmm_((a * weight.unsqueeze(2)).mT, a)


def activation_sum(x: Tensor, gradient_factor: Tensor | None) -> Tensor:
    """Compute ``Σ_n X_nᵀ G X_n``, shape ``(K, p, p)``, for ``X`` of shape ``(K, N, q/K, p)``."""
    left = x if gradient_factor is None else gradient_factor.unsqueeze(1) @ x
    return _symmetric_product(x.flatten(1, 2), left.flatten(1, 2))


def gradient_sum(x: Tensor, activation_factor: Tensor | None) -> Tensor:
    """Compute ``Σ_n X_n A X_nᵀ``, shape ``(K, q/K, q/K)``, for ``X`` of shape ``(K, N, q/K, p)``."""
    left = x if activation_factor is None else (x.flatten(1, 2) @ activation_factor).view_as(x)
    return (left @ x.mT).sum(1)


def frobenius(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute Frobenius norms over the last two axes, which are kept, in ``dtype``.

    In float64 the squares of small single-precision entries do not underflow, but it takes several times as long.
    """
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=dtype)


def squeezed(matrices: Tensor) -> Tensor:
    """Return the matrices without the axis of groups if there is only one group."""
    return matrices[0] if len(matrices) == 1 else matrices


def mean_factors(
    first: Block, second: Block, weights: tuple[float, float], *, scaled_activation: bool
) -> tuple[Tensor, Tensor]:
    """Compute weighted means of the factors of two finished Kronecker blocks, as new tensors.

    Args:
        first: A block.
        second: Another block of the same shape.
        weights: Weights of the two blocks; they sum to one.
        scaled_activation: Whether ``A`` is also multiplied by the block's ``scale`` (`TKFAC`, where both factors are
            moments of ``X``) or is a mean by itself (`KFAC`).

    Returns:
        ``Σ w · scale · G``, shape ``(K, q/K, q/K)``, and ``Σ w · A`` or ``Σ w · scale · A``, shape ``(K, p, p)``.
    """
    factors = []
    for block in (first, second):
        assert isinstance(block, KroneckerBlock)
        gradient, activation, scale = factors_by_group(block)
        factors.append((scale * gradient, scale * activation if scaled_activation else activation))
    (gradient, activation), (other_gradient, other_activation) = factors
    return weighted_mean(gradient, other_gradient, weights), weighted_mean(activation, other_activation, weights)


def factors_by_group(block: KroneckerBlock) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``G``, shape ``(K, q/K, q/K)``, ``A``, shape ``(K, p, p)``, and the scale, shape ``(K, 1, 1)``."""
    gradient, activation = (f if f.ndim == 3 else f[None] for f in (block.gradient_factor, block.activation_factor))
    return gradient, activation, block.scale.expand(len(gradient)).view(-1, 1, 1)


def partial_traces(block: KroneckerBlock, layer: Layer, weight: float) -> dict[str, Tensor]:
    """Return the sums ``Σ_n X Xᵀ`` and ``Σ_n Xᵀ X`` over ``weight`` examples with the block as their mean Fisher."""
    gradient, activation, scale = (t.to(layer.device, layer.dtype) for t in factors_by_group(block))
    sizes = {"gradient": trace(activation), "activation": trace(gradient)}
    return {
        key: weight * scale * sizes[key].view(-1, 1, 1) * factor
        for key, factor in (("gradient", gradient), ("activation", activation))
    }


def _symmetric_product(u: Tensor, v: Tensor) -> Tensor:
    """Compute ``uᵀ v`` for ``(K, m, d)`` if it is symmetric, which saves a quarter of the work."""
    size = u.shape[2]
    if size < 64:
        return u.mT @ v
    half = size // 2
    result = u.new_empty(len(u), size, size)
    result[:, :half] = u[..., :half].mT @ v
    result[:, half:, half:] = u[..., half:].mT @ v[..., half:]
    result[:, half:, :half] = result[:, :half, half:].mT
    return result


def _quadratic_form(vectors: Tensor, matrix: Tensor | None) -> Tensor:
    """Compute ``vᵀ M v`` for vectors ``(K, N, d)``, shape ``(K, N)``."""
    return (vectors * (vectors if matrix is None else vectors @ matrix)).sum(2)


def _mixed(u: Tensor, v: Tensor, matrix: Tensor | None) -> Tensor:
    """Compute ``Σ_n Σ_tt' (v_tᵀ M v_t') u_t u_t'ᵀ`` for ``u``, ``v`` of shape ``(K, N, T, ·)``."""
    kernel = (v if matrix is None else v @ matrix.unsqueeze(1)) @ v.mT  # (K, N, T, T)
    return _symmetric_product(u.flatten(1, 2), (kernel @ u).flatten(1, 2))
