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
    ...         q, p = block.shape
    ...         return block.eigenvalues() + 0.01 * block.trace() / (q * p)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kronlaplace.blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    KroneckerBlock,
    TruncatedBlock,
    decompose,
)
from kronlaplace.damping.factor_rules import DampedFactors
from kronlaplace.damping.inverse import DampedInverse, DiagonalInverse
from kronlaplace.damping.inversion import SolversInProgress
from kronlaplace.damping.plus_diagonal import PlusDiagonal
from kronlaplace.damping.solvers import Solver, solver_of

__all__ = ["Damping", "Tikhonov", "checked_number", "shown_number"]


class Damping(ABC):
    """Base class of the damping strategies, which make a block invertible by new eigenvalues in its eigenbasis.

    A subclass defines `eigenvalues`. `kronlaplace.testing.check_damping` checks whether it obeys the laws of a damping.
    """

    @abstractmethod
    def eigenvalues(self, block: Block) -> Tensor:
        """Return the eigenvalues of the damped block, in the shape of `Block.eigenvalues`, float64, positive and finite.

        That shape is ``(q, p)``, or smaller if the block is truncated: then some eigenvalues stand for several eigenvectors
        (see `Block.multiplicities`), which matters for sums and means of them, not for each by itself. It is also ``(q, p)``
        where `invert` uses another basis than the block's.

        Args:
            block: Block of one layer, which is not changed. Its own eigenvalues are in `Block.eigenvalues`, and those of
                the factors of a `KroneckerBlock` in `KroneckerBlock.eigen`.
        """

    @property
    def is_zero(self) -> bool:
        """Whether nothing is added, so that a block that is singular up to rounding must be rejected."""
        return False

    def damped_factors(self, block: Block) -> DampedFactors | None:
        """Return the damped factors of a block by their four numbers, or None if the damped block has no such factors.

        If it has, `solvers` inverts them by Cholesky, without an eigendecomposition. The base class returns None.
        """
        return None

    def with_added(self, amount: float | Tensor) -> Damping:
        """Return the same strategy with ``amount`` added to its number, such as a weight decay: ``F + (γ + amount) I``.

        Args:
            amount: Number or 0-dim tensor; for `Tikhonov`, a tensor with one value per weight, too.

        Raises:
            NotImplementedError: If the strategy has no number to add to and the amount is not zero.
            ValueError: If the sum is negative or not finite.
        """
        if isinstance(amount, Tensor) or amount != 0:
            raise NotImplementedError(
                f"{self!r} has no number to which {shown_number(amount)} could be added. Use Tikhonov, FactoredTikhonov or "
                "TraceRestricted, or set the weight decay to 0; a damping of your own can define with_added."
            )
        return self

    def solvers(self, blocks: Mapping[str, Block]) -> dict[str, Solver]:
        """Return the cheapest objects that solve with the damped blocks, and do nothing else.

        Factored dampings of Kronecker blocks invert both damped factors by Cholesky, with one batched call per matrix size,
        in the factors' precision; matrices for which this is not enough are inverted again in float64. All others are
        decomposed, as by `invert_all`. This waits for an accelerator; `begin_solvers` does not.

        Args:
            blocks: Blocks by the names of their layers.

        Raises:
            TypeError: If it is not a mapping of blocks.
            ValueError: If a damped block is singular or has NaN or infinite entries, naming its layer.
        """
        return self.begin_solvers(blocks).settle()

    def begin_solvers(self, blocks: Mapping[str, Block]) -> SolversInProgress:
        """Begin to compute `solvers` without waiting for an accelerator, except to decompose blocks.

        The blocks must not change before the result is settled.

        Raises:
            TypeError, ValueError: As `solvers`, for blocks that are decomposed.
        """
        _check_mapping(blocks, "solvers")
        factored, others = {}, {}
        for name, block in blocks.items():
            _check_block(block)
            numbers = None if isinstance(block, TruncatedBlock) else self.damped_factors(block)
            if numbers is None:
                others[name] = block
            else:
                assert isinstance(block, KroneckerBlock)
                factored[name] = block, numbers
        done = {name: solver_of(inverse) for name, inverse in self.invert_all(others).items()}
        return SolversInProgress(factored, done, list(blocks), self)

    def invert(self, block: Block) -> DampedInverse:
        """Return the damped inverse of one layer's block.

        Raises:
            TypeError: If it is not a block.
            ValueError: If the damping is zero and the block is singular, or if a factor has NaN or infinite entries; the
                message names the layer. Eigenvalues no larger than rounding count as zero.
        """
        _check_block(block)
        values = self.eigenvalues(block)
        shape = block.multiplicities().shape
        if values.shape != shape or values.dtype != torch.float64:
            raise ValueError(
                f"{self!r}.eigenvalues must return a float64 tensor of the shape of block.eigenvalues(), {tuple(shape)}; "
                f"for layer {block.name!r} it returned {values.dtype} of shape {tuple(values.shape)}."
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
        _check_mapping(blocks, "invert_all")
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
        checked_number(self.damping, "damping")

    def __repr__(self) -> str:
        return f"Tikhonov({shown_number(self.damping)})"

    @property
    def is_zero(self) -> bool:
        return float(self.damping.detach().min() if isinstance(self.damping, Tensor) else self.damping) == 0

    def eigenvalues(self, block: Block) -> Tensor:
        return self.invert(block).eigenvalues if self._by_weight else self._added(block)

    def invert(self, block: Block) -> DampedInverse:
        if not self._by_weight:
            weights = self._diagonal_weights(block, 1.0)
            return super().invert(block) if weights is None else DiagonalInverse(block, weights, self)
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

    def invert_multiple(self, block: Block, factor: Tensor | float) -> DampedInverse:
        """Return the inverse of ``c F + γ I``, as ``invert(block.scaled(c))``; of a diagonal block without a copy of it.

        Args:
            block: Block ``F``.
            factor: ``c``.

        Raises:
            TypeError, ValueError: As `invert`.
        """
        weights = None if self._by_weight else self._diagonal_weights(block, factor)
        return self.invert(block.scaled(factor)) if weights is None else DiagonalInverse(block, weights, self)

    @torch.no_grad()
    def _diagonal_weights(self, block: Block, factor: Tensor | float) -> Tensor | None:
        """Return the diagonal of the inverse of a multiple of a diagonal block, if it is regular and carries no gradient."""
        with_gradient = any(isinstance(number, Tensor) and number.requires_grad for number in (self.damping, factor))
        if not isinstance(block, DiagonalBlock) or block.values.requires_grad or self.is_zero or with_gradient:
            return None
        weights = torch.empty(block.shape, dtype=block.dtype, device=block.device)
        done = 0
        for rows in block.parts():
            weights[done : done + len(rows)] = (rows * factor + self.damping).reciprocal()
            done += len(rows)
        least, largest = torch.aminmax(weights)
        return weights if bool((least > 0) & torch.isfinite(largest)) else None

    def with_added(self, amount: float | Tensor) -> Tikhonov:
        return Tikhonov(self.damping + amount)

    @property
    def _by_weight(self) -> bool:
        return isinstance(self.damping, Tensor) and self.damping.ndim == 2

    def _added(self, block: Block) -> Tensor:
        return block.eigenvalues() + torch.as_tensor(self.damping, dtype=torch.float64, device=block.device)


def checked_number(damping: float | Tensor, name: str) -> None:
    """Check that ``γ`` is a single finite number that is not negative.

    The value of a tensor on an accelerator is not read, which would wait for it: if it is not allowed, the damped block
    cannot be inverted.

    Raises:
        ValueError: If it is not such a number.
    """
    is_tensor = isinstance(damping, Tensor) and damping.ndim == 0
    if is_tensor and isinstance(damping, Tensor) and damping.device.type != "cpu":
        return
    is_number = is_tensor or isinstance(damping, (int, float, np.integer, np.floating))
    value = float(damping.detach() if isinstance(damping, Tensor) else damping) if is_number else float("nan")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a single finite number that is not negative, got {damping!r}.")


def _check_mapping(blocks: object, method: str) -> None:
    """Check that something is a mapping.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(blocks, Mapping):
        raise TypeError(f"{method} takes a Fisher or a dict of blocks; got {type(blocks).__name__}. Use invert(block).")


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


def shown_number(damping: float | Tensor) -> str:
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
