"""The options of predictions, as one object, and the concatenation of predictions of several batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronlaplace._arguments import Choice, choice, positive_integer, seed_number
from kronlaplace._precision import in_full_precision, wide
from kronlaplace.laplace.migration import VALUES
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.likelihoods import Likelihood, Prediction
from kronlaplace.likelihoods.links import Link, symmetric_root

__all__ = ["JointPrediction", "Predictive", "PredictiveMethod", "checked_predictive", "classes_last", "joined"]

_DRAWS = 100


class PredictiveMethod(Choice):
    """``GLM``: the linearized network, a Gaussian over the outputs in closed form. ``SAMPLE``: the network itself, averaged
    over draws of its weights.
    """

    GLM = "glm"
    SAMPLE = "sample"


@dataclass(frozen=True)
class Predictive:
    """A posterior predictive distribution: the options of `KronLaplace.predict` as one object.

    Args:
        method: ``"glm"`` or ``"sample"``.
        link: Classification with ``"glm"``: for several classes ``"margin"`` (the default), ``"probit"``,
            ``"centered-probit"``, ``"mc"`` (``n_samples`` draws of the outputs), or ``"bridge"`` (Laplace bridge); for
            `Bernoulli` ``"probit"`` (the default) or ``"mc"``. See `kronlaplace.Link`.
        n_samples: Number of draws, if any are made; 100 if not given.
        diagonal: Whether ``"mc"`` and ``"bridge"`` take the outputs' variances only, without the covariances between
            classes; for thousands of classes.
        antithetic: With ``"sample"``, whether draws come in pairs that mirror each other about the mean.
        seed: Seed of the draws; the global random state is neither used nor changed.

    Raises:
        ValueError, TypeError: For unknown names, or options that have no effect together.
    """

    method: PredictiveMethod | str = PredictiveMethod.GLM
    link: Link | str | None = None
    n_samples: int | None = None
    diagonal: bool = False
    antithetic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", choice(PredictiveMethod, self.method, "method", VALUES))
        if self.link is not None:
            object.__setattr__(self, "link", choice(Link, self.link, "link", VALUES))
        if self.n_samples is not None:
            positive_integer(self.n_samples, "n_samples")
        seed_number(self.seed)
        if self.link is not None and self.samples:
            raise ValueError(
                f'link={Link(self.link).value!r} would have no effect: method="sample" needs none. Leave it out.'
            )
        if self.n_samples is not None and not self.samples and self.link is not Link.MC:
            raise ValueError(
                f'n_samples={self.n_samples} would have no effect: draws are made with method="sample" or link="mc".'
            )
        if self.diagonal and self.link not in (Link.MC, Link.BRIDGE):
            raise ValueError(
                'diagonal=True would have no effect: only link="mc" and link="bridge" use covariances between classes.'
            )
        if self.antithetic and not self.samples:
            raise ValueError('antithetic=True would have no effect: weights are drawn with method="sample" only.')
        if self.antithetic and self.draws % 2:
            raise ValueError(f"antithetic draws come in pairs: n_samples must be even, got {self.n_samples}.")

    @property
    def samples(self) -> bool:
        """Whether weights are drawn."""
        return self.method is PredictiveMethod.SAMPLE

    @property
    def draws(self) -> int:
        """The number of draws, if any are made."""
        return _DRAWS if self.n_samples is None else self.n_samples

    def generator(self, device: torch.device) -> torch.Generator:
        """Make the source of the draws."""
        return torch.Generator(device=device).manual_seed(self.seed)

    def check(self, likelihood: Likelihood) -> None:
        """Check that the likelihood supports the link.

        Raises:
            ValueError: If it does not; the message lists the links that it supports.
        """
        links = likelihood.links
        if self.link is not None and not links:
            raise ValueError(
                f"link={Link(self.link).value!r} would have no effect: {likelihood} needs none. Leave it out."
            )
        if self.link is not None and self.link not in links:
            allowed = [link.value for link in links]
            raise ValueError(f"link {Link(self.link).value!r} is not for {likelihood}; allowed are {allowed}.")

    def link_for(self, likelihood: Likelihood) -> Link | None:
        """Return the link, by default the likelihood's first one; None if it has none."""
        if self.link is not None:
            return Link(self.link)
        return likelihood.links[0] if likelihood.links else None

    def linearized(self, outputs: Tensor, covariance: Tensor, likelihood: Likelihood) -> Tensor | Prediction:
        """Return the prediction when the outputs are Gaussian.

        Args:
            outputs: Their mean, as the network gives it.
            covariance: What `output_covariance` asked for.
            likelihood: The likelihood.
        """
        axis = likelihood.class_axis_of(outputs)
        outputs = wide(outputs)
        mean, covariance = classes_last(outputs, covariance, axis)
        link = self.link_for(likelihood) or Link.PROBIT  # a likelihood without links takes any, and ignores it
        prediction = likelihood.predictive(mean, covariance, link, self.draws, self.generator(outputs.device))
        if isinstance(prediction, Prediction):
            if outputs.ndim == 1:
                return replace(prediction, mean=prediction.mean[:, 0], variance=prediction.variance[:, 0])
            return prediction
        return prediction.reshape(outputs.shape) if axis is None else prediction.movedim(-1, axis)

    def output_covariance(self, likelihood: Likelihood) -> OutputCovariance:
        """Return which covariances `linearized` needs."""
        link = self.link_for(likelihood)
        if link is Link.MARGIN:
            return OutputCovariance.MARGIN_VARIANCES
        if link is Link.CENTERED_PROBIT:
            return OutputCovariance.CENTERED_VARIANCES
        of_classes = Link.BRIDGE in likelihood.links and link in (Link.MC, Link.BRIDGE)
        return OutputCovariance.BY_POSITION if of_classes and not self.diagonal else OutputCovariance.VARIANCES


