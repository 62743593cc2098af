"""The predictions of a fitted posterior."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kronlaplace._arguments import choice, positive_integer, seed_number
from kronlaplace._precision import in_full_precision
from kronlaplace.data.loader import is_loader
from kronlaplace.laplace.draws import Draws, draw_outputs
from kronlaplace.laplace.inputs import batches_of_inputs
from kronlaplace.laplace.migration import VALUES, told_of
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.laplace.predictive import Predictive, PredictiveMethod, checked_predictive, joined
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.laplace.report import Report
from kronlaplace.laplace.reporting import make_report
from kronlaplace.laplace.settings import PosteriorSettings
from kronlaplace.laplace.state import State
from kronlaplace.laplace.uncertainty import Uncertainty, uncertainty_of
from kronlaplace.likelihoods import Bernoulli, Prediction
from kronlaplace.likelihoods.links import Link

__all__ = ["PosteriorPredictions"]


class PosteriorPredictions(PosteriorSettings):
    """The predictions of a posterior; each is made with one state, whatever other threads do."""

    @abstractmethod
    def _at_its_weights(self) -> State:
        """Return the state, which is of the network at its present weights."""

    @told_of
    @in_full_precision
    def functional_variance(
        self,
        x: Any,
        diagonal: bool = False,
        *,
        joint: bool = False,
        differentiable: bool = False,
        progress: bool = False,
    ) -> Tensor:
        """Compute the covariance of the network's outputs under the linearized model, without the noise.

        Takes one backward pass per output of an example, except for the part of a last layer that is linear.

        Args:
            x: Inputs as in the fit, first axis examples; or a loader, as in `predict`.
            diagonal: Whether to compute only the variances.
            joint: Whether to include covariances between examples; for a few inputs, passed at once.
            differentiable: Whether the result carries a graph to the inputs.
            progress: Whether to show a progress bar, with a loader.

        Returns:
            Shape ``(N, C, C)``; ``(N, C)`` with ``diagonal=True``; ``(N·C, N·C)`` with ``joint=True``, examples in front.
            Outputs with more axes, ``(N, ...)``, count as one axis ``C`` (row-major), and keep their shape with
            ``diagonal=True``. In at least float32, also where the network runs in half precision.

        Raises:
            ValueError: As `predict`.
        """
        if diagonal and joint:
            raise ValueError("diagonal=True is variances only, joint=True all covariances between examples; take one.")
        wanted = OutputCovariance.BY_EXAMPLE
        if joint or diagonal:
            wanted = OutputCovariance.JOINT if joint else OutputCovariance.VARIANCES
        predictor = self._predictor()
        if joint and is_loader(x):
            raise ValueError("joint=True needs the inputs at once, as a tensor, not a loader.")
        parts = [
            predictor.outputs_and_covariance(part, wanted, differentiable)[1] for part in self._batches(x, progress)
        ]
        covariance = torch.cat(parts) if len(parts) > 1 else parts[0]
        return covariance.unsqueeze(1) if covariance.ndim == 1 else covariance

    @told_of
    @in_full_precision
    def predict(
        self,
        x: Any,
        *,
        method: PredictiveMethod | str = PredictiveMethod.GLM,
        link: Link | str | None = None,
        n_samples: int | None = None,
        diagonal: bool = False,
        antithetic: bool = False,
        joint: bool = False,
        differentiable: bool = False,
        progress: bool = False,
        seed: int = 0,
    ) -> Tensor | Prediction:
        """Compute the posterior predictive distribution.

        Args:
            x: Inputs as in the fit, a tensor or a tuple or dict of tensors, first axis examples; any number, they are
                processed in chunks. Or a loader (any iterable of batches, with or without targets, except a list of tensors,
                which counts as several inputs): the predictions of all of its batches, joined.
            method: ``"glm"``, the linearized model: a Gaussian over the outputs in closed form, then the link.
                ``"sample"``: the network itself, averaged over ``n_samples`` draws of its weights.
            link: Classification with ``"glm"``: for several classes ``"margin"`` (the default), ``"probit"``,
                ``"centered-probit"``, ``"mc"`` (``n_samples`` draws of the outputs), or ``"bridge"`` (Laplace bridge); for
                `Bernoulli` ``"probit"`` (the default) or ``"mc"``. See `kronlaplace.Link`.
            n_samples: Number of draws, if any are made; 100 if not given.
            diagonal: Whether ``"mc"`` and ``"bridge"`` take only the variances of the outputs, without their covariances:
                much cheaper for many classes.
            antithetic: With ``"sample"``, whether draws come in pairs that mirror each other about the mean.
            joint: Regression with ``"glm"``: a `JointPrediction` with the covariances between all inputs.
            differentiable: Whether the result carries a graph to the inputs, which must ask for gradients.
            progress: Whether to show a progress bar, with a loader.
            seed: Seed of the draws; the global random state is neither used nor changed.

        Returns:
            Classification: probabilities, of the shape of the network's outputs (``Bernoulli``: of a one). Regression: a
            `Prediction`; its ``variance`` is of the function, without the noise. All in at least float32: half precision has
            two or three digits, too few for probabilities and errors. Under `torch.autocast` only the network is rounded.

        Raises:
            ValueError: For an unknown method or link, for options that have no effect together, or inputs that are empty
                or, on the CPU, not finite.
        """
        predictive = Predictive(method, link, n_samples, diagonal, antithetic, seed)
        predictive.check(self.likelihood)
        predictor = self._predictor()
        if joint:
            if is_loader(x) or predictive.samples or self.likelihood.links:
                raise ValueError(
                    'joint=True is for regression with method="glm", and inputs that come at once. For the outputs of a '
                    "classifier use functional_variance(x, joint=True)."
                )
            return predictor.predict_jointly(x, predictive, differentiable)
        parts = [predictor.predict(part, predictive, differentiable) for part in self._batches(x, progress)]
        return joined(parts) if len(parts) > 1 else parts[0]

    @told_of
    @in_full_precision
    def draw(
        self,
        x: Any,
        n: int = 100,
        *,
        method: PredictiveMethod | str = PredictiveMethod.GLM,
        joint: bool = False,
        progress: bool = False,
        seed: int = 0,
    ) -> Draws:
        """Draw outputs of the network from the posterior: functions, logits, and with them probabilities and observations.

        Args:
            x: Inputs, or a loader, as in `predict`.
            n: Number of draws.
            method: ``"glm"``, the linearized model: from ``N(f(x), J S Jᵀ)``, independently for every example, with the
                covariances between all outputs of an example. ``"sample"``: the network itself, at ``n`` draws of its
                weights; each is one function at all inputs.
            joint: With ``"glm"``, whether draws have the covariances between examples too, so that each is one function;
                for a few inputs, passed at once.
            progress: Whether to show a progress bar, with a loader.
            seed: Seed of the draws; the global random state is neither used nor changed.

        Returns:
            A `Draws`, with ``outputs`` of shape ``(n, N, ...)``, ``predictions``, and ``observations()``.

        Raises:
            ValueError: For an unknown method, ``joint=True`` where it has no effect, or inputs that `predict` refuses.
        """
        method = choice(PredictiveMethod, method, "method", VALUES)
        samples = method is PredictiveMethod.SAMPLE
        n = positive_integer(n, "n")
        predictive = Predictive(method, n_samples=n if samples else None, seed=seed)
        if joint and samples:
            raise ValueError(
                'joint=True would have no effect: with method="sample" each draw is one network. Leave it out.'
            )
        if joint and is_loader(x):
            raise ValueError("joint=True needs the inputs at once, as a tensor, not a loader.")
        predictor = self._predictor()
        outputs = draw_outputs(predictor, self._batches(x, progress), predictive, n, joint)
        return Draws(outputs, predictor.likelihood)

    @told_of
    @in_full_precision
    def uncertainty(
        self,
        x: Any,
        *,
        method: PredictiveMethod | str = PredictiveMethod.GLM,
        n_samples: int | None = None,
        diagonal: bool = False,
        antithetic: bool = False,
        progress: bool = False,
        seed: int = 0,
    ) -> Uncertainty:
        """Compute how uncertain predictions are, and how much of it more data would remove.

        In classification the total is the entropy of the posterior predictive probabilities and the epistemic part the
        mutual information between label and weights, BALD (Houlsby et al. 2011); in regression they are variances. See
        `Uncertainty`. With ``"glm"`` the expectations over the outputs' Gaussian are exact for two classes and
        `Bernoulli` (by quadrature), and for more classes means over ``n_samples`` draws, as with ``link="mc"``.

        Args:
            x: Inputs, or a loader, as in `predict`.
            method: As in `predict`.
            n_samples: Number of draws, if any are made; 100 if not given. With draws the mutual information is too small
                by about one part in ``n_samples``.
            diagonal: `Categorical` with ``"glm"``: whether to take the variances of the outputs only, without their
                covariances; for thousands of classes.
            antithetic: With ``"sample"``, as in `predict`.
            progress: Whether to show a progress bar, with a loader.
            seed: Seed of the draws; the global random state is neither used nor changed.

        Returns:
            An `Uncertainty`, one number for each example or, with positions or several `Bernoulli` or regression outputs,
            for each of these; in at least float32.

        Raises:
            ValueError: For an unknown method, options that have no effect together, or inputs that `predict` refuses.
        """
        predictor = self._predictor()
        likelihood = predictor.likelihood
        by_draws = bool(likelihood.links) and not isinstance(likelihood, Bernoulli)
        linearized = choice(PredictiveMethod, method, "method", VALUES) is PredictiveMethod.GLM
        link = Link.MC if by_draws and linearized else None
        predictive = Predictive(method, link, n_samples, diagonal, antithetic, seed)
        return uncertainty_of(predictor, self._batches(x, progress), predictive)

    @in_full_precision
    def report(
        self,
        data: Iterable[Any],
        foreign: Any = None,
        *,
        predictive: Predictive | None = None,
        progress: bool = False,
    ) -> Report:
        """Compare the posterior's predictions with those of the network at its trained weights (the MAP), on the same data.

        ``print(posterior.report(test_loader))`` is a table whose last line says whether the posterior helps. All scores
        have standard errors over examples, by the delta method (the infinitesimal jackknife for the expected calibration
        error, the structural components of DeLong et al. 1988 for the AUROC); the differences are paired. Several targets
        of one example, such as pixels, are not counted as independent.

        Args:
            data: Batches ``(inputs, targets)``, best of test data: on training data the MAP looks better than it is.
            foreign: Inputs of another kind, at once or as a loader, as in `predict`, which the network should be less sure
                about: the report says how well entropies (in regression: standard deviations of an observation, averaged
                over outputs) tell them from ``data``.
            predictive: How the posterior predicts; None is `Predictive()`, as `predict` without options.
            progress: Whether to show a progress bar.

        Returns:
            A `Report`. Classification: negative log-likelihood in nats, Brier score, expected calibration error in 15 bins,
            accuracy. Regression, for Gaussians with the noise: negative log-likelihood, continuous ranked probability score,
            root mean square error, coverage of central intervals; the MAP's Gaussian has the noise only.

        Raises:
            ValueError: For fewer than two examples, targets that do not fit, or Bernoulli targets between 0 and 1.
            TypeError: If there are no targets.
            NotImplementedError: If the likelihood has no noise model.
        """
        predictor = self._predictor()
        predictive = checked_predictive(predictive, predictor.likelihood)
        batches = None if foreign is None else self._batches(foreign, progress)
        return make_report(predictor, data, batches, predictive, progress)

    def _batches(self, x: Any, progress: bool) -> Iterable[Any]:
        """Return the inputs of every batch of a loader, or the inputs themselves as the only batch."""
        return batches_of_inputs(self.model, x, progress) if is_loader(x) else [x]

    def _predictor(self) -> Predictor:
        return Predictor(self.model, self._at_its_weights())

    @told_of
    @in_full_precision
    def sample(self, n: int, *, antithetic: bool = False, seed: int = 0) -> dict[str, Tensor]:
        """Draw parameters from the posterior.

        Args:
            n: Number of draws.
            antithetic: Whether draws ``2k`` and ``2k + 1`` mirror each other about the mean; ``n`` must be even.
            seed: Seed of the draws; the global random state is neither used nor changed.

        Returns:
            ``{parameter name: (n, *shape)}`` for the parameters that have a posterior, as `torch.func.functional_call`
            takes them one by one; drawn in at least float32 and rounded to the parameters' dtypes.
        """
        n = positive_integer(n, "n")
        if antithetic and n % 2:
            raise ValueError(f"antithetic draws come in pairs: n must be even, got {n}.")
        return self._predictor().sampler(seed_number(seed), antithetic).draw(n)
