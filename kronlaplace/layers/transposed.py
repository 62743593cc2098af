"""Linear layers whose weight is stored transposed, such as `Conv1D` of Hugging Face's transformers (all of GPT-2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kronlaplace.layers.base import LinearLayer

__all__ = ["TransposedLinearLayer"]


class TransposedLinearLayer(LinearLayer):
    """A layer ``x W + b`` with a weight of shape ``(inputs, outputs)``; ``W̄ = [Wᵀ b]``, as for any other linear layer."""

    @property
    def in_features(self) -> int:
        (weight,) = self._weights.values()
        return len(weight)

    @property
    def shape(self) -> tuple[int, int]:
        (weight,) = self._weights.values()
        return weight.shape[1], self.in_features + self.bias

    def assemble(self, values: Mapping[str, Tensor]) -> Tensor:
        (name,) = self._weights
        columns = [values[name].T]
        if self._bias is not None:
            columns.append(values[self._bias[0]].unsqueeze(1))
        return torch.cat(columns, dim=1)

    def split_directions(self, matrices: Tensor) -> dict[str, Tensor]:
        (name,) = self._weights
        result = {name: matrices[..., : self.in_features].mT}
        if self._bias is not None:
            result[self._bias[0]] = matrices[..., -1]
        return result
