"""The Levenberg–Marquardt rule for the damping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kronlaplace._arguments import positive_integer, positive_number
from kronlaplace.damping.factored import FactoredTikhonov
from kronlaplace.damping.strategies import Damping

__all__ = ["LevenbergMarquardt"]


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Rule that adapts a damping ``γ`` to how well a quadratic model predicts the loss (K-FAC section 6.5, KFC Eq. 37–38).

    The ratio ``ρ`` is the true reduction of the loss over the reduction that the model predicted; where the steps of
    `NaturalGradient` adapt, it is how far the next batches confirm the step of the damped model. Every ``every`` steps,
    ``γ`` is multiplied by ``decay ** every`` if ``ρ > upper``, and divided by it if ``ρ < lower``. The rule has no other
    state than ``γ``, which the optimizer keeps.

    ``γ`` is added to the curvature, as ``λ`` in both papers: a step is damped by ``damping(γ)``. (K-FAC's own ``γ``, which
    it adds to each factor, is the root of this.)

    Args:
        damping: Damping strategy that takes ``γ``: a class such as `Tikhonov`, or a function.
        initial: First ``γ``. None is the curvature along the first gradient, ``gᵀFg / gᵀg``, so that a step along the
            gradient is halved.
        every: Number of steps between two changes.
        decay: Factor per step by which ``γ`` shrinks while the model is right, below 1.
        minimum: Least ``γ``.
        maximum: Largest ``γ``.
        lower: Ratio below which ``γ`` grows.
        upper: Ratio above which ``γ`` shrinks.

    Raises:
        TypeError, ValueError: If a setting is of the wrong type or out of range, naming it.
    """

    damping: Callable[[float | Tensor], Damping] = FactoredTikhonov
    initial: float | None = None
    every: int = 5
    decay: float = 19 / 20
    minimum: float = 1e-8
    maximum: float = 1e8
    lower: float = 1 / 4
    upper: float = 3 / 4

    def __post_init__(self) -> None:
        if not callable(self.damping):
            raise TypeError(
                f"damping must be a class or function that makes a damping from a number, such as FactoredTikhonov without "
                f"parentheses; got {self.damping!r}."
            )
        positive_integer(self.every, "every")
        for name in ("decay", "minimum", "maximum", "upper"):
            positive_number(getattr(self, name), name)
        if self.initial is not None:
            positive_number(self.initial, "initial")
        if not self.decay < 1:
            raise ValueError(f"decay must be below 1, got {self.decay}.")
        if self.initial is not None and not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"initial must be from minimum to maximum, got {self.initial} with minimum {self.minimum} and maximum "
                f"{self.maximum}."
            )
        if not 0 <= self.lower <= self.upper:
            raise ValueError(f"lower must be from 0 to upper, got {self.lower} and {self.upper}.")

    def updated(self, gamma: float | Tensor, ratio: Tensor) -> Tensor:
        """Return the next ``γ``, by tensor arithmetic that waits for no device.

        Args:
            gamma: Current ``γ``, a number or a 0-dim tensor.
            ratio: Ratio ``ρ``, 0-dim. NaN counts as a step that failed: ``γ`` grows.

        Returns:
            The next ``γ``, 0-dim, on the ratio's device, in the dtype of ``gamma`` if it is a tensor, else of the ratio.
        """
        if not isinstance(gamma, Tensor):
            gamma = ratio.new_full((), gamma)
        factor = self.decay**self.every
        grown = torch.where(ratio >= self.lower, gamma, gamma / factor)  # NaN is not larger than anything
        return torch.where(ratio > self.upper, gamma * factor, grown).clamp(self.minimum, self.maximum)
