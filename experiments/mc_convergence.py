"""How fast sampled Fisher factors reach the exact ones: the error falls as one over the root of the samples.

    python -m experiments.mc_convergence --out experiment-results/mc_convergence

The relative Frobenius error of the gradient factors of a small convolutional network in float64, root mean square over
seeds and layers, against the number of labels drawn per example, and the exponent of a power law through it (-1/2 is
what independent draws give). The activation factors have no sampling error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import kronlaplace as kl
from kronlaplace.demo.networks import small_lenet
from kronlaplace.demo.report import Column, Table

LIKELIHOODS = {"classification": kl.Categorical(), "binary": kl.Bernoulli(), "regression": kl.Gaussian()}


def errors(model, data, likelihood, samples, seeds):
    exact = kl.estimate_fisher(model, data, likelihood, sampling="exact")
    rows = []
    for n in samples:
        squared = []
        for seed in range(seeds):
            sampled = kl.estimate_fisher(model, data, likelihood, sampling="mc", mc_samples=n, seed=seed)
            for name, block in exact.items():
                difference = sampled[name].gradient_factor - block.gradient_factor
                squared.append(float(difference.norm() / block.gradient_factor.norm()) ** 2)
        rows.append(np.sqrt(np.mean(squared)))
    return np.array(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("experiment-results/mc_convergence"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = small_lenet().double().eval()
    data = [torch.randn(20, 1, 8, 8, dtype=torch.float64)]
    scores, figure = {}, Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, likelihood in LIKELIHOODS.items():
        error = errors(model, data, likelihood, args.samples, args.seeds)
        exponent = np.polyfit(np.log(args.samples), np.log(error), 1)[0]
        scores[name] = np.array([[*error, exponent]])
        axes.loglog(args.samples, error, "o-", label=f"{name}, exponent {exponent:.2f}")
    axes.loglog(args.samples, np.array(args.samples) ** -0.5, "k:", label="samples$^{-1/2}$")
    axes.set_xlabel("labels drawn per example")
    axes.set_ylabel("relative error of the gradient factors")
    axes.legend(fontsize=8)
    figure.savefig(args.out / "mc_convergence.png", dpi=150)
    columns = [*(Column(f"error_{n}", f"{n} samples") for n in args.samples), Column("exponent", "exponent", 3)]
    table = Table(columns, scores)
    print(table.to_text())
    table.write_csv(args.out / "table.csv")
    (args.out / "table.md").write_text(table.to_markdown("Error of sampled gradient factors"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
