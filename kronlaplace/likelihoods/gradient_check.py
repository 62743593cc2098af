"""Whether gradients at a network's outputs can be those of a likelihood, which the loss of a training loop may not be."""

from __future__ import annotations

import torch
from torch import Tensor

from kronlaplace._precision import wide

__all__ = ["distance_to_simplex", "equal_gradients", "explainable"]

_TOLERANCE = 1e-3
_ROUNDINGS = 16  # allowed error in units of the precision of the gradients' dtype


def explainable(name: str, distance: Tensor, gradient: Tensor) -> tuple[Tensor, str]:
    """Return the result of `Likelihood.check_gradient` for gradients at given distances from those of the likelihood.

    Args:
        name: The likelihood, for the message.
        distance: Distances of any shape, relative to one. Those that are NaN pass: they say nothing about the loss.
        gradient: The gradients, whose dtype determines the tolerance.
    """
    tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(gradient.dtype).eps)
    message = (
        f"the gradient of the loss at the network's outputs is not that of the mean negative log-likelihood of {name}. The "
        'loss may be a sum (reduction="sum") instead of the mean over examples, may have class weights or a factor (such '
        "as that of a GradScaler, which must be taken out first), or may be another loss. Use the mean over examples of "
        "the negative log-likelihood, or the likelihood that belongs to the loss."
    )
    return ~(distance > tolerance).any(), message


def equal_gradients(gradient: Tensor, expected: Tensor) -> Tensor:
    """Return how far gradients are from the expected ones, relative to the largest of these, of the same shape.

    Differences in the rounding of numbers of size one count for nothing.
    """
    rounding = _ROUNDINGS * torch.finfo(gradient.dtype).eps / _TOLERANCE
    scale = wide(expected).abs().amax() + rounding
    return (wide(gradient) - wide(expected)).abs() / scale


def distance_to_simplex(probabilities: Tensor, gradient: Tensor, axis: int) -> Tensor:
    """Return how far ``π − r`` is from a vector of probabilities, of the gradients' shape without ``axis``."""
    explained = probabilities - gradient
    outside = torch.maximum(-explained, explained - 1).amax(axis)
    return torch.maximum(outside, gradient.sum(axis).abs())
