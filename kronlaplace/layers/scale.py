"""Normalization layers of any kind that scale their normalized input by a weight, feature by feature on the last axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace._memory_layout import with_contiguous_gradient
from kronlaplace._replica import Replica
from kronlaplace.layers.normalization import NormalizationLayer

__all__ = ["ScaleLayer"]


class ScaleLayer(NormalizationLayer):
    """A module ``n(x) · w + b``, or ``n(x) · (1 + w) + b``, with the features of ``w`` on the last axes.

    How the module normalizes need not be known: its own forward pass is affine in ``w``, so ``n(x)`` is the difference
    between its outputs at ``w = 1`` and at ``w = 0``.
    """

    @property
    def _trailing(self) -> int:
        return self._weight.ndim

    def _normalized(self, x: Tensor) -> Tensor:
        at_one, at_zero = (self._with_weight(value)(x) for value in (1.0, 0.0))
        return with_contiguous_gradient(at_one - at_zero)

    def _with_weight(self, value: float) -> Any:
        """Return the forward method of a copy of the module with this value in every weight and zero in every bias."""
        copy = Replica(self.module).model
        for i, (name, parameter) in enumerate(self.parameters.items()):
            constant = torch.full_like(parameter, 0.0 if i else value, dtype=self.dtype, requires_grad=False)
            setattr(copy, name.rpartition(".")[2], nn.Parameter(constant, requires_grad=False))
        return copy.forward
