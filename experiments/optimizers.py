"""The optimizers that the experiments compare, with the settings that their grids try."""

from __future__ import annotations

from functools import partial

import torch

import kronlaplace as kl
from experiments.second_order_peers import PEERS
from experiments.training import Optimizer, updater


def plain(make):
    """Train with an optimizer that `make(parameters, **settings)` builds."""
    return lambda model, problem, **settings: updater(model, problem, make(model.parameters(), **settings))


def natural_gradient(model, problem, **settings):
    """Train with `kl.NaturalGradient`, which observes the forward pass."""
    optimizer = kl.NaturalGradient(model, problem.likelihood, **settings)

    def update(x, y):
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.update_curvature(outputs)
        loss = problem.loss(outputs, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return update


def rates(*values, **settings):
    return tuple({"lr": value, **settings} for value in values)


IS_MISSING = "" if hasattr(kl, "NaturalGradient") else "this kronlaplace has no NaturalGradient"
SGD = "SGD with momentum"
OPTIMIZERS = {
    SGD: Optimizer(plain(partial(torch.optim.SGD, momentum=0.9)), rates(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "Adam": Optimizer(plain(torch.optim.Adam), rates(3e-4, 1e-3, 2e-3, 3e-3, 5e-3)),
    "Adam, 1e-3": Optimizer(plain(torch.optim.Adam), rates(1e-3)),
    "NaturalGradient": Optimizer(natural_gradient, missing=IS_MISSING),
    **PEERS,
}
