"""Factored dampings: they damp each factor of a Kronecker block, ``(c_G G + s_G I) ⊗ (c_A A + s_A I)``.

Each states its rule once, in `FactoredDamping.factors`, as numbers that depend on traces and sizes alone. The eigenvalues
follow from it, and so does the inverse of both damped factors by Cholesky (`kronlaplace.damping.cholesky`), which needs no
eigendecomposition.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronlaplace._arguments import positive_number
from kronlaplace.blocks import Block, KroneckerBlock, TruncatedBlock
from kronlaplace.damping.factor_rules import DampedFactors, FactorTraces
from kronlaplace.damping.strategies import Damping, checked_number, shown_number

__all__ = ["FactoredDamping", "FactoredTikhonov", "TraceRestricted", "TraceRestrictedAuto"]


class FactoredDamping(Damping):
    """Damping of each factor of a Kronecker block; other blocks get the equivalent change of eigenvalues."""

    def eigenvalues(self, block: Block) -> Tensor:
        if not isinstance(block, KroneckerBlock):
            return self._damped_values(block)
        gradient, activation = (eigen.values.double() for eigen in block.eigen())
        traces = (
            values @ basis.multiplicities for values, basis in zip((gradient, activation), block.bases(), strict=True)
        )
        rule = self.factors(FactorTraces(block, *traces))
        c_G, s_G, c_A, s_A = (number.unsqueeze(1) for number in rule)
        return ((c_G * gradient + s_G).unsqueeze(2) * (c_A * activation + s_A).unsqueeze(1)).flatten(0, 1)

    def damped_factors(self, block: Block) -> DampedFactors | None:
        if isinstance(block, TruncatedBlock) or not isinstance(block, KroneckerBlock):
            return None  # the factors of a truncated block are decomposed already
        return self.factors(FactorTraces.of(block))

    @abstractmethod
    def factors(self, traces: FactorTraces) -> DampedFactors:
        """Return the numbers of the damped factors; the block's scale is contained in one or both of them."""

    @abstractmethod
    def _damped_values(self, block: Block) -> Tensor:
        """Return the eigenvalues of a damped block that has no factors, in the shape of its own."""


@dataclass(frozen=True, repr=False)
class _ByNumber(FactoredDamping):
    """Common base of the dampings by a single number."""

    damping: float | Tensor

    def __post_init__(self) -> None:
        checked_number(self.damping, "damping")

    @property
    def is_zero(self) -> bool:
        return float(self.damping.detach() if isinstance(self.damping, Tensor) else self.damping) == 0

    def with_added(self, amount: float | Tensor) -> Damping:
        return replace(self, damping=self.damping + amount)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_number(self.damping)})"

    def _damped_values(self, block: Block) -> Tensor:
        return _plus(block, self.damping)

    def _root(self, device: torch.device) -> Tensor:
        """Return ``√γ``."""
        return _root(self.damping, device)


@dataclass(frozen=True, repr=False)
class FactoredTikhonov(_ByNumber):
    """Factored Tikhonov damping ``(G + √γ/π I) ⊗ (A + π √γ I)`` with ``π`` from the trace norm (K-FAC appendix, KFC Eq. 28).

    The product does not depend on how a scale is divided between the factors. Blocks without factors (diagonal, dense,
    EKFAC) get ``γ`` itself, which this damping approximates. K-FAC's own ``γ`` is the ``√γ`` of this formula.

    Args:
        damping: Nonnegative ``γ``, a number or a 0-dim tensor.

    Raises:
        ValueError: If the damping is negative or not finite.
    """

    def factors(self, traces: FactorTraces) -> DampedFactors:
        means = traces.activation / traces.columns, traces.scale * traces.gradient / traces.rows
        alive = (means[0] > 0) & (means[1] > 0)
        pi = torch.sqrt(torch.where(alive, means[0], 1.0) / torch.where(alive, means[1], 1.0))
        root = self._root(pi.device)
        return DampedFactors(traces.scale, root / pi, torch.ones_like(pi), pi * root)


@dataclass(frozen=True, repr=False)
class TraceRestricted(_ByNumber):
    """TKFAC's damping ``(√δ Ψ + √λ I) ⊗ (√δ Φ + √λ I)`` of factors with unit traces (TKFAC Eq. 5.15).

    It applies to any Kronecker block: the factors are first scaled to unit traces, and ``δ`` is the block's trace. Blocks
    without factors (diagonal, dense, EKFAC) get ``λ`` itself.

    Args:
        damping: Nonnegative ``λ``, a number or a 0-dim tensor.

    Raises:
        ValueError: If the damping is negative or not finite.
    """

    def factors(self, traces: FactorTraces) -> DampedFactors:
        return _trace_restricted(traces, self._root(traces.gradient.device))


