"""Curvature estimators and their shorthands."""

from __future__ import annotations

from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.baselines import Diagonal, ExactBlock
from kronlaplace.estimators.ekfac import EKFAC
from kronlaplace.estimators.kfac import KFAC, WeightSharing
from kronlaplace.estimators.kfoc import KFOC, Aggregation, Initialization, UnitFactor
from kronlaplace.estimators.registry import (
    SHORTHANDS,
    UnknownEstimator,
    estimator_from_json,
    estimator_to_json,
    register_estimator,
    resolve_estimator,
)
from kronlaplace.estimators.sua import SUA
from kronlaplace.estimators.tkfac import TKFAC, SpatialCorrelation

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
    "Initialization",
    "SpatialCorrelation",
    "State",
    "UnitFactor",
    "UnknownEstimator",
    "WeightSharing",
    "estimator_from_json",
    "estimator_to_json",
    "register_estimator",
    "resolve_estimator",
]

for _estimator in (KFAC, SUA, TKFAC, KFOC, EKFAC, Diagonal, ExactBlock):
    register_estimator(_estimator)


def __dir__() -> list[str]:
    return sorted(__all__)
