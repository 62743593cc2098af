"""Estimators by name, beside the rules that their blocks obey."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

import kronlaplace as kl
from tests.support import oracles

CONVERGED = {"max_iter": 1000, "tol": 1e-12}
CONVERGED_FULL = {"max_iter": 1000, "tol": 1e-6}  # squared in "full"
# Constructors are called in the tests; each stands beside the rule that one group of its block must obey.
KRONECKER = {
    "kfac": (lambda: kl.KFAC(), oracles.kfac_expand),
    "kfac-reduce": (lambda: kl.KFAC(weight_sharing="reduce"), oracles.kfac_reduce),
    "tkfac": (lambda: kl.TKFAC(), oracles.tkfac_exact),
    "tkfac-uncorrelated": (lambda: kl.TKFAC(spatial="uncorrelated"), oracles.tkfac_uncorrelated),
    "kfoc-one-sweep": (lambda: kl.KFOC(aggregation="sweeps", sweeps=1), oracles.tkfac_exact),
    "kfoc-full": (lambda: kl.KFOC(aggregation="full", **CONVERGED_FULL), oracles.kfoc_full),
}
BASES = ("kfac", "tkfac", "tkfac-uncorrelated")
TOLERANCE = {"kfoc-full": 1e-8}
# Those whose trace is that of the Fisher, whatever the layer.
TRACE = {
    "tkfac": lambda: kl.TKFAC(),
    "kfoc-one-sweep": lambda: kl.KFOC(aggregation="sweeps", sweeps=1),
    "ekfac": lambda: kl.EKFAC(basis=kl.KFAC()),
    "ekfac-kfoc": lambda: kl.EKFAC(basis=kl.KFOC(aggregation="sweeps")),
    "diagonal": lambda: kl.Diagonal(),
    "exact": lambda: kl.ExactBlock(),
}
# Those that no order or size of batches may change.
ADDITIVE = {
    **{name: make for name, (make, _) in KRONECKER.items()},
    "sua": lambda: kl.SUA(),
    "kfoc-sweeps": lambda: kl.KFOC(aggregation="sweeps", sweeps=2),
    **TRACE,
}
# All there is.
EVERYTHING = {
    **ADDITIVE,
    **{
        f"kfoc-{aggregation}-{init}": functools.partial(
            lambda aggregation, init: kl.KFOC(aggregation=aggregation, init=init), aggregation, init
        )
        for aggregation in ("approx", "running", "full")
        for init in ("identity", "normal")
    },
    "kfoc-running-rank-4": lambda: kl.KFOC(aggregation="running", rank=4),
    "kfoc-approx-other-side": lambda: kl.KFOC(aggregation="approx", unit_factor="activation"),
}


@dataclass(frozen=True)
class White(kl.Estimator):
    """``δ · I`` with the trace of the Fisher's block."""

    name: ClassVar[str] = "white"
    for_any_layer: ClassVar[bool] = True

    def start(self, layer):
        return {"trace": torch.zeros((), dtype=layer.dtype)}

    def add_gradients(self, state, gradients):
        state["trace"] += gradients.weight_gradients().square().sum()

    def finish(self, state, layer, weight):
        q, p = layer.shape
        return kl.DiagonalBlock((state["trace"] / (weight * q * p)).expand(q, p).contiguous(), layer.name)
