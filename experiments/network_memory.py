"""Time and peak memory of fit, evidence, tuning and predictions of a large network of torchvision, in one process.

    python -m experiments.network_memory --network resnet50 --size 224 --examples 8 --batch 2

Random weights and inputs; the peak is the resident memory of the whole process so far, with torch and the network in it.
It needs torchvision.
"""

from __future__ import annotations

import argparse
import resource
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from experiments.measure import seconds
from experiments.peers import torchvision


def peak_gib():
    """The peak of this process's resident memory, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def network(name, classes):
    """Return a network of torchvision with random weights."""
    return getattr(torchvision().models, name)(num_classes=classes)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--predictions", type=int, default=2)
    parser.add_argument("--sampling", choices=["exact", "mc"], default="exact")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = network(args.network, args.classes).eval()
    x = torch.randn(args.examples, 3, args.size, args.size)
    y = torch.randint(0, args.classes, (args.examples,))
    posterior = kl.KronLaplace(model, "classification")
    loader = DataLoader(TensorDataset(x, y), args.batch)
    print(f"{'':12} {'seconds':>8} {'peak GiB':>9}\n{'before':12} {'':8} {peak_gib():9.2f}", flush=True)
    for step, call in {
        "fit": lambda: posterior.fit(loader, sampling=args.sampling),
        "evidence": posterior.log_marginal_likelihood,
        "tune": posterior.tune,
        "predict": lambda: posterior.predict(x[: args.predictions]),
    }.items():
        print(f"{step:12} {seconds(call):8.1f} {peak_gib():9.2f}", flush=True)


if __name__ == "__main__":
    main()
