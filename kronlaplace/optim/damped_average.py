"""Moving averages of damped factors, as TKFAC has them, instead of factors that are damped when they are inverted.

Each step's factors are damped by themselves, and the averages are those of the results (TKFAC Eq. 5.18 and 5.19):

    Φ̂ ← ε Φ̂ + (1 − ε) (√δ Φ + √λ I)        Ψ̂ ← ε Ψ̂ + (1 − ε) (√δ Ψ + √λ I)

The inverse is that of ``Ψ̂ ⊗ Φ̂``, which is damped already. Its trace is not the average of the traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.blocks.least_trace import with_least_trace
from kronlaplace.damping import Damping, LevenbergMarquardt
from kronlaplace.damping.factor_rules import DampedFactors, grouped_factors
from kronlaplace.estimators import KFAC, SUA, TKFAC, Estimator, State
from kronlaplace.estimators.base import kind_of
from kronlaplace.estimators.second_moments import squeezed
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.layers import Layer, LayerBatch, LayerGradients
from kronlaplace.optim.preconditioner import Amount, InverseInProgress
from kronlaplace.optim.structure import BlockDiagonal, Structure

__all__ = ["DampedAverage", "DampedBlockDiagonal"]

Decays = Callable[[], Mapping[str, float]]
"""Function that returns the weight decay of every layer."""


class DampedAverage(Accumulation):
    """Moving averages of one estimator's factors, damped step by step.

    Layers without Kronecker factors have the usual diagonal block, not damped. All passes since the last `end_step` count
    as one batch.

    Args:
        estimator: Estimator of the factors, one of `KFAC`, `TKFAC`, and `SUA`.
        layers: The layers.
        damping: The damping of the factors.
        decays: Function that returns the weight decay of every layer, which is added to the damping.
    """

    def __init__(self, estimator: Estimator, layers: Sequence[Layer], damping: Damping, decays: Decays) -> None:
        self._of_step: Accumulation | None = None
        super().__init__(_DampedSums(estimator), layers)
        self._each = estimator
        self._damping = damping
        self._decays = decays

    def start_from(self, blocks: Mapping[str, Block], weight: float) -> None:
        """Start from the given blocks, damped, as `Accumulation.start_from`; the blocks are not damped before."""
        factored = {
            layer.name: kind_of(blocks[layer.name], KroneckerBlock, layer)
            for layer in self._factored()
            if layer.name in blocks
        }
        super().start_from({**blocks, **self._damped(factored)}, weight)

    def begin_batch(self, batches: Mapping[str, LayerBatch]) -> None:
        super().begin_batch(batches)
        if self._of_step is None:
            self._of_step = Accumulation(self._each, self._factored())
        self._of_step.begin_batch(batches)

    def add_gradients(self, gradients: LayerGradients) -> None:
        super().add_gradients(gradients)
        assert self._of_step is not None
        if gradients.layer.has_kronecker_factors:
            self._of_step.add_gradients(gradients)

    def end_batch(self, batches: Mapping[str, LayerBatch], n_examples: int) -> None:
        super().end_batch(batches, n_examples)
        assert self._of_step is not None
        self._of_step.end_batch(batches, n_examples)

    def end_step(self) -> None:
        self._states = self._with_step()
        self._of_step = None

    def so_far(self) -> dict[str, Block]:
        with self._including_step():
            return super().so_far()

    def state_dict(self) -> dict[str, Any]:
        with self._including_step():
            return super().state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self._of_step = None

    @contextmanager
    def _including_step(self) -> Iterator[None]:
        """Count the passes since the last `end_step`, too, in this context."""
        kept = self._states
        self._states = self._with_step()
        try:
            yield
        finally:
            self._states = kept

    def _with_step(self) -> dict[str, State]:
        """Return the states with the damped factors of the passes since the last `end_step`."""
        if self._of_step is None or not self._factored():
            return self._states
        added = {
            name: self.estimators[name].state_from(block, self._layers[name], self._of_step.weight)
            for name, block in self._damped(self._of_step.so_far()).items()
        }
        return {
            name: self.estimators[name].merge(state, added[name]) if name in added else state
            for name, state in self._states.items()
        }

    def _damped(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Return blocks of the damped factors."""
        decays = self._decays()
        result: dict[str, Block] = {}
        for name, block in with_least_trace(blocks).items():
            assert isinstance(block, KroneckerBlock)
            numbers = self._damping.with_added(decays[name]).damped_factors(block)
            assert numbers is not None
            c_G, s_G, c_A, s_A = (number.to(block.dtype).view(-1, 1, 1) for number in numbers)
            gradient, activation = (
                _plus_identity(c * factor, s)
                for c, s, factor in zip((c_G, c_A), (s_G, s_A), grouped_factors(block), strict=True)
            )
            result[name] = KroneckerBlock(squeezed(gradient), squeezed(activation), name=name)
        return result

    def _factored(self) -> list[Layer]:
        return [layer for layer in self._layers.values() if layer.has_kronecker_factors]


