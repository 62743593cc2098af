"""Hooks that an observer attaches to the modules it observes, and their behavior in copies of these modules."""

from __future__ import annotations

import copy
import sys
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from kronlaplace.layers import Layer, UnusableLayersError

__all__ = ["Hook", "WrittenOut"]


def _outside_of_graphs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that the graphs of `torch.compile` must not contain; it is not imported if nobody else did."""
    dynamo = sys.modules.get("torch._dynamo")
    return function(*args, **kwargs) if dynamo is None else dynamo.disable(function)(*args, **kwargs)


class Hook:
    """A hook that does not keep the observer alive and does nothing in copies of its module."""

    only_on_original: ClassVar[bool] = True
    """That a `Replica` of the network does not have it."""

    def __init__(self, observer: Any | None, method: str, *args: Any) -> None:
        self._observer = None if observer is None else weakref.ref(observer)
        self._method = method
        self._args = args

    @property
    def alive(self) -> bool:
        """Whether the observer still exists."""
        return self._observer is not None and self._observer() is not None

    def __call__(self, *args: Any) -> Any:
        return _outside_of_graphs(self._call, *args)

    def _call(self, *args: Any) -> Any:
        observer = None if self._observer is None else self._observer()
        return None if observer is None else getattr(observer, self._method)(*self._args, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None, self._method)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None, self._method)


class WrittenOut:
    """The forward pass of a module that runs written out while it is observed; copies of the module run as usual."""

    only_on_original: ClassVar[bool] = True
    """That a `Replica` of the network does not have it."""

    def __init__(
        self,
        observer: Any,
        module: nn.Module,
        names: Sequence[str],
        forward: Callable[..., Any],
        layers: Mapping[int, Layer],
    ) -> None:
        self._observer = weakref.ref(observer)
        self._module = module
        self._names = names
        self._forward = forward
        self._layers = layers
        self._attached = False
        self._before: Any = None

    def attach(self) -> Callable[[], None]:
        """Let the module run it, and return the function that undoes this, also if others are attached meanwhile."""
        attributes = vars(self._module)
        self._before = attributes.get("forward")
        self._attached = True
        attributes["forward"] = self
        return self._detach

    def _detach(self) -> None:
        self._attached = False
        attributes = vars(self._module)
        if attributes.get("forward") is self:
            del attributes["forward"]
            before = self._before
            while isinstance(before, WrittenOut) and not before._attached:
                before = before._before
            if before is not None:
                attributes["forward"] = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _outside_of_graphs(self._call, *args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        observer = self._observer()
        if observer is None or not observer.observes():
            return type(self._module).forward(self._module, *args, **kwargs)
        try:
            return self._forward(self._module, observer.report_for(self._layers), *args, **kwargs)
        except UnusableLayersError:
            raise
        except NotImplementedError as error:
            reason = str(error).partition(":")[0].rstrip(".")
            raise UnusableLayersError(f"layers {self._names}: {error}", dict.fromkeys(self._names, reason)) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = copy.deepcopy(self._module, memo)
        return types.MethodType(type(module).forward, module)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, "forward")
