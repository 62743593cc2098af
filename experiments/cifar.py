"""CIFAR-10: in how many updates, and in what time, does an optimizer bring the training error to 10 %?

    python -m experiments.cifar --data-dir DATA --out experiment-results/cifar

The networks: `convolutional`, that of KFC's experiments (cuda-convnet's): three convolutions 5x5 with 32, 32, and 64
channels, each followed by pooling 3x3 with stride 2 (the maximum after the first, the mean after the others), and one linear
layer; `batch_norm`, the same with batch norm after each convolution; `resnet20`, He et al. (2016) with shortcuts without
parameters (option A). The data are the first 10,000 training images, standardized by channel, without augmentation; batches
of 512. The training error is that of the network in evaluation mode on all of them, every ten updates, its time not counted.
Every optimizer starts from the same weights and sees the same batches; each is tuned by a grid that the table's notes list.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from experiments.cifar_files import TRAINING, records, standardized
from experiments.comparison import Measure, add_arguments, compare
from experiments.optimizers import OPTIMIZERS
from experiments.training import Problem


def convolutional(is_normalized=False):
    """KFC's network for CIFAR-10."""
    layers = []
    for n_in, n_out, pool in ((3, 32, nn.MaxPool2d), (32, 32, nn.AvgPool2d), (32, 64, nn.AvgPool2d)):
        layers.append(nn.Conv2d(n_in, n_out, 5, padding=2))
        layers += [nn.BatchNorm2d(n_out)] if is_normalized else []
        layers += [nn.ReLU(), pool(3, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


class BasicBlock(nn.Module):
    """Two convolutions 3x3 beside a shortcut that halves the image and pads the channels with zeros where needed."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.first = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(n_out)
        self.second = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(n_out)
        self.stride, self.padding = stride, (n_out - n_in) // 2

    def forward(self, x):
        y = torch.relu(self.first_norm(self.first(x)))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(self.second_norm(self.second(y)) + shortcut)


def resnet20(n_classes=10):
    """ResNet-20 for CIFAR-10."""
    blocks, n_in = [], 16
    for n_out in (16, 32, 64):
        for i in range(3):
            blocks.append(BasicBlock(n_in, n_out, stride=2 if i == 0 and n_out > 16 else 1))
            n_in = n_out
    stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, n_classes))


NETWORKS = {
    "convolutional": convolutional,
    "batch_norm": lambda: convolutional(is_normalized=True),
    "resnet20": resnet20,
}


def images(data_dir, n):
    """The first `n` training images, standardized by channel, `(N, 3, 32, 32)`, and their labels."""
    x, y = records(data_dir, TRAINING)
    return standardized(x, x)[:n].contiguous(), y[:n]


def error(x, y):
    """Return the function that measures the share of wrong labels, in percent, in evaluation mode."""

    def score(model):
        model.eval()
        with torch.no_grad():
            wrong = sum((model(a).argmax(1) != b).sum() for a, b in zip(x.split(500), y.split(500), strict=True))
        model.train()
        return 100 * float(wrong) / len(y)

    return score


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", choices=NETWORKS, default="convolutional")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=512)
    add_arguments(parser, OPTIMIZERS, "cifar", target=10.0, seconds=1800.0, grid_updates=150)
    args = parser.parse_args(argv)
    x, y = (a.to(args.device) for a in images(args.data_dir, args.images))
    title = f"CIFAR-10, {args.network}, {len(x):,} images"
    problem = Problem(
        title, NETWORKS[args.network], F.cross_entropy, kl.Categorical(), x, y, args.batch_size, error(x, y)
    )
    compare(problem, OPTIMIZERS, Measure("training error, %", "SGD with momentum"), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
