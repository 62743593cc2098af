"""Step size and momentum from a quadratic model of the objective (K-FAC sections 6.4 and 7, KFC appendix A.2).

For a step ``δ = Σ_i c_i v_i`` the model is ``M(δ) = h + ∇hᵀδ + ½ δᵀ(F + (λ + η)I)δ``, with the exact Fisher ``F`` of the
batch (KFC Eq. 36). With ``C_ij = v_iᵀFv_j + (λ + η) v_iᵀv_j`` and ``d_i = ∇hᵀv_i`` its minimum is at ``c = −C⁻¹d``, where
``M(δ) − h = ½ dᵀc``. The directions are the preconditioned gradient ``Δ`` and the last step ``δ₀``, so that ``c`` is the
learning rate ``α`` and the momentum ``μ``.

Everything is tensor arithmetic, which waits for no device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Minimum", "adapted_damping", "minimize", "reduction_ratio"]


class Minimum(NamedTuple):
    """Minimum of the quadratic model.

    Attributes:
        coefficients: ``(α, μ)``, shape ``(..., 2)``.
        change: ``M(δ) − h ≤ 0``, shape ``(...)``.
    """

    coefficients: Tensor
    change: Tensor


def minimize(curvature: Tensor, slopes: Tensor, rounding: float = 1e-6) -> Minimum:
    """Minimize the quadratic model over the learning rate and the momentum.

    If ``δ₀`` is zero, or on one line with ``Δ`` up to rounding, the momentum is zero and the learning rate is
    ``α = −∇hᵀΔ / (ΔᵀFΔ + (λ + η)‖Δ‖²)``; if ``Δ`` is zero, both are.

    Args:
        curvature: ``C``, shape ``(..., 2, 2)``, symmetric and positive semidefinite.
        slopes: ``d``, shape ``(..., 2)``.
        rounding: Relative rounding error of the entries of ``C``. Directions whose squared sine, in the metric ``C``, is
            below it count as one.

    Returns:
        The coefficients, and the change of the model.
    """
    first, second = curvature[..., 0, 0], curvature[..., 1, 1]
    mixed = curvature[..., 0, 1]
    slope, slope_before = slopes[..., 0], slopes[..., 1]
    alone = -_quotient(slope, first)
    # δ₀ without its part along Δ, in the metric C: its curvature is the Schur complement, its slope what Δ leaves of it.
    part = _quotient(mixed, first)
    remaining = second - part * mixed
    independent = (remaining > rounding * second) & (first > 0)
    momentum = torch.where(independent, -_quotient(slope_before - part * slope, remaining), 0.0)
    rate = alone - part * momentum
    coefficients = torch.stack([rate, momentum], dim=-1)
    return Minimum(coefficients, (slopes * coefficients).sum(-1) / 2)


def reduction_ratio(change: Tensor, predicted: Tensor) -> Tensor:
    """Compute ``ρ = (h(θ + δ) − h(θ)) / (M(δ) − M(0))``, the true reduction over the predicted one (K-FAC section 6.5).

    Args:
        change: ``h(θ + δ) − h(θ)`` on the batch of the model.
        predicted: ``M(δ) − M(0)``, negative unless nothing can be gained.

    Returns:
        The ratio; 1 where the model predicts no change and there is none, and minus infinity where it predicts none but the
        objective is not a finite number.
    """
    ratio = torch.where(
        predicted == 0, (change <= 0).to(predicted.dtype), change / torch.where(predicted == 0, 1.0, predicted)
    )
    return torch.where(torch.isfinite(change), ratio, -torch.inf)


def adapted_damping(damping: Tensor, ratio: Tensor, factor: float) -> Tensor:
    """Adapt ``λ`` by the Levenberg-Marquardt rule (KFC Eq. 38): times ``ω₁`` if ``ρ > 3/4``, divided by it if ``ρ < 1/4``.

    Args:
        damping: ``λ``.
        ratio: ``ρ``, from `reduction_ratio`.
        factor: ``ω₁``, between 0 and 1.
    """
    return torch.where(ratio > 3 / 4, damping * factor, torch.where(ratio < 1 / 4, damping / factor, damping))


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; the quotient by something that is not positive is zero."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
