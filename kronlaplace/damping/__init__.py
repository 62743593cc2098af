"""Damping, which makes blocks invertible, and the damped inverse."""

from kronlaplace.damping.inverse import DampedInverse
from kronlaplace.damping.strategies import Damping, FactoredTikhonov, Tikhonov, TraceRestricted, TraceRestrictedAuto

__all__ = [
    "DampedInverse",
    "Damping",
    "FactoredTikhonov",
    "Tikhonov",
    "TraceRestricted",
    "TraceRestrictedAuto",
]


def __dir__() -> list[str]:
    return sorted(__all__)
