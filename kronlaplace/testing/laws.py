"""Common functions of the checks, which state a law and report its violation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["generator", "law", "require", "require_equal", "standard_normal"]

_TOLERANCE = 1e-8
"""Relative error allowed for rounding in float64."""


def require(condition: bool, statement: str, found: object = "") -> None:
    """State a law.

    Raises:
        AssertionError: If it does not hold; the message shows ``found``.
    """
    if not condition:
        raise AssertionError(
            f"{statement}; it does not hold: {found}" if found != "" else f"{statement}; it does not hold."
        )


def require_equal(found: Tensor, expected: Tensor, statement: str, tolerance: float = _TOLERANCE) -> None:
    """State that two tensors are equal up to rounding, relative to the largest entry.

    Raises:
        AssertionError: If they are not; the message gives the shapes, or the position and values of the largest difference.
    """
    if found.shape != expected.shape:
        raise AssertionError(f"{statement}; got shape {tuple(found.shape)} instead of {tuple(expected.shape)}.")
    if expected.numel() == 0:
        return
    found, expected = found.detach().double(), expected.detach().double()
    difference = (found - expected).abs().nan_to_num(nan=torch.inf)
    if difference.max() <= tolerance * expected.abs().max().clamp_min(1.0):
        return
    place = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    raise AssertionError(
        f"{statement}; at {place if place else 'the only entry'} it is {found[place].item():.6g} instead of "
        f"{expected[place].item():.6g}."
    )


@contextmanager
def law(statement: str) -> Iterator[None]:
    """State that the body of the context does not raise.

    Raises:
        AssertionError: If it does; the message shows the error.
    """
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{statement}; it raised {type(error).__name__}: {error}") from error


def generator(seed: int) -> torch.Generator:
    """Return a new generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def standard_normal(*shape: int, seed: int) -> Tensor:
    """Draw standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
