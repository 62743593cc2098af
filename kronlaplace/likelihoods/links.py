"""Links: from a Gaussian over the network's outputs to probabilities.

The mean is ``(..., C)`` with any number of leading axes, over which everything goes position by position: ``(N, C)``,
pixels ``(N, H, W, C)``, tokens ``(N, T, C)``. The covariance is ``(..., C, C)``, or only its diagonal, ``(..., C)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kronlaplace._arguments import Choice
from kronlaplace._precision import in_full_precision

__all__ = [
    "Link",
    "centered_probit_scaled",
    "is_whole",
    "laplace_bridge",
    "mean_over_samples",
    "probit_scaled",
    "symmetric_root",
    "variance_of",
]


_BUDGET = 2**22
"""Numbers that the draws of the outputs may take at a time, unless one draw of all examples is more."""


class Link(Choice):
    """How a Gaussian over the outputs becomes class probabilities.

    ``PROBIT`` is MacKay's closed form, ``CENTERED_PROBIT`` the same for each logit less the mean of all (the softmax does
    not see a shift of all logits, and the variance of that is no uncertainty about the class), ``MC`` averages over samples
    of the outputs, ``BRIDGE`` is a Laplace bridge to a Dirichlet (after Hobbhahn et al. 2022, see `laplace_bridge`).
    """

    PROBIT = "probit"
    CENTERED_PROBIT = "centered-probit"
    MC = "mc"
    BRIDGE = "bridge"


def is_whole(mean: Tensor, covariance: Tensor) -> bool:
    """Whether a covariance is given whole, ``(..., C, C)``, and not as its diagonal, ``(..., C)``, the shape of the mean.

    Raises:
        ValueError: If it has neither shape.
    """
    if mean.ndim and covariance.shape == (*mean.shape, mean.shape[-1]):
        return True
    if covariance.shape != mean.shape:
        whole = f"{(*mean.shape, mean.shape[-1])}, whole, or " if mean.ndim else ""
        raise ValueError(
            f"the covariance of outputs with a mean of shape {tuple(mean.shape)} must have shape {whole}"
            f"{tuple(mean.shape)}, its diagonal; got {tuple(covariance.shape)}. Give both with the outputs on the last axis."
        )
    return False


def variance_of(mean: Tensor, covariance: Tensor) -> Tensor:
    """The diagonal, of the shape of the mean, of a covariance given whole or as its diagonal; raises as `is_whole`."""
    return covariance.diagonal(dim1=-2, dim2=-1) if is_whole(mean, covariance) else covariance


def probit_scaled(mean: Tensor, covariance: Tensor) -> Tensor:
    """``f / √(1 + π/8 · var f)`` (MacKay 1992), of the shape of the mean."""
    return mean / torch.sqrt(1 + math.pi / 8 * variance_of(mean, covariance))


def centered_probit_scaled(mean: Tensor, covariance: Tensor) -> Tensor:
    """`probit_scaled` for each output less the mean of all ``C`` outputs, of the shape of the mean.

    Args:
        mean: Mean of the outputs, ``(..., C)``.
        covariance: Their covariance, whole, ``(..., C, C)``; or the variances of the centred outputs, ``(..., C)``.
    """
    if is_whole(mean, covariance):
        covariance = _variance_without_shift(mean, covariance)
    return probit_scaled(mean - mean.mean(-1, keepdim=True), covariance)


@in_full_precision
def mean_over_samples(
    inverse_link: Callable[..., Tensor],
    mean: Tensor,
    covariance: Tensor,
    n_samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Average ``inverse_link(f)`` over ``n_samples`` draws of ``f ~ N(mean, covariance)``, shape ``(..., C)``."""
    whole = is_whole(mean, covariance)
    if whole:
        root = symmetric_root(covariance)
    else:
        positive = covariance > 0  # the root of zero has no derivative
        root = torch.where(positive, covariance, 1).sqrt() * positive
    total = torch.zeros_like(mean)
    at_a_time = max(1, _BUDGET // max(mean.numel(), 1))
    for start in range(0, n_samples, at_a_time):
        count = min(at_a_time, n_samples - start)
        noise = torch.randn(count, *mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        deviations = torch.einsum("...cd,s...d->s...c", root, noise) if whole else noise * root
        total = total + inverse_link(mean + deviations, dim=-1).sum(0)
    return total / n_samples


@in_full_precision
def symmetric_root(covariance: Tensor) -> Tensor:
    """The symmetric root of positive semidefinite matrices ``(..., C, C)``, which may be singular; differentiable."""
    root: Tensor = _SymmetricRoot.apply(covariance)  # type: ignore[no-untyped-call]
    return root


class _SymmetricRoot(torch.autograd.Function):
    """``U √λ Uᵀ`` of positive semidefinite matrices ``(..., C, C)``.

    A functional covariance is often singular, so it is no Cholesky factor; and the symmetric root does not depend on sign
    and order of the eigenvectors. Its derivative is ``dΣ_ij / (√λ_i + √λ_j)`` in the eigenbasis, zero where both are zero.
    """

    @staticmethod
    def forward(ctx: Any, covariance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance)
        rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
        roots = torch.where(values > rounding, values, 0).sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors * roots.unsqueeze(-2)) @ vectors.mT

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
        inside = vectors.mT @ (gradient + gradient.mT) @ vectors / 2
        return vectors @ torch.where(sums > 0, inside / sums, 0) @ vectors.mT


def laplace_bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Mean of a Dirichlet that the Gaussian is bridged to (after Hobbhahn et al. 2022, Eq. 6), shape ``(..., C)``.

    With ``π = softmax(f)``, a Dirichlet whose logits have mean ``f`` and concentration ``s`` has logit variances
    ``c_k / s``, ``c_k = (1 − 2/C) / π_k + Σ_l 1 / (C² π_l)``. The paper solves that for each class by itself,
    ``s_k = c_k / v_k``, and its mean is ``p_k ∝ π_k s_k``. This function departs from it in three ways, so that the
    result is stable and agrees with the network where the network is certain:

    * The shift that all logits have in common, which the softmax does not see, is projected out of mean and covariance,
      ``f − f̄`` and ``PΣP``. The paper conditions on ``Σ_k f_k = 0`` instead, which moves the mean without bound where
      ``1ᵀΣ1`` is small.
    * A variance below ``v̄ / (C − 1)``, for ``v̄`` the mean of all, counts as that: no Dirichlet has a smaller one, and
      where a covariance is singular, rounding would decide how certain a class is.
    * ``p_k ∝ π_k s_kʷ`` with ``w = (π/8) v̄ / (1 + (π/8) v̄)``, the scale of MacKay's probit link. The paper's ``w = 1``
      knows the ratios of the variances but not their size, so that it differs from the softmax of a network that has
      no uncertainty at all. Here that is the limit, and the paper's formula is that of large variances.

    A Gaussian that is the Laplace approximation of a Dirichlet, in the softmax basis, gives the mean of that Dirichlet.

    Args:
        mean: Mean of the outputs, ``(..., C)``.
        covariance: Their covariance, whole, ``(..., C, C)``, or its diagonal, ``(..., C)``.
    """
    variance = _variance_without_shift(mean, covariance)
    n_classes = mean.shape[-1]
    mean = mean - mean.mean(-1, keepdim=True)
    log_pi = F.log_softmax(mean, dim=-1)
    # log(c_k π_k): the log keeps e^{f_k − f_l} finite.
    log_ratio = mean + torch.logsumexp(-mean, dim=-1, keepdim=True) - 2 * math.log(n_classes)
    offset = torch.full_like(log_ratio, 1 - 2 / n_classes).log()
    total = variance.mean(-1, keepdim=True)
    relative = variance / torch.where(total > 0, total, 1)
    log_concentration = torch.logaddexp(log_ratio, offset) - log_pi - relative.clamp_min(1 / (n_classes - 1)).log()
    scaled = math.pi / 8 * total
    return F.softmax(log_pi + scaled / (1 + scaled) * log_concentration, dim=-1)


def _variance_without_shift(mean: Tensor, covariance: Tensor) -> Tensor:
    """Variances of the outputs less their mean, the diagonal of ``PΣP``, of the shape of the mean."""
    row = covariance.mean(-1) if is_whole(mean, covariance) else covariance / mean.shape[-1]
    return (variance_of(mean, covariance) - 2 * row + row.mean(-1, keepdim=True)).clamp_min(0)