@dataclass(frozen=True, repr=False)
class TraceRestrictedAuto(FactoredDamping):
    """TKFAC's automatic damping, derived from the block's trace, which is kept above ``ν`` (TKFAC Eq. 5.16 and 5.17).

    The damped block is ``(√δ̃ Ψ + δ̃/q I) ⊗ (√δ̃ Φ + δ̃/p I)``, with factors of unit trace and ``δ̃ = max(ν, δ)`` for
    convolutions. All other layers of a network are expanded by the largest factor by which any of its layers is expanded,
    ``δ̃ = max(ν, β δ)`` with ``β = max_l max(ν, δ_l) / δ_l`` over its Kronecker blocks. The blocks of a `KroneckerFisher`
    carry the trace needed for this, even when used alone or in a dict (`kronlaplace.blocks.Block.least_trace`); a block
    that does not come from a network is not expanded. Blocks without factors (diagonal, dense, EKFAC) are multiplied by
    ``δ̃ / δ`` and get ``δ̃² / (q p)`` on their diagonal.

    The paper gives this damping for convolutions, and lists a ``λ`` beside ``ν`` among its hyperparameters (TKFAC Table 2,
    ``(α, λ, ν)``). Its text expands linear layers by ``β`` and says nothing else about ``λ``, so both readings are here:
    with ``linear=λ``, layers that are not convolutions are damped by Eq. 5.15 instead, as by `TraceRestricted`.

    Args:
        minimum: Positive ``ν``, the smallest trace of a block.
        linear: Positive ``λ`` for all layers that are not convolutions (`Block.shares_weights_over_space` is False); None
            expands them by ``β``.

    Raises:
        ValueError, TypeError: If ``minimum`` or ``linear`` is not a positive finite number.
    """

    minimum: float
    linear: float | None = None

    def __post_init__(self) -> None:
        positive_number(self.minimum, "minimum")
        if self.linear is not None:
            positive_number(self.linear, "linear")

    def __repr__(self) -> str:
        linear = "" if self.linear is None else f", linear={self.linear!r}"
        return f"TraceRestrictedAuto(minimum={self.minimum!r}{linear})"

    def factors(self, traces: FactorTraces) -> DampedFactors:
        if (linear := self._linear_of(traces.block)) is not None:
            return _trace_restricted(traces, _root(linear, traces.gradient.device))
        trace = self._restricted(traces.block_trace, traces.block)
        return traces.with_unit_traces(trace.sqrt(), trace / traces.rows, trace / traces.columns)

    def _linear_of(self, block: Block) -> float | None:
        return None if block.shares_weights_over_space else self.linear

    def _restricted(self, trace: Tensor, block: Block) -> Tensor:
        """Return ``δ̃``."""
        if (least := block.least_trace) is not None:
            trace = trace * (self.minimum / least.double()).clamp_min(1.0)  # β
        return trace.clamp_min(self.minimum)

    def _damped_values(self, block: Block) -> Tensor:
        if (linear := self._linear_of(block)) is not None:
            return _plus(block, linear)
        values = block.eigenvalues()
        trace = self._restricted(values.sum(), block)
        unit = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        return trace * unit + trace.square() / values.numel()


def _trace_restricted(traces: FactorTraces, damping_root: Tensor) -> DampedFactors:
    """Return the numbers of TKFAC Eq. 5.15, given ``√λ``."""
    trace = traces.block_trace
    alive = trace != 0
    root = torch.where(alive, trace, 1.0).sqrt() * alive  # the square root has no derivative at zero
    return traces.with_unit_traces(root, damping_root, damping_root)


def _plus(block: Block, damping: float | Tensor) -> Tensor:
    return block.eigenvalues() + _on(damping, block.device)


def _root(damping: float | Tensor, device: torch.device) -> Tensor:
    return _on(damping, device).sqrt()


def _on(damping: float | Tensor, device: torch.device) -> Tensor:
    """Return the number as a float64 tensor; a plain number is filled in on the device, which waits for nothing."""
    if isinstance(damping, Tensor):
        return damping.to(device, torch.float64)
    return torch.full((), float(damping), dtype=torch.float64, device=device)
