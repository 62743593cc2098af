"""A network's device, and the random state there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["device_of", "preserved_random_state"]


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leave torch's global random state as found; iterating over a DataLoader alone would change it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters.

    Raises:
        ValueError: If the model has no parameters, or has them on several devices or on the ``meta`` device.
    """
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or devices == {torch.device("meta")}:
        found = "no parameters" if not devices else f"parameters on {', '.join(sorted(map(str, devices)))}"
        raise ValueError(f"the model must have its parameters on one device, but it has {found}.")
    return devices.pop()
