"""The curvature estimators, and their shorthands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, cast

from kronlaplace.blocks import Block
from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.baselines import Diagonal, ExactBlock
from kronlaplace.estimators.ekfac import EKFAC
from kronlaplace.estimators.kfac import KFAC, SUA, WeightSharing
from kronlaplace.estimators.kfoc import KFOC, Aggregation, Initialisation, UnitFactor
from kronlaplace.estimators.tkfac import TKFAC, SpatialCorrelation
from kronlaplace.layers import Layer, LayerGradients
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
    "UnitFactor",
    "WeightSharing",
    "estimator_from_metadata",
    "estimator_to_metadata",
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


_CLASSES: dict[str, type[Estimator]] = {cls.name: cls for cls in (KFAC, SUA, TKFAC, KFOC, EKFAC, Diagonal, ExactBlock)}


def estimator_to_metadata(estimator: Estimator) -> dict[str, Any]:
    """Name and settings, as JSON-compatible values; of an estimator from elsewhere the name only."""
    values: dict[str, Any] = {"name": estimator.name}
    if type(estimator) is _CLASSES.get(estimator.name):
        for item in fields(cast(Any, estimator)):
            value = getattr(estimator, item.name)
            values[item.name] = estimator_to_metadata(value) if isinstance(value, Estimator) else value
    return values


def estimator_from_metadata(values: dict[str, Any]) -> Estimator:
    """Inverse of `estimator_to_metadata`; an estimator from elsewhere becomes one that refuses to be used."""
    settings = {key: value for key, value in values.items() if key != "name"}
    if values["name"] not in _CLASSES:
        return _Unknown(values["name"])
    if "basis" in settings:
        settings["basis"] = estimator_from_metadata(settings["basis"])
    return _CLASSES[values["name"]](**settings)


class _Unknown(Estimator):
    """An estimator that is known by name only, from a file."""

    not_combinable: ClassVar[str] = "kronlaplace knows its name only, and not how its blocks add up"

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]  # a class variable elsewhere

    def start(self, layer: Layer) -> State:
        raise ValueError(
            f"the file was made with an estimator {self.name!r} that kronlaplace does not know, so nothing can be fitted "
            "again with it. Make a new posterior: KronLaplace(model, likelihood, estimator)."
        )

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        raise AssertionError("never started")

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        raise AssertionError("never started")


def resolve_estimator(estimator: Estimator | str) -> Estimator:
    """Turn a shorthand into its estimator; an estimator passes through. Raises as `kronlaplace.options.resolve`."""
    return resolve(estimator, Estimator, SHORTHANDS, "estimator")  # type: ignore[type-abstract]


def __dir__() -> list[str]:
    return sorted(__all__)
