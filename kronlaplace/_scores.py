"""Scores of single predictions, whose means `kronlaplace.metrics` returns; numpy in, numpy out, nothing is checked.

Shapes as there: probabilities ``(N, C)`` and labels ``(N,)``; means, variances and targets of one shape.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

__all__ = [
    "auroc_terms",
    "bins_of",
    "brier_losses",
    "calibration_terms",
    "gaussian_crps",
    "gaussian_log_losses",
    "inside_intervals",
    "log_losses",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def log_losses(p: FloatArray, y: IntArray) -> FloatArray:
    """Return ``-log p(label)`` of each example, infinite for a probability of zero."""
    with np.errstate(divide="ignore"):
        return np.asarray(-np.log(p[np.arange(len(y)), y]))


def brier_losses(p: FloatArray, y: IntArray) -> FloatArray:
    """Return each example's squared error, summed over classes."""
    error = p.copy()
    error[np.arange(len(y)), y] -= 1.0
    return np.asarray(np.square(error).sum(axis=1))


def bins_of(p: FloatArray, n_bins: int) -> IntArray:
    """Return the bin of each example's confidence, of ``n_bins`` of equal width that are closed on the right."""
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    return np.searchsorted(edges[1:-1], p.max(axis=1), side="left")


def calibration_terms(p: FloatArray, y: IntArray, n_bins: int) -> FloatArray:
    """Return each example's term of the expected calibration error, which is their mean.

    A term is confidence minus correctness, with the sign that their sum has in the example's bin. The terms are also the
    influences of the examples on the error, up to its value (the infinitesimal jackknife, Efron 1982).
    """
    gap = p.max(axis=1) - (p.argmax(axis=1) == y)
    bins = bins_of(p, n_bins)
    sign = np.sign(np.bincount(bins, weights=gap, minlength=n_bins))
    return np.asarray(sign[bins] * gap)


def auroc_terms(inside: FloatArray, outside: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return, for every score, the share of the other group's scores that it is ranked correctly against, ties half.

    The mean of either is the AUROC; they are its structural components of DeLong et al. (1988).
    """

    def share_below(scores: FloatArray, others: FloatArray) -> FloatArray:
        ordered = np.sort(others)
        ranks = np.searchsorted(ordered, scores, side="left") + np.searchsorted(ordered, scores, side="right")
        return np.asarray(ranks / (2 * len(others)))

    return 1 - share_below(inside, outside), share_below(outside, inside)


def gaussian_log_losses(mean: FloatArray, variance: FloatArray, target: FloatArray) -> FloatArray:
    """Return the negative log density of each target, in nats."""
    return np.asarray(0.5 * (np.log(2.0 * np.pi * variance) + np.square(target - mean) / variance))


def gaussian_crps(mean: FloatArray, variance: FloatArray, target: FloatArray) -> FloatArray:
    """Return the continuous ranked probability score of each target, smaller is better (Gneiting and Raftery 2007)."""
    std = np.sqrt(variance)
    z = (target - mean) / std
    density = np.exp(-0.5 * np.square(z)) / np.sqrt(2 * np.pi)
    return np.asarray(std * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi)))


def inside_intervals(mean: FloatArray, variance: FloatArray, target: FloatArray, level: float) -> FloatArray:
    """Return 1 for each target inside the central interval of a level, otherwise 0."""
    half_width = ndtri((1.0 + level) / 2.0)
    return np.asarray(np.abs(target - mean) / np.sqrt(variance) <= half_width, dtype=np.float64)
