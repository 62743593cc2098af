"""Draws of the weights, and the predictive that averages the network over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from kronlaplace._replica import Replica
from kronlaplace.damping import DampedInverse
from kronlaplace.data.inputs import Inputs
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
        logit_scale: ``a``; ``(a − 1) f(x)`` is added to the outputs at every draw.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        means: Mapping[str, Tensor],
        inverses: Mapping[str, DampedInverse],
        generator: torch.Generator,
        antithetic: bool,
        logit_scale: float = 1.0,
    ) -> None:
        self._layers = layers
        self._means = means
        self._inverses = inverses
        self._generator = generator
        self._step = 2 if antithetic else 1
        self._logit_scale = logit_scale

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
            parts = layer.split_values(mean + deviations)
            draws |= {name: part.to(layer.parameters[name].dtype) for name, part in parts.items()}
        return draws

    def outputs(self, model: nn.Module, inputs: Inputs, n: int) -> Iterator[Tensor]:
        """Yield the network's outputs at each of ``n`` draws; the inputs may carry a graph."""
        network = Replica(model).model  # drawn weights are put into a network that nobody else sees
        at_mean = inputs.run(network) if self._logit_scale != 1 else None
        for _ in range(0, n, self._step):
            draws = self.draw(self._step)
            for k in range(self._step):
                outputs = inputs.run(network, {name: draw[k] for name, draw in draws.items()})
                yield outputs if at_mean is None else outputs + (self._logit_scale - 1) * at_mean

    def predict(self, model: nn.Module, likelihood: Likelihood, inputs: Inputs, n: int) -> Tensor | Prediction:
        """Return the likelihood's mean and variance, averaged over ``n`` draws; the inputs may carry a graph."""
        moments, of_pairs, noise = _Moments(), _Moments(), _Moments()
        pair: list[Tensor] = []
        for outputs in self.outputs(model, inputs, n):
            pair.append(likelihood.sample_mean(outputs))
            moments.add(pair[-1])
            variance = likelihood.noise_variance(outputs)
            if variance is not None:
                noise.add(variance)
            if len(pair) == self._step:
                of_pairs.add(torch.stack(pair).mean(0))
                pair = []
        if noise.count == 0:
            return moments.mean
        if self._step == 1:
            return Prediction(moments.mean, moments.scatter / max(n - 1, 1), noise.mean)
        # Mirrored draws are not independent: Var x = E[scatter] / n + Var(mean of all), by the variance of pairs' means.
        of_mean = of_pairs.scatter / max(of_pairs.count * (of_pairs.count - 1), 1)
        return Prediction(moments.mean, moments.scatter / n + of_mean, noise.mean)


class _Moments:
    """Mean and sum of squared deviations, by Welford's update: a difference of two sums would lose a small variance."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor
        self.scatter: Tensor

    def add(self, value: Tensor) -> None:
        """Take one more value."""
        self.count += 1
        if self.count == 1:
            self.mean, self.scatter = value, torch.zeros_like(value)
            return
        deviation = value - self.mean
        self.mean = self.mean + deviation / self.count
        self.scatter = self.scatter + deviation * (value - self.mean)
