"""Integration of the estimators into other libraries.

Everything is imported lazily, and no other part of the package imports this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kronlaplace.integrations.laplace_torch import KroneckerBackend

__all__ = ["KroneckerBackend"]


def __getattr__(name: str) -> Any:
    if name == "KroneckerBackend":
        from kronlaplace.integrations.laplace_torch import KroneckerBackend

        return KroneckerBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
