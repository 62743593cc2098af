"""The least trace of the Kronecker blocks of a network, by which TKFAC expands its damping (TKFAC Eq. 5.17)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from kronlaplace.blocks.base import Block
from kronlaplace.blocks.kronecker import KroneckerBlock

__all__ = ["with_least_trace"]


def with_least_trace(blocks: Mapping[str, Block]) -> dict[str, Block]:
    """Return the blocks with the least trace in their network set; those that have it keep it, even in a subset."""
    kronecker = [b for b in blocks.values() if isinstance(b, KroneckerBlock) and b.device.type != "meta"]
    if not kronecker:
        return dict(blocks)
    traces = torch.cat([block.group_traces().detach().to(kronecker[0].scale) for block in kronecker])
    # Ignore layers that receive no gradient; rounding may leave them a tiny trace.
    some = traces > torch.finfo(traces.dtype).eps ** 2 * traces.amax()
    least = torch.where(some, traces, torch.inf).amin()
    result = {}
    for name, block in blocks.items():
        if block.least_trace is None and not block.shares_weights_over_space:
            block = copy.copy(block)
            block.least_trace = least.to(block.device)
        result[name] = block
    return result