class DampedBlockDiagonal(BlockDiagonal):
    """Block-diagonal inverse of averages of damped factors.

    Args:
        structure: The structure that was asked for.
        estimator: The estimator.
        damping: The damping, or the rule that adapts it.
        decays: Function that returns the weight decay of every layer.

    Raises:
        ValueError: If factors cannot be damped step by step with these settings.
    """

    def __init__(
        self, structure: Structure, estimator: Estimator, damping: Damping | LevenbergMarquardt, decays: Decays
    ) -> None:
        if isinstance(damping, LevenbergMarquardt) or type(damping).damped_factors is Damping.damped_factors:
            raise ValueError(
                f'averaging="damped" needs a fixed damping of factors, such as kl.damping.TraceRestricted(1e-3); got '
                f'{damping!r}. Give one as damping=, or use averaging="undamped".'
            )
        if not isinstance(estimator, (KFAC, TKFAC, SUA)):
            raise ValueError(
                'averaging="damped" needs an estimator whose factors come from each batch by itself: "kfac", "tkfac" or '
                f'"sua"; got {estimator!r}. Use one of these, or averaging="undamped".'
            )
        if not isinstance(structure, BlockDiagonal):
            raise ValueError(
                f'averaging="damped" is for structure="block-diagonal", got {structure!r}: the moments between layers are '
                'not damped. Use that structure, or averaging="undamped".'
            )
        self._damping, self._decays = damping, decays

    takes_no_prior = (
        'the curvature of a prior is added before the factors are damped, and averaging="damped" damps them in each step. '
        'Use averaging="undamped", or leave out prior=.'
    )

    def accumulation(self, estimator: Estimator, layers: Sequence[Layer]) -> Accumulation:
        return DampedAverage(estimator, layers, self._damping, self._decays)

    def inversion(
        self, accumulation: Accumulation, blocks: Mapping[str, Block], damping: Damping, added: Mapping[str, Amount]
    ) -> Callable[[], InverseInProgress]:
        return super().inversion(accumulation, blocks, _AlreadyInFactors(damping), added)


@dataclass(frozen=True)
class _AlreadyInFactors(Damping):
    """Damping that Kronecker blocks already contain, and that all others get."""

    damping: Damping

    def __repr__(self) -> str:
        return repr(self.damping)

    @property
    def is_zero(self) -> bool:
        return self.damping.is_zero

    def with_added(self, amount: float | Tensor) -> Damping:
        return _AlreadyInFactors(self.damping.with_added(amount))

    def eigenvalues(self, block: Block) -> Tensor:
        return block.eigenvalues() if isinstance(block, KroneckerBlock) else self.damping.eigenvalues(block)

    def damped_factors(self, block: Block) -> DampedFactors | None:
        if not isinstance(block, KroneckerBlock):
            return None
        ones = torch.ones(len(grouped_factors(block)[0]), dtype=torch.float64, device=block.device)
        return DampedFactors(ones, torch.zeros_like(ones), ones, torch.zeros_like(ones))


class _DampedSums(Estimator):
    """Sums over examples of damped factors, which are added as finished blocks.

    Args:
        each: The estimator of the factors of each step.
    """

    name: ClassVar[str] = "damped average"

    def __init__(self, each: Estimator) -> None:
        self.name = f"{type(self).name} of {each!r}"  # type: ignore[misc]  # a class variable elsewhere
        self._each = each

    def __repr__(self) -> str:
        return self.name

    def start(self, layer: Layer) -> State:
        return {}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        block = kind_of(block, KroneckerBlock, layer)
        gradient, activation = grouped_factors(block)
        return {"gradient": gradient.to(layer.device) * weight, "activation": activation.to(layer.device) * weight}

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        return  # they are in the state of the step

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        gradient, activation = (squeezed(state[key] / weight) for key in ("gradient", "activation"))
        return KroneckerBlock(gradient, activation, name=layer.name)

    def peek(self, state: State, layer: Layer, weight: float) -> Block:
        return self.finish(state, layer, weight)


def _plus_identity(matrices: Tensor, shift: Tensor) -> Tensor:
    """Add a multiple of the identity to each matrix, in place, and return them."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(shift.flatten(1))
    return matrices
