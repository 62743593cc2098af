"""Which parameters a natural-gradient optimizer steps by which rule, and in which parameter group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace._arguments import positive_number
from kronlaplace.layers import Layer, Unsupported, search_layers
from kronlaplace.layers.find import REMEDY
from kronlaplace.optim.checks import check_setting

__all__ = ["Division", "PlainSGD", "divide", "step_plainly"]

_REMEDY = (
    "To go on, train its parameters without curvature, by others=kl.PlainSGD(lr=0.01), or freeze them with "
    "requires_grad_(False)."
)


@dataclass(frozen=True)
class PlainSGD:
    """Rule for parameters without a Kronecker block: stochastic gradient descent with the optimizer's momentum.

    Args:
        lr: Their learning rate, which is independent of the natural gradient's.

    Raises:
        TypeError, ValueError: If the learning rate is not a positive number.
    """

    lr: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", positive_number(self.lr, "lr"))


@dataclass(frozen=True)
class Division:
    """The layers whose parameters follow the natural gradient, and the optimizer's parameter groups.

    Attributes:
        layers: Layers with a block.
        groups: Parameter groups for `torch.optim.Optimizer`; ``"natural"`` tells which ones follow the natural gradient.
    """

    layers: list[Layer]
    groups: list[dict[str, Any]]


def divide(model: nn.Module, params: Any, layers: Sequence[str] | str | None, others: str | PlainSGD) -> Division:
    """Divide a network's parameters into those with a block and the others.

    Args:
        model: The network.
        params: Parameters or parameter groups to be optimized, as for any torch optimizer; None means all trainable ones.
        layers: Names or patterns of the modules that get a block, as in `estimate_fisher`; None means all.
        others: ``"diagonal"`` or `PlainSGD`: the rule for parameters that have no Kronecker block.

    Raises:
        TypeError, ValueError: If an argument is not allowed, a parameter is not the model's, or a layer's parameters are in
            different groups.
        NotImplementedError: If a module cannot have a block and ``others`` is ``"diagonal"``, naming it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the first argument must be the model, a torch.nn.Module whose layers are observed; got {type(model).__name__}."
        )
    if others != "diagonal" and not isinstance(others, PlainSGD):
        raise ValueError(f'others must be "diagonal" or PlainSGD(lr=...), got {others!r}.')
    names = {p: name for name, p in model.named_parameters()}
    groups = _groups(params, names)
    plain = isinstance(others, PlainSGD)
    try:
        search = search_layers(model, layers, Unsupported.FIXED if plain else Unsupported.DIAGONAL)
    except NotImplementedError as error:
        raise NotImplementedError(str(error).replace(REMEDY, _REMEDY)) from None
    index = {p: i for i, group in enumerate(groups) for p in group["params"]}
    found = []
    for layer in search.layers:
        mine = list(layer.parameters.values())
        where = {index.get(p) for p in mine}
        if len(where) > 1:
            raise ValueError(
                f"all parameters of layer {layer.name!r} form one block and must be in the same parameter group; "
                f"{[names[p] for p in mine]} are in different ones."
            )
        if where != {None} and (layer.has_kronecker_factors or not plain):
            found.append(layer)
    natural = {p for layer in found for p in (*layer.parameters.values(), *layer.merged_parameters.values())}
    rest = [names[p] for p in index if p not in natural]
    if rest and not plain:
        raise ValueError(
            f"these parameters have no block: {rest}. Leave them out of params=, freeze them with requires_grad_(False), or "
            "step them without curvature: others=kl.PlainSGD(lr=0.01)."
        )
    if not found:
        raise ValueError(
            "no layer has a block, so there is no natural gradient. Use an optimizer of torch.optim, or other layers=."
        )
    result: list[dict[str, Any]] = []
    for group in groups:
        for is_natural in (True, False):
            members = [p for p in group["params"] if (p in natural) is is_natural]
            if members:
                own = {} if is_natural or not isinstance(others, PlainSGD) else {"lr": others.lr}
                result.append({**group, **own, "params": members, "natural": is_natural})
    return Division(found, result)


def _groups(params: Any, names: Mapping[nn.Parameter, str]) -> list[dict[str, Any]]:
    """Return the user's parameter groups as a list of dicts with lists of trainable parameters."""
    if params is None:
        params = list(names)
    if isinstance(params, (Tensor, str)) or not isinstance(params, Iterable):
        raise TypeError(f"params must be parameters or parameter groups of the model, got {type(params).__name__}.")
    entries = list(params)
    groups: list[dict[str, Any]] = (
        [dict(e) for e in entries] if entries and isinstance(entries[0], Mapping) else [{"params": entries}]
    )
    for group in groups:
        given = group.get("params")
        if not isinstance(given, Iterable):
            raise TypeError(f'a parameter group is a dict with parameters under "params", got the keys {list(group)}.')
        members = [given] if isinstance(given, Tensor) else [p[1] if isinstance(p, tuple) else p for p in given]
        strangers = sum(p not in names for p in members)
        if strangers:
            raise ValueError(
                f"{strangers} of the given parameters are not parameters of the model; pass model.parameters(), or groups "
                "of them."
            )
        group["params"] = [p for p in members if p.requires_grad]
        for name in ("lr", "momentum", "weight_decay"):
            if name in group:
                check_setting(name, group[name])
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("there are no trainable parameters: params is empty, or requires_grad is False everywhere.")
    return groups


def step_plainly(groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]], finite: Tensor) -> None:
    """Step the parameters without a block by gradient descent with momentum.

    Args:
        groups: The optimizer's parameter groups, of which those that follow the natural gradient are passed over.
        state: The optimizer's state, with the momentum by parameter.
        finite: Whether all gradients are finite, boolean, 0-dim; elsewhere than on the CPU, they count as zero otherwise.
    """
    for group in groups:
        for p in [] if group["natural"] else group["params"]:
            if p.grad is None:
                continue
            grad = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
            if grad.device.type != "cpu":
                grad = torch.where(finite, grad, 0.0)
            momentum = group["momentum"]
            if momentum:
                buffer = state[p].get("momentum_buffer")
                buffer = grad.clone() if buffer is None else buffer.mul_(momentum).add_(grad)
                state[p]["momentum_buffer"] = grad = buffer
            p.add_(grad, alpha=-group["lr"])
