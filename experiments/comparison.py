"""A comparison of optimizers on one problem: grids, trainings in turn, logs, table and plot."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.arguments import add_machine, prepare_machine
from experiments.training import Limits, Training, described, train_in_turn, tuned
from kronlaplace.demo.datasets import DATA_VARIABLE
from kronlaplace.demo.report import Column, Table


def add_arguments(parser, optimizers, out, *, target, seconds=math.inf, updates=math.inf, grid_updates=100):
    """Add the options that the comparisons share."""
    parser.add_argument("--data-dir", type=Path, default=os.environ.get(DATA_VARIABLE))
    parser.add_argument("--optimizers", nargs="+", choices=optimizers, default=list(optimizers))
    parser.add_argument("--target", type=float, default=target, help="of what is plotted")
    parser.add_argument("--seconds", type=float, default=seconds, help="wall clock of each training at most")
    parser.add_argument("--updates", type=float, default=updates, help="of each training at most")
    parser.add_argument("--grid-updates", type=int, default=grid_updates, help="of each training of a grid at most")
    parser.add_argument("--stop-at-target", action="store_true", help="end a training once it has reached the target")
    parser.add_argument("--score-every", type=int, default=10, help="updates between evaluations, where there are any")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    add_machine(parser, out)


@dataclass(frozen=True)
class Measure:
    """What is compared: its name, the optimizer to whose time others are related, decimals, limits of the plot."""

    name: str
    reference: str
    decimals: int = 2
    limits: tuple[float, float] | None = None


def table(logs, names, measure, target, seconds):
    """The table of logs by label; `names` has the optimizer of each label."""
    columns = (
        Column("updates", f"updates to {target:g}", 0),
        Column("seconds", f"seconds to {target:g}", 1),
        Column("ratio", f"to {measure.reference}", 2),
        Column(
            "last", f"{measure.name} {f'after {seconds:g} s' if seconds < math.inf else 'at the end'}", measure.decimals
        ),
        Column("ms", "ms an update", 0),
    )
    reference = min(
        (log.reached(target)[1] for label, log in logs.items() if names[label] == measure.reference), default=math.inf
    )
    reference = reference if reference < math.inf else math.nan
    rows = {}
    for label, log in logs.items():
        updates, to_target = log.reached(target)
        median = 1e3 * float(np.median(np.diff(log.seconds, prepend=0.0))) if log.seconds else math.nan
        rows[label] = np.array([[updates, to_target, to_target / reference, log.after(seconds), median]])
    return Table(columns, rows)


def draw(logs, measure, target, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_update, by_second = figure.subplots(1, 2, sharey=True)
    for label, log in logs.items():
        updates, values = list(log.curve()), list(log.curve().values())
        by_update.plot(updates, values, label=label, linewidth=1)
        by_second.plot([log.seconds[k - 1] for k in updates], values, linewidth=1)
    for axes, label in ((by_update, "update"), (by_second, "seconds")):
        axes.set_xlabel(label)
        axes.axhline(target, color="0.6", linewidth=0.8)
    by_update.set_ylabel(measure.name)
    by_update.set_ylim(measure.limits)
    by_update.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def compare(problem, optimizers, measure, args):
    """Tune and train the optimizers, print the table, and write it with logs and plot to the folder `args.out`."""
    prepare_machine(args)
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer of a process imports much, for which none should pay
    title = f"{problem.title}, batches of {problem.batch_size}, {problem.x.device.type}, {args.threads} threads"
    print(title)
    notes, trainings, names = [f"torch {torch.__version__}, seed {args.seed}"], {}, {}
    target = args.target if args.stop_at_target else -math.inf
    limits = Limits(updates=args.updates, seconds=args.seconds, target=target)
    options = {"seed": args.seed, "score_every": args.score_every}
    for name in args.optimizers:
        optimizer = optimizers[name]
        if optimizer.missing:
            notes.append(f"{name} left out: {optimizer.missing}")
            print(notes[-1])
            continue
        settings, lines = tuned(
            name, problem, optimizer, Limits(updates=args.grid_updates, target=args.target), **options
        )
        notes += lines
        label = f"{name} ({described(settings)})" if lines else name
        names[label] = name
        trainings[label] = Training(problem, optimizer, settings, limits, **options)
    logs = train_in_turn(trainings)
    for label, log in logs.items():
        log.write_csv(args.out / f"{names[label]}.csv")
        notes += [f"{label}: {log.error}"] if log.error else []
    scores = table(logs, names, measure, args.target, args.seconds)
    print(f"\n{scores.to_text()}\n")
    scores.write_csv(args.out / "comparison.csv")
    (args.out / "comparison.md").write_text(scores.to_markdown(title, notes), encoding="utf-8")
    draw(logs, measure, args.target, args.out / "comparison.png")
    return logs
