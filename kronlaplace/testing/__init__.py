"""Checks of classes of your own, in the spirit of scikit-learn's ``check_estimator``.

Each takes an instance, runs the laws that the rest of the package relies on, and raises an `AssertionError` that says which
law failed and with which numbers. They run in seconds, on small problems in float64, and change no global state.

    >>> from kronlaplace.testing import check_likelihood
    >>> check_likelihood(kl.Gaussian(noise_std=0.5))
"""

from kronlaplace.testing.dampings import check_damping
from kronlaplace.testing.estimators import check_estimator
from kronlaplace.testing.layers import check_layer
from kronlaplace.testing.likelihoods import check_likelihood
from kronlaplace.testing.registrations import temporary_registrations

__all__ = ["check_damping", "check_estimator", "check_layer", "check_likelihood", "temporary_registrations"]


def __dir__() -> list[str]:
    return sorted(__all__)
