"""The curvature estimators, and their shorthands."""

from __future__ import annotations

from collections.abc import Callable

from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.baselines import Diagonal, ExactBlock
from kronlaplace.estimators.ekfac import EKFAC
from kronlaplace.estimators.kfac import KFAC, SUA, WeightSharing
from kronlaplace.estimators.kfoc import KFOC, Aggregation, Initialisation
from kronlaplace.estimators.tkfac import TKFAC, SpatialCorrelation
from kronlaplace.options import resolve

__all__ = [
    "EKFAC",
    "KFAC",
    "KFOC",
    "SHORTHANDS",
    "SUA",
    "TKFAC",
    "Aggregation",
    "Diagonal",
    "Estimator",
    "ExactBlock",
    "Initialisation",
    "SpatialCorrelation",
    "State",
    "WeightSharing",
    "resolve_estimator",
]

SHORTHANDS: dict[str, Callable[[], Estimator]] = {
    "kfac": KFAC,
    "kfc": KFAC,
    "sua": SUA,
    "tkfac": TKFAC,
    "kfoc": KFOC,
    "ekfac": EKFAC,
    "diagonal": Diagonal,
    "exact": ExactBlock,
}
"""Names by which an estimator with its default settings can be asked for."""


def resolve_estimator(estimator: Estimator | str) -> Estimator:
    """Turn a shorthand into its estimator; an estimator passes through. Raises as `kronlaplace.options.resolve`."""
    return resolve(estimator, Estimator, SHORTHANDS, "estimator")  # type: ignore[type-abstract]
