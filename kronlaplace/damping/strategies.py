"""Damping strategies, which add ``γ`` to a block before it is inverted.

All of them keep the block's eigenbasis, so that the eigendecompositions are computed once, in one batched call for equal
sizes, and a change of damping costs only new eigenvalues. For a block ``scale · G ⊗ A`` whose factors have eigenvalues
``d_G``, ``d_A`` and sizes ``q``, ``p``, with the trace ``δ = scale · tr G · tr A``:

| strategy | eigenvalues of the damped block | |
| --- | --- | --- |
| `Tikhonov` | ``scale · d_G d_A + γ`` | exact |
| `FactoredTikhonov` | ``(scale · d_G + √γ / π) (d_A + π √γ)``, ``π² = (tr A / p) / (scale · tr G / q)`` | KFC Eq. 28 |
| `TraceRestricted` | ``(√δ d_G / tr G + √λ) (√δ d_A / tr A + √λ)`` | TKFAC Eq. 5.15 |
| `TraceRestrictedAuto` | ``(√δ̃ d_G / tr G + δ̃ / q) (√δ̃ d_A / tr A + δ̃ / p)``, ``δ̃ = max(ν, δ)`` | TKFAC Eq. 5.16–5.17 |

Kronecker blocks with groups of rows are damped group by group.

To define a strategy of your own, derive a class from `Damping` with one method, `Damping.eigenvalues`. This one adds a
fraction of the mean eigenvalue:

    >>> class Relative(Damping):
    ...     def eigenvalues(self, block):
    ...         values = block.eigenvalues()
    ...         return values + 0.01 * values.mean()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kronlaplace._arguments import positive_number
from kronlaplace.blocks import Block, DenseBlock, EigenBlock, KroneckerBlock, decompose
from kronlaplace.damping.inverse import DampedInverse
from kronlaplace.damping.plus_diagonal import PlusDiagonal

__all__ = [
    "Damping",
    "FactoredTikhonov",
    "Tikhonov",
    "TraceRestricted",
    "TraceRestrictedAuto",
]


class Damping(ABC):
    """Base class of the damping strategies, which make a block invertible by new eigenvalues in its eigenbasis.

    A subclass defines `eigenvalues`. `kronlaplace.testing.check_damping` checks whether it obeys the laws of a damping.
    """

    @abstractmethod
    def eigenvalues(self, block: Block) -> Tensor:
        """Return the eigenvalues of the damped block, shape ``(q, p)``, float64, positive and finite.

        Args:
            block: Block of one layer, which is not changed. Its own eigenvalues are in `Block.eigenvalues`, and those of
                the factors of a `KroneckerBlock` in `KroneckerBlock.eigen`.
        """

    @property
    def is_zero(self) -> bool:
        """Whether nothing is added, so that a block that is singular up to rounding must be rejected."""
        return False

    def invert(self, block: Block) -> DampedInverse:
        """Return the damped inverse of one layer's block.

        Raises:
            TypeError: If it is not a block.
            ValueError: If the damping is zero and the block is singular, or if a factor has NaN or infinite entries; the
                message names the layer. Eigenvalues no larger than rounding count as zero.
        """
        _check_block(block)
        values = self.eigenvalues(block)
        if values.shape != block.shape or values.dtype != torch.float64:
            raise ValueError(
                f"{self!r}.eigenvalues must return a float64 tensor of the block's shape {tuple(block.shape)}; for layer "
                f"{block.name!r} it returned {values.dtype} of shape {tuple(values.shape)}."
            )
        return self._checked(block, values)

    def _checked(self, block: Block, eigenvalues: Tensor) -> DampedInverse:
        """Return the damped inverse after checking its eigenvalues.

        They must be finite and positive; if the damping is zero, they must also exceed rounding.
        """
        if not torch.isfinite(eigenvalues).all():
            raise ValueError(
                f"the damped block of layer {block.name!r} has NaN or infinite eigenvalues, so it cannot be inverted. Check "
                "its scale and the size of its entries."
            )
        if self.is_zero:
            _refuse_singular(block, eigenvalues, _rounding(block, eigenvalues))
        elif not (eigenvalues > 0).all():
            raise ValueError(
                f"the block of layer {block.name!r}, damped by {self!r}, has an eigenvalue of "
                f"{float(eigenvalues.detach().min()):.3g}; all must be larger than 0. Use a larger damping."
            )
        return DampedInverse(block, eigenvalues, self)

    def invert_all(self, blocks: Mapping[str, Block]) -> dict[str, DampedInverse]:
        """Return the damped inverses of all blocks, such as those of a `KroneckerFisher`.

        Blocks of equal size are decomposed together.

        Raises:
            TypeError: If it is not a mapping of blocks.
            ValueError: As `invert`.
        """
        if not isinstance(blocks, Mapping):
            raise TypeError(
                f"invert_all takes a Fisher or a dict of blocks; got {type(blocks).__name__}. Use invert(block)."
            )
        decompose(blocks.values())
        return {name: self.invert(block) for name, block in blocks.items()}


@dataclass(frozen=True, repr=False)
class Tikhonov(Damping):
    """Exact Tikhonov damping: ``γ`` is added to the block itself, ``F + γ I`` (KFC Eq. 39–44).

    Args:
        damping: Nonnegative ``γ``: a number, a 0-dim tensor, or a tensor with one value per weight, shape ``(q, p)`` (see
            `kronlaplace.damping.plus_diagonal.PlusDiagonal` for the blocks for which this is exact). Tensors may carry a
            gradient; with one value per weight it reaches `logdet`, and solutions only if the eigenvalues of the damped
            block are distinct.

    Raises:
        ValueError: If the damping is negative or not finite.
    """

    damping: float | Tensor

    def __post_init__(self) -> None:
        if isinstance(self.damping, Tensor) and self.damping.ndim == 2:
            if not ((self.damping >= 0) & torch.isfinite(self.damping)).all():
                raise ValueError("damping must be finite and not negative for every weight; some values are not.")
            return
        _number(self.damping, "damping")

    def __repr__(self) -> str:
        return f"Tikhonov({_shown(self.damping)})"

    @property
    def is_zero(self) -> bool:
        return float(self.damping.detach().min() if isinstance(self.damping, Tensor) else self.damping) == 0

    def eigenvalues(self, block: Block) -> Tensor:
        return self.invert(block).eigenvalues if self._by_weight else self._added(block)

    def invert(self, block: Block) -> DampedInverse:
        if not self._by_weight:
            return super().invert(block)
        _check_block(block)
        assert isinstance(self.damping, Tensor)
        if self.damping.shape != block.shape:
            raise ValueError(
                f"the damping of layer {block.name!r} must be a single number or have shape {block.shape}, one value per "
                f"weight; got shape {tuple(self.damping.shape)}."
            )
        inverse = PlusDiagonal(block).damped(self.damping)
        if self.is_zero and isinstance(block, EigenBlock) and inverse.block is not block:
            _refuse_singular(block, inverse.eigenvalues, _rounding(block, inverse.eigenvalues).amax())
        return self._checked(inverse.block, inverse.eigenvalues)

    @property
    def _by_weight(self) -> bool:
        return isinstance(self.damping, Tensor) and self.damping.ndim == 2

    def _added(self, block: Block) -> Tensor:
        return block.eigenvalues() + torch.as_tensor(self.damping, dtype=torch.float64, device=block.device)


class _ByFactor(Damping):
    """Damping of each factor of a Kronecker block; other blocks get the equivalent change of eigenvalues."""

    def eigenvalues(self, block: Block) -> Tensor:
        if isinstance(block, KroneckerBlock):
            gradient, activation = self._damped(_Factors(block))
            return (gradient.unsqueeze(2) * activation.unsqueeze(1)).flatten(0, 1)
        return self._damped_values(block)

    @abstractmethod
    def _damped(self, factors: _Factors) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of the damped factors, shapes ``(K, q/K)`` and ``(K, p)``.

        The block's scale is contained in one or both of them.
        """

    @abstractmethod
    def _damped_values(self, block: Block) -> Tensor:
        """Return the eigenvalues of a damped block that has no factors, shape ``(q, p)``."""


