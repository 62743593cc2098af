"""Parameters whose use no rule describes: their gradients are those of one example at a time, and they get a diagonal block.

A class token, a position embedding, the scale of a residual branch, a norm of somebody's own: whatever ``forward`` does with
them, the gradient of each example with respect to them is well defined. There are two ways to it:

- `ModuleLayer`: the module that owns the parameters runs once more, example by example, between its input and the gradient
  at its output, as they are observed in any other layer. This is for modules that map one tensor to another and contain no
  other modules with parameters.
- `NetworkLayer`: the whole network runs once more, with parameters of its own for each example
  (`kronlaplace.network.one_by_one`). This is right for every network whose outputs belong to examples.

The first batch shows whether the first way is right (`kronlaplace.network.layer_checks`); if it is not, the second is taken.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from kronlaplace._replica import Replica
from kronlaplace.layers.base import Layer
from kronlaplace.layers.unusable import UnusableLayersError

__all__ = ["ModuleLayer", "NetworkLayer", "PerExampleLayer", "is_closed", "rules_of", "with_rules"]


class PerExampleLayer(Layer):
    """Parameters of which only the gradient of each example is known.

    ``W̄`` is the row of all their entries, shape ``(1, P)``, or that of the layer that they would be by a rule that does
    not apply.

    Args:
        name: The block's name.
        module: The module that owns the parameters.
        parameters: The parameters, keyed by their `nn.Module.named_parameters` name.
        tied_modules: Other modules that share some of the parameters.
        reason: Why no rule applies, for `KroneckerFisher.coverage`.
        layout: The layer whose matrix this one has, or None for a row.
    """

    has_kronecker_factors: ClassVar[bool] = False

    rule: ClassVar[str]
    """The name of the way to the gradients, in files."""

    source: ClassVar[str]
    """Where the gradients come from, for `KroneckerFisher.coverage`."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        tied_modules: Sequence[nn.Module] = (),
        *,
        reason: str = "",
        layout: Layer | None = None,
    ) -> None:
        super().__init__(name, module, parameters, tied_modules)
        self.reason = reason
        self._layout = layout
        if layout is not None:
            self.merged_parameters = layout.merged_parameters
            self.block_index = layout.block_index

    @classmethod
    def like(cls, layer: Layer, reason: str) -> PerExampleLayer:
        """Return the layer with the same name, parameters and matrix as one that cannot be what it was taken for."""
        layout = layer._layout if isinstance(layer, PerExampleLayer) else layer
        return cls(layer.name, layer.module, layer.parameters, layer.tied_modules, reason=reason, layout=layout)

    @property
    def note(self) -> str:
        """What `KroneckerFisher.coverage` says about the block."""
        return f"per-example gradients of {self.source}" + (f": {self.reason}" if self.reason else "")

    @property
    def shape(self) -> tuple[int, int]:
        if self._layout is not None:
            return self._layout.shape
        return 1, sum(p.numel() for p in self.parameters.values())

    def assemble(self, values: Mapping[str, Tensor]) -> Tensor:
        if self._layout is not None:
            return self._layout.assemble(values)
        return torch.cat([values[name].flatten() for name in self.parameters]).unsqueeze(0)

    def matrix(self, *, detach: bool = True) -> Tensor:
        return super().matrix(detach=detach) if self._layout is None else self._layout.matrix(detach=detach)

    def split_directions(self, matrices: Tensor) -> dict[str, Tensor]:
        if self._layout is not None:
            return self._layout.split_directions(matrices)
        parts = matrices.squeeze(-2).split([p.numel() for p in self.parameters.values()], dim=-1)
        return {
            name: part.unflatten(-1, p.shape) if p.ndim else part.squeeze(-1)
            for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }

    def split_values(self, matrices: Tensor) -> dict[str, Tensor]:
        return super().split_values(matrices) if self._layout is None else self._layout.split_values(matrices)

    def assembled(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return gradients by parameter, each with the examples first, as matrices ``(N, q, p)`` in `dtype`."""
        wide = {name: gradients[name].to(self.dtype) for name in self.parameters}
        return vmap(self.assemble)(wide)

    def input_norm(self, x: Tensor) -> Tensor | float:
        return 1.0

    def positions(self, x: Tensor, grad: Tensor) -> int | Tensor:
        return 0  # unknown; in particular, the gradients are not products of two vectors

    def temporaries(self, x: Tensor, grad: Tensor, activations: bool) -> int:
        return len(x) * math.prod(self.shape)


class ModuleLayer(PerExampleLayer):
    """Parameters of a module that maps one tensor to another, example by example, in its own way."""

    rule = "module"
    source = "the module"

    def input_shape(self) -> str:
        return "(examples, ...)"

    def temporaries(self, x: Tensor, grad: Tensor, activations: bool) -> int:
        return super().temporaries(x, grad, activations) + 4 * (x.numel() + grad.numel())

    def weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        replica = Replica(self.module).model
        names = {name: name.rpartition(".")[2] for name in self.parameters}
        values = {short: self.parameters[name].detach() for name, short in names.items()}

        def one(x: Tensor, grad: Tensor) -> Mapping[str, Tensor]:
            pull_back = vjp(lambda values: functional_call(replica, values, (x[None],))[0], values)[1]
            return pull_back(grad)[0]

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                found = vmap(one)(x, grad)
        except Exception as error:
            reason = "its module does not run on one example"
            raise UnusableLayersError(f"layer {self.name!r}: {reason}: {error}.", {self.name: reason}) from error
        return self.assembled({name: found[short] for name, short in names.items()}).unsqueeze(0)


class NetworkLayer(PerExampleLayer):
    """Parameters that the network uses in any way.

    What is observed of them are their gradients alone, one for each example.
    """

    rule = "network"
    source = "the network"

    def input_shape(self) -> str:
        return "(examples,)"

    def weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        return grad.unsqueeze(0)


_RULES: dict[str, type[PerExampleLayer]] = {kind.rule: kind for kind in (ModuleLayer, NetworkLayer)}


def is_closed(module: nn.Module) -> bool:
    """Return whether a module has no parameters but its own."""
    return len(list(module.parameters())) == len(list(module.parameters(recurse=False)))


def with_rules(layers: Sequence[Layer], rules: Mapping[str, str]) -> list[Layer]:
    """Return layers of which some are made again as the data have shown that they must be.

    Args:
        layers: The layers.
        rules: For the layers that are not by the rule of their type: `PerExampleLayer.rule` by layer name.
    """
    return [_with_rule(layer, rules.get(layer.name)) for layer in layers]


def _with_rule(layer: Layer, rule: str | None) -> Layer:
    own = layer if isinstance(layer, PerExampleLayer) else None
    if rule is None:
        return layer if own is None or own._layout is None else own._layout
    return layer if own is not None and own.rule == rule else _RULES[rule].like(layer, "")


def rules_of(layers: Sequence[Layer]) -> dict[str, str]:
    """Return what `with_rules` needs to know about layers."""
    return {layer.name: layer.rule for layer in layers if isinstance(layer, PerExampleLayer)}
