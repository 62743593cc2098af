"""By which power of two a gradient scaler multiplies the gradients while they are propagated back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kronlaplace._precision import wide
from kronlaplace.network.hooks import Hook

__all__ = ["GradientScale"]

_SCALED = 16.0
"""Ratio of gradients above which a gradient scaler must be at work; scalers multiply by far larger powers of two."""


class GradientScale:
    """The scale of a `torch.amp.GradScaler`, from one parameter's gradient as it was propagated back and is at the step.

    The scaler divides its scale out of the parameters' gradients before the step, but hooks on the outputs have seen it.

    Args:
        parameter: The parameter; a small one, because its gradient is copied.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self._propagated: Tensor | None = None
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def watch(self) -> None:
        """Observe the gradient from now on, until `stop`."""
        if self._handle is None:
            self._handle = self._parameter.register_hook(Hook(self, "_note"))

    def forget(self) -> None:
        """Forget the gradients so far, as when the parameters' gradients are cleared."""
        self._propagated = None

    def stop(self) -> None:
        """Observe no more, and forget the gradients."""
        self.forget()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _note(self, gradient: Tensor) -> None:
        seen = wide(gradient.detach())
        self._propagated = seen.clone() if self._propagated is None else self._propagated + seen

    def power_of_two(self, estimate: Tensor) -> Tensor:
        """Return the scale, rounded to a power of two, or 1 if no scaler is at work, 0-dim, float64; this does not wait.

        Args:
            estimate: An estimate of the scale, 0-dim, for a parameter whose gradient is zero.
        """
        ratio = estimate.to(torch.float64).abs()
        if self._propagated is not None and self._parameter.grad is not None:
            exact = _norm(self._propagated) / _norm(self._parameter.grad)
            ratio = torch.where(exact.isfinite() & (exact > 0), exact, ratio)
        return torch.where((ratio > _SCALED) & ratio.isfinite(), torch.exp2(ratio.log2().round()), 1.0)


def _norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float64)
