"""Temporary registrations for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kronlaplace.estimators.registry import ESTIMATORS
from kronlaplace.layers import LAYERS
from kronlaplace.likelihoods.base import LIKELIHOODS

__all__ = ["temporary_registrations"]


@contextmanager
def temporary_registrations() -> Iterator[None]:
    """Undo all registrations of layer types, likelihoods and estimators made in this context when it ends.

    The registries are global to the process, so registrations made by other threads in the meantime are undone as well.
    """
    with ExitStack() as stack:
        for registry in (LAYERS, LIKELIHOODS, ESTIMATORS):
            stack.enter_context(registry.temporary())
        yield
