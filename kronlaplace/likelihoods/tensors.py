"""Functions of outputs and targets shared by several likelihoods."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "any_finite_target",
    "check_same_shape",
    "drop_axis",
    "log_at_least_tiny",
    "one_element_at_a_time",
    "output_elements",
    "positive_numbers",
    "standard_normal",
    "sum_and_count",
]


def drop_axis(shape: torch.Size, axis: int) -> torch.Size:
    """Return ``shape`` without one axis."""
    return shape[:axis] + shape[axis + 1 :]


def positive_numbers(given: Any) -> tuple[float, ...] | None:
    """Return the numbers of a sequence or tensor with one axis, or None if they are not all positive and finite."""
    try:
        numbers = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    if numbers.ndim != 1 or not len(numbers) or not ((numbers > 0) & torch.isfinite(numbers)).all():
        return None
    return tuple(numbers.tolist())


def output_elements(shape: torch.Size) -> Iterator[tuple[slice | int, ...]]:
    """Yield an index for each element of an example, which selects it in all examples; ``shape`` is ``(N, ...)``."""
    for index in itertools.product(*map(range, shape[1:])):
        yield (slice(None), *index)


def one_element_at_a_time(values: Tensor) -> Iterator[Tensor]:
    """Yield, for each output element of an example, a tensor that holds ``values`` there and zeros elsewhere."""
    for position in output_elements(values.shape):
        column = torch.zeros_like(values)
        column[position] = values[position]
        yield column


def standard_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw independent standard normal numbers of the shape, dtype and device of ``like``."""
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def log_at_least_tiny(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``log p`` in float64, with ``p`` clamped at the smallest positive normal number of ``dtype``."""
    return p.double().clamp_min(torch.finfo(dtype).tiny).log()


def sum_and_count(values: Tensor) -> Tensor:
    """Return the sum and number of the values, shape ``(2,)``, float64.

    The count is filled in on the device, because a copy from the host would wait for it.
    """
    total = values.double().sum()
    return torch.stack([total, torch.full_like(total, values.numel())])


def any_finite_target(targets: Tensor) -> tuple[Tensor, str]:
    """Return the result of `Likelihood.check_targets` for likelihoods that allow any finite number."""
    return torch.isfinite(targets).all(), "targets contain NaN or infinite values; drop or repair those rows."


def check_same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Check that the targets have the shape of the outputs.

    Raises:
        ValueError: If they do not; the message gives the ``name`` of the likelihood.
    """
    if targets.shape != outputs.shape:
        raise ValueError(
            f"{name} targets must have the shape of the network's outputs, {tuple(outputs.shape)}; got "
            f"{tuple(targets.shape)}. Use targets.unsqueeze(1) or targets.reshape({tuple(outputs.shape)}): "
            "broadcasting would silently compare every output with every target."
            if targets.numel() == outputs.numel()
            else f"{name} targets must have the shape of the network's outputs, {tuple(outputs.shape)}; got "
            f"{tuple(targets.shape)}. Check the number of columns of the targets and of the last layer."
        )
