"""The error for layers that cannot have a block for a reason that only a pass over the data reveals."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["NOT_CALLED", "NO_EFFECT", "UnusableLayersError"]

NOT_CALLED = "its module is not called: a function uses its parameters, or nothing does"
NO_EFFECT = "the network's outputs do not depend on it"
"""Reasons of layers that some data do not use."""


class UnusableLayersError(NotImplementedError, ValueError):
    """Some layers cannot have a block in the network as it runs.

    Args:
        message: What was wrong; possible remedies are appended.
        reasons: The reasons by layer name.
        remedies: What can be done about it, as a sentence; None: by the arguments of `estimate_fisher`.

    Attributes:
        message: What was wrong, without remedies.
        reasons: The reasons by layer name, for `KroneckerFisher.coverage`.
    """

    def __init__(self, message: str, reasons: Mapping[str, str], remedies: str | None = None) -> None:
        if remedies is None:
            remedies = (
                f"Otherwise, leave these layers out with exclude={list(reasons)} (or layers=[...], the names of those that "
                'get a block), freeze their parameters with requires_grad_(False), or pass unsupported="fixed", which keeps '
                "whatever turns out to be unusable at its trained values."
            )
        super().__init__(f"{message} {remedies}")
        self.message = message
        self.reasons = dict(reasons)
