"""Many tasks one after another: what does a network forget, with which penalty?

    python -m experiments.continual --out experiment-results/continual
    python -m experiments.continual --problem permuted-mnist --data-dir DATA --out experiment-results/continual_mnist

Each task has the digits' pixels in an order of its own, drawn by the seed, and all tasks share one network, 100-100 ReLU
units and one head of ten classes. Adam with rate 1e-3, started afresh for each task, lowers the mean cross-entropy of the
batch plus the penalty by the number of the task's examples. All runs start from the same weights and see the same batches.
Joint training, the ceiling, goes on with the batches of all tasks so far mixed, for as many epochs; neither it nor "none"
has a penalty.

Every method is run with each strength of the same grid, and the best is the one with the largest average accuracy after the
last task, on test digits: a comparison of what the methods can do, not of what one gets without looking at test digits.
Without a data directory the digits are scikit-learn's, 8x8.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm

import kronlaplace as kl
from experiments.measure import seconds
from kronlaplace.demo.datasets import DATA_VARIABLE, load
from kronlaplace.demo.report import Column, Table

WIDTH = 100
EVALUATION_BATCH = 1000
ESTIMATORS = {"K-FAC": "kfac", "TKFAC": "tkfac", "K-FOC": "kfoc"}
MERGES = [merge.value for merge in (kl.Merge.SUM, kl.Merge.FACTORS, kl.Merge.KFOC)]
NONE, JOINT = "none", "joint"
METHODS = {
    NONE: None,
    "EWC": {"estimator": "diagonal", "mode": "per-task"},
    "online diagonal": {"estimator": "diagonal"},
    **{
        f"{name}, {merge}": {"estimator": estimator, "merge": merge}
        for name, estimator in ESTIMATORS.items()
        for merge in MERGES
    },
    JOINT: None,
}
BY_DEFAULT = (NONE, "EWC", "online diagonal", *(f"K-FAC, {m}" for m in MERGES), "TKFAC, kfoc", "K-FOC, kfoc", JOINT)
STRENGTHS = (3.0, 10.0, 30.0, 100.0)
COLUMNS = (
    Column("strength", "best strength", 2),
    Column("accuracy", "average accuracy"),
    Column("forgetting", "forgetting"),
    Column("bytes", "memory, bytes", 0),
    Column("training_seconds", "seconds of the last task's training", 1),
    Column("consolidation_seconds", "of its consolidation", 3),
)
SERIES = {"accuracy": 4, "forgetting": 4, "bytes": 0, "training_seconds": 1, "consolidation_seconds": 3}
MILESTONES = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Settings:
    """Data set, batch size and epochs of each task."""

    data: str
    title: str
    batch_size: int
    epochs: int


PROBLEMS = {
    "permuted-digits": Settings("digits", "permuted 8x8 digits", 50, 20),
    "permuted-mnist": Settings("mnist", "permuted MNIST", 250, 10),
}


@dataclass(frozen=True)
class Digits:
    """Inputs `(N, pixels)` and labels `(N,)`, and of each task the order of its pixels, `(tasks, pixels)`."""

    x: Tensor
    y: Tensor
    orders: Tensor

    def __len__(self):
        return len(self.x)

    @property
    def bytes_of_a_task(self):
        return self.x.nbytes + self.y.nbytes

    def batch(self, rows):
        """Rows of all tasks' digits one below the other; the pixels are put in order here, since no two tasks share it."""
        task, digit = rows // len(self), rows % len(self)
        return self.x[digit].gather(1, self.orders[task]), self.y[digit]

    def shuffled(self, tasks, batch_size, generator):
        """One epoch of batches of these tasks, mixed."""
        rows = len(self) * tasks.start + torch.randperm(len(self) * len(tasks), generator=generator)
        for part in rows.to(self.x.device).split(batch_size):
            yield self.batch(part)


