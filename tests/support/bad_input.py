"""A small network and data that can be spoiled."""

import torch
from torch import nn

NAN = float("nan")


def mlp32():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def poisoned(index):
    x = X.clone()
    x[index] = NAN
    return x
