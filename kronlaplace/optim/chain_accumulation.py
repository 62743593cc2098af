"""Accumulation of the moments between adjacent layers of a chain, which the block-tridiagonal inverse needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronlaplace.blocks import Block
from kronlaplace.estimators import KFAC, Estimator
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["ChainAccumulation", "CrossMoments"]


class CrossMoments(NamedTuple):
    """Moments between a layer ``i`` and the layer ``i + 1`` that follows it in a chain (K-FAC section 3.3).

    Attributes:
        activation: ``E[a_i a_{i+1}ᵀ]``, shape ``(p_i, p_{i+1})``, where ``a_i`` is the input of layer ``i`` with the
            homogeneous 1 (the paper's ``ā_{i−1}``).
        gradient: ``E[Σ_v g_i g_{i+1}ᵀ]``, shape ``(q_i, q_{i+1})``.
    """

    activation: Tensor
    gradient: Tensor


class ChainAccumulation(Accumulation):
    """Accumulation of K-FAC's factors and, from the same draws, of the `CrossMoments` of a chain of linear layers.

    All moments have the same weights, so that those of any two adjacent layers together are positive semidefinite.

    Args:
        estimator: K-FAC; the factors of other estimators are not moments of ``a`` and ``g``.
        layers: The layers from the first to the last, as from `kronlaplace.optim.chain.find_chain`.
        ema_decay: Decay of the moving average, as in `Accumulation`.

    Raises:
        ValueError: For any other estimator.
    """

    def __init__(self, estimator: Estimator, layers: Sequence[Layer], ema_decay: float | None = None) -> None:
        if not isinstance(estimator, KFAC):
            raise ValueError(
                f"the block-tridiagonal inverse needs the moments of inputs and gradients as K-FAC has them, got the "
                f'estimator {estimator!r}. Use estimator="kfac", or structure="block-diagonal" with any estimator.'
            )
        self._seen = False
        super().__init__(estimator, layers, ema_decay)

    def start(self, layers: Sequence[Layer]) -> None:
        super().start(layers)
        self._link(layers)

    def _link(self, layers: Sequence[Layer]) -> None:
        """Set the order of the layers, and the sums between adjacent ones to zero."""
        self._numbers = {layer.name: i for i, layer in enumerate(layers)}
        self._sums = [
            CrossMoments(*(torch.zeros(sizes, dtype=before.dtype, device=before.device) for sizes in shapes))
            for before, after in pairwise(layers)
            for shapes in [((before.shape[1], after.shape[1]), (before.shape[0], after.shape[0]))]
        ]
        self._held: tuple[int, Tensor] | None = None

    @property
    def chain(self) -> list[str]:
        """The names of the layers from the first to the last."""
        return list(self._numbers)

    def order(self, layers: Sequence[Layer]) -> None:
        """Set the order of the layers if it was not known, before any moments between them have been seen.

        Args:
            layers: The same layers, from the first to the last.

        Raises:
            ValueError: If moments between layers in another order have been seen.
        """
        names = [layer.name for layer in layers]
        if names == self.chain:
            return
        if self._seen:
            raise ValueError(
                f"the network calls its layers in the order {names}, but called them in the order {self.chain} before. The "
                'block-tridiagonal inverse is for chains of linear layers in a fixed order; use structure="block-diagonal".'
            )
        self._link(layers)

    def start_from(
        self, blocks: Mapping[str, Block], weight: float, cross: Sequence[CrossMoments] | None = None
    ) -> None:
        """Start from given blocks instead of zero, as `Accumulation.start_from`.

        Args:
            blocks: A block for every layer.
            weight: Number of examples that the blocks stand for; positive.
            cross: The moments between adjacent layers on the same data, from `cross_moments`. Without them, adjacent
                layers count as uncorrelated on these data.
        """
        super().start_from(blocks, weight)
        for sums, moments in zip(self._sums, cross or [], strict=cross is not None):
            self._seen = True
            for total, moment in zip(sums, moments, strict=True):
                total.copy_(moment).mul_(weight)

    def begin_batch(self, batches: Mapping[str, LayerBatch]) -> None:
        super().begin_batch(batches)
        self._seen, self._held = True, None
        names = list(self._numbers)
        before = batches[names[0]].activations()[0, :, 0]
        for sums, name in zip(self._sums, names[1:], strict=True):
            after = batches[name].activations()[0, :, 0]
            sums.activation.addmm_(before.T, after)
            before = after

    def decay(self, factor: float) -> None:
        super().decay(factor)
        for moments in self._sums:
            for total in moments:
                total.mul_(factor)

    def add_gradients(self, gradients: LayerGradients) -> None:
        """Add the gradients of one layer along one direction; those of the layer after it must have come before."""
        super().add_gradients(gradients)
        number = self._numbers[gradients.layer.name]
        g = gradients.gradients()[0, :, 0]
        if number + 1 < len(self._numbers):
            assert self._held is not None and self._held[0] == number + 1, (
                "gradients come from the last layer to the first"
            )
            self._sums[number].gradient.addmm_(g.T, self._held[1])
        self._held = (number, g)

    def end_batch(self, batches: Mapping[str, LayerBatch], n_examples: int) -> None:
        super().end_batch(batches, n_examples)
        self._held = None

    def merge(self, other: Accumulation) -> None:
        super().merge(other)
        assert isinstance(other, ChainAccumulation)
        for sums, others in zip(self._sums, other._sums, strict=True):
            for total, more in zip(sums, others, strict=True):
                total += more

    def leave_out(self, names: Collection[str]) -> None:
        """Refuse to remove layers: a chain without one of its layers is not a chain.

        Raises:
            ValueError: If there are any names.
        """
        if names:
            raise ValueError(
                f"the layers {list(names)} cannot have a block, so that the layers are no chain. Use "
                'structure="block-diagonal".'
            )

    def state_dict(self) -> dict[str, Any]:
        cross = [{key: total.clone() for key, total in sums._asdict().items()} for sums in self._sums]
        return {**super().state_dict(), "chain": self.chain, "cross": cross, "seen": self._seen}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if "cross" not in saved:
            raise ValueError(
                "the checkpoint has no moments between adjacent layers: it comes from an optimizer with another structure. "
                'Load it with structure="block-diagonal".'
            )
        super().load_state_dict(saved)
        self._link([self._layers[name] for name in saved["chain"]])
        for sums, others in zip(self._sums, saved["cross"], strict=True):
            for key, total in sums._asdict().items():
                total.copy_(others[key])
        self._seen = saved["seen"]

    def cross_moments(self) -> list[CrossMoments]:
        """Return the means over examples seen so far, for every layer but the last; the accumulation can continue."""
        return [CrossMoments(*(total / self.weight for total in moments)) for moments in self._sums]
