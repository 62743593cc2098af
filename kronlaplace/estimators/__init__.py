"""The curvature estimators, and their shorthands."""

from __future__ import annotations

from collections.abc import Callable

from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.kfac import KFAC
from kronlaplace.options import resolve

__all__ = ["KFAC", "SHORTHANDS", "Estimator", "State", "resolve_estimator"]

SHORTHANDS: dict[str, Callable[[], Estimator]] = {"kfac": KFAC, "kfc": KFAC}
"""Names by which an estimator with its default settings can be asked for."""


def resolve_estimator(estimator: Estimator | str) -> Estimator:
    """Turn a shorthand into its estimator; an estimator passes through. Raises as `kronlaplace.options.resolve`."""
    return resolve(estimator, Estimator, SHORTHANDS, "estimator")  # type: ignore[type-abstract]
