"""What the checks have in common: how a law is stated, and how its failure reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["generator", "law", "require", "require_equal", "standard_normal"]

_TOLERANCE = 1e-8
"""Relative error that rounding in float64 may leave."""


def require(condition: bool, statement: str, found: object = "") -> None:
    """State a law.

    Raises:
        AssertionError: If it does not hold, with what was found.
    """
    if not condition:
        raise AssertionError(
            f"{statement}; it does not hold: {found}" if found != "" else f"{statement}; it does not hold."
        )


def require_equal(found: Tensor, expected: Tensor, statement: str, tolerance: float = _TOLERANCE) -> None:
    """State that two tensors are equal up to rounding, relative to the largest number.

    Raises:
        AssertionError: If they are not, with the shapes, or the place and the numbers that differ most.
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
        f"{statement}; at {place if place else 'the one entry'} it is {found[place].item():.6g} instead of "
        f"{expected[place].item():.6g}."
    )


@contextmanager
def law(statement: str) -> Iterator[None]:
    """State that the body raises nothing.

    Raises:
        AssertionError: If it does, with the error.
    """
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{statement}; it raised {type(error).__name__}: {error}") from error


def generator(seed: int) -> torch.Generator:
    """A generator of its own, on the CPU."""
    return torch.Generator().manual_seed(seed)


def standard_normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
