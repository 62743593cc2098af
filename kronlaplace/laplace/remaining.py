"""What remains of a posterior where a fit finds layers that cannot have a block: its layers, its prior, its Fisher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronlaplace.kronecker import KroneckerFisher
from kronlaplace.laplace.prior import (
    Precision,
    PriorMean,
    PriorStructure,
    by_layer,
    is_number,
    mean_by_layer,
    precision_tensor,
    structure_of,
)
from kronlaplace.layers import NOT_WANTED, Layer, Unsupported

__all__ = ["PriorOfLast", "Remaining", "last_layer_of", "usable"]


@dataclass(frozen=True)
class Remaining:
    """The layers of a posterior, and the prior over them.

    Attributes:
        layers: The layers.
        precision: The prior's precision, as in `KronLaplace.prior_precision`.
        mean: The prior's mean, each layer's matrix ``(q, p)``.
    """

    layers: Sequence[Layer]
    precision: Tensor
    mean: Mapping[str, Tensor]

    def only(self, names: Sequence[str]) -> Remaining:
        """The same without the layers that are not among ``names``.

        Raises:
            ValueError: If none is left.
        """
        kept = [layer for layer in self.layers if layer.name in names]
        if not kept:
            raise ValueError(
                f"none of the posterior's layers {[layer.name for layer in self.layers]} is left: what this fit could use "
                f"are {list(names)}. Layers that an earlier fit has left out stay left out; make a new KronLaplace."
            )
        if len(kept) == len(self.layers):
            return self
        return Remaining(kept, self._precision_of(kept), {layer.name: self.mean[layer.name] for layer in kept})

    def _precision_of(self, kept: Sequence[Layer]) -> Tensor:
        structure = structure_of(self.precision, len(self.layers))
        if structure is PriorStructure.SCALAR:
            return self.precision
        if structure is PriorStructure.LAYERWISE:
            parts = dict(zip([layer.name for layer in self.layers], self.precision, strict=True))
            return torch.stack([parts[layer.name] for layer in kept])
        matrices = by_layer(self.precision, [layer.shape for layer in self.layers])
        parts = dict(zip([layer.name for layer in self.layers], matrices, strict=True))
        return torch.cat([parts[layer.name].flatten() for layer in kept])


@dataclass(frozen=True)
class PriorOfLast:
    """The prior over the last layer, as it was given, while it is not known which layer that is.

    Attributes:
        precision: Its precision if it has more than one number.
        mean: Its mean.
    """

    precision: Precision | None = None
    mean: PriorMean = 0.0

    def with_precision(self, value: Precision) -> PriorOfLast:
        """The same with another precision."""
        return replace(self, precision=None if is_number(value) else value)

    def with_mean(self, value: PriorMean) -> PriorOfLast:
        """The same with another mean."""
        return replace(self, mean=value)

    def over(self, layers: list[Layer], precision: Tensor) -> Remaining:
        """The prior over this layer; ``precision`` is the one that is one number."""
        value = precision if self.precision is None else self.precision
        means = mean_by_layer(self.mean, layers)
        named = {layer.name: mean for layer, mean in zip(layers, means, strict=True)}
        return Remaining(layers, precision_tensor(value, layers).detach().clone(), named)


def last_layer_of(fisher: KroneckerFisher) -> str:
    """The last layer of the network that a Fisher is of.

    Raises:
        ValueError: If the Fisher does not know it.
    """
    name = fisher.metadata.last_layer
    if name is None:
        raise ValueError(
            "the fisher does not tell which layer's output is the network's: it is none of those with a block, or the "
            f'file is from before that was kept. Instead of layers="last" name one of {list(fisher)}.'
        )
    return name


def usable(fisher: KroneckerFisher, layers: Sequence[Layer], unsupported: Unsupported) -> list[str]:
    """The layers of a posterior that a ready-made Fisher is for, by name.

    With ``unsupported="fixed"`` some may be missing, if the Fisher's coverage says why they cannot have a block.

    Raises:
        ValueError: If there is no block for a layer.
    """
    names = [layer.name for layer in layers]
    missing = [name for name in names if name not in fisher]
    reasons = fisher.coverage().reasons()
    chosen = [name for name in missing if reasons.get(name, NOT_WANTED[0]) in NOT_WANTED]
    if chosen:
        raise ValueError(
            f"the fisher has no blocks for the layers {chosen} of the posterior, only for {list(fisher)}. Give KronLaplace "
            "the same layers=, or estimate the Fisher for all of its layers."
        )
    if missing and unsupported is Unsupported.ERROR:
        lines = "\n".join(f"  {name}: {reasons[name]}" for name in missing)
        raise ValueError(
            f"the fisher has no blocks for some of the posterior's layers:\n{lines}\nGive KronLaplace "
            f'layers={list(fisher)}, or unsupported="fixed" as in the estimate: they stay at their trained values.'
        )
    return [name for name in names if name in fisher]
