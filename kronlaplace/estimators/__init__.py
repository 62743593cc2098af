"""The curvature estimators, and their shorthands."""

from __future__ import annotations

from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.kfac import KFAC

__all__ = ["KFAC", "SHORTHANDS", "Estimator", "State", "resolve_estimator"]

SHORTHANDS: dict[str, type[Estimator]] = {"kfac": KFAC, "kfc": KFAC}
"""Names by which an estimator with its default settings can be asked for."""


def resolve_estimator(estimator: Estimator | str) -> Estimator:
    """Turn a shorthand into its estimator; an estimator passes through.

    Raises:
        ValueError: If the shorthand is unknown.
        TypeError: If it is neither.
    """
    if isinstance(estimator, Estimator):
        return estimator
    if isinstance(estimator, str):
        if estimator in SHORTHANDS:
            return SHORTHANDS[estimator]()
        raise ValueError(f"unknown estimator {estimator!r}; the shorthands are {', '.join(map(repr, SHORTHANDS))}.")
    raise TypeError(
        f"estimator must be an instance such as KFAC() or one of {', '.join(map(repr, SHORTHANDS))}; got {estimator!r}."
    )
