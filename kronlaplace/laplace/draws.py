"""Draws of the network's outputs under the posterior, and what follows from them: probabilities, means, observations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronlaplace._arguments import seed_number
from kronlaplace._precision import in_full_precision, wide
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.laplace.predictive import Predictive
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.likelihoods import Likelihood
from kronlaplace.likelihoods.links import symmetric_root

__all__ = ["Draws", "draw_outputs", "means_of_draws"]


@dataclass(frozen=True, repr=False)
class Draws:
    """Draws from a posterior at given inputs, as `KronLaplace.draw` returns them.

    Attributes:
        outputs: Draws of the network's outputs, logits or function values, shape ``(n, N, ...)``: the number of draws in
            front of the outputs' own shape, in at least float32.
        likelihood: The posterior's likelihood, which gives the outputs their meaning.
    """

    outputs: Tensor
    likelihood: Likelihood

    @property
    @in_full_precision
    def predictions(self) -> Tensor:
        """The prediction that belongs to each draw: probabilities in classification, means in regression.

        Shape ``(n, N, ...)``, as `outputs`; with a `HeteroscedasticGaussian`, whose outputs hold log-variances too,
        ``(n, N, C)``.
        """
        return means_of_draws(self.likelihood, self.outputs)

    @in_full_precision
    def observations(self, *, seed: int = 0) -> Tensor:
        """Draw one observation for each draw, from the likelihood: draws from the posterior predictive distribution.

        Args:
            seed: Seed of the observations; the global random state is neither used nor changed.

        Returns:
            Regression: `predictions` plus noise. Classification: labels, int64, of the shape of targets, ``(n, N, ...)``
            without the classes' axis (`Bernoulli`: zeros and ones of the shape of `outputs`).

        Raises:
            NotImplementedError: If the likelihood has no noise model.
        """
        generator = torch.Generator(device=self.outputs.device).manual_seed(seed_number(seed))
        likelihood, flat = self.likelihood, self.outputs.flatten(0, 1)
        mean, variance = likelihood.sample_mean(flat), likelihood.noise_variance(flat)
        if variance is not None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            observed = mean + variance.sqrt() * noise
        elif (axis := likelihood.class_axis_of(flat)) is None:
            uniform = torch.rand(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            observed = (uniform < mean).long()
        else:
            by_class = mean.movedim(axis, -1)
            observed = torch.multinomial(by_class.flatten(0, -2), 1, generator=generator).view(by_class.shape[:-1])
        return observed.unflatten(0, self.outputs.shape[:2])

    def __len__(self) -> int:
        return len(self.outputs)

    def __repr__(self) -> str:
        return f"Draws({len(self)} draws of outputs of shape {tuple(self.outputs.shape[1:])}, {self.likelihood})"


def means_of_draws(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """Return the likelihood's mean for draws of outputs, ``(n, N, ...)``."""
    return likelihood.sample_mean(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])


def draw_outputs(
    predictor: Predictor, batches: Iterable[Any], predictive: Predictive, n: int, joint: bool = False
) -> Tensor:
    """Draw the outputs for all batches, shape ``(n, N, ...)``, in at least float32.

    Args:
        predictor: Predicts with the posterior.
        batches: The inputs.
        predictive: Whether weights are drawn, or outputs of the linearized network; with which seed.
        n: The number of draws.
        joint: Whether the linearized outputs of different examples are drawn together, for a single batch.
    """
    drawn = []
    generator: torch.Generator | None = None
    for x in batches:
        if predictive.samples:  # with the same seed, and so at the same weights, for every batch
            with predictor.sampled_outputs(x, predictive) as outputs:
                drawn.append(torch.stack([wide(f) for f in outputs]))
            continue
        wanted = OutputCovariance.JOINT if joint else OutputCovariance.BY_EXAMPLE
        f, covariance = predictor.outputs_and_covariance(x, wanted)
        generator = predictive.generator(f.device) if generator is None else generator
        drawn.append(_around(wide(f), covariance, n, generator, joint))
    return torch.cat(drawn, dim=1) if len(drawn) > 1 else drawn[0]


def _around(mean: Tensor, covariance: Tensor, n: int, generator: torch.Generator, joint: bool) -> Tensor:
    """Draw from ``N(mean, covariance)`` for every example, or for all together, shape ``(n, N, ...)``."""
    groups = 1 if joint else len(mean)
    size = mean.numel() // groups
    root = symmetric_root(covariance.to(mean.dtype).reshape(groups, size, size))
    noise = torch.randn(n, groups, size, generator=generator, device=mean.device, dtype=mean.dtype)
    deviations = torch.einsum("gij,ngj->ngi", root, noise)
    return mean + deviations.view(n, *mean.shape)
