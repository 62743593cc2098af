"""Which Laplace posterior of LeNet-5 on MNIST: estimators and ways of tuning side by side, in and out of distribution.

    python -m experiments.mnist_posteriors --data-dir DATA --out experiment-results/mnist_posteriors

The network is trained as in the demo, on the first 55,000 training digits; the last 5,000 are the validation digits. The
Fisher of each estimator is estimated once, `sampling="exact"`, and tuned three ways: one prior precision or one per layer
by the evidence, and one by the likelihood of the validation digits on a grid. Two kinds of other digits are to be told
from the test digits by the predictive entropy: the test digits turned by 90 degrees, and scikit-learn's 8x8 digits scaled
to 28x28. The table is of one link; the CSV has all five, every seed and the prior precisions. Trained networks are kept in
`--out` and taken from there the next time; delete them to train again.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from tqdm.auto import tqdm

import kronlaplace as kl
from kronlaplace import metrics
from kronlaplace.demo.classification import train_on
from kronlaplace.demo.datasets import load
from kronlaplace.demo.networks import lenet5
from kronlaplace.demo.report import Column, Table, mean_and_error

COLUMNS = (
    Column("accuracy", "accuracy"),
    Column("nll", "NLL"),
    Column("ece", "ECE"),
    Column("brier", "Brier"),
    Column("auroc_rotated", "AUROC, rotated"),
    Column("auroc_8x8", "AUROC, 8x8"),
)
ESTIMATORS = {"K-FAC": kl.KFAC(), "TKFAC": kl.TKFAC(), "K-FOC": kl.KFOC(), "EKFAC": kl.EKFAC()}
LAST = "K-FAC, last layer"
TUNINGS = ("evidence", "evidence by layer", "validation")
LINKS = {
    "mc": kl.Predictive(link="mc", n_samples=1000),
    "margin": kl.Predictive(link="margin"),
    "probit": kl.Predictive(link="probit"),
    "centered-probit": kl.Predictive(link="centered-probit"),
    "bridge": kl.Predictive(link="bridge"),
}
GRID = [10 ** (k / 2) for k in range(-2, 11)]
N_TRAIN, BATCH = 55_000, 500


def trained(data, seed, device, path):
    """LeNet-5 from its file, or trained as in the demo and written there."""
    if not path.exists():
        save_file(train_on(data, device, seed).cpu().state_dict(), path)
    model = lenet5()
    model.load_state_dict(load_file(path))
    return model.to(device).eval()


def small_digits(data):
    """scikit-learn's digits, their grey values 0 to 16 on the scale of the MNIST inputs."""
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=data.test_x.shape[-2:], mode="bilinear", align_corners=False)
    black, white = data.train_x.min(), data.train_x.max()
    return black + (white - black) * images


def batches(x, y, device):
    return [(a.to(device), b.to(device)) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]


def posteriors(model, train, validation, link):
    """Group, tuning and the tuned posterior, one after the other; each is good until the next is asked for."""
    fisher = kl.estimate_fisher(model, train, "classification", ESTIMATORS["K-FAC"], sampling="exact")
    groups = {LAST: kl.KronLaplace(model, "classification", layers="last").fit(fisher=fisher)}
    for name, estimator in ESTIMATORS.items():
        if name != "K-FAC":
            fisher = kl.estimate_fisher(model, train, "classification", estimator, sampling="exact")
        groups[name] = kl.KronLaplace(model, "classification", estimator).fit(fisher=fisher)
    for name, posterior in groups.items():
        for tuning in TUNINGS:
            if tuning == "validation":
                posterior.tune("validation", data=validation, predictive=LINKS[link], grid=GRID)
            elif tuning == "evidence":
                posterior.tune(logit_scale="fixed")
            elif name != LAST:
                posterior.tune(structure="layerwise", logit_scale="fixed")
            else:
                continue
            yield name, tuning, posterior


def map_probabilities(model, x, device):
    with torch.no_grad():
        return torch.cat([model(part.to(device)).double().softmax(1).cpu() for part in x.split(BATCH)]).numpy()


