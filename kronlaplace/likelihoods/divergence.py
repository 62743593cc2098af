"""Kullback-Leibler divergences that keep their digits at small distances, where they are quadratic and terms cancel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["exponential_excess", "softmax_divergence"]

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
