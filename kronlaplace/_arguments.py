"""Checks of options where they enter the package: one clear error each, the same everywhere."""

from __future__ import annotations

import math
import operator
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch

__all__ = ["Choice", "choice", "positive_integer", "positive_number", "resolve", "seed_number", "warn"]

_Choice = TypeVar("_Choice", bound=Enum)
_Object = TypeVar("_Object")


class Choice(str, Enum):
    """An option with a few values, displayed as the string that the user types."""

    def __repr__(self) -> str:
        return repr(self.value)


def choice(
    enum: type[_Choice], value: _Choice | str, name: str, elsewhere: Mapping[str, str] = MappingProxyType({})
) -> _Choice:
    """Return the member of ``enum`` that is ``value`` or has that value.

    Args:
        enum: The allowed values.
        value: The given value.
        name: The option's name, for the error.
        elsewhere: Values used by other libraries and their equivalents here, for the error.

    Raises:
        ValueError: If there is no such member, naming the allowed values.
    """
    try:
        return enum(value)
    except ValueError:
        allowed = ", ".join(repr(member.value) for member in enum)
        known = elsewhere.get(value) if isinstance(value, str) else None
        hint = f" What is {value!r} elsewhere is {known!r} here." if known else ""
        raise ValueError(f"unknown {name} {value!r}; allowed are {allowed}.{hint}") from None


def resolve(
    value: _Object | str, base: type[_Object], shorthands: Mapping[str, Callable[[], _Object]], name: str
) -> _Object:
    """Return ``value`` if it is a ``base``, or the object for which it is a shorthand, with default settings.

    Raises:
        ValueError: If the shorthand is unknown.
        TypeError: If ``value`` is neither an instance of ``base`` nor a string.
    """
    if isinstance(value, base):
        return value
    known = ", ".join(map(repr, shorthands))
    if isinstance(value, str):
        if value in shorthands:
            return shorthands[value]()
        raise ValueError(f"unknown {name} {value!r}; the shorthands are {known}.")
    example = getattr(next(iter(shorthands.values())), "__name__", name)
    raise TypeError(
        f"{name} must be an instance such as {example}(), with parentheses, or one of the shorthands {known}; got {value!r}."
    )


def positive_integer(value: int, name: str) -> int:
    """Return ``value`` as an int, and check that it is at least 1.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is less than 1.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return number


def positive_number(value: float, name: str) -> float:
    """Return ``value`` as a float, and check that it is finite and positive.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not positive and finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}.") from None
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}.")
    return number


def seed_number(value: int) -> int:
    """Return ``value`` as an int, and check that it can seed a generator.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is negative or too large.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {value!r}.") from None
    if not 0 <= number < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {value}.")
    return number


_INSIDE = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    """Issue a `UserWarning` that points to the line outside the package, and torch, that led here, however deep it is."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
