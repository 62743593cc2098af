"""The precision of a prior as users give it, as one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kronlaplace.layers import Layer
from kronlaplace.priors.mean import by_layer, from_parameters, joined, shown

__all__ = ["Precision", "multiples_by_layer", "precision_tensor"]

Precision: TypeAlias = float | Sequence[float] | Tensor | Mapping[str, Tensor]


def multiples_by_layer(multiples: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return each layer's multiples: a 0-dim tensor, or one for every weight, ``(q, p)``."""
    if multiples.ndim == 0:
        return [multiples] * len(shapes)
    return list(multiples) if len(multiples) == len(shapes) else by_layer(multiples, shapes)


def precision_tensor(value: Precision, layers: Sequence[Layer]) -> Tensor:
    """Return a prior precision as float64 on the layers' device: 0-dim, ``(L,)`` or ``(P,)``.

    Args:
        value: One number; one per block; one per weight, as the row-major flattened matrices of all blocks joined, shape
            ``(P,)``, or by parameter name, ``{name: tensor of the parameter's shape}``. Tensors may carry a gradient.
        layers: The ``L`` layers, with ``P`` weights in all.

    Raises:
        TypeError: If it is none of these.
        ValueError: For another number of them, or values that are not positive and finite.
    """
    device = layers[0].device if layers else None
    given = joined(from_parameters(value, layers, "prior_precision")) if isinstance(value, Mapping) else value
    try:
        precision = torch.as_tensor(given, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            "prior_precision must be a number, one number per block, or one per weight (a flat tensor, or a dict of "
            f"tensors by parameter name); got {shown(value)}."
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
