"""Laws of a layer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kronlaplace.estimators import Diagonal
from kronlaplace.fisher.estimation import estimate_fisher
from kronlaplace.layers import Layer, Unsupported, find_layers, written_out
from kronlaplace.testing.laws import law, require, require_equal, standard_normal

__all__ = ["check_layer"]


def check_layer(module: nn.Module, inputs: Tensor) -> None:
    """Check that a registered type of layer obeys its laws, on a module of that type and a batch of inputs.

    The laws, with the layer's matrix ``W̄`` of shape ``(q, p)``, inputs ``a`` and output gradients ``g``:

    - The module has one block, with all its trainable parameters.
    - `Layer.assemble` is the inverse of splitting a matrix into parameters, and shapes agree.
    - `Layer.weight_gradients` equal the per-example gradients of the parameters by autograd; `total_weight_gradient`
      is their sum, and `squared_weight_gradients`, if supported, the sum of their squares.
    - If the layer has Kronecker factors, the outputs are ``W̄ a``, the gradients ``Σ_t g_t a_tᵀ``, `positions` is the
      number of ``t``, `project` is ``a Q``, and both second moments are those of ``a`` and ``g`` and add up over examples.
    - `estimate_fisher` on the module alone has the same diagonal as autograd.

    Args:
        module: Module of the type, with random parameters; it is not changed.
        inputs: At least two different examples on the first axis; they may be very small.

    Raises:
        AssertionError: If a law does not hold; the message names it.
        TypeError: If ``module`` is not a module, or ``inputs`` is not a tensor.
        ValueError: If there are fewer than two examples, or the type is written out while it is observed (torch's
            recurrent layers and attention): these laws do not apply to it.
    """
    if not isinstance(module, nn.Module) or not isinstance(inputs, Tensor):
        raise TypeError(f"check_layer takes a module and a tensor, got {module!r} and {type(inputs).__name__}.")
    if written_out(module) is not None:
        raise ValueError(f"{type(module).__name__} is written out while it is observed; check_layer cannot check it.")
    if inputs.ndim == 0 or len(inputs) < 2:
        raise ValueError(f"inputs must have at least two examples on the first axis; got shape {tuple(inputs.shape)}.")
    module = copy.deepcopy(module).double().eval()
    x = inputs.detach().double() if inputs.is_floating_point() else inputs.detach()
    kind = type(module).__name__
    with law(f"{kind} is registered (kl.register_layer), and this module can have a block"):
        layers = find_layers(module, unsupported=Unsupported.ERROR)
    require(len(layers) == 1 and layers[0].module is module, f"{kind} has one block", layers)
    (layer,) = layers
    parameters = dict(module.named_parameters(recurse=False))
    require(
        all(layer.parameters[name] is parameters.get(name) for name in layer.parameter_names),
        f"{layer!r}: its parameters are the module's, by name",
        list(layer.parameters),
    )
    require(layer.is_input(x), f"{layer!r}: is_input accepts the inputs", tuple(x.shape))
    require(0 in layer.example_axes(x), f"{layer!r}: example_axes has the first axis", layer.example_axes(x))
    _check_matrix(layer)
    output = module(x)
    grad = standard_normal(*output.shape, seed=1)
    exact = _per_example(layer, output, grad)
    _check_gradients(layer, x, grad, exact)
    if layer.has_kronecker_factors:
        _check_factors(layer, x, output.detach(), grad)
    _check_fisher(layer, module, x, output)


def _check_matrix(layer: Layer) -> None:
    q, p = layer.shape
    count = sum(parameter.numel() for parameter in layer.parameters.values())
    require(
        q * p == count, f"{layer!r}: the matrix has as many entries as there are parameters", f"{q}x{p} and {count}"
    )
    require(q % layer.groups == 0, f"{layer!r}: the rows divide into equal groups", f"{q} rows, {layer.groups} groups")
    matrix = standard_normal(q, p, seed=2)
    parts = layer.split_directions(matrix)
    for name, parameter in layer.parameters.items():
        require(
            name in parts and parts[name].shape == parameter.shape,
            f"{layer!r}: splitting a matrix gives parameters of the right shape",
            {key: tuple(part.shape) for key, part in parts.items()},
        )
    require_equal(layer.assemble(parts), matrix, f"{layer!r}: assembling the parts of a matrix restores it")
    several = layer.split_directions(torch.stack([matrix, 2 * matrix]))
    for name, part in several.items():
        require_equal(part[1], 2 * parts[name], f"{layer!r}: several matrices can be split at once")
    own = layer.split_values(layer.matrix())
    for name, parameter in layer.parameters.items():
        require_equal(own[name], parameter, f"{layer!r}: split_values of matrix() are the parameters")
    require_equal(
        layer.matrix(),
        layer.assemble({n: t.detach() for n, t in layer.parameters.items()}),
        f"{layer!r}: matrix() is assembled from the parameters",
    )


def _per_example(layer: Layer, output: Tensor, grad: Tensor) -> Tensor:
    """Compute ``X`` by autograd, shape ``(N, q, p)``."""
    rows = []
    for n in range(len(output)):
        parts = torch.autograd.grad((output[n] * grad[n]).sum(), list(layer.parameters.values()), retain_graph=True)
        rows.append(layer.assemble(dict(zip(layer.parameters, parts, strict=True))))
    return torch.stack(rows)


def _check_gradients(layer: Layer, x: Tensor, grad: Tensor, exact: Tensor) -> None:
    n, (q, p), groups = len(x), layer.shape, layer.groups
    found = layer.weight_gradients(x, grad)
    require(
        found.shape == (groups, n, q // groups, p),
        f"{layer!r}: weight_gradients have shape (K, N, q/K, p)",
        tuple(found.shape),
    )
    require_equal(
        found.transpose(0, 1).flatten(1, 2), exact, f"{layer!r}: weight_gradients are each example's own, by autograd"
    )
    require_equal(
        layer.total_weight_gradient(x, grad),
        exact.sum(0),
        f"{layer!r}: total_weight_gradient is their sum over examples",
    )
    squares = torch.zeros(q, p, dtype=torch.float64)
    if layer.squared_weight_gradients([(x, grad)], squares):
        require_equal(
            squares, exact.square().sum(0), f"{layer!r}: squared_weight_gradients is the sum of their squares"
        )


def _check_factors(layer: Layer, x: Tensor, output: Tensor, grad: Tensor) -> None:
    a, g, y = layer.activations(x), layer.gradients(grad), layer.gradients(output)
    (q, p), groups = layer.shape, layer.groups
    require(
        a.shape[0] == groups and a.shape[1] == len(x) and a.shape[3] == p and g.shape == (*a.shape[:3], q // groups),
        f"{layer!r}: activations have shape (K, N, T, p) and gradients (K, N, T, q/K)",
        f"{tuple(a.shape)} and {tuple(g.shape)}",
    )
    weight = layer.matrix().unflatten(0, (groups, -1))
    require_equal(a @ weight.unsqueeze(1).mT, y, f"{layer!r}: the outputs are the matrix times the activations")
    require_equal(g.mT @ a, layer.weight_gradients(x, grad), f"{layer!r}: weight_gradients are the sum of g aᵀ")
    positions = torch.as_tensor(layer.positions(x, grad))
    require(
        bool((positions == a.shape[2]).all()), f"{layer!r}: positions is their number {a.shape[2]}", positions.tolist()
    )
    basis = standard_normal(groups, p, 2, seed=3)
    require_equal(
        layer.project(x, basis), a @ basis.unsqueeze(1), f"{layer!r}: project is the activations in another basis"
    )
    rows = a.flatten(1, 2)
    sums: dict[str, Tensor] = {}
    for part in (x[:1], x[1:]):
        layer.add_activation_moment(part, sums)
    require_equal(
        layer.activation_moment(sums),
        rows.mT @ rows,
        f"{layer!r}: the activation moment is the sum of a aᵀ, and adds up over examples",
    )
    total = torch.zeros(groups, q // groups, q // groups, dtype=torch.float64)
    for grads in (grad[:1], grad[1:]):
        layer.add_gradient_moment(grads, total, 2)
    rows = g.flatten(1, 2)
    require_equal(
        2 * total, rows.mT @ rows, f"{layer!r}: the gradient moment is the sum of g gᵀ, and adds up over examples"
    )


def _check_fisher(layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> None:
    expected = torch.zeros(layer.shape, dtype=torch.float64)
    for index in range(output[0].numel()):
        unit = torch.zeros_like(output).flatten(1)
        unit[:, index] = 1
        expected += _per_example(layer, output, unit.view_as(output)).square().sum(0) / len(x)
    with law(f"{layer!r}: estimate_fisher takes the module"):
        fisher = estimate_fisher(module, [x], "euclidean", Diagonal(), sampling="exact")
    block = fisher[layer.name]
    require_equal(block.eigenvalues(), expected, f"{layer!r}: the diagonal of its Fisher is the one by autograd")
