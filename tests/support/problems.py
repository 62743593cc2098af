"""Networks with all that the estimators' oracles know about them."""

import functools

import torch
from torch import nn

import kronlaplace as kl
from tests.support import oracles
from tests.support.architectures import ARCHITECTURES
from tests.support.cases import case
from tests.support.networks import CASES

NETWORKS = {**CASES, **ARCHITECTURES}


@functools.cache
def problem(network, likelihood="classification", empirical=False):
    """A network with data, and what all estimators are defined by."""
    torch.manual_seed(0)
    made = NETWORKS[network](likelihood)
    data = oracles.gradients(made.model, made.inputs, likelihood, made.targets if empirical else None)
    return made, data


def batches(made, size=2, order=None):
    return made.batches(size, order)


def estimate(made, estimator, size=2, order=None, sampling="exact", **options):
    data = batches(made, size, order)
    return kl.estimate_fisher(made.model, data, made.likelihood, estimator, sampling=sampling, **options)


def several(sizes=(1, 3, 8, 20, 2, 2, 8, 9, 1, 5), outputs=3, **options):
    """A small network with examples enough that a running sum of rank two is cut several times, and its batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))
    made = case(model, torch.randn(sum(sizes), 4), outputs, **options)
    rows = list(torch.arange(sum(sizes)).split(list(sizes)))
    return made, rows, [(made.inputs[part], made.targets[part]) for part in rows]


def regression_network(activation=nn.ReLU, n=120, likelihood="classification", outputs=3):
    return case(
        nn.Sequential(nn.Linear(5, 12), activation(), nn.Linear(12, outputs)), torch.randn(n, 5), outputs, likelihood
    )
