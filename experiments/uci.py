"""Test log-likelihoods of the Laplace posterior on five UCI tables: estimators, ways of tuning, and laplace-torch.

    python -m experiments.uci --data-dir DATA --out experiment-results/uci
    python -m experiments.uci --data-dir DATA --rows 200 --out experiment-results/uci-200

The 20 published splits, and on each the demo's own network (one hidden layer of 50 ReLU units, the same seeds and recipe),
kept under --out. All posteriors are of that network, so that methods compare split by split: the splits differ far more
than the methods do. Only the rows "trained by the evidence" have a network of their own, from the same initial weights and
with as many steps.

With --rows each table is cut to so many training rows, drawn from those of the split; the test rows stay.

laplace-torch's K-FAC is over all weights, with the GLM predictive and variance f_var + sigma². Its prior precision and
noise are tuned in two ways: by 1000 steps of Adam, as in the regression example of its documentation, and by maximizing the
same evidence without gradients. They differ, because `KronDecomposed.__mul__` of laplace-torch 0.3 takes the noise out of
the graph (`math.pow`): the gradient misses the log-determinant, and Adam ends at the maximum-likelihood noise.

Validation tunes on a network that was trained on 90 % of the training rows, by the log-likelihood of the rest; what it
finds goes to the posterior of the network that was trained on all. One precision per weight is tuned on the first
--by-weight-splits only, because it takes as long as all the rest.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

import kronlaplace as kl
from experiments.peers import laplace_torch
from kronlaplace.demo.datasets import N_UCI_SPLITS, UCI, load
from kronlaplace.demo.fitting import build, seeds_of
from kronlaplace.demo.networks import one_hidden_layer
from kronlaplace.demo.regression import RECIPE
from kronlaplace.demo.report import Column, Table, mean_and_error
from kronlaplace.demo.training import GaussianNLL, train

ESTIMATORS = {
    "K-FAC": kl.KFAC(),
    "TKFAC": kl.TKFAC(),
    "K-FOC": kl.KFOC(),
    "EKFAC": kl.EKFAC(),
    "diagonal": kl.Diagonal(),
    "exact block": kl.ExactBlock(),
}
DEFAULT = "K-FAC, default"
SCALAR, LAYERWISE, DIAGONAL, VALIDATION = "evidence", "evidence, layer-wise", "evidence, by weight", "validation"
STRUCTURES = {SCALAR: "scalar", LAYERWISE: "layerwise", DIAGONAL: "diagonal"}
DOCUMENTED, MAXIMISED = "laplace-torch K-FAC, Adam", "laplace-torch K-FAC, maximised"
BY_EVIDENCE = "trained by the evidence"
OFF = "weights sampled"
SAMPLED = kl.Predictive("sample", n_samples=1000)
SAMPLED_IN_TUNING, SAMPLED_GRID = kl.Predictive("sample", n_samples=100), [10.0**k for k in range(-1, 7)]
DROPOUT = {"boston": -2.40, "concrete": -2.94, "energy": -1.21, "power-plant": -2.81, "wine-quality-red": -0.93}
HELD_OUT = 0.1
BATCH = 512
LOOKS = 20
ADAM_STEPS = 1000


@dataclass(frozen=True)
class Score:
    """What a method does on one split, in original units."""

    log_likelihood: float
    rmse: float
    noise_std: float
    prior_precision: str
    seconds: float
    warned: str


@dataclass(frozen=True)
class Problem:
    """One split and its networks, on the device."""

    split: object
    device: torch.device
    everything: tuple
    kept: tuple
    held_out: tuple
    model: torch.nn.Module
    model_of_kept: torch.nn.Module
    model_by_evidence: torch.nn.Module


class Shuffled:
    """Batches of tensors, each time in a new order."""

    def __init__(self, x, y, batch_size, seed):
        self.x, self.y, self.batch_size = x, y, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=self.generator).to(self.x.device)
        return ((self.x[rows], self.y[rows]) for rows in order.split(self.batch_size))


def problem_of(data, index, seed, device, folder):
    split = data.split(index)
    x, y = split.train_x.to(device), split.train_y.to(device)
    order = np.random.default_rng([seed, index]).permutation(len(x))
    rest, kept = np.split(order, [round(HELD_OUT * len(x))])

    def network(kind, number, training):
        weight_seed, batch_seed = seeds_of(seed, number)
        model = build(lambda: one_hidden_layer(x.shape[1]), weight_seed, device)
        return cached(
            folder / f"{data.name}_{index:02d}_{kind}.safetensors", f"{RECIPE}, {seed}", model, training, batch_seed
        )

    def usual(rows):
        return lambda model, batch_seed: train(model, GaussianNLL(), x[rows], y[rows], RECIPE, seed=batch_seed)

    return Problem(
        split,
        device,
        (x, y),
        (x[kept], y[kept]),
        (x[rest], y[rest]),
        network("all", index, usual(slice(None))),
        network("kept", N_UCI_SPLITS + index, usual(kept)),
        network("evidence", index, lambda model, batch_seed: train_by_evidence(model, x, y, batch_seed)),
    )


def cached(path, key, model, training, batch_seed):
    """The model with the weights of the file, or trained and written to it."""
    if path.exists():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("recipe") == key:
                names = file.keys()
                model.load_state_dict({name: file.get_tensor(name) for name in names})
                return model.eval()
    training(model, batch_seed)
    save_file(model.state_dict(), path, {"recipe": key})
    return model


def train_by_evidence(model, x, y, seed):
    """As many steps as the recipe has, of the same optimizer; prior and noise are the evidence's."""
    epochs = max(round(RECIPE.steps * RECIPE.batch_size / len(x)), 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=RECIPE.learning_rate)
    kl.train_by_evidence(
        model,
        Shuffled(x, y, RECIPE.batch_size, seed),
        "regression",
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        epochs=epochs,
        every=max(epochs // LOOKS, 1),
        structure="layerwise",
    )


def batches(data):
    return list(zip(*(part.split(BATCH) for part in data), strict=True))


def posteriors_of(problem, by_weight):
    """By method: the function that makes the tuned posterior, and the predictive."""

    def by_evidence(model, estimator, structure):
        posterior = kl.KronLaplace(model, "regression", estimator).fit(batches(problem.everything))
        return posterior.tune("evidence", structure)

    def by_validation(estimator, predictive, grid=None):
        tuned = kl.KronLaplace(problem.model_of_kept, "regression", estimator).fit(batches(problem.kept))
        tuned.tune("validation", data=[problem.held_out], predictive=predictive, grid=grid)
        posterior = kl.KronLaplace(problem.model, "regression", estimator).fit(batches(problem.everything))
        posterior.hyperparameters = tuned.hyperparameters
        return posterior

    result = {}
    for name, estimator in ESTIMATORS.items():
        for tuning in (SCALAR, LAYERWISE, *([DIAGONAL] if name == "K-FAC" and by_weight else [])):
            make = lambda e=estimator, t=tuning: by_evidence(problem.model, e, STRUCTURES[t])  # noqa: E731
            result[f"{name}, {tuning}"] = make, kl.Predictive()
            if name == "K-FAC" and tuning != DIAGONAL:
                result[f"{name}, {tuning}, {OFF}"] = make, SAMPLED
        result[f"{name}, {VALIDATION}"] = lambda e=estimator: by_validation(e, kl.Predictive()), kl.Predictive()
        if name == "K-FAC":
            make = lambda e=estimator: by_validation(e, SAMPLED_IN_TUNING, SAMPLED_GRID)  # noqa: E731
            result[f"{name}, {VALIDATION}, {OFF}"] = make, SAMPLED
    by_default = lambda: kl.KronLaplace(problem.model, "regression").fit(batches(problem.everything)).tune()  # noqa: E731
    result[DEFAULT] = by_default, kl.Predictive()
    result[f"{BY_EVIDENCE}, K-FAC, layer-wise"] = (
        lambda: by_evidence(problem.model_by_evidence, kl.KFAC(), "layerwise"),
        kl.Predictive(),
    )
    return result


def scores_of(problem, by_weight):
    """By method: its score."""
    test_x = problem.split.test_x.to(problem.device)
    with torch.no_grad():
        mean = problem.model(test_x)
        noise = mean_square(problem.model, problem.everything)
        noise_of_held_out = mean_square(problem.model_of_kept, problem.held_out)
    zero = torch.zeros_like(mean)
    result = {
        "MAP": score(problem, mean, zero, noise),
        "MAP, validation": score(problem, mean, zero, noise_of_held_out),
    }
    start = time.perf_counter()
    la = laplace_torch_of(problem)
    fitted = time.perf_counter() - start
    for name, tune in ((DOCUMENTED, tune_as_documented), (MAXIMISED, tune_without_gradients)):
        start = time.perf_counter()
        tune(la)
        mean, variance = la(test_x)
        seconds = fitted + time.perf_counter() - start
        precision, noise = la.prior_precision.item(), la.sigma_noise.item() ** 2
        result[name] = score(problem, mean, variance.squeeze(2), noise, f"{precision:.6g}", seconds)
    for name, (make, predictive) in posteriors_of(problem, by_weight).items():
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            posterior = make()
        prediction = posterior.predict(test_x, **vars(predictive))
        seconds = time.perf_counter() - start
        precision = posterior.prior_precision.flatten().tolist()
        result[name] = score(
            problem,
            prediction.mean,
            prediction.variance,
            float(prediction.noise_variance),
            " ".join(f"{value:.6g}" for value in precision) if len(precision) < 3 else "",
            seconds,
            "; ".join(str(warning.message) for warning in caught),
        )
        if name == f"K-FAC, {SCALAR}":
            result["MAP, noise of K-FAC, evidence"] = score(
                problem, prediction.mean, zero, float(prediction.noise_variance)
            )
    return result


def mean_square(model, data):
    x, y = data
    return float((model(x) - y).square().mean())


def score(problem, mean, variance, noise_variance, precision="", seconds=np.nan, warned=""):
    """Score of a prediction in standardized units."""
    unit, offset = problem.split.target_std, problem.split.target_mean
    mean, target = (offset + unit * column(values) for values in (mean, problem.split.test_y))
    total = unit**2 * (column(variance) + noise_variance)
    return Score(
        kl.metrics.gaussian_log_likelihood(mean, total, target),
        kl.metrics.rmse(mean, target),
        unit * noise_variance**0.5,
        precision,
        seconds,
        warned,
    )


def column(values):
    return values.detach().double().cpu().squeeze(1).numpy()


def laplace_torch_of(problem):
    with quiet():
        la = laplace_torch().Laplace(problem.model, "regression", subset_of_weights="all", hessian_structure="kron")
        la.fit(DataLoader(TensorDataset(*problem.everything), batch_size=BATCH))
    return la


def tune_as_documented(la):
    """As in laplace-torch's regression example: Adam on both logarithms, from one, 1000 steps."""
    log_prior, log_sigma = (torch.ones(1, requires_grad=True, device=la._device) for _ in range(2))
    optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
    with quiet():
        for _ in range(ADAM_STEPS):
            optimizer.zero_grad()
            loss = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
            loss.backward()
            optimizer.step()
    la.prior_precision, la.sigma_noise = log_prior.detach().exp(), log_sigma.detach().exp()


@torch.no_grad()
def tune_without_gradients(la):
    """The maximum of the same function."""

    def loss(logs):
        prior, sigma = torch.tensor(logs, dtype=torch.float32, device=la._device).exp()
        return -float(la.log_marginal_likelihood(prior, sigma))

    start = [la.prior_precision.log().item(), la.sigma_noise.log().item()]
    logs = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-3}).x
    prior, sigma = torch.tensor(logs, dtype=torch.float32, device=la._device).exp()
    la.prior_precision, la.sigma_noise = prior.reshape(1), sigma.reshape(1)


