"""One computation at a time beside the training: in a thread, or on a CUDA stream of its own."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Background"]

_Result = TypeVar("_Result")

_Job = tuple[Callable[..., _Result], tuple[Tensor, ...]]


class Background(Generic[_Result]):
    """One computation beside the caller's own, whose result is taken when it is ready.

    On the CPU, a function runs in a background thread, which is started by the first `submit`, without gradients. On a CUDA
    device, it is called at once and what it launches is queued on a stream of its own, so it must not wait for the device.

    The function goes on reading its tensors after `submit` returns: they must be snapshots that nobody changes meanwhile.

    Args:
        device: The device of the tensors.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._runner: _Thread[_Result] | _Stream[_Result]
        self._runner = _Stream(torch.device(device)) if torch.device(device).type == "cuda" else _Thread()

    @property
    def pending(self) -> bool:
        """Whether something was submitted whose result has not been taken yet."""
        return self._runner.pending

    def submit(self, function: Callable[..., _Result], *tensors: Tensor) -> None:
        """Begin ``function(*tensors)``.

        Args:
            function: Function whose result, which must not be None, `result` returns.
            *tensors: Snapshots; on a CUDA device, tensors that the function reads otherwise must not be freed meanwhile.

        Raises:
            RuntimeError: If the result of an earlier call has not been taken, or after `close`.
        """
        if self.pending:
            raise RuntimeError("the previous computation's result has not been taken; call result() or wait() before.")
        self._runner.submit(function, tensors)

    def result(self) -> _Result | None:
        """Return the result once it is ready, and None before and afterwards; this never waits.

        Work that is queued on the current CUDA stream from now on comes after the result.

        Raises:
            Exception: If the function raised one.
        """
        return self._runner.take(wait=False) if self.pending else None

    def wait(self) -> _Result | None:
        """Return the result after waiting for it, or None if there is nothing to wait for.

        On a CUDA device, the device waits, and the host does not.

        Raises:
            Exception: If the function raised one.
        """
        return self._runner.take(wait=True) if self.pending else None

    def close(self) -> None:
        """Wait for the computation in progress, drop its result, and end the thread. Closing twice does no harm."""
        self._runner.close()


class _Thread(Generic[_Result]):
    """A background thread that takes one job at a time."""

    def __init__(self) -> None:
        self.pending = False
        self._jobs: queue.SimpleQueue[_Job[_Result] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[_Result | None, BaseException | None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stop: Callable[[], object] = lambda: None
        self._closed = False

    def submit(self, function: Callable[..., _Result], tensors: tuple[Tensor, ...]) -> None:
        if self._closed:
            raise RuntimeError("the background thread has been closed.")
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._jobs, self._results), name="kronlaplace-background", daemon=True
            )
            self._thread.start()
            self._stop = weakref.finalize(self, _stop, self._jobs, self._thread)
        self.pending = True
        self._jobs.put((function, tensors))

    def take(self, wait: bool) -> _Result | None:
        try:
            result, error = self._results.get(block=wait)
        except queue.Empty:
            return None
        self.pending = False
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._closed = True
        self.pending = False
        self._stop()
        self._results = queue.SimpleQueue()


def _work(
    jobs: queue.SimpleQueue[_Job[_Result] | None],
    results: queue.SimpleQueue[tuple[_Result | None, BaseException | None]],
) -> None:
    while (job := jobs.get()) is not None:
        function, tensors = job
        try:
            with torch.no_grad():
                result = function(*tensors)
        except BaseException as error:
            results.put((None, error))
        else:
            results.put((result, None))
            del result
        del job, function, tensors  # so that the thread keeps nothing alive while it waits


def _stop(jobs: queue.SimpleQueue[_Job[_Result] | None], thread: threading.Thread) -> None:
    """End the thread after its job; at the exit of the program, too, where a thread inside torch would crash."""
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()


class _Stream(Generic[_Result]):
    """A CUDA stream beside the current one.

    Memory that a job allocates belongs to this stream, and is reused by later jobs only. They begin after all that was
    queued on the current stream until their `submit`, so nothing overwrites a result that is still read.
    """

    def __init__(self, device: torch.device) -> None:
        self.pending = False
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()
        self._result: _Result | None = None
        self._error: Exception | None = None
        self._tensors: tuple[Tensor, ...] = ()
        self._closed = False

    def submit(self, function: Callable[..., _Result], tensors: tuple[Tensor, ...]) -> None:
        if self._closed:
            raise RuntimeError("the background stream has been closed.")
        self.pending = True
        self._tensors = tensors
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            with torch.cuda.stream(self._stream), torch.no_grad():
                self._result = function(*tensors)
        except Exception as error:
            self._error = error
        self._done.record(self._stream)

    def take(self, wait: bool) -> _Result | None:
        if not wait and not self._done.query():
            return None
        torch.cuda.current_stream(self._stream.device).wait_event(self._done)
        result, error = self._result, self._error
        self._clear()
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._closed = True
        self._stream.synchronize()
        self._clear()

    def _clear(self) -> None:
        self.pending, self._result, self._error, self._tensors = False, None, None, ()
