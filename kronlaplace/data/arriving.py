"""Numbers on their way from a device to the host, which nobody has to wait for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Arriving"]


class Arriving:
    """A small tensor that is copied to the host without blocking.

    On the CPU it is there at once, so that what is done with it does not depend on timing.

    Args:
        tensor: The tensor; it is copied.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.to("cpu", copy=True)

    def value(self) -> Tensor | None:
        """Return the tensor on the host, or None if it has not arrived yet."""
        return self._host if self._event is None or self._event.query() else None

    def wait(self) -> Tensor:
        """Return the tensor on the host, after waiting for it if need be."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
