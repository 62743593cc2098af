"""Checks on the first batch, before anything is estimated: that a layer's recorded calls are its parameters' only uses.

Two directions are propagated back: a random one, and the same one with each example's part divided by its own power of two,
which is exact in floating point. The recorded calls must account for the gradient that autograd computes for the parameters.
If an example's direction is smaller by some factor, its rows of the layer's output gradients must be smaller by the same
factor; otherwise, these rows do not belong to that example alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision, wide
from kronlaplace.layers import BatchGradient, LayerGradients, PerExampleLayer, UnusableLayersError
from kronlaplace.network.forward import NetworkForward
from kronlaplace.network.observer import NetworkObserver

__all__ = ["check_layers", "check_observed"]

_ParameterGradients = Callable[[Tensor, Tensor], Iterator[tuple[str, Tensor]]]

_TOLERANCE = 1e-3
"""Relative error of gradients allowed beyond the bound for rounding; real faults are far larger."""

_SCALES = 8
"""Number of different powers of two."""


def check_layers(forward: NetworkForward, outputs: Tensor, generator: torch.Generator) -> None:
    """Check the layers of an observed pass and keep the graph; waits for the device once.

    Raises:
        UnusableLayersError: If a layer's parameters are used other than by its calls, if its rows do not each belong to one
            example, or if the outputs do not depend on it.
    """
    bypassed = forward.bypassed(outputs)
    if bypassed:
        raise UnusableLayersError(
            f"the network reaches these layers through references that a copy of it cannot follow: {bypassed}. Keep "
            "modules as attributes of modules.",
            dict.fromkeys(bypassed, "it is reached through a reference that a copy of the network cannot follow"),
        )
    _check(forward.observer, outputs, generator, forward.parameter_gradients, rows=len(outputs) > 1)


@in_full_precision
def check_observed(
    observer: NetworkObserver, outputs: Tensor, generator: torch.Generator, *, examples_independent: bool
) -> None:
    """Check the layers of a pass that somebody else ran, and keep the graph; waits for the device once.

    The gradients ``.grad`` of the parameters are not touched.

    Args:
        observer: The observer of the pass.
        outputs: Outputs of the network, with their graph; the first axis counts examples.
        generator: Source of the random direction, on the device of the outputs.
        examples_independent: Whether each example's outputs depend on that example alone. If they do not, as with batch
            norms in training mode, the rows of the gradients are not checked.

    Raises:
        RuntimeError: If no forward pass was observed.
        UnusableLayersError: As `check_layers`.
    """

    def parameter_gradients(outputs: Tensor, direction: Tensor) -> Iterator[tuple[str, Tensor]]:
        parameters = [p for layer in observer.layers for p in layer.parameters.values()]
        grads = torch.autograd.grad(outputs, parameters, direction, retain_graph=True, materialize_grads=True)
        filled = iter(grads)
        return (
            (layer.name, layer.assemble({name: next(filled) for name in layer.parameters})) for layer in observer.layers
        )

    observer.layer_batches(len(outputs))
    _check(observer, outputs, generator, parameter_gradients, rows=examples_independent and len(outputs) > 1)


def _check(
    observer: NetworkObserver,
    outputs: Tensor,
    generator: torch.Generator,
    parameter_gradients: _ParameterGradients,
    *,
    rows: bool,
) -> None:
    n = len(outputs)
    direction = torch.randn(outputs.shape, generator=generator, device=outputs.device).to(outputs.dtype)
    order = torch.randperm(n, generator=generator, device=outputs.device)
    scales = torch.exp2(-(order % _SCALES).to(outputs.dtype))
    products: dict[str, tuple[Tensor, Tensor]] = {}
    norms: dict[str, Tensor] = {}
    scaled_norms: dict[str, Tensor] = {}

    def first(gradients: LayerGradients) -> None:
        total, bound = gradients.total_weight_gradient()
        products[gradients.layer.name] = total @ _probe(total), bound
        if not isinstance(gradients, BatchGradient):
            norms[gradients.layer.name] = _row_norms(gradients, n)

    def second(gradients: LayerGradients) -> None:
        if not isinstance(gradients, BatchGradient):
            scaled_norms[gradients.layer.name] = _row_norms(gradients, n)

    observer.backward(outputs, direction, first, retain_graph=True)
    if rows:
        scaled = direction * scales.view(-1, *[1] * (outputs.ndim - 1))
        observer.backward(outputs, scaled, second, retain_graph=True)
    unexplained = {}
    by_name = {layer.name: layer for layer in observer.layers}
    expected = {
        name: (wide_gradient := wide(gradient)) @ _probe(wide_gradient)
        for name, gradient in parameter_gradients(outputs, direction)
    }
    largest = torch.stack([torch.linalg.vector_norm(product) for product in expected.values()]).amax()
    for name, product in expected.items():
        found, bound = products.get(name, (torch.zeros_like(product), product.new_zeros(())))
        if isinstance(by_name[name], PerExampleLayer):  # its inputs are not known, so neither is what may cancel
            bound = bound + 100 * torch.finfo(outputs.dtype).eps * largest
        difference = torch.linalg.vector_norm(found - product)
        unexplained[name] = difference > _TOLERANCE * torch.linalg.vector_norm(product) + bound
    mixed = {}
    for name, found in scaled_norms.items():
        own = norms[name] * scales.to(found)
        mixed[name] = torch.linalg.vector_norm(found - own) > _TOLERANCE * torch.linalg.vector_norm(own)
    _refuse(unexplained, mixed)


def _refuse(unexplained: dict[str, Tensor], mixed: dict[str, Tensor]) -> None:
    flags = torch.stack([*mixed.values(), *unexplained.values()]).tolist()
    rows = [name for name, flag in zip(mixed, flags, strict=False) if flag]
    bad = [name for name, flag in zip(unexplained, flags[len(mixed) :], strict=True) if flag]
    if rows:
        raise UnusableLayersError(
            f"in these layers, the rows do not belong to the examples one by one and in order: {rows}. The forward pass "
            "mixes examples, or by coincidence gives the layer as many rows as there are examples (selected tokens, a "
            "table that is the same for all). Keep the examples on the first axis.",
            dict.fromkeys(rows, "its rows do not belong to the examples one by one"),
        )
    if bad:
        raise UnusableLayersError(
            "\n".join(
                f"the calls of layer {name!r} do not account for the gradient of its parameters: they are also used "
                "elsewhere, by a function such as F.linear(x, layer.weight), or a hook changed the layer. Use the module "
                "itself in both places."
                for name in bad
            ),
            dict.fromkeys(bad, "its parameters are also used by a function, or a hook changed it"),
        )


def _row_norms(gradients: LayerGradients, n: int) -> Tensor:
    """Return the norms of each example's part of the gradients, shape ``(calls, n)``, in at least float32."""
    rows = [grad.reshape(n, -1) for grad in gradients.tensors]
    return torch.stack(
        [torch.linalg.vector_norm(r.to(torch.promote_types(r.dtype, torch.float32)), dim=1) for r in rows]
    )


def _probe(matrix: Tensor) -> Tensor:
    """Return a unit vector to multiply a ``(q, p)`` matrix by, so that not the whole matrix must be kept."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64)
    return (vector / torch.linalg.vector_norm(vector)).to(matrix)
