"""Integration of this package into other libraries.

Everything is imported lazily, and no other part of the package imports this one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kronlaplace.integrations.avalanche import ContinualLaplacePlugin
    from kronlaplace.integrations.laplace_torch import KroneckerBackend

__all__ = ["ContinualLaplacePlugin", "KroneckerBackend"]

_HOMES = {"ContinualLaplacePlugin": "avalanche", "KroneckerBackend": "laplace_torch"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
