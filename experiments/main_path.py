"""Does the library help by itself? Its defaults on networks as people train them, beside laplace-torch and others.

    python -m experiments.main_path --data-dir DATA --out experiment-results/main_path

All methods predict with the same networks, those of `experiments.classification_tasks`; no validation data, no option set.
Temperature scaling holds out a tenth of the training data: its network is trained without them and its temperature fitted to
them. The ensemble averages the probabilities of five networks; the ensembles of neighboring seeds share networks where the
split is the same. laplace-torch runs with its defaults, and over all layers with `subset_of_weights="all"`; it has no
likelihood of one logit, so that there the last layer gets two outputs whose difference is the logit. What would take longer
than `--minutes` to predict is left out, and the table says so.

Seconds are of fit, tune, and prediction of the test and the foreign data, without the training of networks. `--out` has a
CSV for each data set with the rows of every seed; what is measured again replaces its rows there, and the tables are of all
rows in the folder. Trained networks are kept in `--cache`.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from experiments.classification_tasks import TASKS
from experiments.main_path_methods import MAP, METHODS, N_ENSEMBLE, TEMPERATURES, Problem, of_both_classes
from kronlaplace import metrics
from kronlaplace.demo.report import Column, Table

SCORES = (
    Column("accuracy", "accuracy"),
    Column("confidence", "confidence"),
    Column("nll", "NLL"),
    Column("ece", "ECE"),
    Column("brier", "Brier"),
    Column("auroc", "AUROC"),
    Column("seconds", "seconds", 2),
)
AGAINST_MAP = ("nll_ratio", "ece_change", "auroc_change")
PREDICT_BATCH = 100
NLL_BOUND, ECE_BOUND, OVERCONFIDENT = 1.05, 0.01, 0.03


@dataclass(frozen=True)
class Row:
    """A method's scores at one seed, in the order of `SCORES`, and what there is to say."""

    scores: tuple[float, ...]
    remark: str = ""


# -- measuring ----------------------------------------------------------------------------------------------------


class TooLongError(Exception):
    """Predictions would take too long."""


def in_chunks(predict, x, limit):
    """Probabilities of all classes; `limit` is in seconds."""
    chunks, parts = x.split(PREDICT_BATCH), []
    start = time.perf_counter()
    for i, chunk in enumerate(chunks):
        parts.append(of_both_classes(predict(chunk)))
        expected = (time.perf_counter() - start) * len(chunks) / (i + 1)
        if i == min(2, len(chunks) - 1) and expected > limit:
            raise TooLongError(f"left out: predicting {len(x):,} inputs would take about {expected / 60:.0f} minutes")
    return np.concatenate(parts)


def measured(method, problem, limit):
    """The row of a method."""
    networks, make = METHODS[method]
    models = networks(problem)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        predict = make(models, problem)
        try:
            inside, outside = (in_chunks(predict, x, limit) for x in (problem.data.test_x, problem.data.foreign_x))
        except TooLongError as error:
            return Row((math.nan,) * len(SCORES), str(error))
        seconds = time.perf_counter() - start
    own = {str(warning.message) for warning in caught if "kronlaplace" in method and warning.category is UserWarning}
    labels = problem.data.test_y.numpy()
    scores = (
        metrics.accuracy(inside, labels),
        float(inside.max(axis=1).mean()),
        metrics.negative_log_likelihood(inside, labels),
        metrics.expected_calibration_error(inside, labels),
        metrics.brier_score(inside, labels),
        metrics.ood_auroc(metrics.predictive_entropy(inside), metrics.predictive_entropy(outside)),
        seconds,
    )
    return Row(scores, "; ".join(sorted(own)))


# -- files and tables -----------------------------------------------------------------------------------------------


def read_rows(path):
    """By method and seed: rows."""
    if not path.exists():
        return {}
    rows = {}
    with path.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            scores = tuple(float(line[column.key]) for column in SCORES)
            rows.setdefault(line["method"], {})[int(line["seed"])] = Row(scores, line["remark"])
    return rows


def write_rows(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *(column.key for column in SCORES), *AGAINST_MAP, "remark"])
        for method in sorted(rows, key=list(METHODS).index):
            for seed, row in sorted(rows[method].items()):
                numbers = (*row.scores, *against_map(row.scores, rows[MAP][seed].scores))
                writer.writerow([method, seed, *(f"{value:.6g}" for value in numbers), row.remark])


def score(scores, key):
    return scores[[column.key for column in SCORES].index(key)]


def against_map(scores, of_map):
    return (
        score(scores, "nll") / score(of_map, "nll"),
        score(scores, "ece") - score(of_map, "ece"),
        score(scores, "auroc") - score(of_map, "auroc"),
    )


def if_fewer(rows, method):
    """How many seeds a method has, if fewer than the MAP."""
    n, of_map = len(rows[method]), len(rows[MAP])
    return "" if n == of_map else f" (first {n} of {of_map} seeds)"


def table_of(rows):
    by_name = {method + if_fewer(rows, method): list(by_seed.values()) for method, by_seed in rows.items()}
    return Table(SCORES, {name: np.array([row.scores for row in lines]) for name, lines in by_name.items()})