def laplace_probabilities(posterior, x, device):
    """By link: probabilities, from one functional covariance."""
    parts = {link: [] for link in LINKS}
    for part in x.split(BATCH):
        inputs = part.to(device)
        with torch.no_grad():
            outputs = posterior.model(inputs)
        covariance = posterior.functional_variance(inputs)
        for link, predictive in LINKS.items():
            parts[link].append(predictive.linearized(outputs, covariance, posterior.likelihood).double().cpu())
    return {link: torch.cat(probabilities).numpy() for link, probabilities in parts.items()}


def scores(inside, rotated, small, labels):
    """One row of the table, in the order of `COLUMNS`."""
    entropy = metrics.predictive_entropy(inside)
    return [
        metrics.accuracy(inside, labels),
        metrics.negative_log_likelihood(inside, labels),
        metrics.expected_calibration_error(inside, labels),
        metrics.brier_score(inside, labels),
        *(metrics.ood_auroc(entropy, metrics.predictive_entropy(foreign)) for foreign in (rotated, small)),
    ]


def rows_of(data, validation, args, seed):
    """Dicts of one seed: group, tuning, link, prior precisions, scores."""
    device = args.device
    model = trained(data, seed, device, args.out / f"lenet5_seed{seed}.safetensors")
    test_x, labels = data.test_x[: args.test_size], data.test_y[: args.test_size].numpy()
    inputs = (test_x, test_x.rot90(dims=(2, 3)).contiguous(), small_digits(data))

    def row(group, tuning, link, precision, values):
        return {"group": group, "tuning": tuning, "link": link, "seed": seed, "precision": precision, "scores": values}

    rows = [row("MAP", "", "", [], scores(*(map_probabilities(model, x, device) for x in inputs), labels))]
    train = batches(data.train_x, data.train_y, device)
    bar = tqdm(total=3 * len(ESTIMATORS) + 2, desc=f"seed {seed}", leave=False, disable=None)
    for group, tuning, posterior in posteriors(model, train, batches(*validation, device), args.link):
        predictions = [laplace_probabilities(posterior, x, device) for x in inputs]
        precision = posterior.prior_precision.reshape(-1).tolist()
        rows += [row(group, tuning, k, precision, scores(*(p[k] for p in predictions), labels)) for k in LINKS]
        bar.update()
    bar.close()
    return rows


def table_of(rows, link):
    chosen = {}
    for row in rows:
        if row["link"] in ("", link):
            name = f"{row['group']}, {row['tuning']}" if row["tuning"] else row["group"]
            chosen.setdefault(name, []).append(row["scores"])
    return Table(COLUMNS, {name: np.array(values) for name, values in chosen.items()})


def precisions(rows, link):
    """A line for each group: the prior precisions of the first seed."""
    lines = {}
    for row in rows:
        if row["link"] == link and row["seed"] == rows[0]["seed"]:
            values = " ".join(f"{value:.3g}" for value in row["precision"])
            lines.setdefault(row["group"], []).append(f"{row['tuning']} {values}")
    return [f"prior precision, {group}: {'; '.join(parts)}" for group, parts in lines.items()]


def by_link(rows):
    """Two tables, NLL and ECE: a row for each posterior, a column for each link."""
    columns = tuple(Column(link.replace("-", "_"), link) for link in LINKS)
    tables = {}
    for index, what in ((1, "NLL"), (COLUMNS.index(next(c for c in COLUMNS if c.key == "ece")), "ECE")):
        values = {}
        for row in rows:
            if row["link"]:
                name = f"{row['group']}, {row['tuning']}"
                values.setdefault(name, {}).setdefault(row["seed"], []).append(row["scores"][index])
        tables[what] = Table(columns, {name: np.array(list(seeds.values())) for name, seeds in values.items()})
    return tables


def write_rows(rows, path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "tuning", "link", "seed", "prior_precision", *(column.key for column in COLUMNS)])
        for row in rows:
            precision = " ".join(f"{value:.6g}" for value in row["precision"])
            values = [f"{value:.6g}" for value in row["scores"]]
            writer.writerow([row["group"], row["tuning"], row["link"], row["seed"], precision, *values])


