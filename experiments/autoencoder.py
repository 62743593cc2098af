"""An autoencoder of the MNIST digits: which optimizer gets down fastest, by update and by wall clock?

    python -m experiments.autoencoder --data-dir DATA --out experiment-results/autoencoder

The network is 784-1000-500-250-30-250-500-1000-784 (ReLU, PyTorch's initial weights; with `--tanh` the papers' tanh network
with 15 random connections into each unit), the loss the binary cross-entropy summed over pixels, mean over examples; 10,000
digits, batches of 500. Every optimizer starts from the same weights and sees the same batches. The target is a smoothed
loss (exponential moving average of the batches' losses, decay 0.7, corrected for its start).

First each optimizer with a grid is tuned: the settings with the fewest updates to the target, their time not counted. Then
all are trained for some seconds of wall clock, in turn in one process, so that they share what the machine does meanwhile.
Without a data directory the digits are scikit-learn's, 8x8, and the network has 64 inputs.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from experiments.comparison import Measure, add_arguments, compare
from experiments.optimizers import CHAIN_OPTIMIZERS, OPTIMIZERS
from experiments.training import Problem
from kronlaplace.demo.files import read_idx

WIDTHS = (1000, 500, 250, 30, 250, 500, 1000)
CONNECTIONS = 15
TARGET = 140.7
MEASURE = Measure("smoothed loss", "Adam, 1e-3", limits=(60, 300))
SOURCE = "the original MNIST files (yann.lecun.com/exdb/mnist, mirror ossci-datasets.s3.amazonaws.com/mnist)"


def digits(data_dir, n):
    """The first `n` training digits with pixels from 0 to 1, `(N, pixels)`, and their name."""
    if data_dir is None:
        from sklearn.datasets import load_digits

        return torch.from_numpy(load_digits().data[:n] / 16).float(), "scikit-learn's 8x8 digits"
    images = read_idx(Path(data_dir) / "mnist" / "train-images-idx3-ubyte", 3, SOURCE)[:n]
    return torch.from_numpy(images.reshape(len(images), -1) / np.float32(255)), "MNIST digits"


def network(n_pixels, is_tanh=False):
    sizes = (n_pixels, *WIDTHS, n_pixels)
    layers = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.Tanh() if is_tanh else nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    if is_tanh:
        for layer in model[::2]:
            sparse_(layer)
    return model


def sparse_(layer):
    """Give each unit 15 connections with standard normal weights, and no bias (Martens, 2010)."""
    n_out, n_in = layer.weight.shape
    with torch.no_grad():
        layer.bias.zero_()
        kept = torch.rand(n_out, n_in).argsort(dim=1) < min(CONNECTIONS, n_in)
        layer.weight.copy_(torch.randn(n_out, n_in) * kept)


def cross_entropy(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(targets)


def autoencoding(data_dir, n, batch_size=500, is_tanh=False, device="cpu"):
    """The problem."""
    x, source = digits(data_dir, n)
    x = x.to(device)
    title = f"Autoencoder, {'tanh' if is_tanh else 'ReLU'}, {len(x):,} {source}"
    return Problem(title, lambda: network(x.shape[1], is_tanh=is_tanh), cross_entropy, kl.Bernoulli(), x, x, batch_size)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tanh", action="store_true", help="the papers' network")
    parser.add_argument("--digits", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=500)
    optimizers = OPTIMIZERS | CHAIN_OPTIMIZERS
    add_arguments(parser, optimizers, "autoencoder", target=TARGET, seconds=60.0, grid_updates=300)
    args = parser.parse_args(argv)
    problem = autoencoding(args.data_dir, args.digits, args.batch_size, args.tanh, args.device)
    compare(problem, optimizers, MEASURE, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
