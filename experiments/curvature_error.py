"""How near each estimator comes to the Fisher's blocks: relative Frobenius errors on real networks.

    python -m experiments.curvature_error --data-dir DATA --out experiment-results/curvature_error

The protocol of the K-FOC paper (section 4): one hidden layer of 50 ReLU units on Boston, Concrete and Energy, and the two
convolutions of LeNet-5 on MNIST. For every example one label is drawn from the network's predictive distribution, once, so
that all estimates and the exact block are of the same gradients (they go in as `sampling="empirical"`). Errors are of both
layers of the tables' networks and of both convolutions. `running` and `approx` are K-FOC's aggregations of batches, here in
batches of 1, 10, 100 and all; no other estimate depends on batches. `approx` gives unit norm to the gradient factors, as the
paper does, or to the activation factors.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm

import kronlaplace as kl
from kronlaplace.demo.datasets import load
from kronlaplace.demo.networks import lenet5
from kronlaplace.demo.report import Column, Table

TABLES = ("boston", "concrete", "energy")
BATCH_FREE = {
    "diagonal": kl.Diagonal(),
    "SUA": kl.SUA(),
    "K-FAC": kl.KFAC(),
    "TKFAC, uncorrelated": kl.TKFAC(spatial="uncorrelated"),
    "TKFAC": kl.TKFAC(),
    "K-FOC, two sweeps": kl.KFOC(),
    "K-FOC, three sweeps": kl.KFOC(sweeps=3),
    "best Kronecker product": kl.KFOC(aggregation="full"),
    "EKFAC on K-FAC": kl.EKFAC(),
    "EKFAC on K-FOC": kl.EKFAC(kl.KFOC()),
}
BATCHED = {
    "K-FOC, approx": kl.KFOC(aggregation="approx"),
    "K-FOC, approx, unit activation factors": kl.KFOC(aggregation="approx", unit_factor="activation"),
    "K-FOC, running": kl.KFOC(aggregation="running"),
    "K-FOC, running, rank 8": kl.KFOC(aggregation="running", rank=8),
}


def table_problem(name, data_dir, seed, steps):
    split = load(name, data_dir, seed=seed).split(0)
    x, y = split.train_x, split.train_y
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 50), nn.ReLU(), nn.Linear(50, 1))
    train(model, x, y, F.mse_loss, steps)
    with torch.no_grad():
        y = torch.normal(model(x), 1.0)
    return model, x, y, "regression", ["0", "2"], (1, 10, 100, len(x))


def lenet_problem(data_dir, seed, n):
    mnist = load("mnist", data_dir, seed=seed)
    torch.manual_seed(seed)
    model = lenet5()
    train(model, mnist.train_x, mnist.train_y, F.cross_entropy, 500)
    x = mnist.train_x[:n]
    with torch.no_grad():
        y = torch.distributions.Categorical(logits=model(x)).sample()
    return model, x, y, "classification", ["0", "3"], (10, 100, n)


def train(model, x, y, loss, steps, batch_size=100):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,))
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def errors(problem, estimator, batch_size):
    model, x, y, likelihood, layers, _ = problem
    data = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    fisher = kl.estimate_fisher(model, data, likelihood, estimator, sampling="empirical", layers=layers)
    return list(kl.relative_error(fisher, model, data, max_dense=5000).values())


def rows_of(problem):
    """By method: the errors of the problem's layers."""
    sizes = problem[-1]
    rows = {name: errors(problem, estimator, sizes[-1]) for name, estimator in tqdm(BATCH_FREE.items(), leave=False)}
    for name, estimator in BATCHED.items():
        for size in tqdm(sizes, desc=name, leave=False):
            label = "all" if size == sizes[-1] else size
            rows[f"{name}, batches of {label}"] = errors(problem, estimator, size)
    return rows


def draw(table, path):
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    names = list(table.scores)
    for j, column in enumerate(table.columns):
        axes.plot([scores[0, j] for scores in table.scores.values()], range(len(names)), "o", label=column.heading)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", linewidth=0.3)
    axes.set_xlabel("relative Frobenius error of the layer's block")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="training steps on the tables")
    parser.add_argument("--digits", type=int, default=2000, help="MNIST digits that the Fisher is estimated on")
    parser.add_argument("--out", type=Path, default=Path("experiment-results/curvature_error"))
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="sampling=.empirical.")  # the labels are drawn from the network
    args.out.mkdir(parents=True, exist_ok=True)
    problems = {name: table_problem(name, args.data_dir, args.seed, args.steps) for name in TABLES}
    problems["LeNet-5"] = lenet_problem(args.data_dir, args.seed, args.digits)
    columns, by_problem = [], []
    for name, problem in problems.items():
        layers = problem[4]
        columns += [Column(f"{name} {layer}", f"{name}, layer {i}") for i, layer in enumerate(layers, start=1)]
        by_problem.append((rows_of(problem), len(layers)))
    methods = list(dict.fromkeys(method for rows, _ in by_problem for method in rows))
    scores = {
        method: np.array([[value for rows, n in by_problem for value in rows.get(method, [np.nan] * n)]])
        for method in methods
    }
    table = Table(columns, scores)
    title = f"relative error of the blocks; seed {args.seed}, {args.steps} training steps, {args.digits} digits"
    print(f"{title}\n\n{table.to_text()}\n")
    table.write_csv(args.out / "curvature_error.csv")
    (args.out / "curvature_error.md").write_text(table.to_markdown(title), encoding="utf-8")
    draw(table, args.out / "curvature_error.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