def draw(table, path, title):
    """One panel per score: methods from top to bottom, a marker for each way of tuning, the MAP as a line."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    groups = (LAST, *ESTIMATORS)
    styles = {"evidence": ("o", "#1f6fb4"), "evidence by layer": ("s", "#3a9a78"), "validation": ("^", "#8e5bb5")}
    drawn = [i for i, column in enumerate(COLUMNS) if column.key not in ("accuracy", "brier")]
    panels = figure.subplots(1, len(drawn), sharey=True)
    for axes, i in zip(panels, drawn, strict=True):
        better = "higher" if COLUMNS[i].key.startswith("auroc") else "lower"
        mean, error = mean_and_error(table.scores["MAP"][:, i])
        axes.axvline(mean, color="#d1701f", linestyle="--", linewidth=1.2, label="MAP")
        if math.isfinite(error):
            axes.axvspan(mean - error, mean + error, color="#d1701f", alpha=0.15, linewidth=0)
        for j, (tuning, (marker, colour)) in enumerate(styles.items()):
            points = [(k, table.scores.get(f"{group}, {tuning}")) for k, group in enumerate(groups)]
            points = [(k + 0.2 * (j - 1), *mean_and_error(values[:, i])) for k, values in points if values is not None]
            heights, means, errors = map(np.array, zip(*points, strict=True))
            bars = None if np.isnan(errors).all() else errors
            axes.errorbar(means, heights, xerr=bars, fmt=marker, color=colour, markersize=6, label=tuning)
        axes.set_title(f"{COLUMNS[i].heading} ({better} is better)", fontsize=10)
        axes.set_yticks(range(len(groups)), groups)
        for boundary in range(len(groups) - 1):
            axes.axhline(boundary + 0.5, color="0.85", linewidth=0.6)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.margins(x=0.1)
        if better == "lower":  # by the evidence and by validation they differ by factors
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", linewidth=0.3)
        axes.tick_params(labelsize=9)
        axes.tick_params(axis="y", length=0)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--test-size", type=int, default=10_000, help="test digits, the first of 10,000")
    parser.add_argument("--validation-size", type=int, default=5000, help="validation digits, the first of 5,000")
    parser.add_argument("--link", choices=LINKS, default="mc", help="of the validation tuning, the table and the plot")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=Path("experiment-results/mnist_posteriors"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    mnist = load("mnist", args.data_dir)
    data = replace(mnist, train_x=mnist.train_x[:N_TRAIN], train_y=mnist.train_y[:N_TRAIN])
    validation = tuple(part[N_TRAIN:][: args.validation_size] for part in (mnist.train_x, mnist.train_y))
    rows = [row for seed in args.seeds for row in rows_of(data, validation, args, seed)]

    table, several = table_of(rows, args.link), len(args.seeds) > 1
    title = (
        f"LeNet-5 on MNIST, {len(data.train_x):,} training, {len(validation[0]):,} validation and "
        f"{len(data.test_x[: args.test_size]):,} test digits; link {args.link}; "
        + (f"mean ± standard error of seeds {args.seeds}" if several else f"seed {args.seeds[0]}")
    )
    notes = [
        *precisions(rows, args.link),
        f"link mc: softmax averaged over {LINKS['mc'].n_samples} draws of the outputs, with their covariances",
        f"validation: likelihood of the validation digits with link {args.link}, two precisions each decade "
        f"from {GRID[0]:g} to {GRID[-1]:g}",
        "AUROC: test digits turned by 90 degrees, or scikit-learn's 8x8 digits scaled to 28x28, against test digits, told "
        "apart by predictive entropy",
        "NLL in nats; ECE of the top label in 15 bins of equal width; Brier summed over classes",
    ]
    print(f"{title}\n\n{table.to_text()}\n\n" + "\n".join(f"  {note}" for note in notes))
    write_rows(rows, args.out / "mnist_posteriors.csv")
    markdown = table.to_markdown(title, notes)
    for what, links in by_link(rows).items():
        print(f"\n{what} by link\n\n{links.to_text()}")
        markdown += "\n" + links.to_markdown(f"{what} by link", [])
    (args.out / "mnist_posteriors.md").write_text(markdown, encoding="utf-8")
    draw(table, args.out / "mnist_posteriors.png", title)
    print(f"\n{time.perf_counter() - start:.0f} s; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
