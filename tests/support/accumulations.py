"""Estimators by the way their sums go over the data, and accumulations in parts."""

import torch

import kronlaplace as kl
from kronlaplace.data.inputs import Inputs
from kronlaplace.fisher.curvature_pass import accumulate
from kronlaplace.fisher.one_batch import accumulate_batch
from kronlaplace.layers import find_layers
from kronlaplace.likelihoods import Sampling, resolve_likelihood
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.forward import NetworkForward
from tests.support.assertions import assert_close
from tests.support.estimators import CONVERGED, CONVERGED_FULL
from tests.support.problems import batches

ONE_PASS = {
    "kfac": lambda: kl.KFAC(),
    "kfac-reduce": lambda: kl.KFAC(weight_sharing="reduce"),
    "sua": lambda: kl.SUA(),
    "tkfac": lambda: kl.TKFAC(),
    "tkfac-uncorrelated": lambda: kl.TKFAC(spatial="uncorrelated"),
    "kfoc-one-sweep": lambda: kl.KFOC(sweeps=1),
    "kfoc-full": lambda: kl.KFOC(aggregation="full", **CONVERGED_FULL),
    "diagonal": lambda: kl.Diagonal(),
    "exact": lambda: kl.ExactBlock(),
}
SEVERAL_PASSES = {
    "kfoc": lambda: kl.KFOC(),
    "kfoc-three-sweeps": lambda: kl.KFOC(sweeps=3),
    "ekfac": lambda: kl.EKFAC(),
    "ekfac-kfoc": lambda: kl.EKFAC(basis=kl.KFOC()),
}
BY_BATCH = {
    "kfoc-running": lambda: kl.KFOC(aggregation="running", **CONVERGED),
    "kfoc-running-rank-3": lambda: kl.KFOC(aggregation="running", rank=3, **CONVERGED),
    "kfoc-approx": lambda: kl.KFOC(aggregation="approx", **CONVERGED),
    "kfoc-approx-other-side": lambda: kl.KFOC(aggregation="approx", unit_factor="activation", **CONVERGED),
}
ALL = {**ONE_PASS, **SEVERAL_PASSES, **BY_BATCH}


def accumulated(made, estimator, data):
    """What the public driver makes of some batches, by the parts it is made of."""
    accumulation = kl.Accumulation(estimator, find_layers(made.model))
    accumulate(
        made.model,
        data,
        resolve_likelihood(made.likelihood),
        accumulation,
        DirectionSampling(Sampling.EXACT),
        progress=False,
        description="",
    )
    return accumulation


def one_pass(accumulation, made, data):
    """The same, one pass only, written out."""
    likelihood = resolve_likelihood(made.likelihood)
    with NetworkForward(made.model, accumulation.layers) as forward:
        for x, y in data:
            f = forward(Inputs(x))
            accumulate_batch(
                forward.observer, f, likelihood, DirectionSampling(Sampling.EXACT), accumulation, targets=y
            )


def assert_same(blocks, expected, rtol=1e-10):
    assert list(blocks) == list(expected)
    for name, block in blocks.items():
        assert_close(block.to_dense(), expected[name].to_dense(), rtol, name)


def tolerance(name):
    return 1e-8 if "kfoc" in name else 1e-10


DECAY = 0.7
UNEQUAL = [1, 3, 2]  # sizes of batches


def in_batches(made, sizes=UNEQUAL):
    order = torch.arange(sum(sizes)) % len(made.targets)
    return [batches(made, len(part), part)[0] for part in order.split(sizes)]


def average(made, estimator, data, **options):
    return kl.estimate_fisher(
        made.model, data, made.likelihood, estimator, sampling="exact", ema_decay=options.get("decay", DECAY)
    )


NETWORKS = ["mlp", "cnn", "depthwise", "transformer", "lstm", "norms", "reused", "language_model"]
