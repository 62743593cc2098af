"""Predictions of a network with a posterior in one state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace.data.device import device_of
from kronlaplace.laplace.features import FactoredCovariance
from kronlaplace.laplace.inputs import checked_inputs
from kronlaplace.laplace.linearized import Linearized
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.laplace.predictive import JointPrediction, Predictive
from kronlaplace.laplace.sampling import WeightSampler
from kronlaplace.laplace.state import State
from kronlaplace.likelihoods import Likelihood, Prediction
from kronlaplace.network.forward_errors import explained_errors

__all__ = ["Predictor"]


class Predictor:
    """Predicts one batch of inputs at a time.

    Args:
        model: The network.
        state: The posterior's state, fitted to the network at its present weights.
        budget: How many numbers the covariances of some examples may keep at a time; None for the default.
    """

    def __init__(self, model: nn.Module, state: State, budget: int | None = None) -> None:
        self._model = model
        self._state = state
        self._budget = budget

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self._model

    @property
    def likelihood(self) -> Likelihood:
        """The posterior's likelihood."""
        return self._state.likelihood

    def predict(self, x: Any, predictive: Predictive, differentiable: bool = False) -> Tensor | Prediction:
        """Return the predictive distribution of one batch of inputs."""
        likelihood = self._state.likelihood
        if predictive.samples:
            inputs = checked_inputs(self._model, x, differentiable)
            sampler = self.sampler(predictive.seed, predictive.antithetic)
            with _gradients(differentiable), explained_errors(self._model, inputs.value):
                return sampler.predict(self._model, likelihood, inputs, predictive.draws)
        f, covariance = self.outputs_and_covariance(x, predictive.output_covariance(likelihood), differentiable)
        with _gradients(differentiable):
            return predictive.linearized(f, covariance, likelihood)

    def predict_jointly(self, x: Any, predictive: Predictive, differentiable: bool = False) -> JointPrediction:
        """Return the predictive distribution of all inputs together, with the covariances between them."""
        f, covariance = self.outputs_and_covariance(x, OutputCovariance.JOINT, differentiable)
        with _gradients(differentiable):
            marginal = predictive.linearized(f, covariance.diagonal().view(f.shape), self._state.likelihood)
        assert isinstance(marginal, Prediction)
        if marginal.mean.shape != f.shape:  # the outputs are means and log-variances
            of_means = torch.arange(f.numel(), device=f.device).view(f.shape)[:, : marginal.mean.shape[1]].flatten()
            covariance = covariance[of_means][:, of_means]
        return JointPrediction(marginal.mean, marginal.variance, marginal.noise_variance, covariance)

    def outputs_and_covariance(
        self, x: Any, wanted: OutputCovariance, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the mean of the outputs and their covariance under the linearized model."""
        inputs = checked_inputs(self._model, x, differentiable)
        state = self._state
        with _gradients(differentiable), explained_errors(self._model, inputs.value):
            f, covariance = self._linearized().outputs_and_covariance(inputs, wanted, differentiable=differentiable)
            return (f if state.logit_scale == 1 else state.logit_scale * f), covariance

    def outputs_and_factored_covariance(self, x: Any) -> tuple[Tensor, FactoredCovariance] | None:
        """Return the mean of the outputs and their covariances without forming these, or None where that is not possible."""
        inputs = checked_inputs(self._model, x)
        state = self._state
        with _gradients(False), explained_errors(self._model, inputs.value):
            found = self._linearized().factored(inputs)
        return None if found is None else (state.logit_scale * found[0], found[1])

    def n_features(self, x: Any) -> int | None:
        """Return the number of features of a last layer with more outputs than features; None if there is no such layer.

        That is where `outputs_and_factored_covariance` has a result.
        """
        inputs = checked_inputs(self._model, x)
        with _gradients(False), explained_errors(self._model, inputs.value):
            return self._linearized().n_features(inputs)

    def _linearized(self) -> Linearized:
        state = self._state
        fit = state.fitted
        layout = fit.fisher.metadata.layout
        return Linearized(self._model, state.layers, state.inverses, state.likelihood, layout, fit.known, self._budget)

    def outputs(self, x: Any) -> Tensor:
        """Return the network's outputs at its trained weights, without a graph."""
        inputs = checked_inputs(self._model, x)
        with _gradients(False), explained_errors(self._model, inputs.value):
            return inputs.run(self._model)

    @contextmanager
    def sampled_outputs(self, x: Any, predictive: Predictive) -> Iterator[Iterator[Tensor]]:
        """Return a context with the network's outputs at each draw of the weights, without a graph."""
        inputs = checked_inputs(self._model, x)
        sampler = self.sampler(predictive.seed, predictive.antithetic)
        with _gradients(False), explained_errors(self._model, inputs.value):
            yield sampler.outputs(self._model, inputs, predictive.draws)

    def sampler(self, seed: int, antithetic: bool) -> WeightSampler:
        """Return a source of draws of the weights."""
        state = self._state
        generator = torch.Generator(device=device_of(self._model)).manual_seed(seed)
        return WeightSampler(
            state.layers, state.fitted.mean, state.inverses, generator, antithetic, logit_scale=state.logit_scale
        )


@contextmanager
def _gradients(wanted: bool) -> Iterator[None]:
    """Record a graph or not, whatever the caller's mode is."""
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        yield