@dataclass(frozen=True)
class InOrder:
    """The batches of one task, every time in the same order."""

    digits: Digits
    task: int
    batch_size: int

    def __iter__(self):
        n = len(self.digits)
        rows = torch.arange(n * self.task, n * (self.task + 1), device=self.digits.x.device)
        return map(self.digits.batch, rows.split(self.batch_size))

    def __len__(self):
        return -(-len(self.digits) // self.batch_size)


@dataclass
class Run:
    """A sequence of tasks.

    Attributes:
        accuracies: On the test digits of task `j` after task `t`, `(tasks, tasks)`; NaN before it is learned, and after
            the weights have diverged.
        n_bytes: What is kept after each task.
        training_seconds: Seconds of training of each task.
        consolidation_seconds: Seconds of each consolidation.
    """

    accuracies: np.ndarray
    n_bytes: np.ndarray
    training_seconds: np.ndarray
    consolidation_seconds: np.ndarray

    def series(self):
        """By name, a number after each task."""
        return {
            "accuracy": average_accuracy(self.accuracies),
            "forgetting": forgetting(self.accuracies),
            "bytes": self.n_bytes,
            "training_seconds": self.training_seconds,
            "consolidation_seconds": self.consolidation_seconds,
        }


def average_accuracy(accuracies):
    """After each task `t`, the mean over the tasks so far of the accuracy on them then, `(tasks,)`."""
    return np.array([row[: t + 1].mean() for t, row in enumerate(accuracies)])


def forgetting(accuracies):
    """After each task `t`, the mean over the tasks so far of their best accuracy until then minus that then, `(tasks,)`."""
    seen = [accuracies[: t + 1, : t + 1] for t in range(len(accuracies))]
    return np.array([(np.fmax.reduce(rows) - rows[-1]).mean() for rows in seen])


def digits_of(name, data_dir, n_tasks, n_examples, seed, device):
    """Training and test digits with the same orders of pixels."""
    data = load(name, data_dir)
    train_x, test_x = (x.flatten(1).to(device) for x in (data.train_x[:n_examples], data.test_x))
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(train_x.shape[1], generator=generator) for _ in range(n_tasks)]).to(device)
    return Digits(train_x, data.train_y[:n_examples].to(device), orders), Digits(test_x, data.test_y.to(device), orders)


def network(n_pixels, n_classes=10):
    layers = [nn.Linear(n_pixels, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, n_classes))


def accuracy(model, digits, task):
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in InOrder(digits, task, EVALUATION_BATCH)]
    return float(torch.stack(right).sum()) / len(digits)


def diverged(model, batches):
    with torch.no_grad():
        return not torch.stack([model(x).isfinite().all() for x, _ in batches]).all()


def learn(model, digits, tasks, penalty, args, seed):
    """Train on these tasks, mixed; returns the seconds that it took."""
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    generator = torch.Generator().manual_seed(seed)

    def train():
        for _ in range(args.epochs):
            for x, y in digits.shuffled(tasks, args.batch_size, generator):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                if penalty is not None:
                    loss = loss + penalty() / len(digits)
                loss.backward()
                optimizer.step()

    model.train()
    taken = seconds(train, digits.x.device)
    model.eval()
    return taken


def run_sequence(method, strength, train, test, args, bar):
    """Learn all tasks, one after the other, with one method and strength."""
    torch.manual_seed(args.seed)
    model = network(train.x.shape[1]).to(train.x.device)
    options, memory = METHODS[method], None
    if options is not None:
        memory = kl.ContinualLaplace(
            model, "classification", strength=strength, prior_precision=args.prior_precision, **options
        )
    run = Run(np.full((args.tasks, args.tasks), np.nan), *np.full((3, args.tasks), np.nan))
    for t in range(args.tasks):
        tasks = range(t + 1) if method == JOINT else range(t, t + 1)
        penalty = None if memory is None else memory.penalty
        run.training_seconds[t] = learn(model, train, tasks, penalty, args, args.seed + t)
        data = InOrder(train, t, args.fisher_batch_size)
        if diverged(model, data):
            bar.update(args.tasks - t)
            break
        run.n_bytes[t] = train.bytes_of_a_task * (t + 1) if method == JOINT else 0
        if memory is not None:
            run.consolidation_seconds[t] = seconds(
                lambda data=data: memory.consolidate(data, sampling=args.sampling), train.x.device
            )
            run.n_bytes[t] = memory.n_bytes
        run.accuracies[t, : t + 1] = [accuracy(model, test, task) for task in range(t + 1)]
        bar.update()
    return run


def runs_of(train, test, args):
    """By method and strength; methods without a penalty have strength 0."""
    todo = [(m, s) for m in args.methods for s in (args.strengths if METHODS[m] is not None else [0.0])]
    runs = {}
    with tqdm(total=len(todo) * args.tasks, desc="tasks", disable=None) as bar:
        for method, strength in todo:
            bar.set_postfix_str(f"{method}, strength {strength:g}")
            runs[method, strength] = run_sequence(method, strength, train, test, args, bar)
            write_accuracies(runs, args.out / "accuracies.csv")
    return runs


def best_of(runs):
    """By method, the strength with the largest average accuracy after the last task, and its run; diverged ones last."""
    best = {}
    for (method, strength), run in runs.items():
        last = average_accuracy(run.accuracies)[-1]
        score = -np.inf if np.isnan(last) else last
        if method not in best or score > best[method][0]:
            best[method] = score, strength, run
    return {method: (strength, run) for method, (_, strength, run) in best.items()}


def grid_lines(runs, best):
    """For each method with a penalty, its average accuracy after the last task with each strength."""
    lines = []
    for method, (chosen, _) in best.items():
        if METHODS[method] is None:
            continue
        last = {s: average_accuracy(run.accuracies)[-1] for (m, s), run in runs.items() if m == method}
        edge = ", at the edge of the grid" if len(last) > 1 and chosen in (min(last), max(last)) else ""
        values = ", ".join(f"{strength:g}: {value:.4f}" for strength, value in last.items())
        lines.append(f"{method}, average accuracy by strength: {values}; best {chosen:g}{edge}")
    return lines


