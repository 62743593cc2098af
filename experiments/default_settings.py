"""Do optimizers train by themselves? A small transformer encoder and an LSTM, each optimizer with its default settings.

    python -m experiments.default_settings --out experiment-results/default_settings

The data are scikit-learn's 8x8 digits, read as sequences of eight rows; the transformer has two layers of width 64 with four
heads and dropout, the LSTM 64 units. No setting is chosen and no grid run: the optimizers are called with the network (and
the likelihood, where they need one) alone.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from experiments.comparison import Measure, add_arguments, compare
from experiments.optimizers import OPTIMIZERS, plain
from experiments.second_order_peers import PEERS, soap
from experiments.training import Optimizer, Problem

WIDTH = 64


class Positions(nn.Module):
    """Adds sines and cosines of the position (Vaswani et al., 2017)."""

    def __init__(self, length, width):
        super().__init__()
        angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("codes", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))

    def forward(self, x):
        return x + self.codes


class Mean(nn.Module):
    """Mean over the positions."""

    def forward(self, x):
        return x.mean(1)


class LastState(nn.Module):
    """An LSTM's hidden state after the last step."""

    def __init__(self, n_in, width):
        super().__init__()
        self.lstm = nn.LSTM(n_in, width, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


def transformer(length=8, n_in=8, n_classes=10):
    layers = [nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True) for _ in range(2)]
    return nn.Sequential(nn.Linear(n_in, WIDTH), Positions(length, WIDTH), *layers, Mean(), nn.Linear(WIDTH, n_classes))


def lstm(n_in=8, n_classes=10):
    return nn.Sequential(LastState(n_in, WIDTH), nn.Linear(WIDTH, n_classes))


NETWORKS = {"transformer": transformer, "lstm": lstm}
BY_DEFAULT = {
    "SGD": Optimizer(plain(torch.optim.SGD)),
    "Adam": Optimizer(plain(torch.optim.Adam)),
    "AdamW": Optimizer(plain(torch.optim.AdamW)),
    "NaturalGradient": OPTIMIZERS["NaturalGradient"],
    "AdaptiveKFAC": OPTIMIZERS["AdaptiveKFAC"],
    "SOAP": Optimizer(soap, missing=PEERS["SOAP"].missing),
}


def rows_of_digits():
    """The digits as sequences of rows with values from 0 to 1, `(N, 8, 8)`, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images / 16).float(), torch.from_numpy(digits.target).long()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch-size", type=int, default=128)
    add_arguments(parser, BY_DEFAULT, "default_settings", target=0.1, seconds=math.inf, updates=400)
    args = parser.parse_args(argv)
    x, y = (a.to(args.device) for a in rows_of_digits())
    folder = args.out
    for name in args.networks:
        args.out = folder / name
        title = f"{name}, {len(x):,} digits as sequences of rows"
        problem = Problem(title, NETWORKS[name], F.cross_entropy, kl.Categorical(), x, y, args.batch_size)
        compare(problem, BY_DEFAULT, Measure("smoothed loss", "Adam", decimals=4, limits=(0, 2.5)), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