@dataclass(frozen=True)
class Comparison:
    """Means over seeds against those of the MAP with the same seeds, and the scores whose bounds are missed."""

    nll_ratio: float
    ece_change: float
    auroc_change: float
    missed: tuple[str, ...]

    def __str__(self):
        verdict = f"misses {', '.join(self.missed)}" if self.missed else "met"
        return f"{self.nll_ratio:.3f}, {self.ece_change:+.4f}, {self.auroc_change:+.4f}: {verdict}"


def compared(rows, method):
    """The comparison of a method, None where it was left out."""
    scores = np.array([row.scores for row in rows[method].values()])
    of_map = np.array([rows[MAP][seed].scores for seed in rows[method]])
    if np.isnan(scores).any():
        return None
    base = of_map.mean(axis=0)
    ratio, ece, auroc = against_map(scores.mean(axis=0), base)
    overconfident = score(base, "ece") > OVERCONFIDENT and score(base, "confidence") > score(base, "accuracy")
    below = {key: (score(scores.T, key) < score(of_map.T, key)).all() for key in ("nll", "ece")}
    misses = {
        "NLL": ratio > NLL_BOUND or (overconfident and not below["nll"]),
        "ECE": ece > ECE_BOUND or (overconfident and not below["ece"]),
        "AUROC": auroc <= 0,
    }
    return Comparison(ratio, ece, auroc, tuple(name for name, is_missed in misses.items() if is_missed))


def bounds_table(results):
    """Markdown: a row for each method, a column for each data set."""
    methods = [method for method in METHODS if method != MAP and any(method in rows for rows in results.values())]
    lines = [["", *results], ["---"] * (len(results) + 1)]
    for method in methods:
        cells = []
        for rows in results.values():
            comparison = compared(rows, method) if method in rows else None
            cells.append("" if comparison is None else f"{comparison}{if_fewer(rows, method)}")
        lines.append([method, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


NOTES = (
    "Laplace: fit, tune, and predict; no validation data. kronlaplace, no option set: "
    "`KronLaplace(model, likelihood).fit(loader).tune().predict(x)`",
    "laplace-torch, no option set: `Laplace(model, 'classification')`, `fit`, `optimize_prior_precision()`: last layer, "
    "K-FAC, evidence, probit",
    f"temperature scaling: a tenth of the training data held out, temperatures from {TEMPERATURES[0]:g} to "
    f"{TEMPERATURES[1]:g}",
    f"ensemble: mean probability of {N_ENSEMBLE} networks, where the split is the same shared by neighboring seeds",
    "NLL in nats; ECE of the top label in 15 bins of equal width; Brier summed over classes; AUROC: foreign against test "
    "inputs by predictive entropy; confidence: mean probability of the top label",
    "seconds: fit, tune, and prediction of test and foreign inputs, without the training of networks",
)
BOUNDS = (
    "Means over seeds against the MAP's: ratio of NLL, difference of ECE, difference of AUROC. The bounds: NLL at most "
    f"{NLL_BOUND:g} times the MAP's, ECE at most {ECE_BOUND:g} above it, AUROC above it; where the MAP is overconfident "
    f"(ECE above {OVERCONFIDENT:g}), NLL and ECE below it with every seed."
)


def report(results, folder):
    """Print the tables and write them as Markdown."""
    parts = []
    for name, rows in results.items():
        table = table_of(rows)
        remarks = [
            f"{method}, seed {seed}: {row.remark}"
            for method, by_seed in rows.items()
            for seed, row in by_seed.items()
            if row.remark
        ]
        print(f"{TASKS[name].title}\n\n{table.to_text()}\n" + "".join(f"\n  {remark}" for remark in remarks) + "\n")
        parts.append(table.to_markdown(TASKS[name].title, remarks))
    bounds = bounds_table(results)
    print(f"{BOUNDS}\n\n{bounds}")
    parts.append(f"# Bounds\n\n{BOUNDS}\n\n{bounds}\n")
    parts.append("# Notes\n\n" + "\n".join(f"- {note}" for note in NOTES) + "\n")
    (folder / "main_path.md").write_text("\n".join(parts), encoding="utf-8")


def first_of(data, n):
    """The data with the first `n` test and foreign inputs."""
    return replace(data, test_x=data.test_x[:n], test_y=data.test_y[:n], foreign_x=data.foreign_x[:n])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--sets", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--test-size", type=int, help="test and foreign inputs, the first of all; without it all")
    parser.add_argument("--minutes", type=float, default=10.0, help="longest prediction that is waited for")
    parser.add_argument("--cache", type=Path, default=Path("experiment-results/networks"), help="of trained networks")
    parser.add_argument("--out", type=Path, default=Path("experiment-results/main_path"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [(name, seed) for name in args.sets for seed in range(args.seeds)]
    for name, seed in (bar := tqdm(todo, leave=False, disable=None)):
        data = TASKS[name].data(args.data_dir, seed)
        problem = Problem(name, TASKS[name], first_of(data, args.test_size), args.cache, seed)
        path = args.out / f"{name}.csv"
        rows = read_rows(path)
        for method in METHODS:
            if method in args.methods or (method == MAP and seed not in rows.get(MAP, {})):
                bar.set_description(f"{name}, seed {seed}, {method}")
                rows.setdefault(method, {})[seed] = measured(method, problem, 60 * args.minutes)
                write_rows(path, rows)
    results = {name: read_rows(path) for name in TASKS if (path := args.out / f"{name}.csv").exists()}
    report(results, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
