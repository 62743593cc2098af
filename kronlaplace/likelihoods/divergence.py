"""Kullback-Leibler divergences that keep their digits at small distances, where they are quadratic and terms cancel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["exponential_excess", "explained_by_sigmoid", "explained_by_softmax", "softmax_divergence"]

_SERIES = 1e-2  # largest argument at which the series is used; its relative error there is 3e-11
_LARGEST = 1e30  # stands for infinity, so that infinite logits do not give NaN


def exponential_excess(x: Tensor) -> Tensor:
    """Compute ``eˣ − 1 − x``, which is not negative, to nearly full precision around zero."""
    near = x.clamp(-_SERIES, _SERIES)
    series = near.square() * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near / 120)))
    return torch.where(x.abs() < _SERIES, series, torch.expm1(x) - x)


def softmax_divergence(logits: Tensor, new_logits: Tensor, axis: int) -> Tensor:
    """Compute ``KL(softmax(f) ‖ softmax(f'))`` at every position, of the logits' shape without ``axis``.

    With ``π = softmax(f)`` and ``c = d − πᵀd`` for ``d = f' − f``, it is ``log Σ π eᶜ = log(1 + Σ π (eᶜ − 1 − c))``.

    Args:
        logits: Logits ``f``, at least float32; an impossible class has ``-inf``.
        new_logits: Logits ``f'`` of the same shape.
        axis: Axis of the classes.
    """
    log_pi = F.log_softmax(logits, dim=axis)
    pi = log_pi.exp()
    change = torch.where(new_logits == logits, 0.0, new_logits - logits).clamp(-_LARGEST, _LARGEST)
    change = change - (pi * change).sum(axis, keepdim=True)
    near = torch.log1p((pi * exponential_excess(change.clamp_max(1))).sum(axis))
    return torch.where(change.amax(axis) > 1, torch.logsumexp(log_pi + change, axis), near)


def explained_by_softmax(logits: Tensor, gradient: Tensor, axis: int) -> Tensor:
    """Compute ``Σ KL(t ‖ π)``, 0-dim, float64, for the target probabilities ``t = π − r`` that explain gradients ``r``.

    Args:
        logits: Logits, whose softmax is ``π``.
        gradient: Gradient ``r`` of each cross-entropy, of the same shape.
        axis: Axis of the classes.
    """
    log_pi = F.log_softmax(logits.double(), dim=axis)
    target = (log_pi.exp() - gradient).clamp(0, 1)
    return _relative_entropy(target, log_pi).sum(axis).clamp_min(0).sum()


def explained_by_sigmoid(logits: Tensor, gradient: Tensor) -> Tensor:
    """Compute ``Σ KL(t ‖ π)``, 0-dim, float64, for the probabilities ``t = π − r`` of ones that explain gradients ``r``.

    Args:
        logits: Logits, whose logistic function is ``π``.
        gradient: Gradient ``r`` of each cross-entropy, of the same shape.
    """
    logits = logits.double()
    target = (torch.sigmoid(logits) - gradient).clamp(0, 1)
    ones, zeros = (_relative_entropy(t, F.logsigmoid(f)) for t, f in ((target, logits), (1 - target, -logits)))
    return (ones + zeros).clamp_min(0).sum()


def _relative_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``p (log p − log q)``, which is 0 where ``p`` is, also if ``q`` is."""
    return torch.special.xlogy(p, p) - torch.where(p > 0, p * log_q, 0.0)
