"""What fitting, tuning and predicting with a Laplace posterior cost next to laplace-torch 0.3; and thousands of classes.

    python -m experiments.predict_cost --data-dir DATA --out experiment-results/predict_cost

Side by side in one process: K-FAC over all layers of LeNet-5, exact sampling, the same network after some steps of
training, the same MNIST digits (noise of the right shape without `--data-dir`), both posteriors at the prior precision
that our evidence chose when probabilities are compared. laplace-torch keeps weights and biases in separate blocks and ours
joins them, so the posteriors of LeNet-5 differ. They are equal on a LeNet-5 without biases, which is why there is one: in
double precision to 1e-13, in the single precision that is timed here to some 1e-4, of which ours has less than a tenth.
Peak memory is of one batch of the digits to be predicted. Without laplace-torch its rows are left out.

The last layer with thousands of classes is ours alone: a `Linear` by itself, and the same one at the end of a two-layer
network with `layers="last"`; fitted with one Monte Carlo sample on random inputs, its time a multiple of the forward pass.

Times are medians over repeats taken in turn, ratios are medians of the ratios run by run. laplace-torch's predictions take
about half a minute and 9 GB, so they have a number of repeats of their own, `--peer-repeats`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from experiments.fit_cost import train
from experiments.measure import Run, in_turn, largest_bytes, peak_bytes, ratio
from experiments.peers import laplace_torch
from kronlaplace.demo.networks import lenet5
from kronlaplace.demo.report import Column, Table

OURS, THEIRS = "kronlaplace", "laplace-torch"
RATIO = Column("time_ratio", "multiple of ours", 2)
FITTING = Column("seconds", "seconds", 3), RATIO
TUNING = (
    Column("ms", "ms", 2),
    RATIO,
    Column("evidence", "log evidence reached", 3),
)
PREDICTING = (
    Column("seconds", "seconds", 3),
    RATIO,
    Column("peak_mib", "peak MiB", 1),
    Column("difference", "largest difference of probabilities", 8),
)
LAST_LAYER = (
    Column("ms", "ms", 2),
    Column("time_ratio", "multiple of forward", 2),
    Column("largest_mb", "largest tensor, MB", 1),
)
TITLES = {
    "fitting": "Fitting to {digits} digits",
    "tuning": "Tuning the prior precision by the evidence",
    "predicting": "Probit probabilities of {test_digits} digits, batches of {batch_size}",
    "last_layer": "Last layer, {features} inputs and {classes} classes: {batch_size} inputs",
}


def batches(x, y, size):
    """A loader that takes whole batches at once, so that it costs next to nothing; laplace-torch needs its data set."""
    parts = [part.tolist() for part in torch.arange(len(x)).split(size)]
    return DataLoader(TensorDataset(x, y), sampler=parts, batch_size=None)


def digits(args, device):
    """Digits to fit to, with labels, and digits to predict."""
    n, m = args.digits, args.test_digits
    if args.data_dir is None:
        parts = torch.randn(n, 1, 28, 28), torch.randint(10, (n,)), torch.randn(m, 1, 28, 28)
    else:
        from kronlaplace.demo.datasets import load

        mnist = load("mnist", args.data_dir, seed=0)
        parts = mnist.train_x[:n], mnist.train_y[:n], mnist.test_x[:m]
    return [part.to(device) for part in parts]


def networks():
    """LeNet-5, and the same without biases."""
    plain = lenet5()
    for module in plain:
        if hasattr(module, "bias"):
            module.bias = None
    return {"LeNet-5": lenet5(), "LeNet-5 without biases": plain}


def row(columns, times, of, base, **others):
    """Median time and its ratio to that of ``base``, and what else the columns ask for."""
    values = {"seconds": statistics.median(times[of]), "time_ratio": ratio(times[of], times[base])} | others
    values["ms"] = 1000 * values["seconds"]
    return np.array([[values.get(column.key, np.nan) for column in columns]])


# -- all layers of LeNet-5, beside laplace-torch ---------------------------------------------------------------


class Ours:
    def __init__(self, model, loader):
        self.loader = loader
        self.posterior = kl.KronLaplace(model, "classification")

    def fit(self):
        self.posterior.fit(self.loader)

    def fresh(self):
        """As after a fit, without one."""
        self.posterior.fit(fisher=self.posterior.fisher)

    def tune(self, structure):
        self.posterior.tune(structure=structure, logit_scale="fixed")

    def evidence(self):
        return float(self.posterior.log_marginal_likelihood())

    def set_prior_precision(self, value):
        self.posterior.prior_precision = value

    def predict(self, x):
        return self.posterior.predict(x, link="probit")


class Theirs:
    def __init__(self, laplace, model, loader):
        self.loader = loader
        self.posterior = laplace.Laplace(copy.deepcopy(model), "classification", "all", "kron")

    def fit(self):
        self.posterior.fit(self.loader)

    def tune(self, structure):
        self.posterior.optimize_prior_precision(method="marglik", prior_structure=structure)

    def evidence(self):
        return float(self.posterior.log_marginal_likelihood())

    def set_prior_precision(self, value):
        self.posterior.prior_precision = value

    def predict(self, x):
        return self.posterior(x, pred_type="glm", link_approx="probit")


def compare(laplace, args, device):
    """Tables of fitting, tuning and predicting."""
    x, y, test_x = digits(args, device)
    data = batches(x, y, 250)
    tables = {"fitting": {}, "tuning": {}, "predicting": {}}
    for name, model in networks().items():
        train(model.to(device), list(data))
        libraries = {OURS: Ours(model, data)}
        if laplace is not None:
            libraries[THEIRS] = Theirs(laplace, model, data)
        parts = (
            fitting(libraries, args, device),
            tuning(libraries, args, device),
            predicting(libraries, test_x.split(args.batch_size), args, device),
        )
        for table, part in zip(tables.values(), parts, strict=True):
            table.update({f"{name}, {key}": value for key, value in part.items()})
    return tables


def fitting(libraries, args, device):
    for library in libraries.values():  # warm-up
        library.fit()
    times = in_turn({key: Run(library.fit, args.repeats) for key, library in libraries.items()}, device)
    return {key: row(FITTING, times, key, OURS) for key in libraries}


def tuning(libraries, args, device):
    rows = {}
    ours = libraries[OURS]
    for structure in ("scalar", "layerwise"):
        first = f"{structure}, {OURS}, first after the fit"
        runs, evidences = {}, {}
        for key, library in libraries.items():
            library.tune(structure)  # warm-up
            runs[f"{structure}, {key}"] = Run(partial(library.tune, structure), args.repeats)
            evidences[f"{structure}, {key}"] = library.evidence()
        runs[first] = Run(partial(ours.tune, structure), args.repeats, before=ours.fresh)
        evidences[first] = evidences[f"{structure}, {OURS}"]
        times = in_turn(runs, device)
        rows |= {key: row(TUNING, times, key, f"{structure}, {OURS}", evidence=evidences[key]) for key in runs}
    return rows


def predicting(libraries, inputs, args, device):
    libraries[OURS].tune("scalar")
    prior_precision = float(libraries[OURS].posterior.prior_precision)
    runs, probabilities = {}, {}

    def predict(key):
        probabilities[key] = torch.cat([libraries[key].predict(x) for x in inputs])

    for key, library in libraries.items():
        library.set_prior_precision(prior_precision)
        library.predict(inputs[0][:2])  # warm-up
        runs[key] = Run(partial(predict, key), args.repeats if key == OURS else args.peer_repeats)
    times = in_turn(runs, device)
    rows = {}
    for key, library in libraries.items():
        peak = peak_bytes(partial(library.predict, inputs[0]), device) / 2**20
        difference = float((probabilities[key] - probabilities[OURS]).abs().max())
        rows[key] = row(PREDICTING, times, key, OURS, peak_mib=peak, difference=difference)
    return rows


# -- a last layer with thousands of classes --------------------------------------------------------------------


def last_layer(args, device):
    head = nn.Linear(args.features, args.classes)
    models = {
        "head alone": (nn.Sequential(head), None),
        "head of two layers": (
            nn.Sequential(nn.Linear(args.features, args.features), nn.ReLU(), copy.deepcopy(head)),
            "last",
        ),
    }
    x = torch.randn(args.digits, args.features, device=device)
    y = torch.randint(args.classes, (args.digits,), device=device)
    return {
        f"{name}, {key}": value
        for name, (model, layers) in models.items()
        for key, value in head_rows(model.to(device), layers, x, y, args, device).items()
    }


def head_rows(model, layers, x, y, args, device):
    posterior = kl.KronLaplace(model.eval(), "classification", layers=layers)
    posterior.fit(batches(x, y, 250), sampling="mc")
    inputs = torch.randn(args.batch_size, args.features, device=device)
    base = "forward"

    @torch.no_grad()
    def forward():
        model(inputs)

    def other_prior_precision():
        posterior.prior_precision = 1.0

    calls = {
        base: forward,
        "functional_variance": partial(posterior.functional_variance, inputs, diagonal=True),
        "predict": partial(posterior.predict, inputs),
        "predict, probit": partial(posterior.predict, inputs, link="probit"),
    }
    runs = {key: Run(call, args.repeats) for key, call in calls.items()}
    runs["predict, first with a prior precision"] = Run(calls["predict"], args.repeats, before=other_prior_precision)
    for run in runs.values():  # warm-up
        run.call()
    times = in_turn(runs, device)
    rows = {}
    for key, run in runs.items():
        run.call()  # warm again, whatever the run before has reset
        run.before()
        rows[key] = row(LAST_LAYER, times, key, base, largest_mb=largest_bytes(run.call) / 1e6)
    return rows


# -- what comes out --------------------------------------------------------------------------------------------


def draw(tables, path):
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (name, table) in zip(figure.subplots(2, 2).flat, tables.items(), strict=True):
        rows = list(table.scores)
        colours = ["0.6" if THEIRS in key else "C0" for key in rows]
        values = np.array([table.scores[key][0, 0] for key in rows])
        axes.scatter(values, range(len(rows)), color=colours)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(10 ** np.floor(np.log10(values.min())), 10 ** np.ceil(np.log10(values.max())))
        axes.tick_params(which="minor", labelbottom=False)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.set_xlabel(table.columns[0].heading)
        axes.set_title(name.replace("_", " "))
    figure.savefig(path, dpi=150)


def peer(skip):
    """laplace-torch, or None and the reason printed."""
    if skip:
        print(f"{THEIRS} left out: --skip-peer\n")
        return None
    try:
        return laplace_torch()
    except ImportError as error:
        print(f"{THEIRS} left out: {error}\n")
        return None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--peer-repeats", type=int, default=1, help="of laplace-torch's predictions")
    parser.add_argument("--skip-peer", action="store_true", help="leave laplace-torch out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--digits", type=int, default=2000, help="to fit to; as many inputs of the last layer")
    parser.add_argument("--test-digits", type=int, default=200, help="to predict")
    parser.add_argument("--batch-size", type=int, default=100, help="of predictions")
    parser.add_argument("--features", type=int, default=512, help="inputs of the last layer")
    parser.add_argument("--classes", type=int, default=3000, help="of the last layer")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", type=Path, default=Path("experiment-results/predict_cost"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.manual_seed(0)
    laplace = peer(args.skip_peer)
    with warnings.catch_warnings():
        if laplace is not None:
            warnings.simplefilter("ignore")  # laplace-torch's and curvlinops' about themselves
        rows = compare(laplace, args, device)
    rows["last_layer"] = last_layer(args, device)
    columns = {"fitting": FITTING, "tuning": TUNING, "predicting": PREDICTING, "last_layer": LAST_LAYER}
    tables = {name: Table(columns[name], scores) for name, scores in rows.items()}
    source = "noise" if args.data_dir is None else "MNIST"
    note = (
        f"{source}; torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads; medians of {args.repeats} "
        f"repeats in turn, {args.peer_repeats} of {THEIRS}'s predictions"
    )
    for name, table in tables.items():
        title = TITLES[name].format(**vars(args))
        print(f"{title}\n\n{table.to_text()}\n")
        table.write_csv(args.out / f"{name}.csv")
        (args.out / f"{name}.md").write_text(table.to_markdown(title, [note]), encoding="utf-8")
    print(note)
    draw(tables, args.out / "predict_cost.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
