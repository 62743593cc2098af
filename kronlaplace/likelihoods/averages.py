"""Averages over Gaussian outputs, which variational curvature consists of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kronlaplace.likelihoods.links import symmetric_root
from kronlaplace.likelihoods.tensors import standard_normal

__all__ = ["Averages", "average_softmax"]

_PAIRS = 32
"""Number of pairs of draws that mirror each other about the mean."""

_BUDGET = 2**20
"""Maximum number of entries of the draws held at a time, unless one pair has more."""


@dataclass(frozen=True)
class Averages:
    """What a likelihood averages over outputs ``f ~ N(mean, covariance)``.

    Attributes:
        metric: The output metric ``E[M(f)]`` at each position, ``(N, ..., C, C)``, or its diagonal, ``(N, ..., C)``, if it
            is diagonal at all outputs.
        log_likelihood: The sum of ``E[log p(y | f)]`` over all targets, 0-dim, float64; None without targets.
    """

    metric: Tensor
    log_likelihood: Tensor | None


def average_softmax(mean: Tensor, covariance: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``E[diag(π) − ππᵀ]`` and ``E[log Σ_k exp f_k]`` for ``π = softmax(f)``, over draws of ``f``, in float64.

    The draws are independent between positions. They come in pairs ``mean ± d``, so that the averages of linear functions of
    the outputs are exact.

    Args:
        mean: Mean of the outputs, ``(..., C)``.
        covariance: Their covariance, ``(..., C, C)``.
        generator: Source of the draws.
    """
    mean, root = mean.double(), symmetric_root(covariance.double())
    p_mean, outer = torch.zeros_like(mean), torch.zeros_like(root)
    normalizer = torch.zeros_like(mean[..., 0])
    at_a_time = max(1, _BUDGET // max(2 * mean.numel(), 1))
    for start in range(0, _PAIRS, at_a_time):
        count = min(at_a_time, _PAIRS - start)
        noise = standard_normal(mean.expand(count, *mean.shape), generator)
        deviations = torch.einsum("...cd,s...d->s...c", root, noise)
        for f in (mean + deviations, mean - deviations):
            p = F.softmax(f, dim=-1)
            p_mean += p.sum(0)
            outer += torch.einsum("s...c,s...d->...cd", p, p)
            normalizer += f.logsumexp(-1).sum(0)
    n = 2 * _PAIRS
    return torch.diag_embed(p_mean / n) - outer / n, normalizer / n
