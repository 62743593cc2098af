"""The uncertainty of a prediction, and how much of it more data would remove.

In classification the entropy of the predicted probabilities is the sum of two parts: the mean entropy of the probabilities
that single draws from the posterior give (aleatoric), and the mutual information between the label and the weights
(epistemic), the score of Bayesian active learning by disagreement, BALD (Houlsby et al. 2011, Eq. 2). In regression the
variance of an observation is the noise (aleatoric) plus the variance of the function (epistemic), by the law of total
variance. Depeweg et al. (2018) give both decompositions side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronlaplace.laplace.draws import means_of_draws
from kronlaplace.laplace.predictive import Predictive, classes_last
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.likelihoods import Bernoulli, Categorical, Likelihood, Prediction
from kronlaplace.likelihoods.links import is_whole, mean_over_samples, variance_of
from kronlaplace.likelihoods.logistic import logistic_moments

__all__ = ["Uncertainty", "uncertainty_of"]


@dataclass(frozen=True, repr=False)
class Uncertainty:
    """The uncertainty of predictions, in two parts whose sum is the total.

    In classification these are entropies in nats, of shape ``(N,)``, or one for each position or `Bernoulli` output; in
    regression they are variances in squared target units, of the shape of the predicted means.

    Attributes:
        aleatoric: What is left if the weights are known: the mean entropy of the label given the weights; the noise
            variance.
        epistemic: What more data would remove: the mutual information between the label and the weights; the variance
            of the function. It is never negative.
        in_nats: Whether these are entropies, rather than variances.
    """

    aleatoric: Tensor
    epistemic: Tensor
    in_nats: bool

    @property
    def total(self) -> Tensor:
        """Uncertainty of the prediction, ``aleatoric + epistemic``: its entropy, or the variance of an observation."""
        return self.aleatoric + self.epistemic

    @property
    def mutual_information(self) -> Tensor:
        """Mutual information between target and weights in nats, the BALD score of Houlsby et al. (2011).

        In classification it is `epistemic`. In regression it is ``½ log(total / aleatoric)``, exact for Gaussian function
        values with known noise.
        """
        return self.epistemic if self.in_nats else 0.5 * torch.log1p(self.epistemic / self.aleatoric)

    def __len__(self) -> int:
        return len(self.aleatoric)

    def __repr__(self) -> str:
        unit = "nats" if self.in_nats else "variances"
        means = ", ".join(f"{name} {getattr(self, name).mean():.4g}" for name in ("total", "aleatoric", "epistemic"))
        return f"Uncertainty(shape {tuple(self.aleatoric.shape)}, {unit}; means: {means})"


def uncertainty_of(predictor: Predictor, batches: Iterable[Any], predictive: Predictive) -> Uncertainty:
    """Return the uncertainty of predictions for all batches of inputs.

    Args:
        predictor: Predicts with the posterior.
        batches: The inputs.
        predictive: How predictions are made; the link of a classifier with several classes is ``"mc"``.
    """
    parts = [_of_batch(predictor, x, predictive) for x in batches]
    aleatoric, epistemic = (torch.cat(values) if len(values) > 1 else values[0] for values in zip(*parts, strict=True))
    return Uncertainty(aleatoric, epistemic, in_nats=bool(predictor.likelihood.links))


def _of_batch(predictor: Predictor, x: Any, predictive: Predictive) -> tuple[Tensor, Tensor]:
    """Return the aleatoric and epistemic part."""
    likelihood = predictor.likelihood
    if not likelihood.links:
        prediction = predictor.predict(x, predictive)
        assert isinstance(prediction, Prediction)
        return prediction.noise_variance.expand(prediction.mean.shape), prediction.variance
    if predictive.samples:
        return _at_drawn_weights(predictor, x, predictive)
    f, covariance = predictor.outputs_and_covariance(x, predictive.output_covariance(likelihood))
    axis = likelihood.class_axis_of(f)
    mean, covariance = classes_last(f, covariance, axis)
    if isinstance(likelihood, Bernoulli):
        aleatoric, epistemic = _of_logit(mean, covariance)
    elif isinstance(likelihood, Categorical) and mean.shape[-1] == 2:
        whole = is_whole(mean, covariance)
        shared = 2 * covariance[..., 0, 1] if whole else 0
        variance = variance_of(mean, covariance).sum(-1) - shared
        aleatoric, epistemic = _of_logit(mean[..., 1] - mean[..., 0], variance)
    else:
        aleatoric, epistemic = _by_draws(likelihood, axis, mean, covariance, predictive)
    shape = f.shape if axis is None else aleatoric.shape
    return aleatoric.to(mean.dtype).reshape(shape), epistemic.to(mean.dtype).reshape(shape)


def _at_drawn_weights(predictor: Predictor, x: Any, predictive: Predictive) -> tuple[Tensor, Tensor]:
    """Return both parts by the network itself at drawn weights, one draw at a time."""
    likelihood = predictor.likelihood
    axis: int | None = None
    mean, entropy = torch.zeros(()), torch.zeros(())
    with predictor.sampled_outputs(x, predictive) as outputs:
        for k, f in enumerate(outputs, 1):
            p = likelihood.sample_mean(f)
            axis = likelihood.class_axis_of(f)
            mean = p if k == 1 else mean + (p - mean) / k
            entropy = _entropy(p, axis) if k == 1 else entropy + (_entropy(p, axis) - entropy) / k
    return _in_parts(_entropy(mean, axis), entropy, mean.dtype)


def _of_logit(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return both parts of a yes/no answer whose logit is Gaussian, in float64."""
    p, entropy = logistic_moments(mean, variance)
    return _in_parts(_entropy(p, None), entropy, p.dtype)


def _by_draws(
    likelihood: Likelihood, axis: int | None, mean: Tensor, covariance: Tensor, predictive: Predictive
) -> tuple[Tensor, Tensor]:
    """Return both parts by draws of Gaussian outputs with the classes on the last axis."""

    def probabilities_and_entropies(f: Tensor, dim: int) -> Tensor:
        outputs = f if axis is None else f.movedim(dim, axis + 1)
        p = means_of_draws(likelihood, outputs)
        p = p if axis is None else p.movedim(axis + 1, dim)
        entropy = _entropy(p, None) if axis is None else _entropy(p, dim).unsqueeze(dim)
        return torch.cat([p, entropy.to(p.dtype)], dim=dim)

    generator = predictive.generator(mean.device)
    means = mean_over_samples(probabilities_and_entropies, mean, covariance, predictive.draws, generator)
    p, entropy = means[..., : mean.shape[-1]], means[..., mean.shape[-1] :]
    total = _entropy(p, axis if axis is None else -1)
    return _in_parts(total, entropy if axis is None else entropy[..., 0], mean.dtype)


def _in_parts(total: Tensor, aleatoric: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the aleatoric part and the rest, which only rounding makes negative."""
    return aleatoric.to(dtype), (total.double() - aleatoric.double()).clamp_min(0).to(dtype)


def _entropy(probabilities: Tensor, axis: int | None) -> Tensor:
    """Return the entropies over an axis of classes, or, without one, of yes/no answers, in float64."""
    p = probabilities.double()
    terms = torch.special.entr(p)
    return terms + torch.special.entr(1 - p) if axis is None else terms.sum(axis)
