"""How the experiments measure time and memory."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call, device=CPU):
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(call, device=CPU):
    """The most that torch holds during a call, above what was there before; the profiler records it, or CUDA counts it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return int(np.cumsum([size for _, size in allocations]).max())


def largest_bytes(call):
    """The size of the largest tensor that any operation of a call returns."""
    with _Largest() as largest:
        call()
    return largest.size


class _Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        sizes = [t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return out


@dataclass(frozen=True)
class Run:
    """Something to be timed: what comes before each call is not counted."""

    call: Callable
    repeats: int
    before: Callable = lambda: None


def in_turn(runs, device=CPU):
    """Seconds of every call, by name: first calls of all runs, then second ones, so that all see the same machine."""
    times = {name: [] for name in runs}
    for i in range(max(run.repeats for run in runs.values())):
        for name, run in runs.items():
            if i < run.repeats:
                run.before()
                times[name].append(seconds(run.call, device))
    return times


def ratio(times, others):
    """Median of the ratios run by run, so that a machine that drifts does not matter; of as many as both have."""
    return statistics.median(t / other for t, other in zip(times, others, strict=False))
