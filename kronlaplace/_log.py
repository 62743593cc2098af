"""The package's log: what was computed, how long it took, and what was approximated."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["logged"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LOGGER = logging.getLogger("kronlaplace")


def logged(describe: Callable[[Any], str]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a function: each call that succeeds is a line of level INFO, with its seconds.

    Nothing is described, and no device waited for, unless the logger ``"kronlaplace"`` takes lines of this level. The
    package adds no handler and sets no level; those are the program's.

    Args:
        describe: Makes the line from the function's result.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if _LOGGER.isEnabledFor(logging.INFO):
                text = describe(result)  # may wait for the device, whose work then counts
                _LOGGER.info("%s (%.2f s)", text, time.perf_counter() - start)
            return result

        return called

    return decorate
