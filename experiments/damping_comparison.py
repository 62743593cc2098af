"""Estimators and dampings side by side on the autoencoder, as in the experiments of the TKFAC paper.

    python -m experiments.damping_comparison --data-dir DATA --out experiment-results/damping_comparison

All train by TKFAC's Algorithm 1: a constant learning rate, momentum 0.9, no clip, no weight decay. K-FAC, TKFAC, and K-FOC
run with K-FAC's factored damping, with that of TKFAC (Eq. 5.15), and with TKFAC's automatic one (Eq. 5.16 and 5.17, where
the linear layers are expanded); EKFAC and the diagonal, which have no factors to damp, with Tikhonov's. Learning rate and
damping are tuned by the same grid for each, which the notes of the table list.
"""

from __future__ import annotations

import argparse
import sys

import kronlaplace as kl
from experiments.autoencoder import MEASURE, TARGET, autoencoding
from experiments.comparison import add_arguments, compare
from experiments.optimizers import OPTIMIZERS, natural
from experiments.second_order_peers import grid
from experiments.training import Optimizer

FACTORED = {
    "factored": kl.damping.FactoredTikhonov,
    "Eq. 5.15": kl.damping.TraceRestricted,
    "Eq. 5.16, 5.17": kl.damping.TraceRestrictedAuto,
}
RATES = (0.03, 0.1, 0.3)
DAMPINGS = {"Eq. 5.16, 5.17": (1.0, 10.0, 100.0)}
USUAL_DAMPINGS = (3e-3, 3e-2, 3e-1)


def algorithm(estimator, make_damping, every):
    """TKFAC's Algorithm 1 with an estimator and a damping, and factors and inverses renewed every so many updates.

    It averages damped factors (Eq. 5.18 and 5.19), where there are factors that can be.
    """
    can_be_damped = estimator in ("kfac", "tkfac") and make_damping is not kl.damping.Tikhonov

    def make(model, likelihood, lr, damping):
        return kl.NaturalGradient(
            model,
            likelihood,
            lr=lr,
            momentum=0.9,
            estimator=estimator,
            damping=make_damping(damping),
            kl_clip=None,
            averaging="damped" if can_be_damped else "undamped",
            curvature_every=every,
            invert_every=every,
        )

    return natural(make)


def optimizers(every, rates=RATES):
    """By name: estimators with dampings, and Adam."""
    reference = MEASURE.reference
    found = {reference: OPTIMIZERS[reference]}
    pairs = [(name, key, make) for name in ("kfac", "tkfac", "kfoc") for key, make in FACTORED.items()]
    pairs += [(name, "Tikhonov", kl.damping.Tikhonov) for name in ("ekfac", "diagonal")]
    for name, key, make in pairs:
        settings = grid(lr=rates, damping=DAMPINGS.get(key, USUAL_DAMPINGS))
        found[f"{name}, {key}"] = Optimizer(algorithm(name, make, every), settings)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--digits", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--every", type=int, default=10, help="updates between two estimates and two inverses")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of the grid")
    add_arguments(parser, optimizers(10), "damping_comparison", target=TARGET, updates=200, grid_updates=60)
    args = parser.parse_args(argv)
    problem = autoencoding(args.data_dir, args.digits, args.batch_size, device=args.device)
    compare(problem, optimizers(args.every, args.rates), MEASURE, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
