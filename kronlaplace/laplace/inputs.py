"""The inputs of predictions: checked, on the network's device, or batch by batch from a loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.inputs import Inputs, is_record, tensors_of
from kronlaplace.data.loader import Rewind, iterate
from kronlaplace.network.preconditions import check_mode

__all__ = ["batches_of_inputs", "checked_inputs"]


def checked_inputs(model: nn.Module, x: Any, differentiable: bool = False) -> Inputs:
    """Check inputs and move them to the network's device.

    Args:
        model: The network.
        x: A tensor, or a tuple or dict of tensors, first axis examples.
        differentiable: Whether the predictions are to carry a graph to the inputs.

    Raises:
        ValueError: If the inputs are empty or, on the CPU, not finite, or do not ask for the gradients that are wanted.
    """
    check_mode(model)
    inputs = Inputs(x)
    tensors = tensors_of(inputs) if isinstance(x, (Tensor, tuple, list, Mapping)) or is_record(x) else []
    if not tensors or tensors[0].numel() == 0:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"inputs must be a tensor with at least one example on its first axis, a tuple or dict of tensors as in the "
            f"fit, or a loader; got {got}. Turn arrays into tensors with torch.from_numpy."
        )
    if differentiable and not any(t.requires_grad for t in tensors):
        raise ValueError(
            "differentiable=True needs inputs that ask for gradients: x.requires_grad_() first (with a loader, on the "
            "inputs of every batch)."
        )
    device = device_of(model)
    for t in tensors:
        # Accelerators are not waited for: there, NaN inputs give NaN predictions.
        if device.type == "cpu" and t.is_floating_point() and not torch.isfinite(t).all():
            raise ValueError("the inputs contain NaN or infinite values.")
    return inputs.map(lambda t: t.to(device))


def batches_of_inputs(model: nn.Module, data: Iterable[Any], progress: bool) -> Iterator[Any]:
    """Yield the inputs of every batch of a loader, whose random state is as before afterwards."""
    device = device_of(model)
    with preserved_random_state(device), Rewind(data):
        for batch in iterate(data, device, alignment=None, progress=progress, description="Predicting"):
            yield batch.inputs.value
