"""An autoencoder of the MNIST digits: which optimizer gets down fastest, by update and by wall clock?

    python -m experiments.autoencoder --data-dir DATA --out experiment-results/autoencoder

The network is 784-1000-500-250-30-250-500-1000-784 (ReLU, PyTorch's initial weights; with `--tanh` the papers' tanh network
with 15 random connections into each unit), the loss the binary cross-entropy summed over pixels, mean over examples; 10,000
digits, batches of 500. Every optimizer starts from the same weights and sees the same batches. The target is a smoothed
loss (exponential moving average of the batches' losses, decay 0.9, corrected for its start).

First each optimizer with a grid is tuned: the settings with the fewest updates to the target, their time not counted. Then
all are trained for some seconds of wall clock, in turn in one process, so that they share what the machine does meanwhile.
Without a data directory the digits are scikit-learn's, 8x8, and the network has 64 inputs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import kronlaplace as kl
from experiments.optimizers import OPTIMIZERS
from experiments.training import Limits, Problem, Training, described, train_in_turn, tuned
from kronlaplace.demo.datasets import DATA_VARIABLE
from kronlaplace.demo.files import read_idx
from kronlaplace.demo.report import Column, Table

WIDTHS = (1000, 500, 250, 30, 250, 500, 1000)
CONNECTIONS = 15
TARGET = 140.7
REFERENCE = "Adam, 1e-3"
SOURCE = "the original MNIST files (yann.lecun.com/exdb/mnist, mirror ossci-datasets.s3.amazonaws.com/mnist)"


def digits(data_dir, n):
    """The first `n` training digits with pixels from 0 to 1, `(N, pixels)`, and their name."""
    if data_dir is None:
        from sklearn.datasets import load_digits

        return torch.from_numpy(load_digits().data[:n] / 16).float(), "scikit-learn's 8x8 digits"
    images = read_idx(Path(data_dir) / "mnist" / "train-images-idx3-ubyte", 3, SOURCE)[:n]
    return torch.from_numpy(images.reshape(len(images), -1) / np.float32(255)), "MNIST digits"


def network(n_pixels, widths=WIDTHS, is_tanh=False):
    sizes = (n_pixels, *widths, n_pixels)
    layers = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.Tanh() if is_tanh else nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    if is_tanh:
        for layer in model[::2]:
            sparse_(layer)
    return model


def sparse_(layer):
    """Give each unit 15 connections with standard normal weights, and no bias (Martens, 2010)."""
    n_out, n_in = layer.weight.shape
    with torch.no_grad():
        layer.bias.zero_()
        kept = torch.rand(n_out, n_in).argsort(dim=1) < min(CONNECTIONS, n_in)
        layer.weight.copy_(torch.randn(n_out, n_in) * kept)


def cross_entropy(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(targets)


def table(logs, target, seconds):
    columns = (
        Column("updates", f"updates to {target:g}", 0),
        Column("seconds", f"seconds to {target:g}", 1),
        Column("ratio", f"of the seconds of {REFERENCE}", 2),
        Column("loss", f"loss after {seconds:g} s", 2),
        Column("ms", "ms an update", 0),
    )
    reference = logs[REFERENCE].reached(target)[1] if REFERENCE in logs else math.nan
    rows = {}
    for name, log in logs.items():
        updates, to_target = log.reached(target)
        ratio = to_target / reference if to_target < math.inf else math.inf
        median = 1e3 * float(np.median(np.diff(log.seconds, prepend=0.0)))
        rows[name] = np.array([[updates, to_target, ratio, log.after(seconds), median]])
    return Table(columns, rows)


def draw(logs, target, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_update, by_second = figure.subplots(1, 2, sharey=True)
    for name, log in logs.items():
        by_update.plot(range(1, len(log.losses) + 1), log.smoothed, label=name, linewidth=1)
        by_second.plot(log.seconds, log.smoothed, linewidth=1)
    for axes, label in ((by_update, "update"), (by_second, "seconds")):
        axes.set_xlabel(label)
        axes.axhline(target, color="0.6", linewidth=0.8)
    by_update.set_ylabel("smoothed loss")
    by_update.set_ylim(80, 300)
    by_update.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=os.environ.get(DATA_VARIABLE))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--tanh", action="store_true", help="the papers' network")
    parser.add_argument("--digits", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--target", type=float, default=TARGET, help="smoothed loss")
    parser.add_argument("--seconds", type=float, default=60.0, help="wall clock of each training")
    parser.add_argument("--updates", type=float, default=math.inf, help="of each training at most")
    parser.add_argument("--grid-updates", type=int, default=300, help="of each training of a grid at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("experiment-results/autoencoder"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    x, source = digits(args.data_dir, args.digits)
    x = x.to(args.device)
    title = (
        f"Autoencoder, {'tanh' if args.tanh else 'ReLU'}, {len(x):,} {source}, batches of {args.batch_size}, "
        f"{x.device.type}, {args.threads} threads"
    )
    print(title)
    problem = Problem(
        title, lambda: network(x.shape[1], is_tanh=args.tanh), cross_entropy, kl.Bernoulli(), x, x, args.batch_size
    )
    notes, trainings = [f"torch {torch.__version__}"], {}
    grid_limits = Limits(updates=args.grid_updates, target=args.target)
    for name in args.optimizers:
        optimizer = OPTIMIZERS[name]
        if optimizer.missing:
            notes.append(f"{name} left out: {optimizer.missing}")
            print(notes[-1])
            continue
        settings, lines = tuned(name, problem, optimizer, grid_limits, seed=args.seed)
        notes += lines
        limits = Limits(updates=args.updates, seconds=args.seconds)
        label = f"{name} ({described(settings)})" if lines else name
        trainings[label] = Training(problem, optimizer, settings, limits, seed=args.seed)
    logs = train_in_turn(trainings)
    for name, log in logs.items():
        log.write_csv(args.out / f"{name}.csv")
        notes += [f"{name}: {log.error}"] if log.error else []
    scores = table(logs, args.target, args.seconds)
    print("\n" + scores.to_text())
    scores.write_csv(args.out / "autoencoder.csv")
    (args.out / "autoencoder.md").write_text(scores.to_markdown(title, notes), encoding="utf-8")
    draw(logs, args.target, args.out / "autoencoder.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
