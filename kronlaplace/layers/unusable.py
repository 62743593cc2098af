"""The error of layers that cannot have a block for a reason that only a pass over the data shows."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["UnusableLayersError"]


class UnusableLayersError(NotImplementedError, ValueError):
    """Some layers cannot have a block in the network as it runs.

    Attributes:
        reasons: Why, by layer name, for `KroneckerFisher.coverage`.
    """

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)
