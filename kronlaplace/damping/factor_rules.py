"""What a factored damping says: four numbers for each group of rows, computed from traces and sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kronlaplace.blocks import KroneckerBlock

__all__ = ["DampedFactors", "FactorTraces", "grouped_factors"]


class DampedFactors(NamedTuple):
    """Numbers of the damped block ``(c_G G + s_G I) ⊗ (c_A A + s_A I)`` for each group, shape ``(K,)``, float64."""

    gradient_scale: Tensor
    gradient_shift: Tensor
    activation_scale: Tensor
    activation_shift: Tensor


@dataclass(frozen=True, eq=False)
class FactorTraces:
    """Traces and sizes of a Kronecker block's factors.

    Args:
        block: The block.
        gradient: Trace of ``G`` of each group, shape ``(K,)``, float64.
        activation: Trace of ``A`` of each group, shape ``(K,)``, float64.
    """

    block: KroneckerBlock
    gradient: Tensor
    activation: Tensor

    @classmethod
    def of(cls, block: KroneckerBlock) -> FactorTraces:
        """Measure the traces from the diagonals of the factors, without an eigendecomposition."""
        gradient, activation = (factor.diagonal(dim1=-2, dim2=-1).double().sum(-1) for factor in grouped_factors(block))
        return cls(block, gradient, activation)

    @property
    def scale(self) -> Tensor:
        """Scale of the block, shape ``(K,)``, float64."""
        return self.block.scale.double().expand(len(self.gradient))

    @property
    def rows(self) -> int:
        """Number ``q / K`` of rows of ``G``."""
        return self.block.shape[0] // len(self.gradient)

    @property
    def columns(self) -> int:
        """Number ``p`` of rows of ``A``."""
        return self.block.shape[1]

    @property
    def block_trace(self) -> Tensor:
        """Trace ``δ = scale · tr G · tr A`` of each group, shape ``(K,)``."""
        return self.scale * self.gradient * self.activation

    def with_unit_traces(self, root: Tensor, gradient_shift: Tensor, activation_shift: Tensor) -> DampedFactors:
        """Return ``(r G / tr G + s_G I) ⊗ (r A / tr A + s_A I)``; a factor without a trace counts as zero."""
        gradient, activation = (_quotient(root, trace) for trace in (self.gradient, self.activation))
        return DampedFactors(gradient, gradient_shift.expand_as(root), activation, activation_shift.expand_as(root))


def grouped_factors(block: KroneckerBlock) -> tuple[Tensor, Tensor]:
    """Return ``G``, shape ``(K, q/K, q/K)``, and ``A``, shape ``(K, p, p)``."""
    gradient, activation = (
        factor.unsqueeze(0) if factor.ndim == 2 else factor
        for factor in (block.gradient_factor, block.activation_factor)
    )
    return gradient, activation


def _quotient(root: Tensor, trace: Tensor) -> Tensor:
    """Return ``r / tr``, with zeros where the trace is so small that the quotient might overflow."""
    limits = torch.finfo(trace.dtype)
    alive = trace > limits.tiny / limits.eps
    return torch.where(alive, root / torch.where(alive, trace, 1.0), 0.0)
