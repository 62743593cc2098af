"""Step size and momentum from a quadratic model of the objective (K-FAC sections 6.4 and 7, KFC appendix A.2).

For a step ``δ = Σ_i c_i v_i`` the model is ``M(δ) = h + ∇hᵀδ + ½ δᵀ(F + (λ + η)I)δ``, with the exact Fisher ``F`` of the
batch (KFC Eq. 36). With ``C_ij = v_iᵀFv_j + (λ + η) v_iᵀv_j`` and ``d_i = ∇hᵀv_i`` its minimum is at ``c = −C⁻¹d``. The
directions are the preconditioned gradient ``Δ`` and the last step ``δ₀``, so that ``c`` is the learning rate ``α`` and the
momentum ``μ``.

Everything is tensor arithmetic, which waits for no device.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["minimize", "predicted_change", "quotient", "reduction_ratio"]

_ROUNDING = 1e-6
"""Squared sine of the angle between two directions, in the metric ``C``, below which the second one is rounding error."""


def minimize(curvature: Tensor, slopes: Tensor) -> Tensor:
    """Return the coefficients ``c = −C⁻¹d`` at which the model has its minimum over one or two directions.

    If the second direction is zero, or on one line with the first up to rounding, it gets the coefficient zero, and the
    first gets ``α = −∇hᵀΔ / (ΔᵀFΔ + (λ + η)‖Δ‖²)``; if the first is zero, both do.

    Args:
        curvature: ``C``, shape ``(..., k, k)`` with ``k`` of 1 or 2, symmetric and positive semidefinite.
        slopes: ``d``, shape ``(..., k)``.

    Returns:
        Shape ``(..., k)``.
    """
    first, slope = curvature[..., 0, 0], slopes[..., 0]
    alone = -quotient(slope, first)
    if slopes.shape[-1] == 1:
        return alone.unsqueeze(-1)
    # δ₀ without its part along Δ, in the metric C: its curvature is a Schur complement, its slope what Δ leaves of it.
    mixed, second = curvature[..., 0, 1], curvature[..., 1, 1]
    part = quotient(mixed, first)
    remaining = second - part * mixed
    independent = (remaining > _ROUNDING * second) & (first > 0)
    momentum = torch.where(independent, -quotient(slopes[..., 1] - part * slope, remaining), 0.0)
    return torch.stack([alone - part * momentum, momentum], dim=-1)


def predicted_change(curvature: Tensor, slopes: Tensor, coefficients: Tensor) -> Tensor:
    """Return ``M(δ) − M(0) = dᵀc + ½ cᵀCc``, shape ``(...)``; at the minimum it is ``½ dᵀc``.

    Args:
        curvature: ``C``, shape ``(..., k, k)``.
        slopes: ``d``, shape ``(..., k)``.
        coefficients: ``c``, shape ``(..., k)``.
    """
    bent = (curvature @ coefficients.unsqueeze(-1)).squeeze(-1)
    return ((slopes + bent / 2) * coefficients).sum(-1)


def reduction_ratio(change: Tensor, predicted: Tensor) -> Tensor:
    """Return ``ρ = (h(θ + δ) − h(θ)) / (M(δ) − M(0))``, the true over the predicted reduction (KFC Eq. 37).

    Args:
        change: ``h(θ + δ) − h(θ)`` on the batch of the model.
        predicted: ``M(δ) − M(0)``.

    Returns:
        The ratio, of the shape of the arguments; NaN where the model predicts an increase or the objective is NaN; and 1
        where the step neither promises nor makes a difference, as for a gradient of zero.
    """
    ratio = torch.where(predicted < 0, change / predicted, torch.nan)
    return torch.where((predicted == 0) & (change == 0), 1.0, ratio)


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; the quotient by something that is not positive is zero."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
