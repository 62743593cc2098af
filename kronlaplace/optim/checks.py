"""Checks of an optimizer's settings, and of the numbers and passes that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kronlaplace._arguments import positive_number
from kronlaplace.data.inputs import Inputs, tensors_of

__all__ = ["NO_CURVATURE", "REMEDIES", "PassMark", "check_setting", "finite_norms", "fraction_of_batch"]

NO_CURVATURE = (
    "update_curvature was not called in this step: call optimizer.update_curvature(outputs) in every step, between the "
    "forward pass of the model and the backward pass of the loss."
)

REMEDIES = (
    "Otherwise, train these layers without curvature, by layers=[...], the names of those that get a block, with "
    "others=kl.PlainSGD(lr=0.01), or freeze their parameters with requires_grad_(False)."
)


def check_setting(name: str, value: float) -> None:
    """Check a learning rate, momentum or weight decay, as for a parameter group.

    Raises:
        ValueError: If it is not a number in its range.
    """
    below = 1.0 if name == "momentum" else math.inf
    if not isinstance(value, (int, float)) or not 0 <= value < below:
        limit = "less than 1" if name == "momentum" else "finite"
        raise ValueError(f"{name} must be a number, at least 0 and {limit}, got {value!r}.")


def fraction_of_batch(value: float, name: str) -> float:
    """Return a fraction of a batch, from 0 (excluded) to 1.

    Raises:
        TypeError, ValueError: If it is not a number in that range.
    """
    if positive_number(value, name) > 1:
        raise ValueError(f"{name} must be at most 1, got {value!r}.")
    return float(value)


def finite_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return which tensors have a finite norm in at least float32, boolean ``(n,)``; this waits for no device.

    A norm overflows if squares of the entries do, and so do the second moments of the entries.
    """
    norms = []
    for t in tensors:
        values = t.coalesce().values() if t.is_sparse else t
        norm = torch.linalg.vector_norm(values, dtype=torch.promote_types(t.dtype, torch.float32))
        norms.append(norm.isfinite())
    return torch.stack(norms)


class PassMark:
    """What identifies the outputs of a forward pass: the numbers of their nodes in the autograd graph.

    It keeps no part of the graph alive.

    Args:
        outputs: What the network returned.
    """

    def __init__(self, outputs: Any) -> None:
        tensors = tensors_of(Inputs(getattr(outputs, "logits", outputs)))
        self._numbers = {number for t in tensors if (number := _number(t.grad_fn)) is not None}

    def made(self, outputs: Tensor) -> bool:
        """Return whether a tensor was computed from the outputs of the pass, or whether nothing is known about these."""
        if not self._numbers:
            return True
        oldest, nodes, seen = min(self._numbers), [outputs.grad_fn], set()
        while nodes:
            number = _number(node := nodes.pop())
            if number in self._numbers:
                return True
            if node is not None and number is not None and number not in seen and number > oldest:
                seen.add(number)
                nodes += [following for following, _ in node.next_functions]
        return False


def _number(node: Any) -> int | None:
    """Return the number of a node in the graph, which grows with time, or None for a leaf."""
    number = None if node is None else node._sequence_nr()
    return None if number is None or hasattr(node, "variable") else int(number)
