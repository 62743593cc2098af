"""The optimizers that the experiments compare, with the settings that their grids try."""

from __future__ import annotations

from functools import partial, wraps

import torch

import kronlaplace as kl
from experiments.second_order_peers import PEERS, grid
from experiments.training import Optimizer, updater

AVERAGED_EXAMPLES = 50_000


def plain(make):
    """Train with an optimizer that `make(parameters, **settings)` builds."""
    return lambda model, problem, **settings: updater(model, problem, make(model.parameters(), **settings))


def natural(make):
    """Train with an optimizer of kronlaplace that `make(model, likelihood, **settings)` builds."""

    def prepare(model, problem, **settings):
        optimizer = make(model, problem.likelihood, **settings)

        def update(x, y):
            optimizer.zero_grad()
            outputs = model(x)
            optimizer.update_curvature(outputs)
            loss = problem.loss(outputs, y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return update

    return prepare


def averaged(prepare):
    """Evaluate the moving average of the weights over 50,000 examples, as KFC does for every optimizer."""

    @wraps(prepare)
    def with_average(model, problem, **settings):
        update = prepare(model, problem, **settings)
        average = kl.IterateAverage(model, timescale=AVERAGED_EXAMPLES / problem.batch_size)

        def update_both(x, y):
            loss = update(x, y)
            average.update()
            return loss

        update_both.evaluated = average.applied
        return update_both

    return with_average


def kfc(model, likelihood, lr, damping, estimator="kfac", invert_every=20):
    """KFC's Algorithm 1: a constant damping and learning rate, clipped steps, momentum."""
    return kl.NaturalGradient(
        model,
        likelihood,
        lr=lr,
        momentum=0.9,
        estimator=estimator,
        damping=kl.damping.FactoredTikhonov(damping),
        kl_clip=0.3,
        curvature_every=10,
        invert_every=invert_every,
    )


SGD = Optimizer(plain(partial(torch.optim.SGD, momentum=0.9)), grid(lr=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 5e-2, 1e-1)))
KFC = Optimizer(natural(kfc), grid(lr=(0.1, 0.3, 1.0), damping=(1e-3, 1e-2, 1e-1)))
TKFAC = grid(estimator=("tkfac",), damping=(kl.damping.LevenbergMarquardt(every=1, decay=0.5, lower=0.0, upper=0.3),))
EVERY_STEP = grid(curvature_every=(1,), invert_every=(2,))
OPTIMIZERS = {
    "SGD with momentum": SGD,
    "SGD, averaged": Optimizer(averaged(SGD.prepare), SGD.grid),
    "Adam": Optimizer(plain(torch.optim.Adam), grid(lr=(3e-4, 1e-3, 2e-3, 3e-3))),
    "Adam, 1e-3": Optimizer(plain(torch.optim.Adam), grid(lr=(1e-3,))),
    "NaturalGradient": Optimizer(natural(kl.NaturalGradient)),
    "NaturalGradient, every step": Optimizer(natural(kl.NaturalGradient), EVERY_STEP),
    "NaturalGradient, TKFAC": Optimizer(natural(kl.NaturalGradient), TKFAC),
    "NaturalGradient, KFC": KFC,
    "NaturalGradient, KFC, averaged": Optimizer(averaged(KFC.prepare), KFC.grid),
    "AdaptiveKFAC": Optimizer(natural(kl.AdaptiveKFAC)),
    **PEERS,
}
CHAIN_OPTIMIZERS = {
    "NaturalGradient, tridiagonal": Optimizer(natural(partial(kl.NaturalGradient, structure="block-tridiagonal"))),
    "AdaptiveKFAC, tridiagonal": Optimizer(natural(partial(kl.AdaptiveKFAC, structure="block-tridiagonal"))),
}
"""Those for chains of linear layers only."""
