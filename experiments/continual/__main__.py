"""The command line; the package's docstring describes the experiment."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

import kronlaplace as kl
from experiments import continual
from experiments.arguments import add_machine, prepare_machine
from experiments.continual.files import ChangedSettingsError, RunFiles, prepare_folder
from experiments.continual.methods import BY_DEFAULT, METHODS, STRENGTHS, SYNAPTIC, has_grid, has_penalty
from experiments.continual.problems import HEADS, PROBLEMS, images, problem_of
from experiments.continual.report import (
    best_of,
    draw,
    grid_lines,
    growth_lines,
    tables_of,
    write_accuracies,
    write_tasks,
)
from experiments.continual.sequence import run_sequence
from kronlaplace.demo.datasets import DATA_VARIABLE

RATES = {"adam": 1e-3, "natural-gradient": 1.0}
NOT_SETTINGS = ("data_dir", "methods", "strengths", "seeds", "out", "fresh")


def arguments(argv):
    parser = argparse.ArgumentParser(description=continual.__doc__.split("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="permuted-digits")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get(DATA_VARIABLE))
    parser.add_argument(
        "--heads", choices=HEADS, help="without it one for each task of split problems, and else shared"
    )
    parser.add_argument("--tasks", type=int, help="without it 10 permuted ones, or all five of split problems")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(BY_DEFAULT))
    parser.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS), help="of every penalty")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights, batches and orders of pixels")
    parser.add_argument("--examples", type=int, help="of a task, its first training images; all without it")
    parser.add_argument("--epochs", type=int, help="of each task; without it 10 for MNIST, 20 for the others")
    parser.add_argument("--batch-size", type=int, help="without it 50 for 8x8 digits, 250 for MNIST, 100 for CIFAR-10")
    parser.add_argument("--fisher-batch-size", type=int, default=250)
    parser.add_argument(
        "--sampling", choices=[sampling.value for sampling in kl.Sampling], default="exact", help="of the Fisher"
    )
    parser.add_argument("--prior-precision", type=float, default=1.0)
    parser.add_argument("--optimizer", choices=RATES, default="adam")
    parser.add_argument("--lr", type=float, help="at the beginning of a task; without it 1e-3 for Adam, else 1")
    parser.add_argument("--fresh", action="store_true", help="delete the runs in the folder, and start anew")
    add_machine(parser, "continual")
    args = parser.parse_args(argv)
    problem = PROBLEMS[args.problem]
    for name in ("heads", "tasks", "epochs", "batch_size"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(problem, name))
    args.lr = RATES[args.optimizer] if args.lr is None else args.lr
    if args.tasks < 1 or (problem.most_tasks and args.tasks > problem.most_tasks):
        parser.error(f"--tasks {args.tasks}: {args.problem} has 1 to {problem.most_tasks or 'any number of'} tasks")
    if args.optimizer == "natural-gradient" and SYNAPTIC in args.methods:
        parser.error(f"{SYNAPTIC} has no curvature that natural gradients know: leave it out of --methods, or use Adam")
    return parser, args


def settings_of(args):
    """Everything that changes the numbers of a run, but for what names it: method, strength, and seed."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    return settings | {"torch": torch.__version__, "kronlaplace": kl.__version__}


def runs_of(data, args, folder):
    """By method and strength a run for each seed; methods for which none is tried have 0, or 1 to begin with."""
    todo = [(m, s) for m in args.methods for s in (args.strengths if has_grid(m) else [float(has_penalty(m))])]
    runs = {key: [] for key in todo}
    with tqdm(total=len(todo) * len(args.seeds) * args.tasks, desc="tasks", disable=None) as bar:
        for seed in args.seeds:
            problem = problem_of(PROBLEMS[args.problem], data, args.heads, args.tasks, args.examples, seed)
            for method, strength in todo:
                bar.set_postfix_str(f"seed {seed}, {method}, strength {strength:g}")
                files = RunFiles.of(folder, method, strength, seed)
                runs[method, strength].append(run_sequence(problem, method, strength, seed, args, files, bar.update))
    return runs


def title_of(args, problem):
    train, test = ([len(rows) for rows in tasks.rows] for tasks in (problem.train, problem.test))
    sizes = [f"{min(n):,}" if min(n) == max(n) else f"{min(n):,} to {max(n):,}" for n in (train, test)]
    heads = "one head for all" if args.heads == "shared" else "a head for each"
    return (
        f"{args.tasks} tasks of {PROBLEMS[args.problem].title}, {heads}: {sizes[0]} training and {sizes[1]} test images "
        f"each, {args.epochs} epochs of {args.optimizer} in batches of {args.batch_size}, {args.device}, "
        f"{args.threads} threads"
    )


def main(argv=None):
    parser, args = arguments(argv)
    prepare_machine(args)
    start, settings = time.perf_counter(), PROBLEMS[args.problem]
    try:
        folder = prepare_folder(args.out, settings_of(args), args.fresh)
    except ChangedSettingsError as error:
        parser.error(str(error))
    data = images(settings.data, args.data_dir, args.device)
    title = title_of(args, problem_of(settings, data, args.heads, args.tasks, args.examples, args.seeds[0]))
    print(title)
    runs = runs_of(data, args, folder)
    best = best_of(runs)
    last, by_tasks = tables_of(best, args.tasks)
    seeds = ", ".join(map(str, args.seeds))
    notes = [
        *grid_lines(runs, best),
        *growth_lines(best),
        "forgetting: mean over the tasks of their best accuracy minus that after the last task",
        "memory: weights and curvature that the penalty needs; of joint training the data",
        f"Fisher: sampling={args.sampling!r}, batches of {args.fisher_batch_size}; prior precision {args.prior_precision:g}",
        "-: has none, or has diverged",
        f"torch {torch.__version__}, seed {seeds}"
        if len(args.seeds) == 1
        else f"torch {torch.__version__}, seeds {seeds}: mean ± standard error",
    ]
    print(f"\n{last.to_text()}\n\n" + "\n".join(f"  {note}" for note in notes))
    markdown = last.to_markdown(title, notes)
    for name, table in by_tasks.items():
        heading = f"{name.replace('_', ' ')}, by number of tasks"
        print(f"\n{heading}\n\n{table.to_text()}")
        markdown += "\n" + table.to_markdown(heading)
    last.write_csv(args.out / "continual.csv")
    (args.out / "continual.md").write_text(markdown, encoding="utf-8")
    write_accuracies(runs, args.seeds, args.out / "accuracies.csv")
    write_tasks(runs, args.seeds, args.out / "tasks.csv")
    draw(best, args.out / "continual.png", title)
    print(f"\n{time.perf_counter() - start:.0f} s; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
