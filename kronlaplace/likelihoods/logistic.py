"""Averages over a yes/no answer whose logit is Gaussian, by quadrature to nearly machine precision.

The integrands are analytic in a strip around the real line, where the trapezoidal rule converges exponentially
(Trefethen and Weideman 2014, Thm. 5.1). For a standard deviation ``s`` of at most 1 the nodes are ``m + s z`` at a step of
½ in ``z``. Above 1 they are fixed logits at a step of ½, because the answer is uncertain near zero only; the mean is
integrated by parts there, ``E[σ(f)] = ∫ σ′(t) Φ((m − t) / s) dt``, so that its integrand vanishes away from zero, too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["binary_entropy", "logistic_curvature", "logistic_moments"]

_STEP = 0.5
_CHUNK = 2**13
"""Number of logits that are integrated at a time."""
_Z_LIMIT = 9.0
"""A standard normal has no mass beyond it in double precision."""
_LOGIT_LIMIT = 42.0
"""The entropy of an answer is below 1e-16 beyond it."""


def logistic_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``E[σ(f)]`` and ``E[H(σ(f))]``, in nats, for ``f ~ N(mean, variance)``, in float64.

    Args:
        mean: Mean of the logit, any shape.
        variance: Its variance, of the same shape.
    """
    parts = zip(mean.double().flatten().split(_CHUNK), variance.double().flatten().split(_CHUNK), strict=True)
    moments = [_moments(m, v.clamp_min(0).sqrt()) for m, v in parts]
    p, entropy = (torch.cat(values).view(mean.shape) for values in zip(*moments, strict=True))
    return p, entropy


def logistic_curvature(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``E[σ′(f)]`` and ``E[log(1 + eᶠ)]`` for ``f ~ N(mean, variance)``, in float64; arguments as `logistic_moments`.

    Above a standard deviation of 1 the second is integrated by parts twice, ``∫ σ′(t) E[(f − t)₊] dt``.
    """
    parts = zip(mean.double().flatten().split(_CHUNK), variance.double().flatten().split(_CHUNK), strict=True)
    averages = [_curvature(m, v.clamp_min(0).sqrt()) for m, v in parts]
    slope, softplus = (torch.cat(values).view(mean.shape) for values in zip(*averages, strict=True))
    return slope, softplus


def _curvature(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return both averages for vectors in float64."""
    z = _nodes(_Z_LIMIT, mean)
    weight = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    f = mean + std * z
    narrow_slope = (weight * torch.sigmoid(f) * torch.sigmoid(-f)).sum(0)
    narrow_softplus = (weight * F.softplus(f)).sum(0)
    narrow = std <= 1
    t, s = _nodes(_LOGIT_LIMIT, mean), torch.where(narrow, 1, std)
    u = (mean - t) / s
    slope, density = torch.sigmoid(t) * torch.sigmoid(-t), torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)
    wide_slope = (slope * density).sum(0) / s
    wide_softplus = (slope * ((mean - t) * torch.special.ndtr(u) + s * density)).sum(0)
    return _STEP * torch.where(narrow, narrow_slope, wide_slope), _STEP * torch.where(
        narrow, narrow_softplus, wide_softplus
    )


def _moments(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return both moments for vectors in float64."""
    z = _nodes(_Z_LIMIT, mean)
    weight = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    f = mean + std * z
    narrow_p, narrow_entropy = (weight * torch.sigmoid(f)).sum(0), (weight * binary_entropy(f)).sum(0)
    narrow = std <= 1
    t, s = _nodes(_LOGIT_LIMIT, mean), torch.where(narrow, 1, std)
    u = (mean - t) / s
    wide_p = (torch.sigmoid(t) * torch.sigmoid(-t) * torch.special.ndtr(u)).sum(0)
    wide_entropy = (binary_entropy(t) * torch.exp(-0.5 * u.square())).sum(0) / (s * math.sqrt(2 * math.pi))
    return _STEP * torch.where(narrow, narrow_p, wide_p), _STEP * torch.where(narrow, narrow_entropy, wide_entropy)


def binary_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of a yes/no answer in nats, without cancellation in the tails; it has the shape of the logits."""
    return -torch.sigmoid(logits) * F.logsigmoid(logits) - torch.sigmoid(-logits) * F.logsigmoid(-logits)


def _nodes(limit: float, like: Tensor) -> Tensor:
    """Return the nodes of the rule as a column."""
    count = round(limit / _STEP)
    return _STEP * torch.arange(-count, count + 1, dtype=like.dtype, device=like.device).unsqueeze(1)
