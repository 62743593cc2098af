"""Registry of the estimators by name, and conversion of their settings to JSON and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from kronlaplace._arguments import resolve
from kronlaplace._registry import ClassRegistry
from kronlaplace.blocks import Block
from kronlaplace.estimators.base import Estimator, State
from kronlaplace.layers import Layer, LayerGradients

__all__ = [
    "ESTIMATORS",
    "SHORTHANDS",
    "UnknownEstimator",
    "estimator_from_json",
    "estimator_to_json",
    "register_estimator",
    "resolve_estimator",
]

ESTIMATORS: ClassRegistry[Estimator] = ClassRegistry(Estimator, "estimator", lambda cls: cls.name)  # type: ignore[type-abstract]
"""Registry of the estimators that files and shorthands can name, by their ``name``."""

_Class = TypeVar("_Class", bound=type[Estimator])


def register_estimator(estimator: _Class) -> _Class:
    """Register an estimator of your own by its ``name``, for use as a shorthand and in files.

    It can be used as a decorator, above the dataclass decorator. A class that is defined again, as in a notebook, replaces
    the previous one. `kronlaplace.testing.check_estimator` checks whether it obeys the laws of an estimator.

    Args:
        estimator: The class, a frozen dataclass derived from `Estimator`, with a ``name`` of its own and fields that JSON
            can represent (or that are estimators themselves).

    Returns:
        The class.

    Raises:
        TypeError: If it is not such a class.
        ValueError: If another estimator has the same name, or a field is called ``name`` or ``defined_in``.
    """
    if isinstance(estimator, type) and issubclass(estimator, Estimator):
        name = vars(estimator).get("name")
        if not (isinstance(name, str) and name) or name in _ALIASES:
            raise TypeError(
                f"{estimator.__name__} needs a name of its own, for use in files and as a shorthand; got {name!r}. "
                'Write, for example, name: ClassVar[str] = "clipped" in the class.'
            )
    ESTIMATORS.register(estimator)
    return estimator


_ALIASES = {"kfc": "kfac"}


class _Shorthands(Mapping[str, Callable[[], Estimator]]):
    """Mapping from the name and aliases of every registered estimator to the estimator."""

    def __getitem__(self, name: str) -> Callable[[], Estimator]:
        return ESTIMATORS[_ALIASES.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        for name in ESTIMATORS:
            yield name
            yield from (alias for alias, meant in _ALIASES.items() if meant == name)

    def __len__(self) -> int:
        return sum(1 for _ in self)


SHORTHANDS: Mapping[str, Callable[[], Estimator]] = _Shorthands()
"""Shorthands for estimators with default settings."""


def resolve_estimator(estimator: Estimator | str) -> Estimator:
    """Turn a shorthand into its estimator and pass an estimator through; raises as `kronlaplace._arguments.resolve`.

    Raises:
        TypeError: If the settings of a registered estimator cannot be saved.
    """
    resolved = resolve(estimator, Estimator, SHORTHANDS, "estimator")  # type: ignore[type-abstract]
    estimator_to_json(resolved)  # fail here rather than after a long fit
    return resolved


def estimator_to_json(estimator: Estimator) -> dict[str, Any]:
    """Return name and settings as JSON-compatible values, or only the name if the estimator is not registered.

    Raises:
        TypeError: If a registered estimator has settings that JSON cannot represent.
    """
    if isinstance(estimator, UnknownEstimator):
        return dict(estimator.values)
    if ESTIMATORS.knows(estimator):
        return ESTIMATORS.to_json(estimator)
    return {"name": estimator.name, "defined_in": f"{type(estimator).__module__}:{type(estimator).__qualname__}"}


def estimator_from_json(values: Mapping[str, Any]) -> Estimator:
    """Restore an estimator from the result of `estimator_to_json`.

    An estimator that is not registered becomes an `UnknownEstimator`: finished results can be used, but nothing fitted.

    Raises:
        ValueError: If the estimator now has different settings.
    """
    return ESTIMATORS.from_json(values) if ESTIMATORS.can_restore(values) else UnknownEstimator(values)


class UnknownEstimator(Estimator):
    """Placeholder for an estimator from a file whose class is not registered.

    It cannot be used for fitting: an error says what to import.

    Args:
        values: Name and settings from the file.
    """

    not_combinable: ClassVar[str] = (
        "kronlaplace knows only its name, not how its blocks add up (kl.register_estimator makes its class known)"
    )

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.name = values["name"]  # type: ignore[misc]  # a class variable elsewhere

    def __repr__(self) -> str:
        return f"UnknownEstimator({self.values})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnknownEstimator) and self.values == other.values

    __hash__ = None  # type: ignore[assignment]

    def start(self, layer: Layer) -> State:
        raise ValueError(
            f"the estimator named in the file cannot be used for fitting: {ESTIMATORS.complaint(self.values)} Or create a "
            "new posterior with a different estimator: KronLaplace(model, likelihood, estimator)."
        )

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        raise AssertionError("never started")

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        raise AssertionError("never started")
