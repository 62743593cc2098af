"""Targets that are indices of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from kronlaplace.likelihoods.tensors import drop_axis

__all__ = ["advice", "index"]


def advice(outputs: Tensor, targets: Tensor, axes: list[int]) -> str:
    """Return advice on how to make targets fit, for classes on one of these axes."""
    as_integers = ".long()" if targets.is_floating_point() or targets.dtype == torch.bool else ""
    allowed = [drop_axis(outputs.shape, axis) for axis in axes]
    if targets.shape in allowed:
        return "Use targets.long() if they are class indices."
    if targets.shape == outputs.shape:
        axis = axes[0] if len(axes) == 1 else "axis"
        return f"Use targets.argmax({axis}) if yours are one-hot; class probabilities are not supported."
    for axis in range(targets.ndim):
        if targets.shape[axis] == 1 and drop_axis(targets.shape, axis) in allowed:
            return f"Use targets.squeeze({axis}){as_integers}."
    return "Check that there is one target for each example and position."


def index(targets: Tensor, n_classes: int) -> Tensor:
    """Return class indices as int64, clamped so that a wrong label, which `check_targets` reports, aborts no CUDA kernel."""
    return targets.long().clamp(0, n_classes - 1)
