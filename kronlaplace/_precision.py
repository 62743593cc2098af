"""Precision: the network runs in the user's precision, and all of the package's own algebra in at least float32.

A network can run in half precision for two reasons. Its weights may be bfloat16 or float16; then inputs and gradients arrive
in that dtype, and computations continue in `wide` of it. Or it runs under `torch.autocast`, which is a per-thread setting
that would silently round the package's own matrix products, too. These therefore run `without_autocast`, and the caller's
setting is in force again only where the network itself is called, in `callers_autocast`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["alike", "autocast_dtype", "callers_autocast", "in_full_precision", "wide", "wide_dtype", "without_autocast"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_DEVICES = ("cpu", "cuda", "mps", "xpu")

_NONE: dict[str, torch.dtype] = {}

_suspended: ContextVar[dict[str, torch.dtype]] = ContextVar("suspended autocast", default=_NONE)
"""The caller's autocast dtypes by device type, while autocast is off."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which computations run: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """Convert a tensor to at least float32, since half-precision probabilities and errors are too coarse."""
    return tensor.to(wide_dtype(tensor.dtype))


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch `torch.autocast` off, and remember its previous state."""
    active = {device: torch.get_autocast_dtype(device) for device in _DEVICES if torch.is_autocast_enabled(device)}
    if not active:
        yield
        return
    token = _suspended.set(active)
    try:
        with ExitStack() as stack:
            for device in active:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _suspended.reset(token)


def in_full_precision(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function to run `without_autocast`."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with without_autocast():
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def callers_autocast() -> Iterator[None]:
    """Restore `torch.autocast` as it was before `without_autocast` switched it off.

    Its cache of rounded weights stays off: it would keep a replica's weights alive for as long as the caller's context
    lasts, and weights cached in a pass without gradients would have no gradients in the next.
    """
    with ExitStack() as stack:
        for device, dtype in _suspended.get().items():
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
        yield


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast currently uses for products on a device, or None without autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def alike(found: Tensor, expected: Tensor, *, rtol: float, atol: float = 1e-8) -> bool:
    """Return whether the network returned the same values twice, up to rounding.

    In half precision, rounding is measured relative to the largest number, since torch chooses its kernels by batch size.
    """
    if found.shape != expected.shape:
        return False
    dtype = found.dtype
    if dtype == torch.float32:
        dtype = _suspended.get().get(found.device.type, dtype)
    if dtype in (torch.float16, torch.bfloat16) and expected.numel():
        rounding = 8 * torch.finfo(dtype).eps
        rtol, atol = max(rtol, rounding), max(atol, rounding * float(expected.nan_to_num(0, 0, 0).abs().max()))
    return torch.allclose(found, expected, rtol=rtol, atol=atol, equal_nan=True)
