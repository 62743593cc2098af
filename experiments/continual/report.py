"""Tables, files, and the plot of an experiment with many tasks."""

from __future__ import annotations

import csv

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.continual.methods import BY_EVIDENCE, JOINT, METHODS, NONE, has_grid, has_penalty
from experiments.continual.sequence import average_accuracy
from kronlaplace.demo.report import Column, Table, mean_and_error

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
FLAT = 5


def last_accuracy(runs):
    """Average accuracy after the last task, a mean over the seeds; NaN if one has diverged."""
    return float(np.mean([average_accuracy(run.accuracies)[-1] for run in runs]))


def best_of(runs):
    """By method, the strength with the largest average accuracy after the last task, and its runs; diverged ones last."""
    best = {}
    for (method, strength), seeds in runs.items():
        last = last_accuracy(seeds)
        score = -np.inf if np.isnan(last) else last
        if method not in best or score > best[method][0]:
            best[method] = score, strength, seeds
    return {method: (strength, seeds) for method, (_, strength, seeds) in best.items()}


def grid_lines(runs, best):
    """For each method with a grid of strengths, its average accuracy after the last task with each of them."""
    lines = []
    for method, (chosen, _) in best.items():
        if not has_grid(method):
            continue
        last = {s: last_accuracy(seeds) for (m, s), seeds in runs.items() if m == method}
        edge = ", at the edge of the grid" if len(last) > 1 and chosen in (min(last), max(last)) else ""
        values = ", ".join(f"{strength:g}: {value:.4f}" for strength, value in last.items())
        lines.append(f"{method}, average accuracy by strength: {values}; best {chosen:g}{edge}")
    return lines


def growth_lines(best):
    """For each method with a penalty, how memory and time of a task have grown from the second on.

    Times are medians of the first and the last five tasks after the first.
    """
    lines = []
    for method, (_, seeds) in best.items():
        n_tasks = len(seeds[0].n_bytes)
        if not has_penalty(method) or n_tasks < 3:
            continue
        n = min(FLAT, (n_tasks - 1) // 2)
        memory = np.mean([run.n_bytes[-1] / run.n_bytes[1] for run in seeds])
        training, consolidation = (
            np.mean([np.median(times[-n:]) / np.median(times[1 : n + 1]) for times in by_seed])
            for by_seed in ([run.training_seconds for run in seeds], [run.consolidation_seconds for run in seeds])
        )
        lines.append(
            f"{method}, from task 2 to task {n_tasks}: memory x{memory:.2f}, training x{training:.2f}, consolidation "
            f"x{consolidation:.2f}"
        )
    return lines


def tables_of(best, n_tasks):
    """The state after the last task, and by name the series after some numbers of tasks; a row of scores for each seed."""
    last = {}
    for method, (strength, seeds) in best.items():
        ends = [[values[-1] for values in run.series().values()] for run in seeds]
        last[method] = np.array([[strength if has_grid(method) else np.nan, *end] for end in ends])
    shown = [t for t in MILESTONES if t < n_tasks] + [n_tasks]
    by_tasks = {}
    for name, decimals in SERIES.items():
        columns = tuple(Column(f"after_{t}", f"after {t}", decimals) for t in shown)
        rows = {
            m: np.array([run.series()[name] for run in seeds])[:, np.array(shown) - 1] for m, (_, seeds) in best.items()
        }
        by_tasks[name] = Table(columns, rows)
    return Table(COLUMNS, last), by_tasks


def write_accuracies(runs, seeds, path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "strength", "seed", "tasks", "task", "accuracy"])
        for method, strength, seed, run in _rows(runs, seeds):
            for t, row in enumerate(run.accuracies):
                writer.writerows([method, strength, seed, t + 1, j + 1, f"{row[j]:.6g}"] for j in range(t + 1))


def write_tasks(runs, seeds, path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "strength", "seed", "tasks", *SERIES])
        for method, strength, seed, run in _rows(runs, seeds):
            for t, values in enumerate(zip(*run.series().values(), strict=True)):
                writer.writerow([method, strength, seed, t + 1, *(f"{value:.9g}" for value in values)])


def _rows(runs, seeds):
    for (method, strength), by_seed in runs.items():
        for seed, run in zip(seeds, by_seed, strict=True):
            yield method, f"{strength:g}", seed, run


def draw(best, path, title):
    """Plot means over the seeds, with their standard errors if there are several."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    labels = {
        "accuracy": "average test accuracy",
        "forgetting": "forgetting",
        "bytes": "memory, bytes",
        "consolidation_seconds": "seconds of a consolidation",
    }
    with_grid = [method for method in METHODS if has_grid(method)]
    styles = {method: (color, "-") for method, color in zip(with_grid, colormaps["tab20"].colors, strict=False)}
    styles |= {name: (styles[name.removesuffix(BY_EVIDENCE)][0], ":") for name in METHODS if name.endswith(BY_EVIDENCE)}
    styles |= {NONE: ("0.6", "-"), JOINT: ("black", "--")}
    for axes, (name, label) in zip(figure.subplots(1, len(labels)), labels.items(), strict=True):
        for method, (_, seeds) in best.items():
            values = np.array([run.series()[name] for run in seeds])
            mean, error = np.array([mean_and_error(column) for column in values.T]).T
            tasks = range(1, len(mean) + 1)
            color, line = styles[method]
            axes.plot(tasks, mean, color=color, linestyle=line, marker=".", label=method)
            if len(seeds) > 1:
                axes.fill_between(tasks, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("tasks learned")
        axes.grid(linewidth=0.3)
        if name == "bytes":
            axes.set_yscale("symlog", linthresh=1e4)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
