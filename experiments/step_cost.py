"""What a step costs: time and memory of natural gradients beside SGD with momentum and Adam.

    python -m experiments.step_cost --out experiment-results/step_cost

A step is everything that belongs to a batch: forward and backward pass, curvature, inverses, and the update. The optimizers
take turns, step by step, in one process, each with a network of its own, so that all see the same machine. Medians are of
single steps, and leave out the few with inverses; the mean over whole periods has them, too. Ratios are to SGD.
Memory is what an optimizer holds between the steps above what SGD with momentum holds, and the most that a step takes
besides. The data are noise of the right shape.

With `--profile`, some steps of each are recorded instead, and the table shows in how many places they wait for the device:
calls of CUDA that synchronize, and operations that copy a number to the host, which on the CPU show where CUDA would wait.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from contextlib import suppress
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

import kronlaplace as kl
from experiments import autoencoder
from experiments.arguments import add_machine, prepare_machine
from experiments.cifar import convolutional, resnet20
from experiments.measure import Run, in_turn, peak_bytes, ratio
from experiments.optimizers import natural, plain
from experiments.training import Optimizer, Problem
from kronlaplace.demo.report import Column, Table

COLUMNS = (
    Column("ms", "median ms", 1),
    Column("ratio", "ratio", 2),
    Column("mean_ms", "mean ms", 1),
    Column("mean_ratio", "ratio", 2),
    Column("held_mib", "held MiB above SGD", 1),
    Column("peak_mib", "MiB more in a step", 1),
)
PLAIN = "SGD with momentum"
PERIOD = 100
OPTIMIZERS = {
    PLAIN: Optimizer(plain(partial(torch.optim.SGD, lr=1e-3, momentum=0.9))),
    "Adam": Optimizer(plain(torch.optim.Adam)),
    "every 10, inverses every 100": Optimizer(
        natural(partial(kl.NaturalGradient, curvature_every=10, invert_every=PERIOD))
    ),
    "every step, inverses every 100": Optimizer(
        natural(partial(kl.NaturalGradient, curvature_every=1, invert_every=PERIOD))
    ),
    "default": Optimizer(natural(kl.NaturalGradient)),
}
HOST_COPIES = ("aten::_local_scalar_dense", "aten::is_nonzero")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def classification(build, device, batch_size):
    x, y = torch.randn(2 * batch_size, 3, 32, 32, device=device), torch.randint(10, (2 * batch_size,), device=device)
    return Problem("", build, F.cross_entropy, kl.Categorical(), x, y, batch_size)


def autoencoding(device, batch_size):
    x = torch.rand(2 * batch_size, 784, device=device)
    build = partial(autoencoder.network, 784)
    return Problem("", build, autoencoder.cross_entropy, kl.Bernoulli(), x, x, batch_size)


PROBLEMS = {
    "resnet20": (partial(classification, resnet20), 128),
    "convolutional": (partial(classification, convolutional), 512),
    "autoencoder": (autoencoding, 500),
}


def held_bytes(device):
    """What the tensors that Python can reach hold, or CUDA has allocated."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    sizes = {}
    for tensor in gc.get_objects():
        if issubclass(type(tensor), torch.Tensor):
            with suppress(NotImplementedError):  # wrappers of torch.func have no storage of their own
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


class Steps:
    """Steps of an optimizer on a network of its own, of which one is made at once."""

    def __init__(self, problem, optimizer):
        self.batches = problem.batches(seed=0)
        self.model = problem.initial(seed=0)
        self.update = optimizer.prepare(self.model, problem)
        self()

    def __call__(self):
        self.update(*next(self.batches))


def measure(problem, optimizers, n_steps, n_warm):
    device = problem.x.device
    steps, held = {}, {}
    for name, optimizer in optimizers.items():
        before = held_bytes(device)
        steps[name] = Steps(problem, optimizer)
        held[name] = held_bytes(device) - before
    for _ in range(n_warm):
        for step in steps.values():
            step()
    times = in_turn({name: Run(step, n_steps) for name, step in steps.items()}, device)
    scores = {}
    for name, step in steps.items():
        peak = peak_bytes(step, device)
        mean, reference = statistics.mean(times[name]), statistics.mean(times[PLAIN])
        scores[name] = np.array(
            [
                [
                    1e3 * statistics.median(times[name]),
                    ratio(times[name], times[PLAIN]),
                    1e3 * mean,
                    mean / reference,
                    (held[name] - held[PLAIN]) / 2**20,
                    peak / 2**20,
                ]
            ]
        )
    return Table(COLUMNS, scores), times


def waits(problem, optimizers, n_steps, n_warm):
    """How often a step waits for the device, and copies a number to the host, as the profiler records them."""
    device = problem.x.device
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    columns = tuple(Column(name, name, 2) for name in (*HOST_COPIES, *(WAITS if device.type == "cuda" else ())))
    scores = {}
    for name, optimizer in optimizers.items():
        steps = Steps(problem, optimizer)
        for _ in range(n_warm):
            steps()
        with profile(activities=activities) as recorded:
            for _ in range(n_steps):
                steps()
        counts = {event.key: event.count for event in recorded.key_averages()}
        scores[name] = np.array([[counts.get(column.key, 0) / n_steps for column in columns]])
    return Table(columns, scores)


def draw(times, path):
    figure = Figure(figsize=(5 * len(times), 4), layout="constrained")
    for axes, (problem, by_name) in zip(figure.subplots(1, len(times), squeeze=False)[0], times.items(), strict=True):
        for name, seconds in by_name.items():
            axes.plot([1e3 * value for value in seconds], label=name, linewidth=0.8)
        axes.set_title(problem)
        axes.set_xlabel("step")
        axes.set_yscale("log")
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["resnet20", "autoencoder"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--batch-size", type=int, help="without it 128 for ResNet-20, 512 and 500 for the others")
    parser.add_argument("--steps", type=int, default=PERIOD, help="that are timed; whole periods make the means right")
    parser.add_argument("--warm-up", type=int, default=PERIOD - 1, help="steps before; the default periods start short")
    parser.add_argument("--profile", action="store_true", help="count where steps wait for the device")
    add_machine(parser, "step_cost")
    args = parser.parse_args(argv)
    prepare_machine(args)
    device, times = torch.device(args.device), {}
    optimizers = {name: OPTIMIZERS[name] for name in dict.fromkeys([PLAIN, *args.optimizers])}
    for name in args.problems:
        make, batch_size = PROBLEMS[name]
        problem = make(device, args.batch_size or batch_size)
        title = f"{name}: batches of {problem.batch_size}, {device.type}, {args.threads} threads"
        if args.profile:
            table = waits(problem, optimizers, args.steps, args.warm_up)
        else:
            table, times[name] = measure(problem, optimizers, args.steps, args.warm_up)
        print(f"{title}\n\n{table.to_text()}\n")
        stem = f"{name}_waits" if args.profile else name
        table.write_csv(args.out / f"{stem}.csv")
        note = f"torch {torch.__version__}; {args.steps} steps in turn after {args.warm_up}; ratios to {PLAIN}"
        (args.out / f"{stem}.md").write_text(table.to_markdown(title, [note]), encoding="utf-8")
    if times:
        draw(times, args.out / "step_cost.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
