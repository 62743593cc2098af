"""Damping, which makes blocks invertible, and the damped inverse."""

from kronlaplace.damping.factored import FactoredTikhonov, TraceRestricted, TraceRestrictedAuto
from kronlaplace.damping.inverse import DampedInverse
from kronlaplace.damping.levenberg_marquardt import LevenbergMarquardt
from kronlaplace.damping.solvers import Solver, solver_from_tensors
from kronlaplace.damping.strategies import Damping, Tikhonov

__all__ = [
    "DampedInverse",
    "Damping",
    "FactoredTikhonov",
    "LevenbergMarquardt",
    "Solver",
    "Tikhonov",
    "TraceRestricted",
    "TraceRestrictedAuto",
    "solver_from_tensors",
]


def __dir__() -> list[str]:
    return sorted(__all__)
