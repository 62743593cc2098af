"""The quadratic form of a layer's curvature, whose gradient costs no further products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kronlaplace.blocks import Block

__all__ = ["quadratic_form"]


def quadratic_form(blocks: Sequence[Block], deviation: Tensor) -> Tensor:
    """Return ``Δᵀ (Σ_i Λ_i) Δ``, 0-dim, differentiable in ``Δ`` any number of times.

    The product ``Λ Δ`` of the value is kept for the gradient ``2 Λ Δ``. Only if the gradient itself is to be differentiated
    (``create_graph=True``), is it computed again.

    Args:
        blocks: The symmetric blocks ``Λ_i`` of a layer.
        deviation: ``Δ``, shape ``(q, p)``.
    """
    result: Tensor = _QuadraticForm.apply(deviation, blocks)  # type: ignore[no-untyped-call]
    return result


def _product(blocks: Sequence[Block], deviation: Tensor) -> Tensor:
    total = blocks[0].matmul(deviation)
    for block in blocks[1:]:
        total = total + block.matmul(deviation)
    return total


class _QuadraticForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, deviation: Tensor, blocks: Sequence[Block]) -> Tensor:
        product = _product(blocks, deviation)
        ctx.save_for_backward(deviation, product)
        ctx.blocks = blocks
        return (deviation * product).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        deviation, product = ctx.saved_tensors
        if torch.is_grad_enabled():
            product = _product(ctx.blocks, deviation)
        return 2 * grads[0] * product, None
