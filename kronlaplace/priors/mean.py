"""The mean of a prior, as each layer's matrix; and values by parameter name, as matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kronlaplace.data.deferred_checks import all_finite
from kronlaplace.layers import Layer

__all__ = ["PriorMean", "by_layer", "from_parameters", "joined", "mean_by_layer", "shown"]

PriorMean: TypeAlias = float | Tensor | Mapping[str, Tensor]


def mean_by_layer(value: PriorMean, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return the prior mean as ``{layer: (q, p)}``, in each layer's dtype, at least float32.

    Args:
        value: One number for all weights; one per weight, as the row-major flattened matrices of all blocks joined, shape
            ``(P,)``; ``{layer name: (q, p)}``; or ``{parameter name: tensor of its shape}``, such as a state dict, of which
            only the parameters with a posterior are looked at. (The two biases of recurrent layers act through their sum,
            whose mean is the sum.)
        layers: The layers.

    Raises:
        TypeError: If it is none of these.
        ValueError: For missing parameters, other shapes, or values that are not finite.
    """
    shapes = [layer.shape for layer in layers]
    if isinstance(value, Mapping):
        means = [_from_mapping(value, layer) for layer in layers]
    elif isinstance(value, Tensor) and value.ndim == 1:
        count = sum(map(math.prod, shapes))
        if len(value) != count:
            raise ValueError(f"prior_mean must be one number or {count} (one per weight), got {len(value)}.")
        means = by_layer(value.detach(), shapes)
    elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        if not math.isfinite(value):
            raise ValueError("prior_mean has NaN or infinite values.")
        return {  # one number each, not as many as there are weights
            layer.name: torch.full((), float(value), dtype=layer.dtype, device=layer.device).expand(shape)
            for layer, shape in zip(layers, shapes, strict=True)
        }
    else:
        raise TypeError(
            "prior_mean must be a number, a flat tensor with one per weight, or a dict of tensors by parameter name; got "
            f"{shown(value)}."
        )
    if not all(all_finite(mean) for mean in means):
        raise ValueError("prior_mean has NaN or infinite values.")
    return {layer.name: mean.detach().to(layer.device, layer.dtype) for mean, layer in zip(means, layers, strict=True)}


def _from_mapping(value: Mapping[str, Tensor], layer: Layer) -> Tensor:
    if is_matrix_of(layer, value):
        return value[layer.name]
    (mean,) = from_parameters(value, [layer], "prior_mean")
    for name in layer.merged_parameters:  # acts only through its sum with the block's last column (recurrent biases)
        if name in value:
            last = (mean[:, -1] + value[name].to(mean)).unsqueeze(1)
            mean = torch.cat([mean[:, :-1], last], dim=1)
    return mean


def is_matrix_of(layer: Layer, value: Mapping[str, Tensor]) -> bool:
    """Tell whether a mapping holds the layer's matrix under the layer's own name, which no parameter can have."""
    return isinstance(value.get(layer.name), Tensor) and value[layer.name].shape == layer.shape


def from_parameters(values: Mapping[str, Tensor], layers: Sequence[Layer], what: str) -> list[Tensor]:
    """Assemble each layer's matrix ``(q, p)`` from values by parameter name.

    Args:
        values: ``{parameter name: tensor of its shape}``; or each layer's matrix under the layer's name.
        layers: The layers.
        what: What errors call the values.

    Raises:
        ValueError: For missing parameters and other shapes.
    """
    matrices = []
    for layer in layers:
        if is_matrix_of(layer, values):
            matrices.append(values[layer.name].to(layer.device))
            continue
        for name, parameter in layer.parameters.items():
            if name not in values:
                raise ValueError(f"{what} has no entry for the parameter {name!r}; there are {list(values)}.")
            if not isinstance(values[name], Tensor) or values[name].shape != parameter.shape:
                got = tuple(values[name].shape) if isinstance(values[name], Tensor) else type(values[name]).__name__
                raise ValueError(f"{what} of {name!r} must be a tensor of shape {tuple(parameter.shape)}, got {got}.")
        matrices.append(layer.assemble({name: values[name].to(layer.device) for name in layer.parameters}))
    return matrices


def by_layer(vector: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cut a joined vector ``(P,)`` into the layers' matrices ``(q, p)``."""
    parts = vector.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def joined(matrices: Sequence[Tensor]) -> Tensor:
    """Join the layers' matrices into one vector ``(P,)``."""
    return torch.cat([matrix.flatten() for matrix in matrices])


def shown(value: object) -> str:
    """Describe a value that was given, for error messages."""
    return f"{type(value).__name__} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
