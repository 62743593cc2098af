"""What the inverse of a damped Kronecker block costs: Cholesky against the eigendecomposition.

    python -m experiments.inversion_cost --out experiment-results/inversion_cost

Side by side in one process, for blocks with two factors of one size, and for all layers of a network at once: the damped
inverse by eigendecomposition (`Damping.invert_all`), and solvers by Cholesky (`Damping.solvers`), for all layers together,
each layer by itself, and in float64. Factors are moments of noise with eigenvalues that fall off, damped by factored
Tikhonov. Times are medians over repeats taken in turn, ratios are medians of the ratios run by run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import kronlaplace as kl
from experiments.measure import Run, in_turn, ratio
from kronlaplace.demo.report import Column, Table

COLUMNS = (Column("milliseconds", "milliseconds", 2), Column("time_ratio", "time ratio", 3))
PLAIN = "eigendecomposition"
DAMPING = kl.damping.FactoredTikhonov(1e-3)

RESNET20 = [(16, 27), *[(16, 144)] * 6, (32, 144), *[(32, 288)] * 5, (64, 288), *[(64, 576)] * 5, (10, 65)]
WIDTHS = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
AUTOENCODER = [(q, p + 1) for p, q in pairwise(WIDTHS)]

SHAPES = {
    "100": [(100, 100)],
    "500": [(500, 500)],
    "1000": [(1000, 1000)],
    "resnet20": RESNET20,
    "autoencoder": AUTOENCODER,
}


def moment(n):
    x = torch.randn(2 * n, n) / torch.arange(1, n + 1).sqrt()
    return x.T @ x / len(x)


def blocks_of(factors, dtype=torch.float32):
    """New blocks, which have no decomposition yet."""
    made = {name: [factor.to(dtype) for factor in pair] for name, pair in factors.items()}
    return {name: kl.KroneckerBlock(*pair, name=name) for name, pair in made.items()}


def decomposed(factors):
    return [inverse.weights for inverse in DAMPING.invert_all(blocks_of(factors)).values()]


def one_by_one(factors):
    return [DAMPING.solvers({name: block}) for name, block in blocks_of(factors).items()]


def together(factors, dtype=torch.float32):
    return DAMPING.solvers(blocks_of(factors, dtype))


METHODS = {
    PLAIN: decomposed,
    "Cholesky": together,
    "Cholesky, one by one": one_by_one,
    "Cholesky, float64": partial(together, dtype=torch.float64),
}


def measure(name, device, repeats):
    torch.manual_seed(0)
    factors = {f"{i}": [moment(n).to(device) for n in shape] for i, shape in enumerate(SHAPES[name])}
    calls = {key: partial(method, factors) for key, method in METHODS.items()}
    for call in calls.values():  # warm-up
        call()
    times = in_turn({key: Run(call, repeats) for key, call in calls.items()}, device)
    rows = {key: [1e3 * statistics.median(times[key]), ratio(times[key], times[PLAIN])] for key in METHODS}
    return Table(COLUMNS, {key: np.array([row]) for key, row in rows.items()})


def draw(tables, path):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for j, key in enumerate(METHODS):
        values = [table.scores[key][0, 0] for table in tables.values()]
        axes.bar(np.arange(len(values)) + (j - (len(METHODS) - 1) / 2) * 0.2, values, width=0.2, label=key)
    axes.set_xticks(range(len(tables)), list(tables))
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("experiment-results/inversion_cost"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    tables = {}
    for name in args.shapes:
        tables[name] = table = measure(name, device, args.repeats)
        size = f"two factors of size {name}" if name.isdecimal() else f"{name}, {len(SHAPES[name])} layers"
        title = f"{size}: float32, {device.type}, {torch.get_num_threads()} threads"
        print(f"{title}\n\n{table.to_text()}\n")
        table.write_csv(args.out / f"{name}.csv")
        note = f"torch {torch.__version__}; medians of {args.repeats} repeats in turn; ratios to {PLAIN}"
        (args.out / f"{name}.md").write_text(table.to_markdown(title, [note]), encoding="utf-8")
    draw(tables, args.out / "inversion_cost.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
