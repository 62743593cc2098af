"""Embeddings, in which an example's gradient is nonzero only in the rows of its own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace.layers.base import Layer

__all__ = ["EmbeddingLayer", "embedding_refusal"]


class EmbeddingLayer(Layer):
    """An embedding: ``W̄`` is its table, shape ``(tokens, features)``, and ``X`` is nonzero in the rows of the tokens.

    The table may also be the weight of a linear layer without a bias (tied input and output embeddings): calls with
    integer inputs are look-ups, and calls with floating-point inputs are products.
    """

    has_kronecker_factors = False

    @property
    def _table(self) -> nn.Parameter:
        return next(iter(self.parameters.values()))

    @property
    def _padding_index(self) -> int | None:
        return next((m.padding_idx for m in self.modules if getattr(m, "padding_idx", None) is not None), None)  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        q, p = self._table.shape
        return q, p

    def assemble(self, values: Mapping[str, Tensor]) -> Tensor:
        return values[self.parameter_names[0]].clone()

    def total_weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        if x.is_floating_point():
            return super().total_weight_gradient(x, grad)
        index, g = self._look_ups(x, grad.reshape(len(grad), -1, grad.shape[-1]).to(self.dtype))
        return g.new_zeros(self.shape).index_add_(0, index.flatten(), g.flatten(0, 1))

    def split_directions(self, matrices: Tensor) -> dict[str, Tensor]:
        return {self.parameter_names[0]: matrices}

    def input_norm(self, x: Tensor) -> Tensor | float:
        return super().input_norm(x) if x.is_floating_point() else 1.0

    def example_axes(self, x: Tensor) -> tuple[int, ...]:
        return tuple(range(x.ndim - x.is_floating_point()))

    def input_shape(self) -> str:
        return "(examples, ...)"

    def positions(self, x: Tensor, grad: Tensor) -> int | Tensor:
        return grad[0, ..., 0].numel()

    def weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        g = grad.reshape(len(grad), -1, grad.shape[-1]).to(self.dtype)
        if x.is_floating_point():
            return (g.mT @ x.reshape(len(x), -1, x.shape[-1]).to(self.dtype)).unsqueeze(0)
        index, g = self._look_ups(x, g)
        result = g.new_zeros(1, len(x), *self.shape)
        result[0].scatter_add_(1, index.unsqueeze(2).expand_as(g), g)
        return result

    def squared_weight_gradients(self, calls: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> bool:
        """Sort the gradients by token within each example, to sum those of one token before squaring."""
        if any(x.is_floating_point() for x, _ in calls):
            return False
        looked_up = [self._look_ups(x, grad.reshape(len(grad), -1, grad.shape[-1]).to(self.dtype)) for x, grad in calls]
        index = torch.cat([index for index, _ in looked_up], dim=1)
        g = torch.cat([g for _, g in looked_up], dim=1)
        token, order = index.sort(dim=1)
        g = g.take_along_dim(order.unsqueeze(2), dim=1).flatten(0, 1)
        starts = torch.ones_like(token, dtype=torch.bool)
        starts[:, 1:] = token[:, 1:] != token[:, :-1]
        segment = starts.flatten().cumsum(0) - 1
        # There are at most as many sums as look-ups; the unused ones stay zero.
        sums = torch.zeros_like(g).index_add_(0, segment, g)
        owner = torch.zeros_like(segment).scatter_(0, segment, token.flatten())
        out.index_add_(0, owner, sums.square())
        return True

    def _look_ups(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        index = x.reshape(len(x), -1)
        if self._padding_index is not None:
            g = g.masked_fill((index == self._padding_index).unsqueeze(2), 0)
        return index, g


def embedding_refusal(module: Any) -> str | None:
    """Return why this module cannot have a block, or None."""
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes the weights in every forward pass"
    if getattr(module, "scale_grad_by_freq", False):
        return "scale_grad_by_freq scales gradients by token frequencies in the whole batch"
    return None
