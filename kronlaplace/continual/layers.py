"""The layers of a network that may grow, freeze, and use only some of its heads in a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kronlaplace._precision import in_full_precision
from kronlaplace._replica import Replica
from kronlaplace.continual.state import LayerMemory
from kronlaplace.data.deferred_checks import Batch
from kronlaplace.layers import Layer, Unsupported, entries_of, find_layers
from kronlaplace.network.example_axes import Layout

__all__ = ["LayerWish", "UnusedLayers", "check_still_there"]


@dataclass(frozen=True)
class LayerWish:
    """The layers that the user asked for.

    Attributes:
        wanted: Names or patterns, or None for all layers.
        exclude: Names or patterns of those to leave out.
        unsupported: What to do about parameters that cannot have a block.
    """

    wanted: tuple[str, ...] | None
    exclude: tuple[str, ...]
    unsupported: Unsupported

    @classmethod
    def of(
        cls, layers: Sequence[str] | str | None, exclude: Sequence[str] | str, unsupported: Unsupported
    ) -> LayerWish:
        """Check names and patterns.

        Raises:
            TypeError, ValueError: If they are not strings, or duplicated.
        """
        wanted = None if layers is None else entries_of(layers, "layers")
        return cls(wanted, entries_of(exclude, "exclude"), unsupported)

    def find(self, model: nn.Module) -> list[Layer]:
        """Return these layers of the network as it is now."""
        return find_layers(model, self.wanted, self.unsupported, self.exclude)

    def without_frozen(self, model: nn.Module) -> LayerWish:
        """Return a copy without the names of modules whose parameters are all frozen."""
        modules = dict(model.named_modules())
        return replace(
            self,
            wanted=None if self.wanted is None else tuple(n for n in self.wanted if not _is_frozen(modules.get(n))),
            exclude=tuple(name for name in self.exclude if not _is_frozen(modules.get(name))),
        )


def _is_frozen(module: nn.Module | None) -> bool:
    """Return whether a module has parameters of its own, none of which is trainable."""
    own = [] if module is None else list(module.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)


def check_still_there(model: nn.Module, layers: Sequence[Layer], memories: Mapping[str, LayerMemory]) -> None:
    """Check that a network still has the layers of a memory, trainable or frozen, in the same shapes.

    Args:
        model: The network.
        layers: Its layers that are trainable now.
        memories: What is kept of each layer.

    Raises:
        ValueError: Naming the first layer that is gone or has changed.
    """
    found = {layer.name: layer for layer in layers}
    there = dict(model.named_parameters(remove_duplicate=False))
    for name, memory in memories.items():
        layer = found.get(name)
        if layer is not None and set(layer.parameter_names) < set(memory.parameters):
            layer = None  # the rest is frozen
        shape = tuple(memory.center.shape)
        if layer is not None and (layer.shape != shape or layer.parameter_names != memory.parameters):
            raise ValueError(
                f"the memory's layer {name!r} holds {list(memory.parameters)} as a {shape} matrix, and the model's holds "
                f"{list(layer.parameter_names)} as {layer.shape}. For new outputs add a layer beside the old one, which "
                "then has a name of its own; or start a new memory."
            )
        if layer is not None:
            continue
        missing = [parameter for parameter in memory.parameters if parameter not in there]
        if missing:
            raise ValueError(
                f"the memory has a layer {name!r} with the parameters {list(memory.parameters)}, and the model has no "
                f"{missing[0]!r}; its layers are {list(found)}. Use the model that the memory belongs to, with all heads "
                "of earlier tasks (they may be frozen)."
            )
        if sum(there[parameter].numel() for parameter in memory.parameters) != memory.center.numel():
            raise ValueError(
                f"the memory's layer {name!r} has a {shape} matrix, and the model's parameters {list(memory.parameters)} "
                "have other shapes: it is another network."
            )
        if any(there[parameter].requires_grad for parameter in memory.parameters):
            raise ValueError(
                f"the memory has a layer {name!r}, for which the model cannot have a block now: some of its parameters "
                "are frozen and others are not, or it was given to a module of another type. Freeze all of them, or none."
            )


class UnusedLayers:
    """Finds the layers on which the outputs of no batch depend, for use as a watch of a pass over the data.

    Costs one forward pass for each batch, as long as there are such layers.

    Args:
        model: The network, which is not changed.
        layers: The layers to look at.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._model = model
        self._unused = list(layers)

    @property
    def names(self) -> set[str]:
        """Names of the layers that no batch used."""
        return {layer.name for layer in self._unused}

    @in_full_precision
    def __call__(self, batch: Batch, layout: Layout) -> None:
        """Look at a batch."""
        if not self._unused:
            return
        parameters = [[*layer.parameters.values(), *layer.merged_parameters.values()] for layer in self._unused]
        flat = [p for some in parameters for p in some]
        replica = Replica(self._model, flat)
        with torch.inference_mode(False), torch.enable_grad():
            outputs = batch.inputs.map(_ordinary).run(replica.model)
            if not outputs.requires_grad:
                return
            copies = [replica(p) for p in flat]
            grads: Sequence[Tensor | None] = torch.autograd.grad(outputs.sum(), copies, allow_unused=True)
        reached = {id(p) for p, grad in zip(flat, grads, strict=True) if grad is not None}
        self._unused = [
            layer
            for layer, some in zip(self._unused, parameters, strict=True)
            if not any(id(p) in reached for p in some)
        ]


def _ordinary(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
