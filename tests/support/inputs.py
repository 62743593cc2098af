"""Networks that take their inputs and give their outputs in different forms."""

import torch
from torch import nn

import kronlaplace as kl
from tests.support import oracles
from tests.support.assertions import assert_close


def fisher_of(model, data, estimator="tkfac", likelihood="classification", **options):
    return kl.estimate_fisher(model, data, likelihood, estimator, sampling="exact", **options)


class Joined(nn.Module):
    """Two inputs side by side."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def run(self, a, b):
        return self.head(torch.tanh(self.first(torch.cat([a, b], dim=1))))


class Positional(Joined):
    def forward(self, a, b):
        return self.run(a, b)


class Options(Joined):
    def forward(self, *, a, b, scale=1.0):
        return scale * self.run(a, b)


class OneArgument(Joined):
    def forward(self, batch):
        return self.run(batch["a"], batch["b"])


class OneTensor(Joined):
    def forward(self, x):
        return self.run(x[:, :2], x[:, 2:])


class WithLogits(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.inner, self.make = OneTensor(), make

    def forward(self, x):
        return self.make(self.inner(x))


ESTIMATORS = {"kfac": oracles.kfac_expand, "tkfac": oracles.tkfac_exact}


def assert_same(actual, expected, rtol=1e-12):
    assert list(actual) == list(expected)
    assert actual.n_examples == expected.n_examples
    for name, block in actual.items():
        assert_close(block.to_dense(), expected[name].to_dense(), rtol, name)
    assert (actual.statistics is None) == (expected.statistics is None)
    if actual.statistics is not None:
        torch.testing.assert_close(actual.statistics, expected.statistics)