@dataclass(frozen=True, repr=False)
class JointPrediction(Prediction):
    """A regression prediction for several inputs at once, with the covariances between them.

    Attributes:
        covariance: Covariance of the function values, shape ``(N·C, N·C)``, in the order of ``mean.flatten()``. It does
            **not** contain the noise; its diagonal is ``variance``.
    """

    covariance: Tensor

    @property
    def total_covariance(self) -> Tensor:
        """Covariance of new observations: that of the function plus the noise on the diagonal, ``(N·C, N·C)``."""
        noise = self.noise_variance.expand(self.mean.shape).flatten()
        return self.covariance + torch.diag(noise)

    @in_full_precision
    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        """Draw the function's values at all inputs together, without noise: shape ``(n, N, C)``.

        Args:
            n: Number of draws.
            seed: Seed of the draws; the global random state is neither used nor changed.
        """
        generator = torch.Generator(device=self.mean.device).manual_seed(seed_number(seed))
        shape = (positive_integer(n, "n"), self.mean.numel())
        noise = torch.randn(shape, generator=generator, device=self.mean.device, dtype=self.covariance.dtype)
        return self.mean + (noise @ symmetric_root(self.covariance)).view(-1, *self.mean.shape)


def checked_predictive(predictive: Predictive | None, likelihood: Likelihood) -> Predictive:
    """Return how predictions are to be made, by default `Predictive()`, after checking it.

    Raises:
        TypeError: If it is not a `Predictive`.
        ValueError: If the likelihood does not support it.
    """
    predictive = Predictive() if predictive is None else predictive
    if not isinstance(predictive, Predictive):
        raise TypeError(f'predictive must be a kl.Predictive, such as kl.Predictive(link="mc"); got {predictive!r}.')
    predictive.check(likelihood)
    return predictive


def classes_last(outputs: Tensor, covariance: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Return outputs and their covariance in at least float32, with the classes on the last axis of both.

    Args:
        outputs: The outputs as the network gives them, ``(N, ...)``; ``(N,)`` becomes ``(N, 1)``.
        covariance: Variances of the outputs' shape, or covariances by position, ``(N, ..., C, C)``.
        axis: The outputs' axis of the classes, or None if there are no classes.
    """
    outputs = wide(outputs)
    mean = outputs.unsqueeze(1) if outputs.ndim == 1 else outputs if axis is None else outputs.movedim(axis, -1)
    if covariance.ndim == outputs.ndim:
        covariance = covariance.unsqueeze(1) if outputs.ndim == 1 else covariance
        covariance = covariance if axis is None else covariance.movedim(axis, -1)
    return mean, covariance.to(mean.dtype)


def joined(parts: Sequence[Tensor | Prediction]) -> Tensor | Prediction:
    """Join the predictions of batches."""
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    predictions = [part for part in parts if isinstance(part, Prediction)]
    noise = [p.noise_variance for p in predictions]
    return Prediction(
        torch.cat([p.mean for p in predictions]),
        torch.cat([p.variance for p in predictions]),
        noise[0] if noise[0].ndim == 0 else torch.cat(noise),
    )