class _Factors:
    """Eigenvalues of a block's factors in float64, with a leading axis of ``K`` groups.

    Attributes:
        scale: Scale of the block, shape ``(K, 1)``.
        gradient: Eigenvalues ``d_G``, shape ``(K, q/K)``.
        activation: Eigenvalues ``d_A``, shape ``(K, p)``.
        trace: Trace ``δ = scale · tr G · tr A``, shape ``(K, 1)``.
        block: The block.
    """

    def __init__(self, block: KroneckerBlock) -> None:
        self.block = block
        gradient, activation = block.eigen()
        self.gradient, self.activation = gradient.values.double(), activation.values.double()
        self.scale = block.scale.double().expand(len(self.gradient)).unsqueeze(1)
        self.trace = self.scale * self.gradient.sum(1, keepdim=True) * self.activation.sum(1, keepdim=True)

    def unit_trace(self) -> tuple[Tensor, Tensor]:
        """Return ``d_G / tr G`` and ``d_A / tr A``, with zeros where the trace is zero."""
        return _unit(self.gradient), _unit(self.activation)


def _unit(values: Tensor) -> Tensor:
    return values / values.sum(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


@dataclass(frozen=True, repr=False)
class _ByNumber(_ByFactor):
    """Common base of the dampings by a single number."""

    damping: float | Tensor

    def __post_init__(self) -> None:
        _number(self.damping, "damping")

    @property
    def is_zero(self) -> bool:
        return _number(self.damping, "damping") == 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_shown(self.damping)})"

    def _damped_values(self, block: Block) -> Tensor:
        return block.eigenvalues() + torch.as_tensor(self.damping, dtype=torch.float64, device=block.device)

    def _root(self, device: torch.device) -> Tensor:
        """Return ``√γ``."""
        return torch.as_tensor(self.damping, dtype=torch.float64, device=device).sqrt()


