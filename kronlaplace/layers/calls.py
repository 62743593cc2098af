"""All that flows through one layer in one batch: the calls of a forward pass, and their gradients along a direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronlaplace.layers.base import Layer, Sums

__all__ = ["Call", "Calls"]

_SMALL = 2**20
"""Numbers that a temporary may always hold."""


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        x: Its input, examples first.
        fold: How many rows of the first axis belong to one example (1, unless the network folds positions into it).
        autocast: The dtype that products of float32 were made in, or None if there was no autocast.
    """

    x: Tensor
    fold: int = 1
    autocast: torch.dtype | None = None


class Calls:
    """The calls of one layer in one forward pass; together their positions are the layer's shared axis.

    Gradients are given as one tensor per call, in the same order, examples first.

    Args:
        layer: The layer.
        calls: Its calls.
    """

    def __init__(self, layer: Layer, calls: Sequence[Call]) -> None:
        self.layer = layer
        self.calls = list(calls)

    @property
    def n_examples(self) -> int:
        """``N``."""
        return len(self.calls[0].x) // self.calls[0].fold

    def positions(self, grads: Sequence[Tensor]) -> int | Tensor:
        """``T`` of all calls together; shape ``(K, 1, 1)`` if it differs between the groups."""
        total: int | Tensor = 0
        for call, grad in zip(self.calls, grads, strict=True):
            total = total + call.fold * self.layer.positions(call.x, grad)
        return total

    def activations(self) -> Tensor:
        """``a``, shape ``(K, N, T, p)``."""
        return self._joined([self.layer.activations(call.x) for call in self.calls])

    def gradients(self, grads: Sequence[Tensor]) -> Tensor:
        """``g``, shape ``(K, N, T, q/K)``."""
        return self._joined([self.layer.gradients(grad) for grad in grads])

    def project(self, basis: Tensor) -> Tensor:
        """``a Q`` for ``Q`` of shape ``(K, p, k)``: shape ``(K, N, T, k)``."""
        return self._joined([self.layer.project(call.x, basis) for call in self.calls])

    def weight_gradients(self, grads: Sequence[Tensor]) -> Tensor:
        """``X = Σ_t g_t a_tᵀ``, summed over all calls, shape ``(K, N, q/K, p)``."""
        total: Tensor | None = None
        for call, grad in zip(self.calls, grads, strict=True):
            part = self.layer.weight_gradients(call.x, grad)
            if call.fold > 1:
                part = part.unflatten(1, (-1, call.fold)).sum(2)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def total_weight_gradient(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``Σ_n X_n``, shape ``(q, p)``, and a bound of what rounding can do to it, 0-dim."""
        total = torch.zeros(self.layer.shape, dtype=self.layer.dtype, device=self.layer.device)
        bound = total.new_zeros(())
        for part, part_grads in self.parts(grads):
            for call, grad in zip(part.calls, part_grads, strict=True):
                total += self.layer.total_weight_gradient(call.x, grad)
                bound += self.layer.input_norm(call.x) * torch.linalg.vector_norm(grad.to(total))
        return total, 100 * max(_rounding(call.x, call.autocast), _rounding(grad, call.autocast)) * bound

    def add_activation_moment(self, sums: Sums) -> None:
        """Add ``Σ_n Σ_t a aᵀ`` to ``sums``; `Layer.activation_moment` gets it out again."""
        for call in self.calls:
            self.layer.add_activation_moment(call.x, sums)

    def add_gradient_moment(self, grads: Sequence[Tensor], out: Tensor) -> None:
        """Add ``1/T · Σ_n Σ_t g gᵀ`` to ``out`` of shape ``(K, q/K, q/K)``."""
        positions = self.positions(grads)
        for grad in grads:
            self.layer.add_gradient_moment(grad, out, positions)

    def add_squared_weight_gradients(self, grads: Sequence[Tensor], out: Tensor) -> None:
        """Add ``Σ_n X ∘ X`` to ``out`` of shape ``(q, p)``."""
        if all(call.fold == 1 for call in self.calls):
            pairs = [(call.x, grad) for call, grad in zip(self.calls, grads, strict=True)]
            if self.layer.squared_weight_gradients(pairs, out):
                return
        for part, part_grads in self.parts(grads):
            out += part.weight_gradients(part_grads).square_().sum(1).view_as(out)

    def parts(self, grads: Sequence[Tensor], *, activations: bool = False) -> Iterator[tuple[Calls, list[Tensor]]]:
        """The same a few examples at a time, so that what is made of a part (``a``, ``g`` or ``X``) is no larger than what
        the whole batch has in inputs and outputs anyway.

        Args:
            grads: The gradients of all calls.
            activations: Whether ``a`` will be made in any case.
        """
        layer, n = self.layer, self.n_examples
        pairs = [(call.x, grad) for call, grad in zip(self.calls, grads, strict=True)]
        held = sum(x.numel() + grad.numel() for x, grad in pairs)
        needed = sum(layer.temporaries(x, grad, activations) for x, grad in pairs)
        count = max(1, min(n, n * max(held, _SMALL) // max(needed, 1)))
        if count >= n:
            yield self, list(grads)
            return
        for start in range(0, n, count):
            rows_of = [slice(start * call.fold, (start + count) * call.fold) for call in self.calls]
            part = [replace(call, x=call.x[rows]) for call, rows in zip(self.calls, rows_of, strict=True)]
            yield Calls(layer, part), [grad[rows] for grad, rows in zip(grads, rows_of, strict=True)]

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """Calls side by side on the axis of the positions."""
        unfolded = [
            t if call.fold == 1 else t.unflatten(1, (-1, call.fold)).flatten(2, 3)
            for t, call in zip(tensors, self.calls, strict=True)
        ]
        return unfolded[0] if len(unfolded) == 1 else torch.cat(unfolded, dim=2)


def _rounding(tensor: Tensor, autocast: torch.dtype | None) -> float:
    """Relative rounding error of products with a tensor, 0 for indices.

    The network may multiply float32 in less: under autocast, or in TF32 on CUDA.
    """
    if not tensor.is_floating_point():
        return 0.0
    if autocast is not None and tensor.dtype == torch.float32:
        return torch.finfo(autocast).eps
    coarse = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if tensor.is_cuda and tensor.dtype == torch.float32 and coarse:
        return 2.0**-11
    return torch.finfo(tensor.dtype).eps
