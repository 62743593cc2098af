"""The penalty of a network's weights for what a memory keeps, and its second derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kronlaplace.continual.options import PenaltyMode
from kronlaplace.continual.quadratic_form import quadratic_form
from kronlaplace.continual.state import LayerMemory, MemoryState
from kronlaplace.layers import Layer
from kronlaplace.priors.penalty import LayerPrecision, layer_precision
from kronlaplace.priors.prior import Prior

__all__ = ["SeenNetwork"]


@dataclass(frozen=True, eq=False)
class SeenNetwork:
    """The network as a memory has last seen it.

    Attributes:
        state: What was kept then.
        parameters: What tells whether the network is still the same.
        layers: Its layers that are trainable.
        prior: The prior over these.
        memories: What is kept of those that a task has used.
    """

    state: MemoryState
    parameters: object
    layers: list[Layer]
    prior: Prior
    memories: Mapping[str, LayerMemory]

    def penalty(self, mode: PenaltyMode, strength: float) -> Tensor:
        """Return the penalty of the weights now, 0-dim, differentiable."""
        parts = []
        for layer in self.layers:
            weights = layer.matrix(detach=False).to(layer.dtype)
            memory = self.memories.get(layer.name)
            if memory is None or mode is PenaltyMode.PER_TASK:
                deviation = weights - self.prior.means[layer.name]
                parts.append(self.prior.quadratic_form(layer.name, deviation).to(layer.dtype))
            if memory is None:
                continue
            if mode is PenaltyMode.LATEST:
                deviation = weights - memory.center
                of_prior = self.prior.quadratic_form(layer.name, deviation).to(layer.dtype)
                of_tasks = quadratic_form([term.block for term in memory.terms], deviation)
                parts.append(strength * (of_prior + of_tasks))
                continue
            for term in memory.terms:
                assert term.center is not None
                parts.append(strength * quadratic_form([term.block], weights - term.center))
        return 0.5 * torch.stack(parts).sum()

    def precision(self, mode: PenaltyMode, strength: float) -> dict[str, LayerPrecision]:
        """Return the second derivatives of `penalty` by layer."""
        result = {}
        for layer in self.layers:
            of_prior = layer_precision(self.prior, layer.name)
            memory = self.memories.get(layer.name)
            if memory is None:
                result[layer.name] = of_prior
                continue
            of_tasks = LayerPrecision(tuple(term.block for term in memory.terms), torch.zeros_like(of_prior.identity))
            if mode is PenaltyMode.LATEST:
                result[layer.name] = (of_prior + of_tasks).scaled(strength)
            else:
                result[layer.name] = of_prior + of_tasks.scaled(strength)
        return result