@dataclass(frozen=True, repr=False)
class FactoredTikhonov(_ByNumber):
    """Factored Tikhonov damping ``(G + √γ/π I) ⊗ (A + π √γ I)`` with ``π`` from the trace norm (K-FAC appendix, KFC Eq. 28).

    The product does not depend on how a scale is divided between the factors. Blocks without factors (diagonal, dense,
    EKFAC) get ``γ`` itself, which this damping approximates.

    Args:
        damping: Nonnegative ``γ``, a number or a 0-dim tensor.

    Raises:
        ValueError: If the damping is negative or not finite.
    """

    def _damped(self, factors: _Factors) -> tuple[Tensor, Tensor]:
        gradient = factors.scale * factors.gradient
        means = factors.activation.mean(1, keepdim=True), gradient.mean(1, keepdim=True)
        alive = (means[0] > 0) & (means[1] > 0)
        pi = torch.sqrt(torch.where(alive, means[0], 1.0) / torch.where(alive, means[1], 1.0))
        root = self._root(pi.device)
        return gradient + root / pi, factors.activation + pi * root


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

    def _damped(self, factors: _Factors) -> tuple[Tensor, Tensor]:
        gradient, activation = factors.unit_trace()
        damping = self._root(gradient.device)
        alive = factors.trace != 0
        root = torch.where(alive, factors.trace, 1.0).sqrt() * alive  # the square root has no derivative at zero
        return root * gradient + damping, root * activation + damping


