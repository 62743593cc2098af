"""By which factor a loss is larger than the mean negative log-likelihood, found from its gradient at the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kronlaplace._precision import wide
from kronlaplace.likelihoods.base import Likelihood

__all__ = ["loss_factor"]

_TOLERANCE = 1e-2


def loss_factor(likelihood: Likelihood, outputs: Tensor, gradient: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the factor ``c`` for which the gradients are ``c`` times those of each example's negative log-likelihood.

    Without targets it can be found only if hard targets explain the gradients, as in classification without label
    smoothing; otherwise, and if the gradients are not multiples of the right ones, it is 1. Nothing waits for the device.

    Args:
        likelihood: The likelihood.
        outputs: Network outputs ``f``, shape ``(N, ...)``, without a graph.
        gradient: ``N ∂h/∂f`` for the loss ``h``, of the same shape.
        targets: Targets in the data, if they are known.

    Returns:
        0-dim, in at least float32.
    """
    outputs, gradient = wide(outputs), wide(gradient)
    targets = likelihood.likely_targets(outputs, gradient) if targets is None else targets
    one = torch.ones((), dtype=gradient.dtype, device=gradient.device)
    if targets is None:
        return one
    expected = torch.where(gradient == 0, 0.0, likelihood._gradient(outputs, targets))
    largest = expected.abs().amax().clamp_min(torch.finfo(expected.dtype).tiny)
    unit = expected / largest  # squares of small numbers would underflow
    factor = (gradient * unit).sum() / unit.square().sum().clamp_min(torch.finfo(unit.dtype).tiny)
    residual = (gradient - factor * unit).abs().amax()
    right = (residual <= _TOLERANCE * gradient.abs().amax()) & (factor > 0)
    return torch.where(right, factor / largest, one)
