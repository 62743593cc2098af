"""The Gaussian prior over the weights: its precisions and its mean, checked once and cut up by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TypeAlias

import torch
from torch import Tensor

from kronlaplace.layers import Layer

__all__ = [
    "Precision",
    "PriorMean",
    "PriorStructure",
    "is_number",
    "mean_by_layer",
    "precision_by_layer",
    "precision_tensor",
]

Precision: TypeAlias = float | Sequence[float] | Tensor | Mapping[str, Tensor]
PriorMean: TypeAlias = float | Tensor | Mapping[str, Tensor]


class PriorStructure(str, Enum):
    """What has a prior precision of its own: ``SCALAR`` one for all weights, ``LAYERWISE`` one for each block,
    ``DIAGONAL`` one for each weight.
    """

    SCALAR = "scalar"
    LAYERWISE = "layerwise"
    DIAGONAL = "diagonal"


def precision_tensor(value: Precision, layers: Sequence[Layer]) -> Tensor:
    """A prior precision as float64 on the layers' device: 0-dim, ``(L,)`` or ``(P,)``.

    Args:
        value: One number; one per block; one per weight, as the row-major flattened matrices of all blocks joined, shape
            ``(P,)``, or by parameter name, ``{name: tensor of the parameter's shape}``. Tensors may carry a gradient.
        layers: The ``L`` layers, with ``P`` weights in all.

    Raises:
        TypeError: If it is nothing of the kind.
        ValueError: For another number of them, or values that are not positive and finite.
    """
    device = layers[0].device if layers else None
    try:
        if isinstance(value, Mapping):
            value = _joined(_from_parameters(value, layers, "prior_precision"))
        precision = torch.as_tensor(value, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ValueError) and "prior_precision" in str(error):
            raise
        raise TypeError(
            "prior_precision must be a number, one number per block, or one per weight (a flat tensor, or a dict of "
            f"tensors by parameter name); got {_shown(value)}."
        ) from None
    count = sum(math.prod(layer.shape) for layer in layers)
    if precision.shape not in ((), (len(layers),), (count,)):
        raise ValueError(
            f"prior_precision must be one number, {len(layers)} (one per block) or {count} (one per weight), got shape "
            f"{tuple(precision.shape)}."
        )
    good = (precision > 0) & torch.isfinite(precision)
    if not good.all():
        bad = float(precision.detach()[~good].flatten()[0])
        raise ValueError(f"prior_precision must be positive and finite, got {bad}.")
    return precision


def is_number(value: object) -> bool:
    """Whether a prior is one number for all weights."""
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)


def structure_of(precision: Tensor, n_layers: int) -> PriorStructure:
    """The structure of what `precision_tensor` returned."""
    if precision.ndim == 0:
        return PriorStructure.SCALAR
    return PriorStructure.LAYERWISE if len(precision) == n_layers else PriorStructure.DIAGONAL


def precision_by_layer(precision: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Each layer's precision: a 0-dim tensor, or one for every weight, ``(q, p)``."""
    structure = structure_of(precision, len(shapes))
    if structure is PriorStructure.SCALAR:
        return [precision] * len(shapes)
    if structure is PriorStructure.LAYERWISE:
        return list(precision)
    return by_layer(precision, shapes)


def by_layer(joined: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cut a joined vector ``(P,)`` into the layers' matrices ``(q, p)``."""
    parts = joined.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def mean_by_layer(value: PriorMean, layers: Sequence[Layer]) -> list[Tensor]:
    """The prior mean as each layer's matrix, ``(q, p)``, in the layer's dtype, at least float32.

    Args:
        value: One number for all weights; one per weight, as the row-major flattened matrices of all blocks joined, shape
            ``(P,)``; or ``{parameter name: tensor of its shape}``, such as a state dict, of which only the parameters with a
            posterior are looked at. (The two biases of recurrent layers act through their sum, whose mean is the sum.)
        layers: The layers.

    Raises:
        TypeError: If it is nothing of the kind.
        ValueError: For missing parameters, other shapes, or values that are not finite.
    """
    shapes = [layer.shape for layer in layers]
    if isinstance(value, Mapping):
        means = _from_parameters(value, layers, "prior_mean")
        means = [_with_redundant(mean, layer, value) for mean, layer in zip(means, layers, strict=True)]
    elif isinstance(value, Tensor) and value.ndim == 1:
        count = sum(map(math.prod, shapes))
        if len(value) != count:
            raise ValueError(f"prior_mean must be one number or {count} (one per weight), got {len(value)}.")
        means = by_layer(value.detach(), shapes)
    elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        means = [torch.full(shape, float(value), dtype=torch.float64) for shape in shapes]
    else:
        raise TypeError(
            "prior_mean must be a number, a flat tensor with one per weight, or a dict of tensors by parameter name; got "
            f"{_shown(value)}."
        )
    if not all(torch.isfinite(mean).all() for mean in means):
        raise ValueError("prior_mean has NaN or infinite values.")
    return [mean.detach().to(layer.device, layer.dtype) for mean, layer in zip(means, layers, strict=True)]


def _from_parameters(values: Mapping[str, Tensor], layers: Sequence[Layer], what: str) -> list[Tensor]:
    matrices = []
    for layer in layers:
        for name, parameter in layer.parameters.items():
            if name not in values:
                raise ValueError(f"{what} has no entry for the parameter {name!r}; there are {list(values)}.")
            if not isinstance(values[name], Tensor) or values[name].shape != parameter.shape:
                got = tuple(values[name].shape) if isinstance(values[name], Tensor) else type(values[name]).__name__
                raise ValueError(f"{what} of {name!r} must be a tensor of shape {tuple(parameter.shape)}, got {got}.")
        matrices.append(layer.assemble({name: values[name].to(layer.device) for name in layer.parameters}))
    return matrices


def _with_redundant(mean: Tensor, layer: Layer, values: Mapping[str, Tensor]) -> Tensor:
    """Add the mean of a parameter that acts only through its sum with the block's last column (recurrent biases)."""
    for name in layer.redundant:
        if name in values:
            last = (mean[:, -1] + values[name].to(mean)).unsqueeze(1)
            mean = torch.cat([mean[:, :-1], last], dim=1)
    return mean


def _joined(matrices: Sequence[Tensor]) -> Tensor:
    return torch.cat([matrix.flatten() for matrix in matrices])


def _shown(value: object) -> str:
    return f"{type(value).__name__} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
