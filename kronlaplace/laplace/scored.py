"""Predictions as flat arrays, one row per target, with all of their scores.

`Probabilities` and `Gaussians` have the same methods: ``spread`` is how uncertain each prediction is, ``(T,)``, and
``spread_name`` what that is; ``scores`` takes the targets and the example of each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kronlaplace import _scores, metrics
from kronlaplace.laplace.calibration_picture import CalibrationCurve, pooled
from kronlaplace.laplace.comparison import Statistic, mean_of
from kronlaplace.likelihoods import Likelihood, Prediction

__all__ = ["Gaussians", "Probabilities", "scored", "target_array"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_N_BINS = 15
_LEVELS = (0.5, 0.9, 0.95)
_DRAWN_LEVELS = np.linspace(0.02, 0.98, 49)


@dataclass(frozen=True)
class Probabilities:
    """Class probabilities, ``(T, C)``."""

    p: FloatArray
    spread_name = "entropy"

    @staticmethod
    def of(likelihood: Likelihood, probabilities: Tensor) -> Probabilities:
        """Flatten probabilities of the outputs' shape; those of a one become those of two classes."""
        p, axis = probabilities.detach().double(), likelihood.class_axis_of(probabilities)
        p = torch.stack([1 - p, p], dim=-1) if axis is None else p.movedim(axis, -1)
        tiny = torch.finfo(probabilities.dtype).tiny  # as in `Likelihood.predictive_nll`
        return Probabilities(p.flatten(0, -2).clamp_min(tiny).cpu().numpy())

    @property
    def spread(self) -> FloatArray:
        """Entropies, in nats."""
        return metrics.predictive_entropy(self.p)

    def join(self, others: Sequence[Probabilities]) -> Probabilities:
        """Return these predictions with others behind them."""
        return Probabilities(np.concatenate([self.p, *(other.p for other in others)]))

    def select(self, keep: BoolArray) -> Probabilities:
        """Return some of the predictions."""
        return Probabilities(self.p[keep])

    def scores(self, targets: npt.NDArray[np.generic], example: IntArray) -> dict[str, Statistic]:
        """Return the scores by name."""
        labels = targets.astype(np.int64)
        terms = {
            "NLL": _scores.log_losses(self.p, labels),
            "Brier score": _scores.brier_losses(self.p, labels),
            "ECE": _scores.calibration_terms(self.p, labels, _N_BINS),
            "accuracy": (self.p.argmax(axis=1) == labels).astype(np.float64),
        }
        return {name: mean_of(values, example) for name, values in terms.items()}

    def curve(self, targets: npt.NDArray[np.generic]) -> CalibrationCurve:
        """Return what a picture of the calibration shows."""
        curve = metrics.reliability_curve(self.p, targets.astype(np.int64), _N_BINS)
        filled = curve.count > 0
        return pooled(CalibrationCurve(curve.confidence[filled], curve.accuracy[filled], curve.count[filled]))


@dataclass(frozen=True)
class Gaussians:
    """Means and total variances, ``(T,)`` each."""

    mean: FloatArray
    variance: FloatArray
    spread_name = "standard deviation"

    @staticmethod
    def of(prediction: Prediction) -> Gaussians:
        """Flatten a prediction of a new observation."""
        variance = prediction.total_variance.expand(prediction.mean.shape)
        return Gaussians(_flat(prediction.mean), _flat(variance))

    @property
    def spread(self) -> FloatArray:
        """Standard deviations of a new observation."""
        return np.asarray(np.sqrt(self.variance))

    def join(self, others: Sequence[Gaussians]) -> Gaussians:
        """Return these predictions with others behind them."""
        means, variances = ([getattr(x, name) for x in (self, *others)] for name in ("mean", "variance"))
        return Gaussians(np.concatenate(means), np.concatenate(variances))

    def select(self, keep: BoolArray) -> Gaussians:
        """Return some of the predictions."""
        return Gaussians(self.mean[keep], self.variance[keep])

    def scores(self, targets: npt.NDArray[np.generic], example: IntArray) -> dict[str, Statistic]:
        """Return the scores by name."""
        given = (self.mean, self.variance, targets.astype(np.float64))
        found = {
            "NLL": mean_of(_scores.gaussian_log_losses(*given), example),
            "CRPS": mean_of(_scores.gaussian_crps(*given), example),
            "RMSE": mean_of(np.square(given[2] - self.mean), example).root(),
        }
        for level in _LEVELS:
            found[f"coverage {level:.0%}".replace("%", " %")] = mean_of(
                _scores.inside_intervals(*given, level), example
            )
        return found

    def curve(self, targets: npt.NDArray[np.generic]) -> CalibrationCurve:
        """Return what a picture of the calibration shows."""
        covered = metrics.interval_coverage(self.mean, self.variance, targets.astype(np.float64), _DRAWN_LEVELS)
        return CalibrationCurve(_DRAWN_LEVELS, covered, np.full(len(covered), len(targets)))


def scored(likelihood: Likelihood, prediction: Tensor | Prediction) -> Probabilities | Gaussians:
    """Return a prediction as flat arrays."""
    if isinstance(prediction, Prediction):
        return Gaussians.of(prediction)
    return Probabilities.of(likelihood, prediction)


def target_array(likelihood: Likelihood, targets: Tensor) -> npt.NDArray[np.generic]:
    """Return targets as a flat array, after checking that labels are classes.

    Raises:
        ValueError: If labels are shares between 0 and 1.
    """
    if not likelihood.links:
        return _flat(targets)
    labels = targets.detach().flatten().cpu().numpy()
    if (labels != np.round(labels)).any():
        raise ValueError(
            f"a report needs labels 0 and 1 with {likelihood}; some targets are between them, where accuracy and "
            "calibration have no meaning."
        )
    return labels.astype(np.int64)


def _flat(values: Tensor) -> FloatArray:
    return values.detach().double().flatten().cpu().numpy()
