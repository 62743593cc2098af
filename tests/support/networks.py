"""Small float64 networks with data, for tests: cases as data."""

import torch
from torch import nn

from tests.support.cases import Case


class Residual(nn.Module):
    """An in-place ReLU right behind a convolution, a residual addition, a batch norm, functional code."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        h = self.relu(self.first(x))
        h = h + self.relu(self.norm(self.second(h)))
        return self.head(torch.relu_(h).mean((2, 3)))


class Pooled(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.token = nn.Linear(3, 5)
        self.head = nn.Linear(5, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.token(x)).mean(1))


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def mlp(likelihood="classification", outputs=3, bias=True):
    model = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, outputs, bias=bias))
    return _case(model, torch.randn(7, 4), likelihood, outputs, ["0", "2"])


def cnn(likelihood="classification", outputs=3):
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 2, bias=False, dilation=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2 * 1 * 2, outputs),
    )
    return _case(model, torch.randn(5, 2, 5, 7), likelihood, outputs, ["0", "2", "5"])


def sequence(likelihood="classification", outputs=3):
    """A linear layer that is used at four positions."""

    return _case(Pooled(outputs), torch.randn(6, 4, 3), likelihood, outputs, ["token", "head"])


def residual(likelihood="classification"):
    case = _case(Residual(), torch.randn(5, 2, 4, 5), likelihood, 4, ["first", "second", "head"])
    case.model.norm.running_mean.normal_()
    case.model.norm.running_var.uniform_(0.5, 2)
    return case


CASES = {"mlp": mlp, "cnn": cnn, "sequence": sequence, "residual": residual}


def _case(model, inputs, likelihood, outputs, layers):
    model, inputs = model.double().eval(), inputs.double()
    n = len(inputs)
    targets = {
        "classification": lambda: torch.randint(outputs, (n,)),
        "binary": lambda: torch.randint(2, (n, outputs)).double(),
        "regression": lambda: torch.randn(n, outputs).double(),
    }[likelihood]()
    return Case(model, inputs, targets, likelihood, layers, batch_size=3)
