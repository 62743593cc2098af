"""Vectors in the space of the parameters that follow the natural gradient, such as gradients and steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kronlaplace.layers import Layer
from kronlaplace.optim.preconditioner import Inverse

__all__ = ["Vector", "assembled", "combine", "dot", "objective_gradient", "solved"]

Vector = dict[nn.Parameter, Tensor]
"""A vector by parameter, each part with the parameter's shape."""


def objective_gradient(layers: Iterable[Layer], weight_decays: Mapping[str, float]) -> Vector:
    """Return the gradient of the objective, with weight decay, for all layers that have one.

    Args:
        layers: The layers, with gradients at their parameters.
        weight_decays: The factor ``η`` of ``½‖θ‖²`` in the objective, by layer name.
    """
    gradient: Vector = {}
    for layer in layers:
        own, decay = list(layer.parameters.values()), weight_decays[layer.name]
        if all(p.grad is None for p in own):
            continue
        for p in own:
            g = torch.zeros_like(p) if p.grad is None else p.grad
            gradient[p] = g.add(p, alpha=decay) if decay else g
    return gradient


def solved(inverse: Inverse, layers: Iterable[Layer], gradient: Vector) -> Vector:
    """Return the natural gradient ``F̂⁻¹ ∇h`` in the dtype of each parameter.

    Args:
        inverse: The inverse of the damped Fisher.
        layers: The layers, of which those without a gradient are passed over.
        gradient: The gradient, for all parameters of a layer or for none.
    """
    present = [layer for layer in layers if next(iter(layer.parameters.values())) in gradient]
    directions = inverse.solve({layer.name: assembled(layer, gradient) for layer in present})
    result: Vector = {}
    for layer in present:
        for name, part in layer.split_directions(directions[layer.name]).items():
            p = layer.parameters[name]
            result[p] = part.to(p.dtype)
    return result


def dot(u: Vector, v: Vector) -> Tensor:
    """Return the inner product over the parameters of the second vector, 0-dim, float64."""
    return torch.stack([_inner(u[p], w) for p, w in v.items()]).sum()


def combine(step: Vector, last: Vector, coefficients: Tensor) -> None:
    """Turn the direction ``Δ`` into the step ``αΔ + μδ₀``, in place.

    Args:
        step: The direction.
        last: The last step ``δ₀``, of some of the parameters or none.
        coefficients: ``(α, μ)``, or ``α`` alone if there is no last step, shape ``(k,)``.
    """
    for v in step.values():
        v.mul_(coefficients[0])
    for p, v in last.items():
        step[p].add_(coefficients[1] * v)


def assembled(layer: Layer, values: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """Return values of a layer's parameters, such as their gradients, as one matrix ``(q, p)`` in the layer's dtype."""
    return layer.assemble({name: values[p] for name, p in layer.parameters.items()}).to(layer.dtype)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return an inner product, 0-dim, float64; rows are summed without a copy of the products in float64."""
    products = a * b
    rows = products.flatten(1) if products.ndim > 1 else products
    return rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32)).sum(dtype=torch.float64)
