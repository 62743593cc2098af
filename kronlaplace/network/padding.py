"""Padded tokens: which positions of a layer's input hold none of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["padding_mask"]

_NAME = "attention_mask"


def padding_mask(arguments: tuple[tuple[Any, ...], Mapping[str, Any]] | None, x: Tensor) -> Tensor | None:
    """Return the network's ``attention_mask`` if it says which positions of a layer's input are padding.

    Args:
        arguments: The positional and keyword arguments of the network. One of them, or an entry of the first, has that name.
        x: A layer's input, examples first.

    Returns:
        The mask as booleans, ``(N, T)``, if it has whole numbers or booleans and ``x`` the shape ``(N, T, p)``; else None.
    """
    if arguments is None or x.ndim != 3:
        return None
    args, kwargs = arguments
    mask = kwargs.get(_NAME)
    if mask is None and args and isinstance(args[0], Mapping):
        mask = args[0].get(_NAME)
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:2] or mask.is_floating_point():
        return None
    return mask.to(torch.bool)
