"""Checks for user-defined classes, in the spirit of scikit-learn's ``check_estimator``.

Each check takes an instance, tests the laws on which the rest of the package relies, and raises an `AssertionError` that
names the violated law and the numbers involved. The checks run in seconds, on small problems in float64, and do not change
any global state.

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
