"""Draws of the weights, and the predictive that averages the network over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kronlaplace.batches import Inputs
from kronlaplace.inversion import DampedInverse
from kronlaplace.layers import Layer
from kronlaplace.likelihoods import Likelihood, Prediction

__all__ = ["WeightSampler"]


class WeightSampler:
    """Draws parameters from the posterior.

    Args:
        layers: The layers that have a posterior.
        means: Its mean, each layer's ``W̄``.
        inverses: Its covariance, by layer.
        generator: Source of the draws.
        antithetic: Whether every second draw mirrors the one before it about the mean.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        means: Mapping[str, Tensor],
        inverses: Mapping[str, DampedInverse],
        generator: torch.Generator,
        antithetic: bool,
    ) -> None:
        self._layers = layers
        self._means = means
        self._inverses = inverses
        self._generator = generator
        self._step = 2 if antithetic else 1

    def draw(self, n: int) -> dict[str, Tensor]:
        """``n`` draws, ``{parameter name: (n, *shape)}``; ``n`` is even for antithetic ones."""
        draws: dict[str, Tensor] = {}
        for layer in self._layers:
            inverse, mean = self._inverses[layer.name], self._means[layer.name]
            noise = torch.randn(
                n // self._step,
                *layer.shape,
                generator=self._generator,
                device=self._generator.device,
                dtype=inverse.block.dtype,
            )
            deviations = inverse.sqrt_solve(noise)
            if self._step == 2:
                deviations = torch.stack([deviations, -deviations], dim=1).flatten(0, 1)
            draws |= layer.split((mean + deviations).to(mean.dtype))
        return draws

    def predict(self, model: nn.Module, likelihood: Likelihood, inputs: Inputs, n: int) -> Tensor | Prediction:
        """The likelihood's mean and variance, averaged over ``n`` draws; the inputs may carry a graph."""
        average = scatter = noise = torch.zeros((), device=self._generator.device)
        for i in range(0, n, self._step):
            draws = self.draw(self._step)
            for k in range(self._step):
                outputs = inputs.run(model, {name: draw[k] for name, draw in draws.items()})
                count = i + k + 1
                mean = likelihood.sample_mean(outputs)
                # Welford's update: a difference of two large sums would lose a small variance to rounding.
                deviation = mean - average
                average = average + deviation / count
                scatter = scatter + deviation * (mean - average)
                variance = likelihood.noise_variance(outputs)
                if variance is not None:
                    noise = noise + (variance - noise) / count
        if variance is None:
            return average
        return Prediction(average, scatter / max(n - 1, 1), noise)
