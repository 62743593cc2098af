"""Is it the Kronecker factors? The same Laplace posterior with the exact Gauss-Newton matrix, on scikit-learn's digits.

    python -m experiments.dense_ggn --out experiment-results/dense_ggn

A small LeNet is trained as in the demo, and four posteriors are tuned by the evidence: K-FAC over the last layer and over
all layers, the exact matrix cut to the layers' blocks, and the whole exact matrix (3,658 parameters, so it can be stored).
All predict with the softmax averaged over draws of the linearized outputs.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.func import functional_call, jacrev, vmap

import kronlaplace as kl
from kronlaplace import metrics
from kronlaplace.demo.classification import train_on
from kronlaplace.demo.datasets import load
from kronlaplace.demo.report import Column, Table

COLUMNS = (
    Column("nll", "NLL"),
    Column("ece", "ECE"),
    Column("variance", "mean variance", 2),
    Column("prior_precision", "prior precision", 2),
    Column("evidence", "log evidence", 1),
)
DRAWS = 1000


def jacobians(model, x):
    """Derivatives of all outputs by all parameters, (N, C, P)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    one = jacrev(lambda p, x: functional_call(model, p, (x[None],))[0])
    parts = [vmap(one, (None, 0))(parameters, chunk) for chunk in x.split(100)]
    return torch.cat([torch.cat([p.flatten(2) for p in part.values()], dim=2) for part in parts])


def exact_posterior(curvature, theta, log_likelihood):
    """Root of the covariance, prior precision and evidence of a dense curvature, tuned on a fine grid."""
    values, vectors = torch.linalg.eigh(curvature)
    values = values.clamp_min(0)
    grid = torch.logspace(-3, 5, 801, dtype=torch.float64)
    evidence = torch.stack([log_likelihood - 0.5 * (d * theta @ theta + torch.log1p(values / d).sum()) for d in grid])
    best = grid[evidence.argmax()]
    return vectors / (values + best).sqrt(), float(best), float(evidence.max())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("experiment-results/dense_ggn"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    data = load("digits")
    model = train_on(data, torch.device("cpu"), seed=0).double()
    x, y, test_x, labels = data.train_x.double(), data.train_y, data.test_x.double(), data.test_y.numpy()
    with torch.no_grad():
        f, test_f = model(x), model(test_x)
    rows = {}

    def add(name, probabilities, covariance=None, precision=math.nan, evidence=math.nan):
        p = probabilities.numpy()
        variance = 0.0 if covariance is None else float(covariance.diagonal(dim1=1, dim2=2).mean())
        nll, ece = metrics.negative_log_likelihood(p, labels), metrics.expected_calibration_error(p, labels)
        rows[name] = np.array([[nll, ece, variance, precision, evidence]])

    def averaged(covariance):
        generator = torch.Generator().manual_seed(0)
        return kl.Categorical().predictive(test_f, covariance, kl.Link.MC, DRAWS, generator)

    add("MAP", test_f.softmax(1))
    fisher = kl.estimate_fisher(model, [(x, y)], "classification", sampling="exact")
    for name, layers in (("K-FAC, last layer", list(fisher)[-1:]), ("K-FAC, all layers", list(fisher))):
        posterior = kl.KronLaplace(model, "classification", layers=layers).fit(fisher=fisher).tune(logit_scale="fixed")
        covariance = posterior.functional_variance(test_x)
        precision, evidence = float(posterior.prior_precision), float(posterior.log_marginal_likelihood())
        add(name, averaged(covariance), covariance, precision, evidence)

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    pi, test_jacobians = f.softmax(1), jacobians(model, test_x)
    curvature = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for J, p in zip(jacobians(model, x).split(100), pi.split(100), strict=True):
        curvature += ((torch.diag_embed(p) - p[:, :, None] * p[:, None]) @ J).flatten(0, 1).T @ J.flatten(0, 1)
    sizes = [sum(p.numel() for p in m.parameters()) for m in model if any(True for _ in m.parameters())]
    ends = np.cumsum(sizes)
    blocks = torch.block_diag(*(curvature[e - n : e, e - n : e] for n, e in zip(sizes, ends, strict=True)))
    log_likelihood = torch.log(pi[range(len(y)), y]).sum()
    for name, matrix in (("exact, block diagonal", blocks), ("exact, whole", curvature)):
        root, precision, evidence = exact_posterior(matrix, theta, log_likelihood)
        spread = test_jacobians @ root
        add(name, averaged(spread @ spread.mT), spread @ spread.mT, precision, evidence)

    table = Table(COLUMNS, rows)
    print(table.to_text())
    table.write_csv(args.out / "table.csv")
    (args.out / "table.md").write_text(
        table.to_markdown("Exact and Kronecker-factored Laplace on digits"), encoding="utf-8"
    )
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(rows)[::-1], [row[0, 1] for row in rows.values()][::-1])
    axes.set_xlabel("expected calibration error")
    figure.savefig(args.out / "dense_ggn.png", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