@contextmanager
def quiet():
    """laplace-torch warns of torch's and of its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def table_of(scores, value, decimals):
    """Rows methods, columns data sets; a row has as many splits as the method."""
    first = next(iter(scores.values()))[0]
    methods = sorted(first, key=lambda method: not method.startswith("MAP"))
    values = {
        method: np.array([[value(s, method) for s in by_split if method in s] for by_split in scores.values()]).T
        for method in methods
    }
    return Table([Column(name, name, decimals) for name in scores], values)


def tables_of(scores):
    likelihood = table_of(scores, lambda s, method: s[method].log_likelihood, 3)
    complete = {method: rows for method, rows in likelihood.scores.items() if len(rows) == likelihood.n_splits}
    dropout = np.array([[DROPOUT[name] for name in scores]])
    result = {
        "log_likelihood": (
            "test log-likelihood, nats per target",
            Table(likelihood.columns, {**complete, "MC dropout (Gal and Ghahramani's code)": dropout}),
        )
    }
    for key, base in (("to_maximised", MAXIMISED), ("to_documented", DOCUMENTED)):
        table = table_of(scores, lambda s, method, b=base: s[method].log_likelihood - s[b].log_likelihood, 4)
        rows = {
            method if len(values) == table.n_splits else f"{method} (first {len(values)} splits)": values
            for method, values in table.scores.items()
            if method != base
        }
        result[key] = f"log-likelihood less that of {base}, split by split", Table(table.columns, rows)
    rmse = table_of(scores, lambda s, method: s[method].rmse, 3)
    own = ("MAP", OFF, BY_EVIDENCE)
    rows = {
        method: values
        for method, values in rmse.scores.items()
        if method == own[0] or any(text in method for text in own[1:])
    }
    result["rmse"] = "test RMSE; all other rows predict the MAP's mean", Table(rmse.columns, rows)
    return result


def notes_of(scores, seed):
    """Which is best, what was warned of, and how long it took."""
    counts = [sum(method in s for s in next(iter(scores.values()))) for method in ("MAP", f"K-FAC, {DIAGONAL}")]
    notes = [
        f"{counts[0]} splits (K-FAC, {DIAGONAL}: the first {counts[1]}), seed {seed}; mean ± standard error over the "
        "splits; the network is the demo's"
    ]
    own = [f"{name}, {tuning}" for name in ESTIMATORS for tuning in (SCALAR, LAYERWISE, DIAGONAL, VALIDATION)]
    for name, by_split in scores.items():
        means = {m: np.mean([s[m].log_likelihood for s in by_split]) for m in own if m in by_split[-1]}
        best = max(means, key=means.get)
        gains = [
            "{:+.4f} ± {:.4f} to {}".format(
                *mean_and_error([s[best].log_likelihood - s[base].log_likelihood for s in by_split]), base
            )
            for base in (MAXIMISED, DOCUMENTED, "MAP")
        ]
        notes.append(f"best on {name}: {best}, {means[best]:.3f}; {', '.join(gains)} (chosen on the test rows)")
    for method in next(iter(scores.values()))[0]:
        warned = {
            name: sum(method in s and bool(s[method].warned) for s in by_split) for name, by_split in scores.items()
        }
        if any(warned.values()):
            counts = ", ".join(f"{name} {count}" for name, count in warned.items() if count)
            notes.append(f"splits on which tuning warned of an optimum at the edge: {method}: {counts}")
    timed = [DOCUMENTED, *(f"K-FAC, {tuning}" for tuning in (*STRUCTURES, VALIDATION))]
    for method in [method for method in timed if method in next(iter(scores.values()))[0]]:
        seconds = [np.median([s[method].seconds for s in by_split if method in s]) for by_split in scores.values()]
        notes.append(f"median seconds to fit, tune and predict: {method}: " + ", ".join(f"{t:.3g}" for t in seconds))
    return notes


def write_splits(path, scores):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["data set", "split", "method", *Score.__dataclass_fields__])
        for name, by_split in scores.items():
            for k, by_method in enumerate(by_split):
                for method, s in by_method.items():
                    numbers = [f"{value:.8g}" for value in (s.log_likelihood, s.rmse, s.noise_std)]
                    writer.writerow([name, k, method, *numbers, s.prior_precision, f"{s.seconds:.4g}", s.warned])


def draw(title, table, path):
    """One panel per data set; what is far off stands at the margin, with its value."""
    methods = list(table.scores)
    figure = Figure(figsize=(3 + 2.5 * len(table.columns), 0.24 * len(methods) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(table.columns), sharey=True, squeeze=False)[0]
    inner = [i for i, method in enumerate(methods) if method != "MAP" and not (OFF in method and SCALAR in method)]
    groups = [method.split(",")[0].split(" K-FAC")[0] for method in methods]
    shaded = np.cumsum([0, *(a != b for a, b in pairwise(groups))]) % 2 == 1
    for j, (axes, column) in enumerate(zip(panels, table.columns, strict=True)):
        means, errors = np.array([mean_and_error(scores[:, j]) for scores in table.scores.values()]).T
        errors = np.nan_to_num(errors)
        low, high = min((means - errors)[inner].min(), 0), max((means + errors)[inner].max(), 0)
        width = max(high - low, 1e-3)
        low, high = low - 0.12 * width, high + 0.08 * width
        for i, method in enumerate(methods):
            color, marker = style(method)
            if low + 0.03 * width < means[i] < high - 0.03 * width:
                axes.errorbar(
                    means[i], i, xerr=errors[i], fmt=marker, color=color, markersize=5, elinewidth=1.2, capsize=2
                )
                continue
            edge, sign = (low, 1) if means[i] < 0 else (high, -1)
            axes.plot(edge + sign * 0.03 * width, i, "<" if sign > 0 else ">", color=color, markersize=5)
            align = "left" if sign > 0 else "right"
            text = f"{means[i]:+.3f}"
            axes.text(edge + sign * 0.07 * width, i, text, ha=align, va="center", fontsize=7, color=color)
        for i in np.flatnonzero(shaded):
            axes.axhspan(i - 0.5, i + 0.5, color="0.94", zorder=0)
        axes.set_xlim(low, high)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(axis="x", linewidth=0.3)
        axes.set_title(column.heading, fontsize=10)
        axes.tick_params(axis="x", labelsize=7)
        axes.locator_params(axis="x", nbins=5)
    panels[0].set_yticks(range(len(methods)), methods, fontsize=8)
    figure.suptitle(f"Test {title} (nats per target; right is better)", fontsize=11)
    figure.savefig(path, dpi=150)


def style(method):
    """Color and marker, by the way of tuning."""
    if OFF in method or method.startswith(("MAP", "laplace-torch")):
        return "dimgray", "s"
    ways = {LAYERWISE: ("tab:blue", "o"), DIAGONAL: ("tab:purple", "P"), VALIDATION: ("tab:orange", "^")}
    color, marker = next((look for way, look in ways.items() if way in method), ("tab:green", "D"))
    return color, "*" if BY_EVIDENCE in method else marker


def report(scores, seed, folder):
    tables, notes = tables_of(scores), notes_of(scores, seed)
    for key, (title, table) in tables.items():
        print(f"{title}\n\n{table.to_text()}\n")
        table.write_csv(folder / f"{key}.csv")
    print("\n".join(notes))
    text = "\n".join(table.to_markdown(title) for title, table in tables.values())
    (folder / "uci.md").write_text("\n".join([text, *(f"- {note}" for note in notes), ""]), encoding="utf-8")
    draw(*tables["to_maximised"], folder / "uci.png")


@cache
def data_of(name, data_dir, splits, rows):
    data = load(name, data_dir, n_splits=splits)
    if rows is None:
        return data
    cut = [
        (np.random.default_rng([0, k, rows]).permutation(train)[:rows], test)
        for k, (train, test) in enumerate(data.splits)
    ]
    return replace(data, splits=cut)


def split_scores(data_dir, networks, seed, device, splits, rows, by_weight_splits, which):
    name, k = which
    data = data_of(name, data_dir, splits, rows)
    return scores_of(problem_of(data, k, seed, device, networks), k < by_weight_splits)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--data-sets", nargs="+", choices=UCI, default=list(UCI))
    parser.add_argument("--splits", type=int, default=N_UCI_SPLITS)
    parser.add_argument("--rows", type=int, help="training rows of each split; all without it")
    parser.add_argument("--by-weight-splits", type=int, default=5, help="splits with one prior precision per weight")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=Path("experiment-results/uci"))
    args = parser.parse_args(argv)
    networks = args.out / ("networks" if args.rows is None else f"networks-{args.rows}")
    networks.mkdir(parents=True, exist_ok=True)
    fixed = args.data_dir, networks, args.seed, args.device, args.splits, args.rows, args.by_weight_splits
    work = partial(split_scores, *fixed)
    todo = [(name, k) for k in range(args.splits) for name in args.data_sets]
    scores = {name: [] for name in args.data_sets}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for (name, _), by_method in zip(todo, tqdm(pool.map(work, todo), total=len(todo), leave=False), strict=True):
            scores[name].append(by_method)
            write_splits(args.out / "splits.csv", scores)
    report(scores, args.seed, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
