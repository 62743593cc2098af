"""Scores for predictive distributions: numpy in, numpy out, no state.

Shapes, the same in every function: `N` examples, `C` classes, `B` bins. Logarithms are natural, so
likelihoods and entropies are in nats. Every average over examples is a plain mean. Every input that `numpy.asarray`
takes is allowed: lists, and tensors on the CPU that need no gradient.

Classification functions take probabilities `(N, C)` and integer labels `(N,)`; regression functions take the
mean and the variance of Gaussian predictions and the targets, all of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import entr

from kronlaplace import _scores

__all__ = [
    "accuracy",
    "negative_log_likelihood",
    "brier_score",
    "expected_calibration_error",
    "ReliabilityCurve",
    "reliability_curve",
    "predictive_entropy",
    "ood_auroc",
    "rmse",
    "gaussian_log_likelihood",
    "gaussian_crps",
    "interval_coverage",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_SUM_TOLERANCE = 1e-3
"""How far a row of probabilities may be from one: half precision passes, logits do not."""


# -- classification ------------------------------------------------------------------------------------------


def accuracy(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of the examples whose most probable class is the label.

    Args:
        probabilities: Class probabilities, `(N, C)`.
        labels: True classes, integers in `0 .. C-1`, `(N,)`.
    """
    p, y = _check_classification(probabilities, labels)
    return float(np.mean(p.argmax(axis=1) == y))


def negative_log_likelihood(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean of `-log p(label)` in nats. A label of probability zero gives infinity; nothing is clipped.

    Args:
        probabilities: Class probabilities, `(N, C)`.
        labels: True classes, integers in `0 .. C-1`, `(N,)`.
    """
    p, y = _check_classification(probabilities, labels)
    return float(_scores.log_losses(p, y).mean())


def brier_score(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean over examples of the squared error **summed over classes**, `Σ_c (p_c - 1[c = label])²`.

    This is Brier's own form, between 0 and 2. For two classes it is twice the one-column form.

    Args:
        probabilities: Class probabilities, `(N, C)`.
        labels: True classes, integers in `0 .. C-1`, `(N,)`.
    """
    p, y = _check_classification(probabilities, labels)
    return float(_scores.brier_losses(p, y).mean())


@dataclass(frozen=True)
class ReliabilityCurve:
    """The data of a reliability diagram, per bin of the top-label confidence."""

    confidence: FloatArray
    """Mean confidence in the bin, `(B,)`; NaN where the bin is empty."""
    accuracy: FloatArray
    """Share of right answers in the bin, `(B,)`; NaN where the bin is empty."""
    count: IntArray
    """Examples in the bin, `(B,)`."""


def reliability_curve(probabilities: npt.ArrayLike, labels: npt.ArrayLike, n_bins: int = 15) -> ReliabilityCurve:
    """Confidence against accuracy in `n_bins` bins of equal width.

    The confidence is the largest class probability. Bins are closed on the right, `(b/B, (b+1)/B]`, as in
    Guo et al. (2017).

    Args:
        probabilities: Class probabilities, `(N, C)`.
        labels: True classes, integers in `0 .. C-1`, `(N,)`.
        n_bins: Number of bins `B`.
    """
    p, y = _check_classification(probabilities, labels)
    _check_bins(n_bins)
    confidence = p.max(axis=1)
    bins = _scores.bins_of(p, n_bins)
    count = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bins, weights=confidence, minlength=n_bins) / count
        mean_accuracy = np.bincount(bins, weights=p.argmax(axis=1) == y, minlength=n_bins) / count
    return ReliabilityCurve(mean_confidence, mean_accuracy, count.astype(np.int64))


def expected_calibration_error(probabilities: npt.ArrayLike, labels: npt.ArrayLike, n_bins: int = 15) -> float:
    """Expected calibration error of the top label: `Σ_b (n_b / N) · |accuracy_b - confidence_b|`.

    Args:
        probabilities: Class probabilities, `(N, C)`.
        labels: True classes, integers in `0 .. C-1`, `(N,)`.
        n_bins: Number of bins of equal width, see `reliability_curve`.
    """
    p, y = _check_classification(probabilities, labels)
    _check_bins(n_bins)
    return float(_scores.calibration_terms(p, y, n_bins).mean())


def predictive_entropy(probabilities: npt.ArrayLike) -> FloatArray:
    """Entropy `-Σ_c p_c log p_c` of each prediction in nats, `(N,)`; between 0 and `log C`.

    Args:
        probabilities: Class probabilities, `(N, C)`.
    """
    return np.asarray(entr(_check_probabilities(probabilities)).sum(axis=1), dtype=np.float64)


def ood_auroc(in_scores: npt.ArrayLike, out_scores: npt.ArrayLike) -> float:
    """Area under the ROC curve of detecting out-of-distribution inputs by their larger score.

    It is the probability that a random out-of-distribution input scores above a random in-distribution one,
    ties counted half: 0.5 is chance, 1 is perfect.

    Args:
        in_scores: Scores of in-distribution inputs, for example their predictive entropy, `(N_in,)`.
        out_scores: Scores of out-of-distribution inputs, `(N_out,)`.
    """
    inside, outside = _check_vector("in_scores", in_scores), _check_vector("out_scores", out_scores)
    return float(_scores.auroc_terms(inside, outside)[1].mean())


# -- regression ----------------------------------------------------------------------------------------------


