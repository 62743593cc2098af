"""Tuning of a posterior's hyperparameters, and the evidence by which it goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from kronlaplace._arguments import Choice, choice, positive_number, warn
from kronlaplace._log import logged
from kronlaplace._precision import in_full_precision
from kronlaplace.laplace.calibration import calibrated_logit_scale, has_logit_scale, training_examples
from kronlaplace.laplace.exact_evidence import by_exact_evidence, has_exact_evidence
from kronlaplace.laplace.hyperparameters import Hyperparameters
from kronlaplace.laplace.migration import VALUES, told_of
from kronlaplace.laplace.predictions import PosteriorPredictions
from kronlaplace.laplace.predictive import Predictive
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.laplace.settings import ONE_CHANGE
from kronlaplace.laplace.state import State
from kronlaplace.laplace.tuning import NoiseTuning, ScaleTuning, by_evidence
from kronlaplace.laplace.validation import by_validation
from kronlaplace.priors.precision import Precision, precision_tensor
from kronlaplace.priors.prior import Prior, PriorStructure, prior_from_multiples

__all__ = ["PosteriorTuning", "TuningMethod"]

_Posterior = TypeVar("_Posterior", bound="PosteriorTuning")


class TuningMethod(Choice):
    """The objective of `KronLaplace.tune`: the ``EVIDENCE``, that with the exact Gauss-Newton matrix (``EXACT_EVIDENCE``),
    or the likelihood of ``VALIDATION`` data.
    """

    EVIDENCE = "evidence"
    EXACT_EVIDENCE = "exact-evidence"
    VALIDATION = "validation"


class PosteriorTuning(PosteriorPredictions):
    """The tuning of a posterior."""

    @told_of
    @in_full_precision
    def log_marginal_likelihood(
        self,
        prior_precision: Prior | Precision | None = None,
        noise_std: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """Return the Laplace evidence ``log p(D)``; see `kronlaplace.laplace.evidence`.

        Args:
            prior_precision: A `Prior`, or ``δ`` as in the constructor, with the mean of the posterior's prior; None is the
                posterior's own. Tensors may carry a gradient.
            noise_std: ``σ``, Gaussian likelihood only; None is the posterior's own. A tensor may carry a gradient.
            temperature: ``τ``; None is the posterior's own. A tensor may carry a gradient.

        Returns:
            0-dim tensor, float64, in nats, differentiable in its arguments.

        Raises:
            ValueError: If the fit saw no targets, or ``noise_std`` is given without a Gaussian likelihood.
        """
        state = self._at_its_weights()
        if noise_std is None:
            noise_std = state.likelihood.noise_std
        else:
            state.likelihood.with_noise_std(_positive(noise_std, "noise_std"))
        if temperature is None:
            temperature = state.temperature
        _positive(temperature, "temperature")
        prior = state.prior
        if isinstance(prior_precision, Prior):
            prior = prior_precision.over(state.layers)
        elif prior_precision is not None:
            prior = prior_from_multiples(precision_tensor(prior_precision, state.layers), prior.means)
        evidence = state.evidence if state.evidence.belongs_to(prior) else state.evidence_of(prior)
        state.warn_of_rounding(prior, evidence.scale(noise_std, temperature))
        return evidence(prior.multiples, noise_std, temperature)

    @told_of
    @in_full_precision
    @logged(lambda posterior: f"tuned to {posterior.hyperparameters}")
    def tune(
        self: _Posterior,
        method: TuningMethod | str | None = None,
        structure: PriorStructure | str = PriorStructure.SCALAR,
        data: Iterable[Any] | None = None,
        *,
        noise: NoiseTuning | str | None = None,
        logit_scale: ScaleTuning | str = ScaleTuning.TUNED,
        predictive: Predictive | None = None,
        grid: Sequence[float] | None = None,
        progress: bool = False,
    ) -> _Posterior:
        """Set the prior precision, and with it the noise in regression (unless it is known) or a classifier's `logit_scale`.

        By the evidence it costs milliseconds after the fit (only sums over cached eigenvalues, if all weights of a block
        share a precision), by the exact evidence less than a second. The scale of the logits, which keeps a classifier as
        certain as it was where it has data (see `kronlaplace.laplace.calibration`), costs one prediction of up to 1,024
        training examples, of which `fit` keeps copies. By validation it costs one prediction of the validation data for
        every point of the grid.

        Args:
            method: ``"evidence"``, the log marginal likelihood; ``"exact-evidence"``, that with the exact Gauss-Newton
                matrix of all layers together, see `kronlaplace.laplace.exact_evidence`; ``"validation"``, the negative
                log-likelihood of ``data`` under ``predictive``. None is ``"exact-evidence"`` where a fit to data has made it
                possible (a `Gaussian` likelihood, up to 1,024 targets, one precision for all weights), else ``"evidence"``:
                with few targets the evidence through Kronecker factors takes far too large a noise.
            structure: What has a precision of its own: ``"scalar"`` all weights together, ``"layerwise"`` every block,
                ``"diagonal"`` every weight. With ``"validation"`` the ratios of the precisions are those that the evidence
                prefers, and the grid has factors in front.
            data: For ``"validation"`` batches ``(inputs, targets)`` that were not used for training, readable several
                times. For an evidence the training data, to calibrate the scale of the logits where `fit` has seen none: for
                a posterior that was loaded, or fitted with ``fisher=``.
            noise: With a `Gaussian` likelihood ``"tuned"``, its ``noise_std`` is found with the prior, or ``"fixed"``, it
                stays as the posterior's `likelihood` has it. None keeps a noise that was stated, as in ``Gaussian(0.1)``,
                and tunes one that was not, as in ``Gaussian()`` or ``"regression"``.
            logit_scale: Whether a classifier's `logit_scale` is ``"tuned"`` too (with ``"validation"`` it is 1), or stays as
                it is, ``"fixed"``.
            predictive: How predictions will be made; None is `Predictive()`, the linearized one with the default link.
            grid: Prior precisions to try, or factors if ``structure`` is not ``"scalar"``; None for two each decade from
                1e-4 to 1e6, or 1e4. In regression they are meant for the noise of the training errors; every one is tried
                with the noise that is best for it, and moves with that, so that curvature and prior keep their ratio. With a
                noise that stays they are tried as they are.
            progress: Whether to show a progress bar.

        Returns:
            The posterior itself, with new `prior_precision` and `likelihood`.

        Raises:
            ValueError: For an unknown method or structure, for a fixed noise where there is none, if the fit saw no targets,
                or if no loss is finite. The posterior is then as before.
            TypeError: If ``data`` is missing, or has no effect.

        Warns:
            UserWarning: If the optimum is at the edge of what was searched; if the scale of the logits cannot be calibrated,
                because the fit has seen no data or an example has too many outputs; if the noise is several times the root
                mean square error on the training data; for validation data that are one process's share.
        """
        structure = choice(PriorStructure, structure, "structure")
        state = self._at_its_weights()
        calibrated = choice(ScaleTuning, logit_scale, "logit_scale") is ScaleTuning.TUNED and has_logit_scale(
            state.likelihood
        )
        if method is None:
            exact = has_exact_evidence(state, structure)
            method = TuningMethod.EXACT_EVIDENCE if exact else TuningMethod.EVIDENCE
        method = choice(TuningMethod, method, "method", VALUES)
        if method is not TuningMethod.VALIDATION:
            if predictive is not None or grid is not None:
                raise TypeError('predictive and grid are for method="validation"; the evidence does not use them.')
            if data is not None and not calibrated:
                raise TypeError(
                    'data are for method="validation", or for a classifier whose logit_scale is tuned; the evidence does '
                    "not use them."
                )
            tune = by_evidence if method is TuningMethod.EVIDENCE else by_exact_evidence
            tuned = tune(state, structure, noise)
            if calibrated:
                tuned = replace(tuned, logit_scale=self._calibrated_scale(state, tuned, data))
        else:
            tuned = by_validation(
                self.model,
                replace(state, logit_scale=1.0) if calibrated else state,
                lambda trial: Predictor(self.model, self.with_hyperparameters(trial)._state),
                data,
                structure,
                noise,
                predictive,
                grid,
                progress,
            )
        with ONE_CHANGE:
            self.hyperparameters = replace(tuned, temperature=self.temperature)  # it may have been set meanwhile
        return self

    def _calibrated_scale(self, state: State, tuned: Hyperparameters, data: Iterable[Any] | None) -> float:
        """Return the scale of the logits at other hyperparameters, or, without examples, the present one with a warning."""
        fit = state.fitted
        layout = fit.fisher.metadata.layout
        examples = fit.examples if data is None else training_examples(self.model, data, state.likelihood, layout)
        if not len(examples):
            warn(
                "the scale of the logits stays as it is, because the fit has seen no data (it took a ready-made Fisher, or "
                "the posterior was loaded): predictions may be far less certain than the network. Give tune the training "
                'data, tune(data=...), or leave the scale alone, tune(logit_scale="fixed").'
            )
            return state.logit_scale
        at_tuned = state.with_hyperparameters(replace(tuned, logit_scale=1.0))
        try:
            return calibrated_logit_scale(Predictor(self.model, at_tuned), examples, layout)
        except OverflowError as error:
            warn(
                f'the scale of the logits stays as it is: {error}. Tune on validation data, tune("validation", data=...), '
                'or leave the scale alone, tune(logit_scale="fixed").'
            )
            return state.logit_scale


def _positive(value: float | Tensor, name: str) -> float:
    return positive_number(value.item() if isinstance(value, Tensor) else value, name)
