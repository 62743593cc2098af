"""What it costs to keep large Kronecker factors whole, and what is lost if they are truncated (`kl.Truncation`).

    python -m experiments.large_factors --out experiment-results/large_factors

ResNet-18 for 10 classes, at random weights, with 64 images of noise at 32x32; or a linear layer from 512 features to
10,000 classes with 256 examples. The Fisher is estimated once. Then, for factors that are whole and truncated: the seconds
until the posterior is fitted to this Fisher, the seconds of the second prediction of 32 inputs, the evidence at prior
precisions from 1e-2 to 10 (the largest difference from that of the whole factors, relative), and the mean difference of the
probabilities.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import kronlaplace as kl
from experiments.measure import seconds
from kronlaplace.demo.report import Column, Table

COLUMNS = (
    Column("estimate", "estimate, s", 1),
    Column("fit", "fit to it, s", 1),
    Column("predict", "predict 32, s", 2),
    Column("evidence", "evidence, relative difference", 6),
    Column("probabilities", "probabilities, difference", 7),
)
PRECISIONS = (1e-2, 1e-1, 1.0, 10.0)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        shortcut = (nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        self.shortcut = nn.Sequential(*(shortcut if stride > 1 or n_in != n_out else ()))

    def forward(self, x):
        return torch.relu(self.main(x) + self.shortcut(x))


def resnet18(n_classes=10):
    """ResNet-18 with torchvision's layers: a 7x7 convolution of stride 2 and a pooling first."""
    stages = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    body = [block for i, o, stride in stages for block in (BasicBlock(i, o, stride), BasicBlock(o, o, 1))]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_classes))


NETWORKS = {
    "resnet18": (resnet18, (3, 32, 32), 64, 10, {"sampling": "exact"}),
    "head": (lambda: nn.Sequential(nn.Linear(512, 10_000)), (512,), 256, 10_000, {"sampling": "mc"}),
}


def choices(rank):
    """The truncations that are compared, by name."""
    return {"whole": None, "truncated": kl.Truncation() if rank is None else kl.Truncation(rank=rank)}


def measure(name, rank=None, which=("whole", "truncated")):
    build, shape, n, classes, options = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    x, y, new = torch.randn(n, *shape), torch.randint(classes, (n,)), torch.randn(32, *shape)
    found = []
    estimate = seconds(
        lambda: found.append(
            kl.estimate_fisher(model, list(zip(x.split(64), y.split(64), strict=True)), "classification", **options)
        )
    )
    scores, evidences, predictions = {}, {}, {}
    for key in which:
        posterior = kl.KronLaplace(model, "classification", truncation=choices(rank)[key])
        fit = seconds(lambda posterior=posterior: posterior.fit(fisher=found[0]))
        evidences[key] = torch.stack([posterior.log_marginal_likelihood(prior_precision=d) for d in PRECISIONS])
        predictions[key] = posterior.predict(new)
        predict = seconds(lambda posterior=posterior: posterior.predict(new))
        first = next(iter(scores), key)
        evidence = float(((evidences[key] - evidences[first]) / evidences[first]).abs().max())
        difference = float((predictions[key] - predictions[first]).abs().mean())
        scores[key] = np.array([[estimate, fit, predict, evidence, difference]])
    return Table(COLUMNS, scores)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rank", type=int, help="of the truncated factors; without it the default")
    parser.add_argument("--only", choices=("whole", "truncated"), help="only one of them, without differences")
    parser.add_argument("--out", type=Path, default=Path("experiment-results/large_factors"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        table = measure(name, args.rank, ("whole", "truncated") if args.only is None else (args.only,))
        title = f"{name}, {torch.get_num_threads()} threads"
        print(f"{title}\n\n{table.to_text()}\n")
        table.write_csv(args.out / f"{name}.csv")
        (args.out / f"{name}.md").write_text(table.to_markdown(title, [f"torch {torch.__version__}"]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
