"""Links: from a Gaussian over the network's outputs to probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Link", "laplace_bridge", "mean_over_samples", "probit_scaled", "variance_of"]


class Link(str, Enum):
    """How a Gaussian over the outputs becomes class probabilities.

    ``PROBIT`` is MacKay's closed form, ``MC`` averages over samples of the outputs, ``BRIDGE`` is the Laplace
    bridge to a Dirichlet (Hobbhahn et al. 2022).
    """

    PROBIT = "probit"
    MC = "mc"
    BRIDGE = "bridge"


def variance_of(covariance: Tensor) -> Tensor:
    """The diagonal ``(N, C)`` of a covariance given whole or as its diagonal."""
    return covariance if covariance.ndim == 2 else covariance.diagonal(dim1=1, dim2=2)


def probit_scaled(mean: Tensor, covariance: Tensor) -> Tensor:
    """``f / √(1 + π/8 · var f)`` (MacKay 1992)."""
    return mean / torch.sqrt(1 + math.pi / 8 * variance_of(covariance))


def mean_over_samples(
    inverse_link: Callable[..., Tensor],
    mean: Tensor,
    covariance: Tensor,
    n_samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Average ``inverse_link(f)`` over ``n_samples`` draws of ``f ~ N(mean, covariance)``, shape ``(N, C)``."""
    noise = torch.randn(n_samples, *mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    if covariance.ndim == 2:
        samples = mean + noise * covariance.clamp_min(0).sqrt()
    else:
        # An eigendecomposition, not a Cholesky: a functional covariance is often singular.
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
        samples = mean + torch.einsum("ncd,snd->snc", root, noise)
    return inverse_link(samples, dim=-1).mean(0)


def laplace_bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Mean of the Dirichlet of the Laplace bridge (Hobbhahn et al. 2022, Eq. 6), shape ``(N, C)``.

    The softmax does not see a shift of all logits, the bridge lives on ``Σ_c f_c = 0``: the Gaussian is
    conditioned on that first.
    """
    covariance = torch.diag_embed(covariance) if covariance.ndim == 2 else covariance
    n_classes = mean.shape[1]
    row = covariance.sum(2)
    # The floor is for a covariance that lies on Σ_c f_c = 0 already, up to rounding.
    floor = torch.finfo(mean.dtype).eps * variance_of(covariance).sum(1, keepdim=True)
    total = torch.maximum(row.sum(1, keepdim=True), floor)
    mean = mean - row * (mean.sum(1, keepdim=True) / total)
    variance = (variance_of(covariance) - row.square() / total).clamp_min(torch.finfo(mean.dtype).eps)
    # α_k = (1 − 2/C + e^{f_k} / C² · Σ_l e^{−f_l}) / v_k, normalised; the log keeps e^{f_k − f_l} finite.
    log_ratio = mean + torch.logsumexp(-mean, dim=1, keepdim=True) - 2 * math.log(n_classes)
    offset = torch.full_like(log_ratio, 1 - 2 / n_classes).log()
    return F.softmax(torch.logaddexp(log_ratio, offset) - variance.log(), dim=1)
