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

    @property
    def weight_of_inputs(self) -> Tensor | None:
        return self._table.detach()

    def assemble(self, values: Mapping[str, Tensor]) -> Tensor:
        return values[self.parameter_names[0]].clone()

    @property
    def totals_are_products(self) -> bool:
        return True

    def total_weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        if x.is_floating_point():
            g, a = (part.reshape(-1, part.shape[-1]).to(self.dtype) for part in (grad, x))
            return g.T @ a
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
        found = self.sums_by_token(calls, len(calls[0][0]))
        if found is None:
            return False
        token, sums = found
        out.index_add_(0, token.flatten(), sums.square().flatten(0, 1))
        return True

    def sums_by_token(self, calls: Sequence[tuple[Tensor, Tensor]], n_examples: int) -> tuple[Tensor, Tensor] | None:
        """Return the rows of ``X`` that are not zero: each example's tokens, and for each the sum of its gradients.

        Args:
            calls: The input and output gradient of every call.
            n_examples: ``N``.

        Returns:
            Tokens, ``(N, S)``, and sums, ``(N, S, p)``, for as many places ``S`` as there are look-ups; a token that is
            looked up several times leaves places without one, whose sums are zero. None if the table also multiplies inputs.
        """
        if any(x.is_floating_point() for x, _ in calls):
            return None
        looked_up = [
            self._look_ups(x.reshape(n_examples, -1), grad.reshape(n_examples, -1, grad.shape[-1]).to(self.dtype))
            for x, grad in calls
        ]
        index = torch.cat([index for index, _ in looked_up], dim=1)
        g = torch.cat([g for _, g in looked_up], dim=1)
        ordered, order = index.sort(dim=1)
        starts = torch.ones_like(ordered)
        starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        place_in_order = starts.cumsum(1) - 1
        place = torch.zeros_like(order).scatter_(1, order, place_in_order)
        sums = torch.zeros_like(g).scatter_add_(1, place.unsqueeze(2).expand_as(g), g)
        return torch.zeros_like(index).scatter_(1, place, index), sums

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
