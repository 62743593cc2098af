"""Scores of two methods on the same examples, with standard errors of both and of their difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Comparison", "Statistic", "mean_of", "two_samples"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Statistic:
    """A number computed from examples, with the influence of each on it.

    Attributes:
        value: The number.
        influences: For each independent group of examples, how the number changes with the weight of each example, with
            mean zero, shape ``(n,)``. The standard error follows from them by the delta method.
    """

    value: float
    influences: tuple[FloatArray, ...]

    @property
    def error(self) -> float:
        """Standard error over examples."""
        return math.sqrt(sum(float(np.square(x).sum()) / (len(x) * (len(x) - 1)) for x in self.influences))

    def __sub__(self, other: Statistic) -> Statistic:
        """Return the difference of two statistics of the same examples, whose errors may be correlated."""
        pairs = zip(self.influences, other.influences, strict=True)
        return Statistic(self.value - other.value, tuple(a - b for a, b in pairs))

    def root(self) -> Statistic:
        """Return the square root."""
        value = math.sqrt(self.value)
        return Statistic(value, tuple(x / (2 * value) if value else x for x in self.influences))


def mean_of(terms: FloatArray, example: npt.NDArray[np.int64]) -> Statistic:
    """Return the mean of terms of which several may belong to one example; these need not be independent.

    Args:
        terms: The terms, ``(T,)``.
        example: The example of each term, numbers from 0 without a gap, ``(T,)``.
    """
    mean = float(terms.mean())
    count = np.bincount(example)
    sums = np.bincount(example, weights=terms)
    return Statistic(mean, ((sums - mean * count) / count.mean(),))


def two_samples(first: FloatArray, second: FloatArray) -> Statistic:
    """Return the common mean of the structural components of two independent groups, such as those of an AUROC."""
    value = float(second.mean())
    return Statistic(value, (first - value, second - value))


@dataclass(frozen=True)
class Comparison:
    """One row of a `Report`: a score of the MAP and of the posterior on the same examples, with standard errors.

    Attributes:
        name: The score, such as ``"NLL"``.
        map: The score of the network at its trained weights.
        map_error: Its standard error over examples.
        posterior: The score of the posterior predictive distribution.
        posterior_error: Its standard error over examples.
        difference: Posterior minus MAP.
        difference_error: Standard error of the difference, which is paired: as a rule much smaller than those of the scores.
    """

    name: str
    map: float
    map_error: float
    posterior: float
    posterior_error: float
    difference: float
    difference_error: float

    @staticmethod
    def of(name: str, at_map: Statistic, of_posterior: Statistic) -> Comparison:
        """Compare two statistics of the same examples."""
        paired = of_posterior - at_map
        values = (at_map.value, at_map.error, of_posterior.value, of_posterior.error, paired.value, paired.error)
        return Comparison(name, *values)

    @property
    def direction(self) -> int:
        """1 if the posterior's score is larger by more than two standard errors, −1 if smaller, 0 if neither."""
        if abs(self.difference) <= 2 * self.difference_error:
            return 0
        return 1 if self.difference > 0 else -1
