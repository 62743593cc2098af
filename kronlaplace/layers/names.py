"""Names and patterns of modules, as accepted by ``layers=`` and ``exclude=``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["NOT_WANTED", "NOT_WANTED_BY_EXCLUDE", "NOT_WANTED_BY_LAYERS", "entries_of", "matching"]

NOT_WANTED_BY_LAYERS = "left out by layers="
NOT_WANTED_BY_EXCLUDE = "left out by exclude="
NOT_WANTED = ("left out", NOT_WANTED_BY_LAYERS, NOT_WANTED_BY_EXCLUDE)
"""The notes of parameters that have no block because the caller left them out."""

_SPECIAL = "*?["


def entries_of(value: Iterable[str] | str, what: str) -> tuple[str, ...]:
    """Return the given names and patterns as a tuple; a single one may be a plain string.

    Raises:
        TypeError: If an entry is not a string.
        ValueError: If there are duplicates.
    """
    entries = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    wrong = [entry for entry in entries if not isinstance(entry, str)]
    if wrong:
        raise TypeError(
            f"{what} must be a module name or a pattern such as 'encoder.*', or a list of these; got {wrong[0]!r}."
        )
    if len(set(entries)) != len(entries):
        raise ValueError(f"{what} contains duplicates: {list(entries)}.")
    return entries


def matching(entries: Sequence[str], what: str, known: Sequence[str], model: nn.Module) -> set[str]:
    """Return the names that are given, and those that match a pattern as in `fnmatch` (case-sensitive).

    Args:
        entries: Names and patterns. An entry that is a known name is never treated as a pattern.
        what: The argument's name, for errors.
        known: The names of the blocks, and of the modules with trainable parameters of their own.
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
    """Return the reason why nothing has this name."""
    modules = dict(model.named_modules())
    inside = [name for name in known if name.startswith(f"{entry}.")]
    if inside:
        return (
            f"module {entry!r} ({type(modules[entry]).__name__}) has no trainable parameters of its own; use '{entry}.*' "
            f"for all modules inside it, or some of {inside}."
        )
    if entry in modules:
        return (
            f"module {entry!r} ({type(modules[entry]).__name__}) has no trainable parameters of its own; the modules with "
            f"trainable parameters are {list(known)}."
        )
    if any(character in entry for character in _SPECIAL):
        return f"no module with trainable parameters of its own matches {entry!r}; available names are {list(known)}."
    return f"the model has no module {entry!r}; the modules with trainable parameters are {list(known)}."
