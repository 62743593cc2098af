"""The inputs of a network: one tensor, several tensors, or named tensors."""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kronlaplace._precision import callers_autocast
from kronlaplace.data.outputs import output_tensor

__all__ = ["Inputs", "is_record", "leaves", "tensors_of", "with_one_more"]


class Inputs:
    """The inputs of a network: one tensor, several tensors, or named tensors.

    A tuple or list is unpacked, ``model(*inputs)``. A mapping is passed as keywords if the model's ``forward`` takes them,
    ``model(**inputs)``, and otherwise as one argument, ``model(inputs)``. A dataclass is one argument. A `UserDict`, such as
    the ``BatchEncoding`` of transformers, and a dataclass keep their class.

    Args:
        value: A tensor, or a tuple, list, mapping or dataclass of tensors (and other values, which are passed through).
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def arguments(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments for calling the network."""
        if isinstance(self.value, Tensor):
            return (self.value,), {}
        if isinstance(self.value, Mapping):
            return ((), dict(self.value)) if _takes_keywords(model, self.value) else ((self.value,), {})
        return ((self.value,) if is_record(self.value) else tuple(self.value)), {}

    def run(self, model: nn.Module, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Call the network, with ``parameters`` in place of its own, if given.

        Raises:
            TypeError: If it is not clear which tensor is the output.
        """
        args, kwargs = self.arguments(model)
        with callers_autocast():
            outputs = model(*args, **kwargs) if parameters is None else functional_call(model, parameters, args, kwargs)
        return output_tensor(outputs)

    def count(self, axis: int) -> int:
        """Return the number of examples, given that ``axis`` indexes them."""
        return tensors_of(self)[0].shape[axis]

    def examples(self, axis: int, start: int, stop: int, shared: Collection[str] = ()) -> Inputs:
        """Return the examples ``start:stop``; tensors in ``shared``, or without one entry per example, are not cut."""
        n = self.count(axis)
        index = (slice(None),) * axis + (slice(start, stop),)
        return self.map_by_path(lambda t, path: t[index] if path not in shared and counts_examples(t, axis, n) else t)

    def by_example(self, axis: int, shared: Collection[str] = ()) -> list[str]:
        """Return the paths of the tensors that `examples` cuts."""
        n = self.count(axis)
        return [path for path, t in leaves(self.value) if path not in shared and counts_examples(t, axis, n)]

    def of_other_length(self, axis: int) -> list[str]:
        """Return the paths of the tensors that have the axis ``axis``, but not one entry per example on it."""
        n = self.count(axis)
        return [path for path, t in leaves(self.value) if t.ndim > axis and t.shape[axis] != n]

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Return the inputs with a function applied to every tensor."""
        return self.map_by_path(lambda t, _: change(t))

    def map_by_path(self, change: Callable[[Tensor, str], Tensor]) -> Inputs:
        """Return the inputs with a function of each tensor and its path, such as ``"0"`` or ``"mask"``, applied."""
        return Inputs(_mapped(self.value, change))


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Return all tensors except 0-dim ones; the first one determines the number of examples."""
    return [t for _, t in leaves(inputs.value) if t.ndim]


def with_one_more(inputs: Inputs, axis: int, shared: Collection[str] = ()) -> Inputs:
    """Return the inputs with their first example repeated at the end."""
    n = inputs.count(axis)

    def longer(t: Tensor, path: str) -> Tensor:
        if path in shared or not counts_examples(t, axis, n):
            return t
        return torch.cat([t, t.narrow(axis, 0, 1)], dim=axis)

    return inputs.map_by_path(longer)


def is_record(value: Any) -> bool:
    """Return whether a value is an object of a dataclass that is not also a mapping."""
    return is_dataclass(value) and not isinstance(value, (type, Mapping))


def replaced(record: Any, changes: Mapping[str, Any]) -> Any:
    """Return a copy of an object of a dataclass with other values of some fields, without running its ``__init__``."""
    changed = copy.copy(record)
    for name, part in changes.items():
        object.__setattr__(changed, name, part)
    return changed


def counts_examples(tensor: Tensor, axis: int, n: int) -> bool:
    """Return whether a tensor has one entry per example on an axis."""
    return tensor.ndim > axis and tensor.shape[axis] == n


def _parts(value: Any, path: str) -> list[tuple[Any, Any, str]]:
    """Return the key, value and path of each part of a container, or nothing for any other object."""
    prefix = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return [(key, part, f"{prefix}{key}") for key, part in value.items()]
    if is_record(value):
        return [(f.name, getattr(value, f.name), f"{prefix}{f.name}") for f in fields(value)]
    return [(i, part, f"{prefix}{i}") for i, part in enumerate(value)] if isinstance(value, (tuple, list)) else []


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in nested tuples, lists, mappings and dataclasses, with their paths."""
    if isinstance(value, Tensor):
        yield path, value
    for _, part, where in _parts(value, path):
        yield from leaves(part, where)


def _mapped(value: Any, change: Callable[[Tensor, str], Tensor], path: str = "") -> Any:
    if isinstance(value, Tensor):
        return change(value, path)
    parts = {key: _mapped(part, change, where) for key, part, where in _parts(value, path)}
    if isinstance(value, UserDict):
        changed = copy.copy(value)
        changed.update(parts)
        return changed
    if is_record(value):
        return replaced(value, parts)
    if isinstance(value, Mapping):
        return parts
    return list(parts.values()) if isinstance(value, (tuple, list)) else value


def _takes_keywords(model: nn.Module, value: Mapping[str, Any]) -> bool:
    """Return whether to pass a mapping to the model as keywords.

    Raises:
        TypeError: If the model's ``forward`` takes some but not all of them as keywords.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**value)
    except TypeError as error:
        taken = [name for name in signature.parameters if name in value]
        if taken:
            raise TypeError(
                f"the model's forward takes {list(signature.parameters)}; the batch has {list(value)}: {error}. Pass "
                "batches with only the keys that it takes (and the targets), for example from a generator over the loader."
            ) from None
        return False
    return True
