"""Links, which turn a Gaussian over the network's outputs into probabilities.

The mean has shape ``(..., C)`` with any number of leading axes, whose positions are treated independently: ``(N, C)``,
pixels ``(N, H, W, C)``, tokens ``(N, T, C)``. The covariance has shape ``(..., C, C)``, or ``(..., C)`` if only its
diagonal is given.
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
    "margin_scaled",
    "margin_variances",
    "mean_over_samples",
    "probit_scaled",
    "symmetric_root",
    "variance_of",
]


_BUDGET = 2**22
"""Maximum number of entries of the draws held at a time, unless one draw of all examples has more."""


class Link(Choice):
    """Rule that turns a Gaussian over the outputs into class probabilities.

    The default is the likelihood's first one: ``MARGIN`` for `Categorical`, ``PROBIT`` for `Bernoulli`.

    ``MARGIN`` applies MacKay's closed form to each logit minus that of the most probable class (see `margin_scaled`): the
    network's class stays the most probable, and with two classes it is ``PROBIT`` for the difference of their logits.
    ``PROBIT`` is MacKay's closed form for each logit. ``CENTERED_PROBIT`` applies it to each logit minus the mean of all
    logits. The softmax is invariant to a shift of all logits, and the variance of that shift is not uncertainty about the
    class: ``PROBIT`` takes it for that, ``MARGIN`` and ``CENTERED_PROBIT`` do not.
    ``MC`` averages over samples of the outputs. ``BRIDGE`` is a Laplace bridge to a Dirichlet (after Hobbhahn et al. 2022,
    see `laplace_bridge`).
    """

    MARGIN = "margin"
    PROBIT = "probit"
    CENTERED_PROBIT = "centered-probit"
    MC = "mc"
    BRIDGE = "bridge"


def is_whole(mean: Tensor, covariance: Tensor) -> bool:
    """Return whether a covariance is a full one, ``(..., C, C)``, rather than a diagonal of the mean's shape, ``(..., C)``.

    Raises:
        ValueError: If it has neither shape.
    """
    if mean.ndim and covariance.shape == (*mean.shape, mean.shape[-1]):
        return True
    if covariance.shape != mean.shape:
        whole = f"{(*mean.shape, mean.shape[-1])} (full) or " if mean.ndim else ""
        raise ValueError(
            f"the covariance of outputs with a mean of shape {tuple(mean.shape)} must have shape {whole}"
            f"{tuple(mean.shape)} (diagonal); got {tuple(covariance.shape)}. Pass both with the outputs on the last axis."
        )
    return False


def variance_of(mean: Tensor, covariance: Tensor) -> Tensor:
    """Return the diagonal of a full or diagonal covariance, of the shape of the mean; raises as `is_whole`."""
    return covariance.diagonal(dim1=-2, dim2=-1) if is_whole(mean, covariance) else covariance


def probit_scaled(mean: Tensor, covariance: Tensor) -> Tensor:
    """Compute ``f / √(1 + π/8 · var f)`` (MacKay 1992), of the shape of the mean."""
    return mean / torch.sqrt(1 + math.pi / 8 * variance_of(mean, covariance))


def centered_probit_scaled(mean: Tensor, covariance: Tensor) -> Tensor:
    """Apply `probit_scaled` to each output minus the mean of all ``C`` outputs; the result has the shape of the mean.

    Args:
        mean: Mean of the outputs, ``(..., C)``.
        covariance: Full covariance of the outputs, ``(..., C, C)``, or the variances of the centered outputs, ``(..., C)``.
    """
    if is_whole(mean, covariance):
        covariance = _variance_without_shift(mean, covariance)
    return probit_scaled(mean - mean.mean(-1, keepdim=True), covariance)


def margin_variances(mean: Tensor, covariance: Tensor) -> Tensor:
    """Return the variances of the margins to the most probable class, of the shape of the mean.

    Args:
        mean: Mean of the outputs, ``(..., C)``.
        covariance: Full covariance of the outputs, ``(..., C, C)``, or already the variances of the margins, ``(..., C)``.
    """
    if not is_whole(mean, covariance):
        return covariance
    top = mean.argmax(-1, keepdim=True)
    with_top = covariance.gather(-1, top.unsqueeze(-2).expand(*mean.shape, 1)).squeeze(-1)
    variance = variance_of(mean, covariance)
    return (variance + variance.gather(-1, top) - 2 * with_top).clamp_min(0)


def margin_scaled(mean: Tensor, covariance: Tensor) -> Tensor:
    """Apply `probit_scaled` to the margins ``f_k − f_t`` to the most probable class ``t``, the first if there are several.

    The result has the shape of the mean; it is zero for ``t`` and at most zero for all others. This is MacKay 1992 for each
    pair of classes ``{k, t}``: of the softmax, ``p_k / (p_k + p_t)`` is the probability that he gives to ``k`` of the two.
    Where two classes swap places as the most probable, the margins of all others change, and their probabilities jump.

    Args:
        mean: Mean of the outputs, ``(..., C)``.
        covariance: Full covariance of the outputs, ``(..., C, C)``, or the variances of the margins, ``(..., C)``.
    """
    top = mean.argmax(-1, keepdim=True)
    return probit_scaled(mean - mean.gather(-1, top), margin_variances(mean, covariance))


@in_full_precision
def mean_over_samples(
    inverse_link: Callable[..., Tensor],
    mean: Tensor,
    covariance: Tensor,
    n_samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Average ``inverse_link(f)`` over ``n_samples`` draws of ``f ~ N(mean, covariance)``, of the shape of its values.

    ``inverse_link(f, dim=-1)`` takes several draws at a time, ``(S, ..., C)``, and keeps the axis of the draws.
    """
    whole = is_whole(mean, covariance)
    if whole:
        root = symmetric_root(covariance)
    else:
        positive = covariance > 0  # the square root has no derivative at zero
        root = torch.where(positive, covariance, 1).sqrt() * positive
    total = mean.new_zeros(())
    at_a_time = max(1, _BUDGET // max(mean.numel(), 1))
    for start in range(0, n_samples, at_a_time):
        count = min(at_a_time, n_samples - start)
        noise = torch.randn(count, *mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        deviations = torch.einsum("...cd,s...d->s...c", root, noise) if whole else noise * root
        total = total + inverse_link(mean + deviations, dim=-1).sum(0)
    return total / n_samples


@in_full_precision
def symmetric_root(covariance: Tensor) -> Tensor:
    """Compute the symmetric root of positive semidefinite, possibly singular matrices ``(..., C, C)``, differentiably."""
    root: Tensor = _SymmetricRoot.apply(covariance)  # type: ignore[no-untyped-call]
    return root


class _SymmetricRoot(torch.autograd.Function):
    """Symmetric root ``U √λ Uᵀ`` of positive semidefinite matrices ``(..., C, C)``.

    It is used in place of a Cholesky factor because functional covariances are often singular; and it does not depend on
    the sign and order of the eigenvectors. Its derivative is ``dΣ_ij / (√λ_i + √λ_j)`` in the eigenbasis, and zero where
    both roots are zero.
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
    """Compute the mean of the Dirichlet to which the Gaussian is bridged, shape ``(..., C)``.

    This follows Hobbhahn et al. 2022, Eq. 6. With ``π = softmax(f)``, a Dirichlet whose logits have mean ``f`` and
    concentration ``s`` has logit variances ``c_k / s``, ``c_k = (1 − 2/C) / π_k + Σ_l 1 / (C² π_l)``. The paper solves this
    for each class separately, ``s_k = c_k / v_k``, and its mean is ``p_k ∝ π_k s_k``. This function departs from it in
    three ways, so that the result is stable and agrees with the network where the network is certain:

    * The shift common to all logits, to which the softmax is invariant, is projected out of mean and covariance, ``f − f̄``
      and ``PΣP``. The paper conditions on ``Σ_k f_k = 0`` instead, which moves the mean without bound where ``1ᵀΣ1`` is
      small.
    * A variance below ``v̄ / (C − 1)``, where ``v̄`` is the mean of all variances, is raised to that value: no Dirichlet has
      a smaller one, and where a covariance is singular, rounding would decide how certain a class is.
    * ``p_k ∝ π_k s_kʷ`` with ``w = (π/8) v̄ / (1 + (π/8) v̄)``, the scale of MacKay's probit link. The paper's ``w = 1``
      depends on the ratios of the variances but not on their size, so its result differs from the softmax of a network
      that has no uncertainty at all. Here the softmax is the limit of small variances, and the paper's formula that of
      large ones.

    A Gaussian that is the Laplace approximation of a Dirichlet, in the softmax basis, gives the mean of that Dirichlet.

    Args:
        mean: Mean of the outputs, ``(..., C)``.
        covariance: Covariance of the outputs, full, ``(..., C, C)``, or diagonal, ``(..., C)``.
    """
    variance = _variance_without_shift(mean, covariance)
    n_classes = mean.shape[-1]
    mean = mean - mean.mean(-1, keepdim=True)
    log_pi = F.log_softmax(mean, dim=-1)
    # log(c_k π_k): taking the logarithm keeps e^{f_k − f_l} finite.
    log_ratio = mean + torch.logsumexp(-mean, dim=-1, keepdim=True) - 2 * math.log(n_classes)
    offset = torch.full_like(log_ratio, 1 - 2 / n_classes).log()
    total = variance.mean(-1, keepdim=True)
    relative = variance / torch.where(total > 0, total, 1)
    log_concentration = torch.logaddexp(log_ratio, offset) - log_pi - relative.clamp_min(1 / (n_classes - 1)).log()
    scaled = math.pi / 8 * total
    return F.softmax(log_pi + scaled / (1 + scaled) * log_concentration, dim=-1)


def _variance_without_shift(mean: Tensor, covariance: Tensor) -> Tensor:
    """Compute the variances of the outputs minus their mean, the diagonal of ``PΣP``, of the shape of the mean."""
    row = covariance.mean(-1) if is_whole(mean, covariance) else covariance / mean.shape[-1]
    return (variance_of(mean, covariance) - 2 * row + row.mean(-1, keepdim=True)).clamp_min(0)
