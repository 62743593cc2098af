"""The border between the user's data and ours: what a batch is, and the checks on its values.

Everything that a pass over the data needs to know about loaders is here: what a batch looks like, how it gets to
the model's device, how progress is shown, and how values are checked without waiting for an accelerator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

__all__ = ["Batch", "DeferredChecks", "device_of", "iterate", "preserved_random_state"]


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leave torch's global random state as found; iterating over a DataLoader alone would change it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device: its position in the data, the inputs, and the targets if there are any."""

    index: int
    inputs: Tensor
    targets: Tensor | None


class DeferredChecks:
    """Conditions on tensor values that are looked at without stalling an accelerator.

    On the CPU a broken condition is raised at once. On other devices the first batch that broke it is remembered
    in a tensor there, and `settle` reads it once, at the end of the pass.
    """

    def __init__(self) -> None:
        self._first_broken: dict[str, Tensor] = {}

    def require(self, holds: Tensor, batch: Batch, message: str) -> None:
        """Note that ``holds`` (a boolean 0-dim tensor) must be true for this batch.

        Raises:
            ValueError: At once on the CPU, in `settle` elsewhere: ``batch <index>: <message>``.
        """
        if holds.device.type == "cpu":
            if not holds:
                raise ValueError(f"batch {batch.index}: {message}")
            return
        first = self._first_broken.get(message)
        if first is None:
            first = torch.full((), -1, dtype=torch.int64, device=holds.device)
        self._first_broken[message] = torch.where(holds | (first >= 0), first, batch.index)

    def settle(self) -> None:
        """Raise the first condition that was broken, if one was."""
        broken = [(int(first), message) for message, first in self._first_broken.items() if int(first) >= 0]
        if broken:
            index, message = min(broken)
            raise ValueError(f"batch {index}: {message}")


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's parameters.

    Raises:
        ValueError: If the model has no parameters, has them on several devices, or has them nowhere (``meta``).
    """
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or devices == {torch.device("meta")}:
        found = "no parameters" if not devices else f"parameters on {', '.join(sorted(map(str, devices)))}"
        raise ValueError(f"the model must have its parameters on one device, but it has {found}.")
    return devices.pop()


def iterate(data: Iterable[Any], device: torch.device, *, progress: bool, description: str) -> Iterator[Batch]:
    """Yield the batches of ``data`` on ``device``, checked as far as shapes and types go.

    Args:
        data: An iterable of ``(inputs, targets)`` pairs or of ``inputs`` alone, such as a `torch.utils.data.DataLoader`
            or a list; ``inputs`` is a tensor whose first axis counts examples.
        device: Where the batches are needed.
        progress: Whether to show a progress bar (never where the output is not a terminal).
        description: What the bar says.

    Raises:
        TypeError: If ``data`` or a batch has another form.
        ValueError: If there is no batch, or a batch has no examples.
    """
    if isinstance(data, (Tensor, tuple)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be an iterable of (inputs, targets) batches, such as a DataLoader or a list; got "
            f"{type(data).__name__}. Wrap a single batch in a list, [(inputs, targets)], a Dataset in a DataLoader."
        )
    total = len(data) if isinstance(data, Sized) else None
    seen = 0
    for index, raw in enumerate(
        tqdm(data, total=total, desc=description, leave=False, disable=None if progress else True)
    ):
        inputs, targets = _split(raw, index)
        if inputs.ndim == 0 or len(inputs) == 0:
            raise ValueError(f"batch {index}: has no examples (inputs of shape {tuple(inputs.shape)}).")
        yield Batch(
            index,
            inputs.to(device, non_blocking=True),
            None if targets is None else targets.to(device, non_blocking=True),
        )
        seen += 1
    if not seen:
        raise ValueError("the data is empty: no batch came out of the loader. (An iterator can be read only once.)")


def _split(raw: Any, index: int) -> tuple[Tensor, Tensor | None]:
    if isinstance(raw, Tensor):
        return raw, None
    if (
        isinstance(raw, (tuple, list))
        and len(raw) in (1, 2)
        and all(isinstance(part, Tensor) or (i == 1 and part is None) for i, part in enumerate(raw))
    ):
        return raw[0], raw[1] if len(raw) == 2 else None
    got = type(raw).__name__
    if isinstance(raw, (tuple, list)):
        got += f" of {len(raw)}: {', '.join(type(part).__name__ for part in raw)}"
    raise TypeError(
        f"batch {index}: expected a pair (inputs, targets) of tensors, or a tensor of inputs; got {got}. "
        "Turn arrays into tensors with torch.from_numpy; from other batches, pass a generator: "
        "((x, y) for x, y, *_ in loader)."
    )
