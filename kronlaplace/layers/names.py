"""Names and patterns of modules, as ``layers=`` and ``exclude=`` take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["NOT_WANTED", "NOT_WANTED_BY_EXCLUDE", "NOT_WANTED_BY_LAYERS", "entries_of", "matching"]

NOT_WANTED_BY_LAYERS = "left out by layers="
NOT_WANTED_BY_EXCLUDE = "left out by exclude="
NOT_WANTED = ("left out", NOT_WANTED_BY_LAYERS, NOT_WANTED_BY_EXCLUDE)
"""The notes of parameters that have no block because the caller wants none."""

_SPECIAL = "*?["


def entries_of(value: Iterable[str] | str, what: str) -> tuple[str, ...]:
    """The names and patterns that were given: one as a string, or several.

    Raises:
        TypeError: If it is something else.
        ValueError: If one is there twice.
    """
    entries = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    wrong = [entry for entry in entries if not isinstance(entry, str)]
    if wrong:
        raise TypeError(
            f"{what} must be names of modules, or patterns such as 'encoder.*': one string or a list of them; got "
            f"{wrong[0]!r}."
        )
    if len(set(entries)) != len(entries):
        raise ValueError(f"{what}: a name stands there twice in {list(entries)}.")
    return entries


def matching(entries: Sequence[str], what: str, known: Sequence[str], model: nn.Module) -> set[str]:
    """The names that are meant: those that are given, and those that match a pattern, as in `fnmatch` (case matters).

    Args:
        entries: Names and patterns. One that is a name is never a pattern.
        what: The argument's name, for errors.
        known: The names of the modules with trainable parameters of their own, and of blocks.
        model: The network, for errors.

    Raises:
        ValueError: If a name is unknown, or a pattern matches nothing.
    """
    found: set[str] = set()
    for entry in entries:
        if entry in known:
            found.add(entry)
            continue
        matches = [name for name in known if fnmatchcase(name, entry)]
        if not matches:
            raise ValueError(f"{what}: {_complaint(entry, known, model)}")
        found.update(matches)
    return found


def _complaint(entry: str, known: Sequence[str], model: nn.Module) -> str:
    """Why nothing has this name."""
    modules = dict(model.named_modules())
    inside = [name for name in known if name.startswith(f"{entry}.")]
    if inside:
        return (
            f"module {entry!r} ({type(modules[entry]).__name__}) has no trainable parameters of its own; use '{entry}.*' "
            f"for all modules inside, or some of {inside}."
        )
    if entry in modules:
        return (
            f"module {entry!r} ({type(modules[entry]).__name__}) has no trainable parameters of its own; those that have "
            f"are {list(known)}."
        )
    if any(character in entry for character in _SPECIAL):
        return f"no module with trainable parameters of its own matches {entry!r}; there are {list(known)}."
    return f"the model has no module {entry!r}; with trainable parameters are {list(known)}."
