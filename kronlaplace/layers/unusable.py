"""The error of layers that cannot have a block for a reason that only a pass over the data shows."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["UnusableLayersError"]


class UnusableLayersError(NotImplementedError, ValueError):
    """Some layers cannot have a block in the network as it runs.

    Args:
        message: What was wrong; the ways out are added to it.
        reasons: Why, by layer name.

    Attributes:
        reasons: Why, by layer name, for `KroneckerFisher.coverage`.
    """

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        names = list(reasons)
        super().__init__(
            f"{message} The ways out: leave them out with exclude={names} (or layers=[...], the names of those that get "
            'a block), freeze the parameters with requires_grad_(False), or ask for unsupported="fixed", which keeps '
            "whatever turns out to be unusable at its trained values."
        )
        self.reasons = dict(reasons)
