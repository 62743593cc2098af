"""The settings of a posterior that can be read and set at any time: prior, noise, temperature, scale of the logits."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from kronlaplace._arguments import positive_number
from kronlaplace.estimators import Estimator
from kronlaplace.laplace.hyperparameters import Hyperparameters
from kronlaplace.laplace.migration import LaplaceTorchNames
from kronlaplace.laplace.state import State
from kronlaplace.layers import Layer
from kronlaplace.likelihoods import Likelihood
from kronlaplace.network.last_layer import LAST
from kronlaplace.priors.given import GivenPrior, owned
from kronlaplace.priors.mean import PriorMean
from kronlaplace.priors.precision import Precision, precision_tensor
from kronlaplace.priors.prior import Prior, prior_from_multiples

__all__ = ["ONE_CHANGE", "PosteriorSettings"]

ONE_CHANGE = threading.RLock()
"""Held for the moment in which a state is replaced, so that no change of another thread is lost."""


_Posterior = TypeVar("_Posterior", bound="PosteriorSettings")


class PosteriorSettings(LaplaceTorchNames):
    """A posterior's state and the hyperparameters in it. Every change replaces the state as a whole."""

    model: nn.Module
    estimator: Estimator
    _state: State

    @property
    def _layers(self) -> Sequence[Layer]:
        return self._state.layers

    def _change(self, **changes: Any) -> None:
        """Become another state, which differs in these attributes."""
        with ONE_CHANGE:
            self._state = replace(self._state, **changes)

    def __repr__(self) -> str:
        now = self._state
        state = f"fitted to {now.fit.fisher.n_examples:,} examples" if now.fit else "not fitted"
        if now.fit and now.fit.fisher.metadata.variational:
            state += ", variational curvature"
        names = [layer.name for layer in now.layers] or LAST
        scale = "" if now.logit_scale == 1 else f"logit_scale={now.logit_scale:.4g}, "
        return (
            f"{type(self).__name__}({now.likelihood}, {self.estimator}, {now.given.shown()}, "
            f"temperature={now.temperature:g}, {scale}layers={names}, {state})"
        )

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood; in regression with the noise that predictions use, which may be set or tuned after the fit."""
        return self._state.likelihood

    @likelihood.setter
    def likelihood(self, likelihood: Likelihood) -> None:
        self._change(likelihood=self._checked_likelihood(likelihood))

    def _checked_likelihood(self, likelihood: Likelihood) -> Likelihood:
        state = self._state
        if state.fit is not None and type(likelihood) is not type(state.likelihood):
            raise ValueError(f"the posterior was fitted with {state.likelihood}; {likelihood} needs a new fit.")
        return likelihood

    @property
    def prior(self) -> Prior:
        """The prior over the weights, with its mean; it can be set after the fit without another pass.

        Raises:
            RuntimeError: If ``layers="last"``, before the fit has found that layer.
        """
        return self._state.prior

    @prior.setter
    def prior(self, prior: Prior) -> None:
        self.prior_precision = prior

    @property
    def prior_precision(self) -> Tensor:
        """``δ``, 0-dim, one per block ``(L,)``, or one per weight ``(P,)``, float64.

        May be set after the fit, to whatever the constructor takes: that costs no new pass.

        Raises:
            TypeError: If the prior's precision is not diagonal; see `prior`.
        """
        given = self._state.given
        if isinstance(given, GivenPrior) and given.number is not None:
            return given.number
        return self._state.prior.precisions

    @prior_precision.setter
    def prior_precision(self, value: Prior | Precision) -> None:
        with ONE_CHANGE:
            given = self._state.given
            if isinstance(given, GivenPrior):
                self._change(given=given.with_precision(value))
            elif isinstance(value, Prior):
                self._change(given=owned(value.over(self._layers)))
            else:
                precision = precision_tensor(value, self._layers)
                self._change(given=owned(prior_from_multiples(precision, given.means)))

    @property
    def prior_mean(self) -> dict[str, Tensor]:
        """Mean of the prior, each block's matrix ``(q, p)``. May be set after the fit, to what the constructor takes."""
        return dict(self._state.prior.means)

    @prior_mean.setter
    def prior_mean(self, value: PriorMean) -> None:
        with ONE_CHANGE:
            given = self._state.given.with_mean(value)
            self._change(given=given.over(self._layers) if isinstance(given, Prior) else given)

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Prior, noise, temperature and scale of the logits as one value; may be set after the fit, all at once.

        Raises:
            RuntimeError: If ``layers="last"``, before the fit has found that layer.
        """
        return self._state.hyperparameters

    @hyperparameters.setter
    def hyperparameters(self, new: Hyperparameters) -> None:
        with ONE_CHANGE:
            self._state = self._with(new)

    def with_hyperparameters(self: _Posterior, new: Hyperparameters) -> _Posterior:
        """Return a posterior with other hyperparameters that shares the network and the fit; this one stays as it is.

        Raises:
            TypeError, ValueError: If they do not fit the layers or the likelihood.
        """
        view = copy.copy(self)
        view._state = self._with(new)
        return view

    def _with(self, new: Hyperparameters) -> State:
        if not isinstance(new, Hyperparameters):
            raise TypeError(f"hyperparameters must be a kl.Hyperparameters, got {type(new).__name__}.")
        positive_number(new.temperature, "temperature")
        self._checked_scale(new.logit_scale)
        return self._state.with_hyperparameters(replace(new, prior=owned(new.prior.over(self._layers))))

    @property
    def layers(self) -> list[str]:
        """Names of the blocks, in their order; those that a fit has found to be unusable are gone."""
        self._state.prior  # noqa: B018  # raises if they are not known
        return [layer.name for layer in self._layers]

    @property
    def temperature(self) -> float:
        """``τ``, divides the log-likelihood; may be set after the fit."""
        return self._state.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._change(temperature=positive_number(value, "temperature"))

    @property
    def logit_scale(self) -> float:
        """``a``, the mean of a classifier's logits is ``a f(x)``; may be set after the fit. `tune` calibrates it.

        It acts on the outputs, in all predictions and draws of outputs; the weights that `sample` draws are without it. Like
        the prior it stays as it is in a new fit.

        Raises:
            ValueError: On setting, if it is not positive, or not 1 where the outputs are not logits.
        """
        return self._state.logit_scale

    @logit_scale.setter
    def logit_scale(self, value: float) -> None:
        self._change(logit_scale=self._checked_scale(value))

    def _checked_scale(self, value: float) -> float:
        value = positive_number(value, "logit_scale")
        if value != 1 and not self.likelihood.accepts_logits:
            raise ValueError(
                f"logit_scale is for outputs that are logits; {self.likelihood} has others. Leave it at 1."
            )
        return value