@dataclass(frozen=True)
class TraceRestrictedAuto(_ByFactor):
    """TKFAC's automatic damping, derived from the block's trace, which is kept above ``ν`` (TKFAC Eq. 5.16 and 5.17).

    The damped block is ``(√δ̃ Ψ + δ̃/q I) ⊗ (√δ̃ Φ + δ̃/p I)``, with factors of unit trace and ``δ̃ = max(ν, δ)`` for
    convolutions. All other layers of a network are expanded by the largest factor by which any of its layers is expanded,
    ``δ̃ = max(ν, β δ)`` with ``β = max_l max(ν, δ_l) / δ_l`` over its Kronecker blocks. The blocks of a `KroneckerFisher`
    carry the trace needed for this, even when used alone or in a dict (`kronlaplace.blocks.Block.least_trace`); a block
    that does not come from a network is not expanded. Blocks without factors (diagonal, dense, EKFAC) are multiplied by
    ``δ̃ / δ`` and get ``δ̃² / (q p)`` on their diagonal.

    Args:
        minimum: Positive ``ν``, the smallest trace of a block.

    Raises:
        ValueError, TypeError: If ``minimum`` is not a positive finite number.
    """

    minimum: float

    def __post_init__(self) -> None:
        positive_number(self.minimum, "minimum")

    def _restricted(self, trace: Tensor, block: Block) -> Tensor:
        """Return ``δ̃``."""
        if (least := block.least_trace) is not None:
            trace = trace * (self.minimum / least.double()).clamp_min(1.0)  # β
        return trace.clamp_min(self.minimum)

    def _damped(self, factors: _Factors) -> tuple[Tensor, Tensor]:
        gradient, activation = factors.unit_trace()
        trace = self._restricted(factors.trace, factors.block)
        root = trace.sqrt()
        return root * gradient + trace / gradient.shape[1], root * activation + trace / activation.shape[1]

    def _damped_values(self, block: Block) -> Tensor:
        values = block.eigenvalues()
        trace = self._restricted(values.sum(), block)
        return trace * _unit(values.flatten()[None]).view_as(values) + trace.square() / values.numel()


def _number(damping: float | Tensor, name: str) -> float:
    """Return the value of ``γ`` as a float.

    Raises:
        ValueError: If it is negative or not a single finite number.
    """
    is_number = isinstance(damping, (int, float, np.integer, np.floating)) or (
        isinstance(damping, Tensor) and damping.ndim == 0
    )
    value = float(damping.detach() if isinstance(damping, Tensor) else damping) if is_number else float("nan")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a single finite number that is not negative, got {damping!r}.")
    return value


def _check_block(block: object) -> None:
    """Check that something is a block.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(block, Block):
        raise TypeError(
            f"invert takes a single block, such as fisher[layer_name]; got {type(block).__name__}. For all blocks of a "
            "Fisher use invert_all(fisher)."
        )


def _shown(damping: float | Tensor) -> str:
    """Format a damping for a repr: as a number, however it is stored."""
    if isinstance(damping, Tensor) and damping.ndim:
        return f"{'x'.join(map(str, damping.shape))} numbers"
    return f"{float(damping):.6g}"


def _refuse_singular(block: Block, eigenvalues: Tensor, rounding: Tensor) -> None:
    if not (eigenvalues > rounding).all():
        raise ValueError(f"the block of layer {block.name!r} is singular; use a damping larger than 0.")


def _rounding(block: Block, eigenvalues: Tensor) -> Tensor:
    """Return the size up to which a block's eigenvalues may be rounding; broadcasts against ``(q, p)``.

    For a Kronecker block, rounding was removed when its factors were decomposed, and each entry of a diagonal block is a
    sum of squares by itself. In the basis of an `EigenBlock`, rounding adds a fraction of the largest eigenvalues to those
    that should be zero.
    """
    if isinstance(block, DenseBlock):
        return eigenvalues.numel() * torch.finfo(eigenvalues.dtype).eps * eigenvalues.detach().max()
    if not isinstance(block, EigenBlock):
        return eigenvalues.new_zeros(())
    by_group = block.values.detach().double().unflatten(0, (len(block.gradient_basis), -1))
    n = max(by_group.shape[1:])
    return (n * torch.finfo(block.dtype).eps * by_group.amax((1, 2), keepdim=True)).expand_as(by_group).flatten(0, 1)