def tables_of(best, n_tasks):
    """The state after the last task, and by name the series after some numbers of tasks."""
    last = {}
    for method, (strength, run) in best.items():
        end = [values[-1] for values in run.series().values()]
        last[method] = np.array([[strength if METHODS[method] is not None else np.nan, *end]])
    shown = [t for t in MILESTONES if t < n_tasks] + [n_tasks]
    by_tasks = {}
    for name, decimals in SERIES.items():
        columns = tuple(Column(f"after_{t}", f"after {t}", decimals) for t in shown)
        rows = {method: run.series()[name][None, [t - 1 for t in shown]] for method, (_, run) in best.items()}
        by_tasks[name] = Table(columns, rows)
    return Table(COLUMNS, last), by_tasks


def write_accuracies(runs, path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "strength", "tasks", "task", "accuracy"])
        for (method, strength), run in runs.items():
            for t, row in enumerate(run.accuracies):
                writer.writerows([method, f"{strength:g}", t + 1, j + 1, f"{row[j]:.6g}"] for j in range(t + 1))


def write_tasks(runs, path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "strength", "tasks", *SERIES])
        for (method, strength), run in runs.items():
            for t, values in enumerate(zip(*run.series().values(), strict=True)):
                writer.writerow([method, f"{strength:g}", t + 1, *(f"{value:.9g}" for value in values)])


def draw(best, path, title):
    figure = Figure(figsize=(14, 4), layout="constrained")
    labels = {
        "accuracy": "average test accuracy",
        "forgetting": "forgetting",
        "bytes": "memory, bytes",
        "consolidation_seconds": "seconds of a consolidation",
    }
    colors = dict(zip(METHODS, colormaps["tab20"].colors, strict=False))
    for axes, (name, label) in zip(figure.subplots(1, len(labels)), labels.items(), strict=True):
        for method, (_, run) in best.items():
            values = run.series()[name]
            style = {NONE: ("0.6", "-"), JOINT: ("black", "--")}.get(method, (colors[method], "-"))
            axes.plot(range(1, len(values) + 1), values, color=style[0], linestyle=style[1], marker=".", label=method)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("tasks learned")
        axes.grid(linewidth=0.3)
        if name == "bytes":
            axes.set_yscale("symlog", linthresh=1e4)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="permuted-digits")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get(DATA_VARIABLE))
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(BY_DEFAULT))
    parser.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS), help="of every penalty")
    parser.add_argument("--examples", type=int, help="of a task, the first training digits; all without it")
    parser.add_argument("--epochs", type=int, help="of each task; without it 20 for the 8x8 digits, 10 for MNIST")
    parser.add_argument("--batch-size", type=int, help="without it 50 for the 8x8 digits, 250 for MNIST")
    parser.add_argument("--fisher-batch-size", type=int, default=250)
    parser.add_argument(
        "--sampling", choices=[sampling.value for sampling in kl.Sampling], default="exact", help="of the Fisher"
    )
    parser.add_argument("--prior-precision", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and orders of pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("experiment-results/continual"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    start, settings = time.perf_counter(), PROBLEMS[args.problem]
    args.epochs, args.batch_size = args.epochs or settings.epochs, args.batch_size or settings.batch_size
    train, test = digits_of(settings.data, args.data_dir, args.tasks, args.examples, args.seed, args.device)
    title = (
        f"{args.tasks} tasks of {settings.title}: {len(train):,} training and {len(test):,} test digits each, "
        f"{args.epochs} epochs in batches of {args.batch_size}, {train.x.device.type}, {args.threads} threads"
    )
    print(title)
    runs = runs_of(train, test, args)
    best = best_of(runs)
    last, by_tasks = tables_of(best, args.tasks)
    notes = [
        *grid_lines(runs, best),
        "forgetting: mean over the tasks of their best accuracy minus that after the last task",
        "memory: weights and curvature that the penalty needs; of joint training the data",
        f"Fisher: sampling={args.sampling!r}, batches of {args.fisher_batch_size}; prior precision {args.prior_precision:g}",
        f"torch {torch.__version__}, seed {args.seed}",
    ]
    print(f"\n{last.to_text()}\n\n" + "\n".join(f"  {note}" for note in notes))
    markdown = last.to_markdown(title, notes)
    for name, table in by_tasks.items():
        heading = f"{name.replace('_', ' ')}, by number of tasks"
        print(f"\n{heading}\n\n{table.to_text()}")
        markdown += "\n" + table.to_markdown(heading)
    last.write_csv(args.out / "continual.csv")
    (args.out / "continual.md").write_text(markdown, encoding="utf-8")
    write_tasks(runs, args.out / "tasks.csv")
    draw(best, args.out / "continual.png", title)
    print(f"\n{time.perf_counter() - start:.0f} s; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
