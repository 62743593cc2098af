"""Registrations that a test makes and that nobody else should see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kronlaplace.estimators.registry import ESTIMATORS
from kronlaplace.layers import LAYERS
from kronlaplace.likelihoods.base import LIKELIHOODS

__all__ = ["temporary_registrations"]


@contextmanager
def temporary_registrations() -> Iterator[None]:
    """Undo, when the context ends, every registration of a layer type, likelihood or estimator that was made in it.

    Registries belong to the process, so registrations that other threads make meanwhile are undone too.
    """
    with ExitStack() as stack:
        for registry in (LAYERS, LIKELIHOODS, ESTIMATORS):
            stack.enter_context(registry.temporary())
        yield
