"""Exact products with the Fisher, ``vᵀFw``, from the derivatives of the network's outputs along directions in weight space.

With the Jacobian ``J`` of the outputs of an example and their metric ``M(f)``, ``vᵀFw`` is the mean over the examples of
``(Jv)ᵀ M(f) (Jw)`` (K-FAC appendix C). ``Jv`` is one forward pass in forward-mode differentiation, and needs no graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn
from torch.func import functional_call

from kronlaplace._precision import callers_autocast, wide
from kronlaplace._replica import Replica
from kronlaplace.data.device import preserved_random_state
from kronlaplace.data.inputs import Inputs, tensors_of
from kronlaplace.data.outputs import output_tensor
from kronlaplace.layers import family_of
from kronlaplace.likelihoods import Likelihood
from kronlaplace.network.forward import differentiable_attention
from kronlaplace.network.hooks import Hook, WrittenOut

__all__ = ["fisher_inner_products", "jacobian_products", "outputs_at", "part_of_batch"]

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def jacobian_products(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    directions: Sequence[Mapping[str, Tensor]],
) -> tuple[Tensor, list[Tensor]]:
    """Compute the network's outputs and their derivatives along several directions in the space of its parameters.

    Nothing about the network changes: a replica runs, in the mode (training or evaluation) of each module, on copies of
    the inputs and of the buffers; an attached `NetworkObserver` sees nothing, and the random state stays as it is. All
    directions see the same dropout masks. Batch norm in training mode is differentiated with the statistics of the batch.

    Each direction takes a forward pass in forward-mode differentiation, without a graph. If an operation of the network
    does not support that (a `torch.autograd.Function` without ``jvp``, a fused LSTM with projections), all directions are
    taken through the graph of one pass instead, by differentiating its backward pass with respect to the vector that is
    propagated back.

    Args:
        model: The network.
        args: Positional arguments of its call.
        kwargs: Keyword arguments of its call.
        directions: Directions ``v_i`` by parameter name, of the shapes of the parameters. Parameters that are not in a
            direction stay constant along it.

    Returns:
        The outputs ``f``, and ``J v_i`` for every direction, of the shape of ``f``, all without a graph.

    Raises:
        ValueError: If a direction has the name of no parameter, or another shape than its parameter.
        TypeError: If the network returns neither a tensor nor an object with a tensor ``logits``.
        NotImplementedError: If an operation supports neither way of differentiating.
    """
    parameters = dict(model.named_parameters())
    for direction in directions:
        _check_direction(direction, parameters)
    replica = _private_replica(model)
    inputs = Inputs([list(args), dict(kwargs)])
    device = next(iter(parameters.values())).device
    with torch.inference_mode(False), differentiable_attention(), preserved_random_state(device):
        if not directions:
            with torch.no_grad():
                return _run(replica, {}, inputs), []
        try:
            return _in_forward_mode(replica, inputs, directions)
        except NotImplementedError as error:
            if not _lacks_forward_mode(error):
                raise
            unsupported = error
        with torch.enable_grad():
            return _through_backward(replica, inputs, directions, unsupported)


def outputs_at(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> Tensor:
    """Compute the network's outputs with other values of some of its parameters, as in `jacobian_products`.

    Args:
        model: The network, which keeps its parameters.
        args: Positional arguments of its call.
        kwargs: Keyword arguments of its call.
        parameters: Values by parameter name.

    Returns:
        The outputs, without a graph.
    """
    with torch.inference_mode(False), torch.no_grad(), differentiable_attention():
        return _run(_private_replica(model), parameters, Inputs([list(args), dict(kwargs)]))


def fisher_inner_products(
    likelihood: Likelihood, outputs: Tensor, products: Sequence[Tensor], targets: Tensor | None = None
) -> Tensor:
    """Compute the matrix of ``v_iᵀ F v_j``, the means over the examples of ``(J v_i)ᵀ M(f) (J v_j)``.

    Nothing waits for the device.

    Args:
        likelihood: The likelihood, whose metric of the outputs is ``M``.
        outputs: The outputs ``f``, shape ``(N, ...)``.
        products: The ``k`` derivatives ``J v_i`` of the outputs, from `jacobian_products`.
        targets: Targets in the data, which only show `Categorical` which positions are ignored and which axis holds the
            classes.

    Returns:
        Shape ``(k, k)``, symmetric, float64 (float32 on devices without float64), on the device of the outputs.

    Raises:
        ValueError: As `Likelihood.metric_product`.
    """
    vectors = wide(torch.stack([*products])) if products else wide(outputs).new_zeros(0, *outputs.shape)
    images = likelihood.metric_product(wide(outputs), vectors, targets)
    n = len(outputs)
    left, right = (t.reshape(len(vectors), n, -1).transpose(0, 1) for t in (vectors, images))
    by_example = left @ right.mT  # (N, k, k)
    exact = by_example.dtype if by_example.device.type == "mps" else torch.float64
    matrix = by_example.to(exact).mean(0)
    return (matrix + matrix.mT) / 2


def part_of_batch(
    args: Sequence[Any], kwargs: Mapping[str, Any], fraction: float, n_examples: int, axis: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call of the network with only the first examples of the batch.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        fraction: The part of the examples to keep, at most 1; rounded up to whole examples.
        n_examples: The number ``N`` of examples in the batch.
        axis: The axis of the inputs that indexes the examples. Tensors without ``N`` entries on it stay whole.

    Returns:
        The arguments with the first ``ceil(fraction · N)`` examples, as views of the given tensors.

    Raises:
        ValueError: If the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}.")
    if fraction == 1:
        return tuple(args), dict(kwargs)
    count = math.ceil(fraction * n_examples - 1e-9)  # 0.1 · 30 is 3, whatever its rounding
    index = (slice(None),) * axis + (slice(count),)

    def cut(tensor: Tensor) -> Tensor:
        return tensor[index] if tensor.ndim > axis and tensor.shape[axis] == n_examples else tensor

    positional, named = Inputs([list(args), dict(kwargs)]).map(cut).value
    return tuple(positional), named


def _check_direction(direction: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    unknown = [name for name in direction if name not in parameters]
    if unknown:
        raise ValueError(
            f"directions must be keyed by the names of the model's parameters, got {unknown}; the model has "
            f"{list(parameters)}. A tied parameter goes by the first of its names."
        )
    for name, vector in direction.items():
        if vector.shape != parameters[name].shape:
            raise ValueError(
                f"a direction must have the shape of its parameter: {name!r} is {tuple(parameters[name].shape)}, got "
                f"{tuple(vector.shape)}."
            )


def _private_replica(model: nn.Module) -> nn.Module:
    """Return a replica that no observer watches and whose recurrent modules run written out."""
    replica = Replica(model)
    for original in model.modules():
        module: Any = replica(original)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]
        if isinstance(vars(module).get("forward"), WrittenOut):
            del vars(module)["forward"]
        found = family_of(original) if isinstance(original, _RECURRENT) else None
        if found is not None and type(original).forward is found[0].forward and found[1].refusal(original) is None:
            assert found[1].forward is not None
            vars(module)["forward"] = partial(found[1].forward, module, _Unreported())  # fused ones lack forward mode
    return replica.model


class _Unreported:
    """A `Report` that nobody reads."""

    def __call__(self, block_index: int, x: Tensor, output: Tensor) -> None:
        pass

    def probe(self, block_index: int, zeros: Tensor) -> Tensor:
        return zeros


def _run(replica: nn.Module, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """Run the network on copies of its inputs and buffers, always with the same random numbers."""
    args, kwargs = inputs.map(lambda tensor: tensor.detach().clone()).value
    buffers = {name: buffer.clone() for name, buffer in replica.named_buffers()}
    device = tensors_of(inputs)[0].device if tensors_of(inputs) else torch.device("cpu")
    with callers_autocast(), preserved_random_state(device):
        return output_tensor(functional_call(replica, {**parameters, **buffers}, tuple(args), kwargs))


def _in_forward_mode(
    replica: nn.Module, inputs: Inputs, directions: Sequence[Mapping[str, Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    products: list[Tensor] = []
    parameters = dict(replica.named_parameters())
    for direction in directions:
        with torch.no_grad(), forward_mode.dual_level():
            duals = {
                name: forward_mode.make_dual(parameters[name].detach(), vector.detach().to(parameters[name].dtype))
                for name, vector in direction.items()
            }
            outputs, product = forward_mode.unpack_dual(_run(replica, duals, inputs))
            products.append(torch.zeros_like(outputs) if product is None else product)
    return outputs.detach(), products


def _lacks_forward_mode(error: NotImplementedError) -> bool:
    return "forward AD" in str(error) or "forward mode AD" in str(error)


def _through_backward(
    replica: nn.Module, inputs: Inputs, directions: Sequence[Mapping[str, Tensor]], unsupported: Exception
) -> tuple[Tensor, list[Tensor]]:
    """Take them through the backward pass: ``vᵀJᵀu`` is linear in ``u``, and its gradient is ``Jv``."""
    wanted = list(dict.fromkeys(name for direction in directions for name in direction))
    parameters = dict(replica.named_parameters())
    leaves = {name: parameters[name].detach().requires_grad_() for name in wanted}
    outputs = _run(replica, leaves, inputs)
    if not outputs.requires_grad:
        return outputs, [torch.zeros_like(outputs) for _ in directions]
    multiplier = torch.zeros_like(outputs, requires_grad=True)
    try:
        grads = torch.autograd.grad(
            outputs, [*leaves.values()], multiplier, create_graph=True, allow_unused=True, materialize_grads=True
        )
        by_name = dict(zip(leaves, grads, strict=True))
        products = []
        for direction in directions:
            used = [name for name in direction if by_name[name].requires_grad]
            vectors = [direction[name].detach().to(leaves[name].dtype) for name in used]
            products.append(
                torch.autograd.grad([by_name[name] for name in used], multiplier, vectors, retain_graph=True)[0]
                if used
                else torch.zeros_like(outputs)
            )
    except RuntimeError as error:
        raise NotImplementedError(
            "the network has an operation that can be differentiated neither in forward mode nor twice "
            f"(forward mode: {unsupported}; twice: {error}). Give it one of the two, such as jvp in a "
            "torch.autograd.Function, or train with an optimizer that needs no exact products with the Fisher."
        ) from error
    return outputs.detach(), [product.detach() for product in products]
