"""A private copy of a network's modules that shares the network's tensors, used for all of the package's own passes.

Otherwise, hooks, replaced forward passes, and parameters that must not carry gradients would be visible to everyone else who
uses the network: another thread that calls it, a thread that trains it, the user after an interrupt. On a replica, nobody
sees them, nothing has to be undone, and any number of threads can observe one network at the same time.

A replica costs one small object per module, and no tensor is copied: its parameters are new leaves on the same memory
(as in `torch.nn.DataParallel`, which replicates modules in the same way).
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from kronlaplace._memory_layout import guard_norm

__all__ = ["Replica"]

_Object = TypeVar("_Object", nn.Module, Tensor)

_STATE_OF_ANY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has; those that are containers (of hooks, for example) are always copied."""

_CONTAINERS = (dict, OrderedDict, set, list)

_DEPTH = 4
"""How deeply containers in a module's attributes are searched for modules and parameters."""

_SIMPLE = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, types.ModuleType)


def _stays_behind(value: Any) -> bool:
    """Return whether something on a module belongs to those who observe the original, and means nothing to a copy."""
    return getattr(type(value), "only_on_original", False)


def _others(value: Any) -> Any:
    """Return a module's hooks without those that stay behind; anything else unchanged."""
    if not isinstance(value, dict) or not any(_stays_behind(part) for part in value.values()):
        return value
    changed = copy.copy(value)
    for key in [key for key, part in value.items() if _stays_behind(part)]:
        del changed[key]
    return changed