def rmse(mean: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Root of the mean squared error over all elements.

    Args:
        mean: Predictions, any shape.
        target: Targets, the same shape.
    """
    m, y = _check_same_shape(mean=mean, target=target)
    return float(np.sqrt(np.square(m - y).mean()))


def gaussian_log_likelihood(mean: npt.ArrayLike, variance: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Mean log density of the targets under independent Gaussians, in nats **per target** (per element).

    Args:
        mean: Predictive means, any shape.
        variance: Predictive variances, positive, the same shape (or one number for all).
        target: Targets, the same shape.
    """
    m, v, y = _check_gaussian(mean, variance, target)
    return float(-_scores.gaussian_log_losses(m, v, y).mean())


def gaussian_crps(mean: npt.ArrayLike, variance: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Mean continuous ranked probability score of Gaussian predictions, in target units; smaller is better.

    It is the mean absolute error of a prediction without variance (Gneiting and Raftery 2007).

    Args:
        mean: Predictive means, any shape.
        variance: Predictive variances, positive, the same shape (or one number for all).
        target: Targets, the same shape.
    """
    return float(_scores.gaussian_crps(*_check_gaussian(mean, variance, target)).mean())


def interval_coverage(
    mean: npt.ArrayLike,
    variance: npt.ArrayLike,
    target: npt.ArrayLike,
    levels: Sequence[float] | FloatArray = (0.5, 0.9, 0.95),
) -> FloatArray:
    """Share of the targets inside the central Gaussian interval of each level, `(len(levels),)`.

    The interval of level `ℓ` is `mean ± Φ⁻¹((1 + ℓ)/2) · √variance`; calibrated predictions cover `ℓ`.

    Args:
        mean: Predictive means, any shape.
        variance: Predictive variances, positive, the same shape (or one number for all).
        target: Targets, the same shape.
        levels: Nominal levels, each strictly between 0 and 1.
    """
    m, v, y = _check_gaussian(mean, variance, target)
    nominal = _check_vector("levels", levels)
    if (nominal <= 0).any() or (nominal >= 1).any():
        raise ValueError(f"levels must lie strictly between 0 and 1, got {nominal.tolist()}. Write 90 % as 0.9.")
    return np.array([_scores.inside_intervals(m, v, y, level).mean() for level in nominal])


# -- checks --------------------------------------------------------------------------------------------------


def _check_bins(n_bins: int) -> None:
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}. 15 is the usual choice.")


def _check_probabilities(probabilities: npt.ArrayLike) -> FloatArray:
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or p.shape[0] < 1 or p.shape[1] < 2:
        raise ValueError(
            "probabilities must have shape (N, C) with at least one example and two classes, "
            f"got {p.shape}. For a binary model stack them: np.stack([1 - p, p], axis=1)."
        )
    if not np.isfinite(p).all():
        raise ValueError("probabilities contain NaN or infinity. Check the model's inputs and weights.")
    if p.min() < 0.0 or p.max() > 1.0 + _SUM_TOLERANCE:
        raise ValueError(
            f"probabilities must lie in [0, 1], got values from {p.min():.4g} to {p.max():.4g}. "
            "If these are logits, apply a softmax over axis 1 first."
        )
    worst = float(np.abs(p.sum(axis=1) - 1.0).max())
    if worst > _SUM_TOLERANCE:
        raise ValueError(
            f"each row of probabilities must sum to 1 within {_SUM_TOLERANCE:g}, one is off by {worst:.4g}. "
            "Normalize over axis 1."
        )
    return p


def _check_classification(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[FloatArray, IntArray]:
    p, y = _check_probabilities(probabilities), np.asarray(labels)
    if y.shape != (len(p),):
        raise ValueError(
            f"labels must have shape ({len(p)},) to go with probabilities of shape {p.shape}, got {y.shape}. "
            "Turn one-hot rows into class indices with argmax(axis=1)."
        )
    if y.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got dtype {y.dtype}. Convert them with .astype(int).")
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(
            f"labels must lie in 0 .. {p.shape[1] - 1} for {p.shape[1]} classes, "
            f"got values from {y.min()} to {y.max()}."
        )
    return p, y.astype(np.int64)


def _check_vector(name: str, values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a vector with at least one entry, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinity.")
    return array


def _check_same_shape(**arrays: npt.ArrayLike) -> tuple[FloatArray, ...]:
    converted = {name: np.asarray(value, dtype=np.float64) for name, value in arrays.items()}
    shapes = {name: array.shape for name, array in converted.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"shapes must be equal, got {listed}. Reshape first: broadcasting (N,) against (N, 1) would "
            "pair every prediction with every target."
        )
    for name, array in converted.items():
        if array.size == 0:
            raise ValueError(f"{name} is empty; at least one example is needed.")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} contains NaN or infinity.")
    return tuple(converted.values())


def _check_gaussian(
    mean: npt.ArrayLike, variance: npt.ArrayLike, target: npt.ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    v = np.asarray(variance, dtype=np.float64)
    if v.ndim == 0:
        v = np.full(np.shape(mean), v)
    m, v, y = _check_same_shape(mean=mean, variance=v, target=target)
    if v.min() <= 0.0:
        raise ValueError(
            f"variance must be positive, its smallest value is {v.min():.4g}. "
            "Add the noise variance to the variance of the function."
        )
    return m, v, y


def __dir__() -> list[str]:
    return sorted(__all__)
