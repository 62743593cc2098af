"""What an estimate of the Fisher costs: time and peak memory relative to plain forward and backward passes.

    python -m experiments.fit_cost --data-dir DATA --out experiment-results/fit_cost

Side by side in one process over the same batches: a forward and backward pass of the mean cross-entropy (parameter
gradients, no optimizer step), and `estimate_fisher` with each estimator. The network is trained for some steps before.
Times are medians over repeats taken in turn, ratios are medians of the ratios run by run. Peak memory is what torch
allocates above what was there before, as the profiler records it (CPU) or as CUDA counts it. With `--data-dir` LeNet-5 sees
the first 10,000 MNIST digits; all else, and LeNet-5 without it, noise of the right shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import kronlaplace as kl
from experiments.measure import Run, in_turn, peak_bytes, ratio
from kronlaplace.demo.networks import lenet5
from kronlaplace.demo.report import Column, Table

COLUMNS = (
    Column("seconds", "seconds", 3),
    Column("time_ratio", "time ratio", 2),
    Column("peak_mib", "peak MiB", 1),
    Column("memory_ratio", "memory ratio", 2),
)
PLAIN = "forward + backward"


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def residual_network():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        ResidualBlock(32),
        nn.MaxPool2d(2),
        ResidualBlock(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def mlp():
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))


NETWORKS = {
    "lenet5": (lenet5, (1, 28, 28), 10_000, 250),
    "mlp": (mlp, (784,), 10_000, 250),
    "residual": (residual_network, (3, 32, 32), 200, 50),
}


def train(model, data, steps=100):
    """A few steps, so that activations and gradients are those of a network and not of its initialisation."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for i in range(steps):
        x, y = data[i % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def forward_backward(model, data):
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()


def fisher(estimator, sampling="mc"):
    return lambda model, data: kl.estimate_fisher(model, data, "classification", estimator, sampling=sampling)


METHODS = {
    PLAIN: forward_backward,
    "K-FAC": fisher(kl.KFAC()),
    "K-FAC, exact": fisher(kl.KFAC(), "exact"),
    "TKFAC": fisher(kl.TKFAC()),
    "TKFAC, uncorrelated": fisher(kl.TKFAC(spatial="uncorrelated")),
    "K-FOC, one sweep": fisher(kl.KFOC(sweeps=1)),
    "K-FOC, two sweeps": fisher(kl.KFOC()),
    "K-FOC, running": fisher(kl.KFOC(aggregation="running")),
    "K-FOC, running, rank 8": fisher(kl.KFOC(aggregation="running", rank=8)),
    "EKFAC": fisher(kl.EKFAC()),
    "diagonal": fisher(kl.Diagonal()),
}


def measure(name, device, repeats, data_dir):
    build, shape, n, batch_size = NETWORKS[name]
    torch.manual_seed(0)
    model = build().to(device)
    x, y = torch.randn(n, *shape), torch.randint(10, (n,))
    if data_dir is not None and name == "lenet5":
        from kronlaplace.demo.datasets import load

        mnist = load("mnist", data_dir, seed=0)
        x, y = mnist.train_x[:n], mnist.train_y[:n]
    data = [(a.to(device), b.to(device)) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)]
    train(model, data)
    for method in METHODS.values():  # warm-up
        method(model, data[:2])
    calls = {key: partial(method, model, data) for key, method in METHODS.items()}
    times = in_turn({key: Run(call, repeats) for key, call in calls.items()}, device)
    peaks = {key: peak_bytes(partial(method, model, data[:3]), device) for key, method in METHODS.items()}
    scores = {}
    for key in METHODS:
        time_ratio, memory_ratio = ratio(times[key], times[PLAIN]), peaks[key] / peaks[PLAIN]
        scores[key] = np.array([[statistics.median(times[key]), time_ratio, peaks[key] / 2**20, memory_ratio]])
    return Table(COLUMNS, scores)


def draw(tables, path):
    figure = Figure(figsize=(9, 4), layout="constrained")
    names = [key for key in METHODS if key != PLAIN]
    for axes, (i, title) in zip(figure.subplots(1, 2, sharey=True), ((1, "time"), (3, "peak memory")), strict=True):
        for j, (name, table) in enumerate(tables.items()):
            values = [table.scores[key][0, i] for key in names]
            axes.barh(np.arange(len(values)) + (j - (len(tables) - 1) / 2) * 0.27, values, height=0.27, label=name)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("multiple of forward + backward")
        axes.set_title(title)
        axes.axvline(1, color="0.6", linewidth=0.8)
    figure.axes[0].invert_yaxis()
    figure.axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", type=Path, default=Path("experiment-results/fit_cost"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    tables = {}
    for name in args.networks:
        tables[name] = table = measure(name, device, args.repeats, args.data_dir)
        _, shape, n, batch_size = NETWORKS[name]
        title = f"{name}: {n} inputs {shape}, batches of {batch_size}, {device.type}, {torch.get_num_threads()} threads"
        print(f"{title}\n\n{table.to_text()}\n")
        table.write_csv(args.out / f"{name}.csv")
        note = f"torch {torch.__version__}; medians of {args.repeats} repeats in turn; ratios to {PLAIN}"
        (args.out / f"{name}.md").write_text(table.to_markdown(title, [note]), encoding="utf-8")
    draw(tables, args.out / "fit_cost.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
