"""K-FOC by power iteration over the whole data set: each pass multiplies by all examples once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.estimators.base import Estimator, State, kind_of
from kronlaplace.estimators.kfoc.krylov import best_of_krylov
from kronlaplace.estimators.kfoc.power_iteration import made_psd
from kronlaplace.estimators.kfoc.truncation import factors_of
from kronlaplace.estimators.second_moments import add_pair_sums, add_row_sums, frobenius, partial_traces, squeezed
from kronlaplace.estimators.tkfac import trace_preserving_block
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["Sweeps"]

_KEYS = ("activation", "gradient")


@dataclass(frozen=True)
class Sweeps(Estimator):
    """K-FOC by accumulating both sums with the factors of the previous pass and combining the last iterates at the end.

    Args:
        sweeps: Number of passes over the data.
    """

    name: ClassVar[str] = "kfoc"
    constants: ClassVar[frozenset[str]] = frozenset(
        f"{which} {key}" for which in ("older", "previous", "length") for key in _KEYS
    )
    sweeps: int

    @property
    def passes(self) -> int:
        return self.sweeps

    def start(self, layer: Layer) -> State:
        return {}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        if self.passes > 1:
            return super().state_from(block, layer, weight)
        return dict(partial_traces(kind_of(block, KroneckerBlock, layer), layer, weight))

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        add_pair_sums(state, gradients, state.get("previous activation"), state.get("previous gradient"))

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        add_row_sums(state, batch)

    def next_pass(self, state: State, layer: Layer, weight: float) -> State:
        result: State = {}
        for key in _KEYS:
            total = state.pop(key)
            # The first pass used the identity itself on the other side, not scaled to unit norm.
            norm = 1.0 if f"previous {key}" in state else _other_size(layer, key) ** 0.5
            result[f"older {key}"] = state.pop(f"previous {key}", None)  # None: the identity
            length = frobenius(total, torch.float64)
            result[f"length {key}"] = length / (weight * norm)
            result[f"previous {key}"] = total.div_(length.clamp_min(torch.finfo(total.dtype).tiny))
        return result

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        if "previous activation" not in state:
            return trace_preserving_block(state["gradient"], state["activation"], weight, layer.name)
        new_lengths = [frobenius(state[key], torch.float64) for key in _KEYS]
        lengths = [state[f"length {key}"] for key in _KEYS] + [length / weight for length in new_lengths]
        iterates = {}
        for key, length in zip(_KEYS, new_lengths, strict=True):
            older, new = state.pop(f"older {key}"), state.pop(key)
            new /= length.clamp_min(torch.finfo(new.dtype).tiny)
            if older is None:
                size = new.shape[-1]
                older = torch.eye(size, dtype=new.dtype, device=new.device).expand_as(new) / size**0.5
            iterates[key] = [older, state.pop(f"previous {key}"), new]
        name = factors_of(layer.name)
        gradient, activation = best_of_krylov(iterates["gradient"], iterates["activation"], name, *lengths)
        iterates.clear()
        gradient, activation = made_psd(gradient, name), made_psd(activation, name)
        return KroneckerBlock(squeezed(gradient), squeezed(activation), name=layer.name)


def _other_size(layer: Layer, key: str) -> int:
    """Return the size of the factor other than ``key``."""
    q, p = layer.shape
    return q // layer.groups if key == "activation" else p