class Replica:
    """A structural copy of a network.

    Every module is copied, including modules that are only reachable through plain attributes: lists, tuples, sets, dicts,
    bound methods, ``functools.partial``, closures, and simple objects. Anything that contains neither a module nor a
    parameter is shared with the network. Scripted modules cannot be copied and are shared. Norms that torch differentiates
    incorrectly are guarded (see `kronlaplace._memory_layout`).

    Args:
        model: The network, which is not changed.
        trainable: The parameters whose copies carry gradients, provided that they are trainable in the network. All
            other parameters are constants in the replica.
    """

    def __init__(self, model: nn.Module, trainable: Collection[Tensor] = ()) -> None:
        self._trainable = {id(parameter) for parameter in trainable}
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []  # kept alive, so that no id is used twice
        self.model: nn.Module = self._module(model)
        """The copy of the network."""

    def __call__(self, original: _Object) -> _Object:
        """Return the copy of one of the network's modules or parameters.

        Raises:
            KeyError: If the network does not contain it.
        """
        return cast(_Object, self._copies[id(original)])

    def _remember(self, original: Any, replica: Any) -> Any:
        self._copies[id(original)] = replica
        self._originals.append(original)
        return replica

    def _module(self, module: nn.Module) -> nn.Module:
        if id(module) in self._copies:
            return cast(nn.Module, self._copies[id(module)])
        if isinstance(module, torch.jit.ScriptModule):
            return cast(nn.Module, self._remember(module, module))
        replica = self._remember(module, object.__new__(type(module)))
        state = {name: _others(value) for name, value in vars(module).items() if not _stays_behind(value)}
        for name, value in state.items():
            if name in ("_parameters", "_buffers", "_modules"):
                parts = copy.copy(value)
                parts.update({key: self._tensor_or_module(part) for key, part in value.items()})
                state[name] = parts
                continue
            if type(value) in _CONTAINERS and not value and name in _STATE_OF_ANY_MODULE:
                state[name] = type(value)()  # hooks that nobody registered
                continue
            state[name] = self._value(value, _DEPTH)
            if name in _STATE_OF_ANY_MODULE and state[name] is value and isinstance(value, (dict, set, list)):
                state[name] = copy.copy(value)
        vars(replica).update(state)
        guard_norm(replica)
        self._unwrap(replica)
        return cast(nn.Module, replica)

    @staticmethod
    def _unwrap(replica: Any) -> None:
        """Make compiled and parallel wrappers run the copied module inside; they hold references to the original one."""
        if "_compiled_call_impl" in vars(replica):
            vars(replica)["_compiled_call_impl"] = None
        inner = None
        if type(replica).__name__ == "OptimizedModule":  # of torch.compile; importing its package takes seconds
            inner = replica._modules.get("_orig_mod")
        elif isinstance(replica, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = replica._modules.get("module")
        if inner is not None:
            vars(replica)["forward"] = inner.__call__

    def _tensor_or_module(self, part: Any) -> Any:
        if isinstance(part, nn.Module):
            return self._module(part)
        return self._tensor(part) if isinstance(part, Tensor) else part

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._copies:
            return cast(Tensor, self._copies[id(tensor)])
        # Autograd cannot keep tensors that were made in inference mode.
        ordinary = tensor.clone() if tensor.is_inference() else tensor
        if isinstance(tensor, nn.Parameter):
            wanted = tensor.requires_grad and id(tensor) in self._trainable
            return cast(Tensor, self._remember(tensor, nn.Parameter(ordinary.detach(), requires_grad=wanted)))
        return cast(Tensor, self._remember(tensor, ordinary))

    def _value(self, value: Any, depth: int) -> Any:
        """Return the value with all modules and parameters in it replaced by their copies, or itself if it has none."""
        if isinstance(value, _SIMPLE):
            return value
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, nn.Parameter):
            return self._tensor(value)
        if isinstance(value, Tensor) or depth == 0:
            return self._copies.get(id(value), value)
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._sequence(value, depth)
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, types.MethodType):
            owner = self._value(value.__self__, depth - 1)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            parts = self._value((value.func, value.args, value.keywords), depth)
            same = parts[0] is value.func and parts[1] is value.args and parts[2] is value.keywords
            return value if same else type(value)(parts[0], *parts[1], **parts[2])
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, weakref.ReferenceType):
            target = value()
            replica = self._value(target, depth - 1)
            return value if replica is target else weakref.ref(replica)
        return self._object(value, depth)

    def _sequence(self, value: Any, depth: int) -> Any:
        parts = [self._value(part, depth - 1) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        if isinstance(value, tuple):
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        changed = copy.copy(value)
        if isinstance(value, list):
            changed[:] = parts
            return changed
        return type(value)(parts)

    def _mapping(self, value: Any, depth: int) -> Any:
        parts = {key: self._value(part, depth - 1) for key, part in value.items()}
        if all(parts[key] is part for key, part in value.items()):
            return value
        if not hasattr(value, "update"):
            return parts
        changed = copy.copy(value)
        changed.update(parts)
        return changed

    def _function(self, function: types.FunctionType, depth: int) -> Any:
        cells = function.__closure__ or ()
        if id(function) in self._copies or not (cells or function.__defaults__ or function.__kwdefaults__):
            return self._copies.get(id(function), function)
        self._remember(function, function)  # its closure may contain the function itself
        contents = [self._value(cell.cell_contents, depth - 1) if _filled(cell) else None for cell in cells]
        defaults = self._value(function.__defaults__, depth)
        keyword_defaults = self._value(function.__kwdefaults__, depth)
        unchanged = [not _filled(c) or new is c.cell_contents for c, new in zip(cells, contents, strict=True)]
        if all(unchanged) and defaults is function.__defaults__ and keyword_defaults is function.__kwdefaults__:
            return function
        closure = tuple(
            cell if same else types.CellType(new) for cell, same, new in zip(cells, unchanged, contents, strict=True)
        )
        replica = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, defaults, closure if cells else None
        )
        replica.__kwdefaults__ = keyword_defaults
        vars(replica).update(vars(function))
        return self._remember(function, replica)

    def _object(self, value: Any, depth: int) -> Any:
        """Copy an object of any other class if its attributes contain modules or parameters."""
        if id(value) in self._copies or not hasattr(value, "__dict__"):
            return self._copies.get(id(value), value)
        self._remember(value, value)  # its attributes may lead back to it
        attributes = dict(vars(value))
        changed = {}
        for name, part in attributes.items():
            new = self._value(part, depth - 1)
            if new is not part:
                changed[name] = new
        if not changed:
            return value
        try:
            replica = object.__new__(type(value))
        except TypeError:  # a class implemented in C
            return value
        vars(replica).update(attributes | changed)
        return self._remember(value, replica)


def _filled(cell: types.CellType) -> bool:
    """Return whether a closure variable has a value yet."""
    try:
        cell.cell_contents  # noqa: B018 - only whether reading it fails matters
    except ValueError:
        return False
    return True
