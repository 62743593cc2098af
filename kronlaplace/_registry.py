"""Registries: what names in files, shorthands and module types stand for, open to the user's own classes.

A `Registry` is a mapping to which entries can be added. A `ClassRegistry` maps names to classes whose settings are the
fields of a frozen dataclass, and converts their objects to JSON and back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Generic, TypeVar

__all__ = ["ClassRegistry", "Registry"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_Object = TypeVar("_Object")

_NAME, _ORIGIN = "name", "defined_in"
"""The entries of an object's JSON values that are not its fields."""

_PACKAGE = __name__.partition(".")[0]


class Registry(Mapping[_Key, _Value], Generic[_Key, _Value]):
    """A mapping to which several threads can add entries at once.

    Every change replaces the whole table, so that ongoing iterations are not disturbed.
    """

    def __init__(self) -> None:
        self._table: dict[_Key, _Value] = {}
        self._lock = threading.RLock()

    def __getitem__(self, key: _Key) -> _Value:
        return self._table[key]

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._table)})"

    def add(self, key: _Key, value: _Value) -> None:
        """Add an entry, or replace the existing one."""
        with self._lock:
            self._table = {**self._table, key: value}

    def remove(self, key: _Key) -> None:
        """Remove an entry.

        Raises:
            KeyError: If there is no such entry.
        """
        with self._lock:
            if key not in self._table:
                raise KeyError(key)
            self._table = {k: v for k, v in self._table.items() if k != key}

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """Undo all additions and removals, by any thread, at the end of the context."""
        before = self._table
        try:
            yield
        finally:
            with self._lock:
                self._table = before


class ClassRegistry(Registry[str, type[_Object]]):
    """Registry of the classes derived from one base; an object is stored as its class's name and its fields' values.

    Args:
        base: The base class, which may be abstract.
        what: What such a class is, for errors: ``"likelihood"``.
        name_of: Function that returns the name of a class in files.

    Attributes:
        what: What such a class is, for errors.
        register_function: The public function that registers a class, for errors: ``"kl.register_likelihood"``.
    """

    def __init__(self, base: type[_Object], what: str, name_of: Callable[[type[_Object]], str]) -> None:
        super().__init__()
        self._base = base
        self._name_of = name_of
        self.what = what
        self.register_function = f"kl.register_{what}"

    def register(self, cls: Any) -> None:
        """Register a class under its name.

        A class that is defined again, as in a notebook, replaces the previous one.

        Raises:
            TypeError: If it is not a class derived from the base, or if its settings are not the fields of a dataclass.
            ValueError: If another class has that name, or if the name of a field is reserved for files.
        """
        if not (isinstance(cls, type) and issubclass(cls, self._base)):
            function = self.register_function.removeprefix("kl.")
            raise TypeError(f"{function} takes a class derived from kl.{self._base.__name__}, got {cls!r}.")
        found: type[_Object] = cls
        own = vars(found)
        if ("__init__" in own and "__dataclass_fields__" not in own) or not is_dataclass(cls):
            raise TypeError(
                f"{cls.__name__} must be a dataclass, since otherwise its parameters would not be saved: declare them as "
                "fields and put @dataclass(frozen=True) above the class."
            )
        reserved = {field.name for field in fields(cls)} & {_NAME, _ORIGIN}
        if reserved:
            raise ValueError(
                f"{cls.__name__} has a field {min(reserved)!r}, a name that files reserve to identify the {self.what}; "
                "rename the field."
            )
        name = self._name_of(found)
        with self._lock:
            known: type = self.get(name, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                article = "an" if self.what[0] in "aeiou" else "a"
                raise ValueError(
                    f"there is already {article} {self.what} {name!r}: {known.__module__}.{known.__qualname__}. Give yours "
                    "a different name."
                )
            self.add(name, found)

    def knows(self, value: _Object) -> bool:
        """Return whether the object's own class is registered."""
        return self.get(self._name_of(type(value))) is type(value)

    def to_json(self, value: _Object) -> dict[str, Any]:
        """Return the name of an object's class, its fields' values, and for a user's own class, where it is defined.

        A field may hold another object of the same registry, or a dataclass of numbers and strings; the class must also take
        that as a dict.

        Raises:
            TypeError: If a field holds a value that JSON cannot represent.
        """
        cls = type(value)
        values: dict[str, Any] = {_NAME: self._name_of(cls)}
        for field in fields(value):  # type: ignore[arg-type]  # all registered classes are dataclasses
            content = getattr(value, field.name)
            if is_dataclass(content) and not isinstance(content, (self._base, type)):
                content = asdict(content)
            if isinstance(content, self._base):
                values[field.name] = self.to_json(content)
                continue
            try:
                json.dumps(content)
                if isinstance(content, Mapping) and _NAME in content:
                    raise TypeError(
                        f"the dict in its field {field.name!r} has a key {_NAME!r}, which is reserved for files"
                    )
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"{value!r} cannot be saved: {error}. Its fields must be numbers, strings, None, or lists and dicts of "
                    "these."
                ) from None
            values[field.name] = content
        if _is_foreign(cls):
            values[_ORIGIN] = f"{cls.__module__}:{cls.__qualname__}"
        return values

    def can_restore(self, values: Mapping[str, Any]) -> bool:
        """Return whether the classes of all objects in these JSON values are registered."""
        return self._unknown(values) is None

    def _unknown(self, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the JSON values of the first object, here or in a field, whose class is not registered, or None."""
        cls = self.get(values[_NAME])
        # A user's class may have inherited the name of a class of this package without being registered.
        if cls is None or (_ORIGIN in values and not _is_foreign(cls)):
            return values
        nested = (self._unknown(value) for value in values.values() if isinstance(value, Mapping) and _NAME in value)
        return next((unknown for unknown in nested if unknown is not None), None)

    def from_json(self, values: Mapping[str, Any]) -> _Object:
        """Make an object from its JSON values, as the inverse of `to_json`.

        Raises:
            ValueError: If the class is not registered, saying what to import, or if it has different fields.
        """
        name = values[_NAME]
        if not self.can_restore(values):
            raise ValueError(self.complaint(values))
        parameters = {
            key: self.from_json(value) if isinstance(value, Mapping) and _NAME in value else value
            for key, value in values.items()
            if key not in (_NAME, _ORIGIN)
        }
        try:
            return self[name](**parameters)
        except TypeError as error:
            raise ValueError(
                f"the {self.what} {name!r} was saved with {parameters}, which it does not accept: {error}"
            ) from None

    def complaint(self, values: Mapping[str, Any]) -> str:
        """Return why `from_json` cannot restore an object whose class is not registered, and what to do."""
        values = self._unknown(values) or values
        name = values[_NAME]
        module, _, cls = values.get(_ORIGIN, f":{name}").partition(":")
        where = (
            f"import {module}, which defined it when it was saved" if module else "import the module that defines it"
        )
        if module == "__main__":
            where = "run the code that defines it, which was the main script or notebook when it was saved"
        return (
            f"the {self.what} {name!r} is not registered; registered are {list(self)}. If it is your own, {where}, and call "
            f"{self.register_function}({cls}) before loading; with @{self.register_function} above the class, importing it "
            "is enough."
        )


def _is_foreign(cls: type) -> bool:
    """Return whether a class is defined outside this package."""
    return cls.__module__.partition(".")[0] != _PACKAGE
