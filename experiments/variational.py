"""How near variational curvature comes to the best Gaussian, and what it costs.

    python -m experiments.variational --data-dir DATA --out experiment-results/variational

Distance: one hidden layer of 8 ReLU units on scikit-learn's wine (three classes) and breast cancer (one logit), trained
until it is certain, in double precision. The reference is the dense Gaussian over all weights together, at the fixed point
of its own iteration from the dense Gauss-Newton matrix. Next to it are plain and variational posteriors of every estimator
(by default; with exact sampling, one round, and rounds until the bound stops growing): the relative Frobenius error of the
covariance, the Kullback-Leibler divergence from the reference, the evidence lower bound, the prior precision and the
effective number of parameters.

Cost: LeNet-5 after some steps of training on 2,000 MNIST digits in batches of 250 (noise of the right shape without
`--data-dir`), against the plain exact fit. Times are medians over repeats taken in turn; ratios are medians of the ratios
run by run. Peak memory is what torch allocates above what was there before in the first three batches, as the profiler
records it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.optimize import brentq
from torch.func import functional_call, jacrev, vmap
from tqdm.auto import tqdm

import kronlaplace as kl
from experiments.fit_cost import train
from experiments.measure import CPU, Run, in_turn, largest_bytes, peak_bytes, ratio
from kronlaplace.demo.datasets import load
from kronlaplace.demo.networks import lenet5, one_hidden_layer
from kronlaplace.demo.report import Column, Table

DISTANCE = (
    Column("covariance_error", "error of the covariance", 3),
    Column("divergence", "KL from the best, nats", 2),
    Column("bound", "lower bound, nats", 2),
    Column("prior_precision", "prior precision", 4),
    Column("effective", "effective parameters", 1),
)
COST = (
    Column("seconds", "seconds", 3),
    Column("time_ratio", "multiple of the plain fit", 2),
    Column("peak_mib", "peak MiB", 1),
    Column("largest_mib", "largest tensor, MiB", 1),
    Column("bound", "lower bound, nats", 1),
)
ESTIMATORS = {
    "K-FAC": kl.KFAC(),
    "TKFAC": kl.TKFAC(),
    "K-FOC": kl.KFOC(),
    "EKFAC": kl.EKFAC(),
    "diagonal": kl.Diagonal(),
    "exact blocks": kl.ExactBlock(),
}
TABLES = {"wine": "classification", "breast-cancer": "binary"}
PLAIN = "plain, exact"


def certain_network(name, seed, steps):
    data = load(name)
    x, y = data.train_x.double(), data.train_y
    torch.manual_seed(seed)
    model = one_hidden_layer(x.shape[1], 8, n_outputs=3 if TABLES[name] == "classification" else 1).double()
    if TABLES[name] == "binary":
        y = y.double().unsqueeze(1)
    loss = F.cross_entropy if TABLES[name] == "classification" else F.binary_cross_entropy_with_logits
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), x, y


class Dense:
    """The Gaussian over all weights together, N(theta, (sum of Jᵀ M J + d)⁻¹)."""

    def __init__(self, model, x, y, likelihood):
        self.y, self.likelihood = y, likelihood
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        one = jacrev(lambda p, x: functional_call(model, p, (x[None],))[0])
        by_name = vmap(one, (None, 0))(parameters, x)
        self.f = model(x).detach()
        self.J = joined(by_name, self.f.ndim)
        self.theta = joined(parameters, 0)

    def tuned(self, curvature):
        """Precision and prior precision where d ‖theta‖² = γ, the largest evidence with this curvature."""
        values = torch.linalg.eigvalsh(curvature).clamp_min(0)
        squares = float(self.theta @ self.theta)
        log = brentq(lambda u: np.exp(u) * squares - float((values / (values + np.exp(u))).sum()), -30, 30)
        return curvature + np.exp(log) * torch.eye(len(curvature), dtype=curvature.dtype), np.exp(log)

    def averages(self, precision):
        """The average metric and log-likelihood, with the draws that the library makes of one batch."""
        covariance = self.J @ torch.linalg.solve(precision, self.J.mT)
        if self.likelihood.outputs_are_independent:
            covariance = covariance.diagonal(dim1=1, dim2=2)
        generator = kl.DirectionSampling(seed=0).generator(0, CPU)
        found = self.likelihood.averages(self.f, covariance, self.y, generator)
        return found.metric if found.metric.ndim == 3 else torch.diag_embed(found.metric), found.log_likelihood

    def curvature(self, metric):
        return (metric @ self.J).flatten(0, 1).T @ self.J.flatten(0, 1)

    def bound(self, precision, delta, log_likelihood):
        n = len(self.theta)
        trace = delta * float(torch.linalg.inv(precision).trace())
        occam = float(torch.logdet(precision)) - n * np.log(delta) + delta * float(self.theta @ self.theta)
        return float(log_likelihood) - 0.5 * (occam + trace - n), n - trace

    def plain(self):
        self.likelihood.check_outputs(self.f)
        directions = torch.stack(list(self.likelihood.directions(self.f, kl.Sampling.EXACT)))
        return self.curvature(torch.einsum("vnc,vnd->ncd", directions, directions))

    def best(self, step=0.5, tolerance=1e-9):
        """The fixed point, by damped steps."""
        curvature = self.plain()
        while True:
            precision, delta = self.tuned(curvature)
            metric, log_likelihood = self.averages(precision)
            new = self.curvature(metric)
            if torch.linalg.norm(new - curvature) <= tolerance * torch.linalg.norm(new):
                return precision, delta, log_likelihood
            curvature = (1 - step) * curvature + step * new


def joined(values, axes):
    """Values of parameters as the row-major matrices of the layers, bias last, flat behind `axes` leading axes."""
    layers = {name.rpartition(".")[0] for name in values}
    parts = [torch.cat([values[f"{k}.weight"], values[f"{k}.bias"].unsqueeze(-1)], dim=-1) for k in sorted(layers)]
    return torch.cat([part.flatten(axes) for part in parts], dim=axes)


def distances(name, seed, steps):
    model, x, y = certain_network(name, seed, steps)
    posterior = kl.KronLaplace(model, TABLES[name], kl.ExactBlock())
    dense = Dense(model, x, y, posterior.likelihood)
    best, delta, log_likelihood = dense.best()
    reference = torch.linalg.inv(best)
    rows = {}

    def add(label, precision, delta, bound, effective):
        covariance = torch.linalg.inv(precision)
        error = float(torch.linalg.norm(covariance - reference) / torch.linalg.norm(reference))
        log_ratio = float(torch.logdet(precision) - torch.logdet(best))
        divergence = 0.5 * (float((best @ covariance).trace()) - len(best) + log_ratio)
        rows[label] = np.array([[error, divergence, bound, delta, effective]])

    add("dense, variational", best, delta, *dense.bound(best, delta, log_likelihood))
    precision, delta = dense.tuned(dense.plain())
    add("dense, plain", precision, delta, *dense.bound(precision, delta, dense.averages(precision)[1]))
    data = [(x, y)]
    for label, estimator in tqdm(ESTIMATORS.items(), leave=False):
        posterior = kl.KronLaplace(model, TABLES[name], estimator)
        for kind, options in (
            ("plain", None),
            ("default", {}),
            ("one round", {"sampling": "exact"}),
            ("variational", {"sampling": "exact", "rounds": 100, "tolerance": 1e-6}),
        ):
            if options is None:
                posterior.fit(data).tune(logit_scale="fixed")
            else:
                posterior.fit_variational(data, **options)
            fisher, delta = posterior.fisher, float(posterior.prior_precision)
            precision = fisher.n_examples * fisher.to_dense() + delta * torch.eye(len(best), dtype=best.dtype)
            bound = posterior.evidence_lower_bound(data)
            add(f"{label}, {kind}", precision, delta, bound.value, bound.effective_parameters)
    return Table(DISTANCE, rows)


def plain(model, data):
    return kl.KronLaplace(model, "classification").fit(data)


def variational(model, data, **options):
    return kl.KronLaplace(model, "classification").fit_variational(data, **options).posterior


METHODS = {
    PLAIN: plain,
    "variational, default": variational,
    "variational, two rounds": partial(variational, rounds=2),
    "variational, exact sampling": partial(variational, sampling="exact"),
}


def costs(digits, batch_size, repeats, data_dir):
    torch.manual_seed(0)
    model = lenet5()
    x, y = torch.randn(digits, 1, 28, 28), torch.randint(10, (digits,))
    if data_dir is not None:
        mnist = load("mnist", data_dir)
        x, y = mnist.train_x[:digits], mnist.train_y[:digits]
    data = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    train(model, data, steps=300)
    for method in METHODS.values():  # warm-up
        method(model, data[:2])
    calls = {key: partial(method, model, data) for key, method in METHODS.items()}
    times = in_turn({key: Run(call, repeats) for key, call in calls.items()})
    rows = {}
    for key, method in METHODS.items():
        few = partial(method, model, data[:3])
        posterior = calls[key]()
        bound = posterior.tune(logit_scale="fixed").evidence_lower_bound(data).value
        peaks = [peak_bytes(few) / 2**20, largest_bytes(few) / 2**20]
        rows[key] = np.array([[statistics.median(times[key]), ratio(times[key], times[PLAIN]), *peaks, bound]])
    return Table(COST, rows)


def draw(tables, path):
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (name, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        names = [key for key in table.scores if key != "dense, variational"]
        axes.barh(range(len(names)), [table.scores[key][0, 1] for key in names])
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(name)
        axes.set_xlabel("KL from the best Gaussian, nats")
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="training steps on the tables")
    parser.add_argument("--digits", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-cost", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("experiment-results/variational"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message="the evidence is largest at the edge")
    tables = {}
    for name in TABLES:
        tables[name] = distances(name, args.seed, args.steps)
        report(tables[name], name, f"{name}: distance from the best Gaussian", args.out)
    draw(tables, args.out / "variational.png")
    if not args.skip_cost:
        title = f"LeNet-5: {args.digits} digits, batches of {args.batch_size}, {torch.get_num_threads()} threads"
        report(costs(args.digits, args.batch_size, args.repeats, args.data_dir), "cost", title, args.out)
    return 0


def report(table, name, title, out):
    print(f"{title}\n\n{table.to_text()}\n")
    table.write_csv(out / f"{name}.csv")
    (out / f"{name}.md").write_text(table.to_markdown(title, [f"torch {torch.__version__}"]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
