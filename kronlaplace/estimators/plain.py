"""Copies of what an estimator accumulates, in containers and tensors only, as `torch.load(weights_only=True)` reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["moved_copy", "plain_copy"]


def plain_copy(value: Any, owner: str) -> Any:
    """Copy tensors, numbers, strings, and dicts, lists and tuples of them.

    Raises:
        TypeError: For anything else; the message names the ``owner``, which must define how it is saved.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is dict:
        return {key: plain_copy(one, owner) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_copy(one, owner) for one in value)
    raise TypeError(
        f"{owner} accumulates a {type(value).__name__}, which a checkpoint cannot hold. Define {owner}.to_plain and "
        f"{owner}.from_plain, which convert a state to dicts, lists and tensors and back."
    )


def moved_copy(value: Any, device: torch.device) -> Any:
    """Copy what `plain_copy` returned, with all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: moved_copy(one, device) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved_copy(one, device) for one in value)
    return value
