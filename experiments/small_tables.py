"""Regression on few rows: does the default choose noise and prior well by itself?

    python -m experiments.small_tables --data-dir DATA --out experiment-results/small_tables

Each split of the UCI tables is cut to so many training rows as in `experiments.uci --rows`; the test rows stay. All methods
predict with the same network, the demo's. The noise left at the root mean square training error is where laplace-torch's
documented tuning ends (`experiments.uci` has laplace-torch itself). Entries are test log-likelihoods in nats per target, and
the differences to the best of the other methods, that with the largest mean; mean ± standard error over the splits, paired.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

import kronlaplace as kl
from experiments.uci import batches, data_of
from kronlaplace import metrics
from kronlaplace.demo.datasets import N_UCI_SPLITS, UCI
from kronlaplace.demo.fitting import build, seeds_of
from kronlaplace.demo.networks import one_hidden_layer
from kronlaplace.demo.regression import RECIPE
from kronlaplace.demo.report import Column, Table
from kronlaplace.demo.training import GaussianNLL, train

MAP, LEFT, EVIDENCE, DEFAULT = "MAP", "noise left at the training error", "K-FAC, its own evidence", "no option set"
METHODS = (MAP, LEFT, EVIDENCE, DEFAULT)
ALL = 0


def scores_of(split, model):
    """By method: the test log-likelihood in original units."""
    x, y = split.train_x, split.train_y
    with torch.no_grad():
        error = float((model(x) - y).square().mean().sqrt())
        at_map = model(split.test_x).double()

    def score(mean, variance):
        density = metrics.gaussian_log_likelihood(mean.flatten(), variance.flatten(), split.test_y.double().flatten())
        return density - math.log(split.target_std)

    def of(posterior, method=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nearly interpolating networks are the point here
            prediction = posterior.fit(batches((x, y))).tune(method).predict(split.test_x)
        return score(prediction.mean.double(), prediction.total_variance.double())

    return {
        MAP: score(at_map, torch.full_like(at_map, error**2)),
        LEFT: of(kl.KronLaplace(model, kl.Gaussian(error)), "evidence"),
        EVIDENCE: of(kl.KronLaplace(model, "regression"), "evidence"),
        DEFAULT: of(kl.KronLaplace(model, "regression")),
    }


def split_scores(data_dir, seed, splits, which):
    torch.set_num_threads(1)
    name, rows, k = which
    split = data_of(name, data_dir, splits, rows or None).split(k)
    weight_seed, batch_seed = seeds_of(seed, k)
    model = build(lambda: one_hidden_layer(split.train_x.shape[1]), weight_seed, torch.device("cpu"))
    train(model, GaussianNLL(), split.train_x, split.train_y, RECIPE, seed=batch_seed)
    return scores_of(split, model)


def tables_of(scores, names):
    """By number of rows: the table of log-likelihoods; and the table of what the default gains."""
    columns = tuple(Column(name, name, 3) for name in names)
    by_rows, gains = {}, {}
    for rows, by_name in scores.items():
        values = {name: {m: np.array([s[m] for s in by_name[name]]) for m in METHODS} for name in names}
        by_rows[rows] = Table(columns, {m: np.stack([values[name][m] for name in names], axis=1) for m in METHODS})
        best = {name: max((MAP, LEFT, EVIDENCE), key=lambda m, v=values[name]: v[m].mean()) for name in names}
        gains[f"{rows} rows" if rows else "all rows"] = np.stack(
            [values[name][DEFAULT] - values[name][best[name]] for name in names], axis=1
        )
    return by_rows, Table(columns, gains)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--data-sets", nargs="+", choices=UCI, default=list(UCI))
    parser.add_argument("--rows", nargs="+", type=int, default=[100, 200, 300, ALL], help="0 for all")
    parser.add_argument("--splits", type=int, default=N_UCI_SPLITS)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("experiment-results/small_tables"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [(name, rows, k) for rows in args.rows for name in args.data_sets for k in range(args.splits)]
    scores = {rows: {name: [] for name in args.data_sets} for rows in args.rows}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        results = pool.map(partial(split_scores, args.data_dir, args.seed, args.splits), todo)
        for (name, rows, _), result in zip(todo, tqdm(results, total=len(todo), leave=False), strict=True):
            scores[rows][name].append(result)
    by_rows, gains = tables_of(scores, args.data_sets)
    text = []
    for rows, table in by_rows.items():
        title = f"Test log-likelihood with {rows or 'all'} training rows"
        print(f"{title}\n\n{table.to_text()}\n")
        table.write_csv(args.out / f"rows_{rows or 'all'}.csv")
        text.append(table.to_markdown(title))
    title = f"Log-likelihood of the default less that of the best of {MAP}, {LEFT}, and {EVIDENCE}"
    print(f"{title}\n\n{gains.to_text()}")
    gains.write_csv(args.out / "gains.csv")
    (args.out / "small_tables.md").write_text("\n".join([*text, gains.to_markdown(title)]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
