"""`KronLaplace`: a Gaussian over a trained network's weights, from its Kronecker-factored Fisher."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace.batches import (
    Inputs,
    Rewind,
    device_of,
    is_loader,
    iterate,
    preserved_random_state,
    tensors_of,
    warn_of_share,
)
from kronlaplace.combination import combined
from kronlaplace.estimators import Estimator, estimator_from_metadata, estimator_to_metadata, resolve_estimator
from kronlaplace.example_axes import Layout
from kronlaplace.fingerprint import WeightsGuard, fingerprint
from kronlaplace.fisher import check_belongs, estimate_fisher
from kronlaplace.forward_errors import explained_errors
from kronlaplace.inversion import DampedInverse
from kronlaplace.kronecker import KroneckerFisher
from kronlaplace.laplace import files
from kronlaplace.laplace.evidence import noise_exponent
from kronlaplace.laplace.functional import Linearised
from kronlaplace.laplace.migration import VALUES, LaplaceTorchNames, told_of
from kronlaplace.laplace.predictive import JointPrediction, Predictive, PredictiveMethod, joined
from kronlaplace.laplace.prior import (
    Precision,
    PriorMean,
    PriorStructure,
    is_number,
    mean_by_layer,
    precision_by_layer,
    precision_tensor,
)
from kronlaplace.laplace.remaining import PriorOfLast, Remaining, last_layer_of, usable
from kronlaplace.laplace.sampling import WeightSampler
from kronlaplace.laplace.state import Fit, State
from kronlaplace.laplace.terms import Between
from kronlaplace.laplace.tuning import SUSPICIOUS_NOISE, NoiseTuning, known_noise, maximise_evidence
from kronlaplace.laplace.validation import Validator, best_of_grid, default_grid
from kronlaplace.last_layer import LAST, check_last
from kronlaplace.layers import Layer, Unsupported, entries_of, find_layers, search_layers
from kronlaplace.likelihoods import Categorical, Gaussian, Likelihood, Prediction, Sampling, resolve_likelihood
from kronlaplace.links import Link
from kronlaplace.options import Choice, choice, positive_integer, positive_number, seed_number, warn
from kronlaplace.precision import in_full_precision
from kronlaplace.preconditions import check_mode, check_model

__all__ = ["KronLaplace", "TuningMethod"]

_ONE_CHANGE = threading.RLock()
"""Held for the moment in which a state is replaced, so that no change of another thread is lost."""


class TuningMethod(Choice):
    """What `KronLaplace.tune` goes by: the ``EVIDENCE``, or the likelihood of ``VALIDATION`` data."""

    EVIDENCE = "evidence"
    VALIDATION = "validation"


class KronLaplace(LaplaceTorchNames):
    """Laplace posterior of a trained network with a Kronecker-factored Fisher.

    The posterior is ``N(θ, H⁻¹)`` around the trained weights ``θ``, with one block per layer,
    ``H = N · F / temperature + D``: ``F`` is the Fisher as a mean over the ``N`` examples, ``D`` the prior precision.
    Parameters without a block (see ``layers``) stay at their trained values.

    The model is held by reference and never changed (but by `to`); keep its weights as they were at `fit`.

    Args:
        model: The trained network, in the mode in which it predicts (``model.eval()``).
        likelihood: `Categorical`, `Bernoulli`, `Gaussian`, `HeteroscedasticGaussian`, or ``"classification"``,
            ``"binary"``, ``"regression"``, ``"heteroscedastic"``.
        estimator: How the Fisher's blocks are made, such as `KFAC`, or its shorthand.
        prior_precision: ``δ``: one number; one per block, in the order of the blocks; or one per weight, as the
            row-major flattened matrices of all blocks joined, shape ``(P,)``, or ``{parameter name: tensor}``. Where
            weights have precisions of their own see `kronlaplace.inversion.PlusDiagonal` for what is exact.
        prior_mean: Mean of the prior: one number, a flat tensor ``(P,)``, or ``{parameter name: tensor}`` (a state dict).
        temperature: Divides the log-likelihood; below 1 the posterior is sharper than Bayes ("cold").
        layers: Which modules get a posterior: their names, or patterns that match these, such as ``"encoder.*.query"``, as
            in `estimate_fisher`; None means all with trainable parameters. ``"last"`` is the layer whose output is the
            network's; `fit` finds it, and what belongs to single weights or layers is not known before.
        exclude: Names or patterns of modules that get none.
        unsupported: ``"error"``, or ``"fixed"``: parameters that cannot have a block stay at their trained values. Layers
            of which only `fit` shows that (they are not called, or used by a function too) are gone after it, and so are
            their entries in the prior; the Fisher's `coverage` has the reasons. They do not come back in later fits.

    Raises:
        ValueError, TypeError, NotImplementedError: As `estimate_fisher`.
    """

    _state: State

    @told_of
    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        estimator: Estimator | str = "kfac",
        *,
        prior_precision: Precision = 1.0,
        prior_mean: PriorMean = 0.0,
        temperature: float = 1.0,
        layers: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str = (),
        unsupported: Unsupported | str = Unsupported.ERROR,
    ) -> None:
        check_model(model)
        self.model = model
        self.estimator = resolve_estimator(estimator)
        self._unsupported = choice(Unsupported, unsupported, "unsupported")
        self._wanted = layers if layers is None or layers == LAST else entries_of(layers, "layers")
        self._exclude = entries_of(exclude, "exclude")
        found: list[Layer] = []  # of the last layer alone only the fit shows which it is
        self._prior_of_last = PriorOfLast()
        if layers == LAST:
            check_last(model, self._exclude)
            self._prior_of_last = PriorOfLast().with_precision(prior_precision).with_mean(prior_mean)
        else:
            found = find_layers(model, self._wanted, self._unsupported, self._exclude)
        self._state = State(
            found,
            resolve_likelihood(likelihood),
            _own_precision(prior_precision, found),
            _means(prior_mean, found),
            positive_number(temperature, "temperature"),
        )

    @property
    def _layers(self) -> Sequence[Layer]:
        return self._state.layers

    def _change(self, **changes: Any) -> None:
        """Become another state, which differs in these attributes."""
        with _ONE_CHANGE:
            self._state = replace(self._state, **changes)

    def __repr__(self) -> str:
        now = self._state
        state = f"fitted to {now.fit.fisher.n_examples:,} examples" if now.fit else "not fitted"
        names = [layer.name for layer in now.layers] or LAST
        precision = now.prior_precision
        prior = f"{float(precision):.4g}" if precision.ndim == 0 else f"{len(precision)} values"
        if precision.ndim > 0 and len(precision) == len(names):
            prior = "[" + ", ".join(f"{value:.4g}" for value in precision.tolist()) + "]"
        return (
            f"KronLaplace({now.likelihood}, {self.estimator}, prior_precision={prior}, temperature={now.temperature:g}, "
            f"layers={names}, {state})"
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
    def prior_precision(self) -> Tensor:
        """``δ``, 0-dim, one per block ``(L,)``, or one per weight ``(P,)``, float64.

        May be set after the fit, to whatever the constructor takes: that costs no new pass.
        """
        self._check_known(self._prior_of_last.precision is None)
        return self._state.prior_precision

    @prior_precision.setter
    def prior_precision(self, value: Precision) -> None:
        if not self._layers:
            self._prior_of_last = self._prior_of_last.with_precision(value)
        self._change(prior_precision=_own_precision(value, self._layers))

    @property
    def prior_mean(self) -> dict[str, Tensor]:
        """Mean of the prior, each block's matrix ``(q, p)``. May be set after the fit, to what the constructor takes."""
        self._check_known()
        return dict(self._state.prior_mean)

    @prior_mean.setter
    def prior_mean(self, value: PriorMean) -> None:
        if not self._layers:
            self._prior_of_last = self._prior_of_last.with_mean(value)
        self._change(prior_mean=_means(value, self._layers))

    @property
    def layers(self) -> list[str]:
        """Names of the blocks, in their order; those that a fit has found to be unusable are gone."""
        self._check_known()
        return [layer.name for layer in self._layers]

    def _check_known(self, known: bool = False) -> None:
        if not (self._layers or known):
            raise RuntimeError(
                'layers="last" is found by the fit; before that it is not known. Call fit(loader) first.'
            )

    @property
    def temperature(self) -> float:
        """``τ``, divides the log-likelihood; may be set after the fit."""
        return self._state.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._change(temperature=positive_number(value, "temperature"))

    @in_full_precision
    def to(self, *args: Any, **kwargs: Any) -> KronLaplace:
        """Move the posterior **and its network** to another device or dtype, as `torch.nn.Module.to` does.

        A network that was moved to another device by itself takes the posterior with it at the next use.

        Returns:
            The posterior itself.

        Raises:
            RuntimeError: If the weights changed after the fit.
        """
        if self._state.fit is not None:
            self._at_its_weights()
        self.model.to(*args, **kwargs)
        self._state = self._following(self._state)
        return self

    def _following(self, state: State) -> State:
        """The state on the network's device and in its dtype."""
        if not state.layers:
            return state
        layers = find_layers(self.model, [layer.name for layer in state.layers])
        mean = torch.cat([mean.flatten() for mean in state.prior_mean.values()])
        moved = replace(
            state,
            layers=layers,
            prior_precision=state.prior_precision.to(device_of(self.model)),
            prior_mean=_means(mean, layers),
        )
        if state.fit is None:
            return moved
        fisher = state.fit.fisher.to(device_of(self.model), {layer.name: layer.dtype for layer in layers})
        fisher.metadata = replace(fisher.metadata, weights=fingerprint(self.model))
        return replace(moved, fit=self._fit_of(fisher, layers))

    @told_of
    @in_full_precision
    def fit(
        self,
        data: Iterable[Any] | None = None,
        *,
        fisher: KroneckerFisher | None = None,
        add: bool = False,
        sampling: Sampling | str = Sampling.EXACT,
        mc_samples: int = 1,
        seed: int = 0,
        progress: bool = False,
    ) -> KronLaplace:
        """Fit the posterior: estimate the Fisher in one pass over ``data``, or take a ready-made one.

        The posterior changes only when all has gone well.

        Args:
            data: Batches ``(inputs, targets)`` of the training data, such as a DataLoader.
            fisher: Instead of data: what `estimate_fisher` returned for this model and likelihood, at these weights. It
                may have more blocks than the posterior has layers, and, with ``unsupported="fixed"``, none for layers that
                could not have one; `estimator` becomes the one that it was made with.
            add: Whether the data come in addition to those of earlier fits, at the same weights. The result is that of one
                fit to all of them; possible for `KFAC`, `TKFAC`, `Diagonal`, `ExactBlock`.
            sampling: As in `estimate_fisher`, with ``data`` only. The default is the exact generalized Gauss-Newton
                matrix; ``"mc"`` is cheaper where there are many outputs.
            mc_samples: As in `estimate_fisher`.
            seed: As in `estimate_fisher`.
            progress: Whether to show a progress bar.

        Returns:
            The posterior itself.

        Raises:
            TypeError: If not exactly one of ``data`` and ``fisher`` is given.
            ValueError, NotImplementedError: As `estimate_fisher`; or if ``fisher`` is of another model or likelihood, or
                cannot be added.
        """
        if (data is None) == (fisher is None):
            raise TypeError("fit takes either data or fisher=, exactly one of them.")
        if isinstance(data, KroneckerFisher):
            raise TypeError("a ready-made Fisher is given by name: fit(fisher=...).")
        likelihood = self.likelihood
        state = self._state
        before = None if state.fit is None else state.fit.fisher
        if add and before is not None:
            likelihood = before.metadata.likelihood  # with the noise of that fit; it may have been tuned since
        ready_made = fisher is not None
        if fisher is None:
            assert data is not None
            fisher = estimate_fisher(
                self.model,
                data,
                likelihood,
                self.estimator,
                sampling=sampling,
                mc_samples=mc_samples,
                layers=self._wanted,
                exclude=self._exclude,
                unsupported=self._unsupported,
                seed=seed,
                progress=progress,
            )
            names = list(fisher)
        else:
            check_model(self.model)
            layers = self._layers or find_layers(self.model, [last_layer_of(fisher)])
            names = usable(fisher, layers, self._unsupported)
            if type(fisher.metadata.likelihood) is not type(likelihood):
                raise ValueError(
                    f"the fisher was estimated with {fisher.metadata.likelihood}, the posterior has {likelihood}."
                )
        if state.layers:
            remaining = Remaining(state.layers, state.prior_precision, state.prior_mean).only(names)
        else:
            remaining = self._prior_of_last.over(find_layers(self.model, names), state.prior_precision)
        names = [layer.name for layer in remaining.layers]
        reasons = {} if before is None else before.coverage().reasons()
        if set(names) < set(fisher):  # estimated once for all layers, used here for some
            fisher = fisher.restricted_to(names, self._reasons(names) | reasons)
        if ready_made:
            check_belongs(fisher, remaining.layers, self.model, "the fisher", "estimated")
        if add and before is not None:
            if set(names) < set(before):
                before = before.restricted_to(names, fisher.coverage().reasons())
            fisher = combined(before, fisher)
        with torch.inference_mode(False):
            fisher.decompose()  # all that follows needs it, and a factor that cannot be inverted is found here
            self._adopt(fisher, remaining)
        return self

    def _reasons(self, names: list[str]) -> dict[str, str]:
        """Why the posterior has no block for some modules, as far as that shows without data."""
        wanted = names if self._wanted == LAST else self._wanted
        search = search_layers(self.model, wanted, self._unsupported, self._exclude)
        return {left.name: left.reason for left in search.left_out}

    def _adopt(self, fisher: KroneckerFisher, remaining: Remaining | None = None) -> None:
        """Become the posterior of ``fisher``, which is of this network at its present weights, over the remaining layers."""
        changes: dict[str, Any] = {}
        if remaining is not None and remaining.layers is not self._layers:  # else the prior may have been set meanwhile
            changes = {
                "layers": remaining.layers,
                "prior_precision": remaining.precision,
                "prior_mean": remaining.mean,
            }
        changes["fit"] = self._fit_of(fisher, self._layers if remaining is None else remaining.layers)
        likelihood = self.likelihood
        if isinstance(likelihood, Categorical) and likelihood.class_axis is None:
            changes["likelihood"] = fisher.metadata.likelihood  # the targets have told where the classes are
        if estimator_to_metadata(self.estimator) != fisher.metadata.settings:
            self.estimator = estimator_from_metadata(fisher.metadata.settings)
        self._change(**changes)

    def _fit_of(self, fisher: KroneckerFisher, layers: Sequence[Layer]) -> Fit:
        means = {layer.name: layer.matrix() for layer in layers}
        return Fit(fisher, means, WeightsGuard(self.model, fisher.metadata.weights))

    @property
    def fisher(self) -> KroneckerFisher:
        """The Fisher that the posterior was fitted with.

        Raises:
            RuntimeError: Before `fit`.
        """
        return self._state.fitted.fisher

    @in_full_precision
    def covariance(self) -> dict[str, DampedInverse]:
        """The posterior covariance ``H⁻¹`` by layer, as the damped inverse of ``N · F / temperature + D``.

        Computed once for given hyperparameters, from the eigendecompositions that `fit` made.

        Raises:
            RuntimeError: Before `fit`, or if the weights changed after it.

        Warns:
            UserWarning: If weights of a large layer have precisions of their own, which is not exact there.
        """
        return self._at_its_weights().inverses

    @told_of
    @in_full_precision
    def log_marginal_likelihood(
        self,
        prior_precision: Precision | None = None,
        noise_std: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """The Laplace evidence ``log p(D)``, see `kronlaplace.laplace.evidence`.

        Args:
            prior_precision: ``δ``, as in the constructor; None is the posterior's own. Tensors may carry a gradient.
            noise_std: ``σ``, Gaussian likelihood only; None is the posterior's own. A tensor may carry a gradient.
            temperature: ``τ``; None is the posterior's own. A tensor may carry a gradient.

        Returns:
            0-dim tensor, float64, in nats, differentiable in its arguments.

        Raises:
            ValueError: If the fit saw no targets, or ``noise_std`` is given without a Gaussian likelihood.
        """
        state = self._at_its_weights()
        if isinstance(state.likelihood, Gaussian):
            noise_std = state.likelihood.noise_std if noise_std is None else _positive(noise_std, "noise_std")
        elif noise_std is not None:
            _with_noise(state.likelihood)
        if temperature is not None:
            _positive(temperature, "temperature")
        temperature = state.temperature if temperature is None else temperature
        precision = (
            state.prior_precision if prior_precision is None else precision_tensor(prior_precision, state.layers)
        )
        state.warn_of_rounding(
            precision_by_layer(precision, state.evidence.shapes), state.evidence.scale(noise_std, temperature)
        )
        return state.evidence(precision, noise_std, temperature)

    @told_of
    @in_full_precision
    def tune(
        self,
        method: TuningMethod | str = TuningMethod.EVIDENCE,
        structure: PriorStructure | str = PriorStructure.SCALAR,
        data: Iterable[Any] | None = None,
        *,
        noise: NoiseTuning | str = NoiseTuning.TUNED,
        predictive: Predictive | None = None,
        grid: Sequence[float] | None = None,
        progress: bool = False,
    ) -> KronLaplace:
        """Set the prior precision, and in regression the noise with it (unless it is known).

        By the evidence it costs milliseconds after the fit (only sums over cached eigenvalues, if all weights of a block
        share a precision). By validation it costs one prediction of the validation data for every point of the grid.

        Args:
            method: ``"evidence"``, the log marginal likelihood; ``"validation"``, the negative log-likelihood of ``data``
                under ``predictive``.
            structure: What has a precision of its own: ``"scalar"`` all weights together, ``"layerwise"`` every block,
                ``"diagonal"`` every weight. With ``"validation"`` the ratios of the precisions are those that the evidence
                prefers, and the grid has factors in front.
            data: Batches ``(inputs, targets)`` that were not used for training (``"validation"`` only), readable several
                times.
            noise: With a `Gaussian` likelihood ``"tuned"``, its ``noise_std`` is found with the prior, or ``"fixed"``, it is
                known, and stays as the posterior's `likelihood` has it.
            predictive: How predictions will be made; None is `Predictive()`, the linearised one with the probit link.
            grid: Prior precisions to try, or factors if ``structure`` is not ``"scalar"``; None for two each decade from
                1e-4 to 1e6, or 1e4. In regression they are meant for the noise of the training errors; every one is tried
                with the noise that is best for it, and moves with that, so that curvature and prior keep their ratio. With
                ``noise="fixed"`` they are tried as they are.
            progress: Whether to show a progress bar.

        Returns:
            The posterior itself, with new `prior_precision` and `likelihood`.

        Raises:
            ValueError: For an unknown method or structure, for a fixed noise where there is none, if the fit saw no targets,
                or if no loss is finite. The posterior is then as before.
            TypeError: If ``data`` is missing, or has no effect.

        Warns:
            UserWarning: If the optimum is at the edge of what was searched; if the noise is several times the root mean
                square error on the training data; for validation data that are one process's share.
        """
        method = choice(TuningMethod, method, "method", VALUES)
        structure = choice(PriorStructure, structure, "structure")
        known = known_noise(noise, self.likelihood)
        if method is TuningMethod.EVIDENCE:
            if data is not None or predictive is not None or grid is not None:
                raise TypeError(
                    'data, predictive and grid are for method="validation"; the evidence needs none of them.'
                )
            state = self._at_its_weights()
            tuned = maximise_evidence(state.evidence, structure, state.temperature, known)
            self.set_hyperparameters(tuned.prior_precision, tuned.noise_std)
            if tuned.at_the_edge:
                warn(
                    f"the evidence is largest at the edge of the range searched for: {', '.join(tuned.at_the_edge)}. It has "
                    "no maximum inside; check that the network is trained and that the prior suits its weights."
                )
            self._check_noise(
                tuned.noise_std,
                "the network has nearly as many effective parameters as there are targets and follows their noise, so that "
                "its training errors do not tell it",
            )
            return self
        if data is None or isinstance(data, Iterator):
            got = "none" if data is None else "an iterator, which can be read only once"
            raise TypeError(
                f'method="validation" needs data=, batches (inputs, targets) such as a DataLoader; got {got}.'
            )
        grid = default_grid(structure is not PriorStructure.SCALAR) if grid is None else grid
        if not isinstance(grid, Iterable):
            raise TypeError(f"grid must be a list of prior precisions, such as [0.1, 1, 10]; got {grid!r}.")
        grid = sorted(positive_number(value, "an entry of grid") for value in grid)
        if not grid:
            raise ValueError("grid is empty; give at least one prior precision.")
        predictive = Predictive() if predictive is None else predictive
        if not isinstance(predictive, Predictive):
            raise TypeError(
                f'predictive must be a kl.Predictive, such as kl.Predictive(link="mc"); got {predictive!r}.'
            )
        predictive.check(self.likelihood)
        warn_of_share(data)
        state = self._at_its_weights()
        base = torch.ones((), dtype=torch.float64)
        if structure is not PriorStructure.SCALAR:
            base = maximise_evidence(state.evidence, structure, state.temperature, known).prior_precision
        start = self._training_error() if known is None else None
        trial = copy.copy(self)  # the posterior stays as it is until the best hyperparameters are known
        validator = Validator(trial, data, predictive, start, -noise_exponent(state.fitted.fisher))
        index, best = best_of_grid([base * factor for factor in grid], validator, progress)
        self.set_hyperparameters(best.prior_precision, best.noise_std)
        if index in (0, len(grid) - 1) and len(grid) > 1:
            what = "prior precision" if structure is PriorStructure.SCALAR else "factor of the prior precisions"
            warn(
                f"the validation loss is smallest at the edge of the grid, for the {what} {grid[index]:.3g} of "
                f"{grid[0]:.3g} to {grid[-1]:.3g}; give a wider grid= or more validation data"
                + (", unless the trained network itself predicts best." if index else ".")
            )
        self._check_noise(
            best.noise_std,
            "its errors on the validation data are so much larger. It follows the noise of the training data, or the "
            "validation data are of another kind, or in another unit",
        )
        return self

    def _check_noise(self, tuned: float | None, meaning: str) -> None:
        """Say so if the tuned noise is far from the errors on the training data."""
        statistics = self.fisher.statistics
        if tuned is None or statistics is None:
            return
        error = _with_noise(self.likelihood).root_mean_square_error(statistics)
        if 0 < error < tuned / SUSPICIOUS_NOISE:
            warn(
                f"the tuned noise_std, {tuned:.3g}, is {tuned / error:.3g} times the network's root mean square error on "
                f"the training data, {error:.3g}: {meaning}. Train with more data or weight decay, or stop earlier; if the "
                'noise is known set it, posterior.likelihood = kl.Gaussian(noise_std), and tune with noise="fixed".'
            )

    def _training_error(self) -> float | None:
        """Root mean square error on the training data, with a Gaussian likelihood; its noise if there were no targets."""
        if not isinstance(self.likelihood, Gaussian):
            return None
        statistics = self.fisher.statistics
        error = 0.0 if statistics is None else self.likelihood.root_mean_square_error(statistics)
        return error if error > 0 else self.likelihood.noise_std

    def set_hyperparameters(self, prior_precision: Precision, noise_std: float | None = None) -> None:
        """Set the prior precision, and the noise of a Gaussian likelihood if it is given."""
        changes: dict[str, Any] = {"prior_precision": _own_precision(prior_precision, self._layers)}
        if noise_std is not None:
            changes["likelihood"] = replace(_with_noise(self.likelihood), noise_std=noise_std)
        self._change(**changes)

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
        """Covariance of the network's outputs under the linearised model; the noise is not in it.

        Takes one backward pass per output of an example, but for the part of a last layer that is linear.

        Args:
            x: Inputs as in the fit, first axis examples; or a loader, as in `predict`.
            diagonal: Whether only the variances are wanted.
            joint: Whether covariances between examples are wanted, too; of a few inputs, all at once.
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
        between = Between.EXAMPLES if joint else Between.NONE if diagonal else Between.OUTPUTS
        state = self._at_its_weights()
        if is_loader(x):
            if joint:
                raise ValueError("joint=True needs the inputs at once, as a tensor, not a loader.")
            parts = [self._linearised(state, part, between, differentiable)[1] for part in self._batches(x, progress)]
        else:
            parts = [self._linearised(state, x, between, differentiable)[1]]
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
        """Posterior predictive distribution.

        Args:
            x: Inputs as in the fit, a tensor or a tuple or dict of tensors, first axis examples; any number, they are
                worked off in chunks. Or a loader (any iterable of batches, with or without targets, but a list of tensors,
                which is several inputs): the predictions of all of its batches, joined.
            method: ``"glm"``, the linearised model: a Gaussian over the outputs in closed form, then the link.
                ``"sample"``: the network itself, averaged over ``n_samples`` draws of its weights.
            link: Classification with ``"glm"``: ``"probit"`` (the default), ``"mc"`` (``n_samples`` draws of the outputs),
                or, for several classes, ``"centered-probit"`` or ``"bridge"`` (Laplace bridge); see `kronlaplace.Link`.
            n_samples: Number of draws, where there are any; 100 if not given.
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
        state = self._at_its_weights()
        if joint:
            if is_loader(x) or predictive.samples or self.likelihood.links:
                raise ValueError(
                    'joint=True is for regression with method="glm", and inputs that come at once. For the outputs of a '
                    "classifier use functional_variance(x, joint=True)."
                )
            return self._predict_jointly(state, x, predictive, differentiable)
        if is_loader(x):
            return joined([self._predict(state, x_, predictive, differentiable) for x_ in self._batches(x, progress)])
        return self._predict(state, x, predictive, differentiable)

    @in_full_precision
    def predict_batch(self, x: Any, predictive: Predictive, differentiable: bool = False) -> Tensor | Prediction:
        """`predict` for one batch of inputs, with its options as an object, and no look at whether the weights changed."""
        return self._predict(self._state, x, predictive, differentiable)

    def _predict(self, state: State, x: Any, predictive: Predictive, differentiable: bool) -> Tensor | Prediction:
        if predictive.samples:
            inputs = self._checked(x, differentiable)
            sampler = self._sampler(state, predictive.seed, predictive.antithetic)
            with _gradients(differentiable), explained_errors(self.model, inputs.value):
                return sampler.predict(self.model, state.likelihood, inputs, predictive.draws)
        f, covariance = self._linearised(state, x, predictive.between(state.likelihood), differentiable)
        with _gradients(differentiable):
            return predictive.linearised(f, covariance, state.likelihood)

    def _predict_jointly(self, state: State, x: Any, predictive: Predictive, differentiable: bool) -> JointPrediction:
        f, covariance = self._linearised(state, x, Between.EXAMPLES, differentiable)
        with _gradients(differentiable):
            marginal = predictive.linearised(f, covariance.diagonal().view(f.shape), state.likelihood)
        assert isinstance(marginal, Prediction)
        if marginal.mean.shape != f.shape:  # the outputs are means and log-variances
            of_means = torch.arange(f.numel(), device=f.device).view(f.shape)[:, : marginal.mean.shape[1]].flatten()
            covariance = covariance[of_means][:, of_means]
        return JointPrediction(marginal.mean, marginal.variance, marginal.noise_variance, covariance)

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
        return self._sampler(self._at_its_weights(), seed_number(seed), antithetic).draw(n)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file: the posterior's mean and factors, hyperparameters, how they came about.

        A fingerprint of all the network's weights goes with them, so that `load` can tell whether it is the same network.

        Raises:
            RuntimeError: Before `fit`, or if the weights changed after it.
            FileNotFoundError: If the folder is not there.
        """
        state = self._at_its_weights()
        fit = state.fitted
        files.write(
            path,
            files.Stored(
                fit.fisher, fit.mean, state.prior_mean, state.prior_precision, state.likelihood, state.temperature
            ),
        )

    @classmethod
    @told_of
    def load(cls, path: str | PathLike[str], model: nn.Module) -> KronLaplace:
        """Read a file that `save` wrote, for the same trained network; nothing is unpickled.

        Args:
            path: The file.
            model: The network with its trained weights, on any device.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or something else, or if it is of another network: the first layer that
                differs is named, or the first parameter or buffer.
        """
        check_model(model)
        stored = files.read(path, model)
        posterior = cls(
            model,
            stored.likelihood,
            estimator_from_metadata(stored.fisher.metadata.settings),
            prior_precision=stored.prior_precision,
            prior_mean=torch.cat([stored.prior_mean[name].flatten() for name in stored.fisher]),
            temperature=stored.temperature,
            layers=list(stored.fisher),
        )
        posterior._adopt(stored.fisher)
        return posterior

    def _at_its_weights(self) -> State:
        """The state, which is of the network at its present weights: predicting with others would be silently wrong."""
        state = self._state
        changed = None if state.fit is None else state.fit.guard.changed()
        if changed is not None:
            raise RuntimeError(
                f"the model's {changed!r} changed after the posterior was fitted. Fit again, or restore the weights; for "
                "another dtype use posterior.to(dtype)."
            )
        if state.fit is not None and device_of(self.model) != state.prior_precision.device:
            state = self._state = self._following(state)
        return state

    def _linearised(
        self, state: State, x: Any, between: Between, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        inputs = self._checked(x, differentiable)
        fit = state.fitted
        layout = Layout(fit.fisher.metadata.input_axis, fit.fisher.metadata.shared_inputs)
        network = Linearised(self.model, state.layers, state.inverses, state.likelihood, layout, fit.known)
        with _gradients(differentiable), explained_errors(self.model, inputs.value):
            return network.outputs_and_covariance(inputs, between, differentiable=differentiable)

    def _sampler(self, state: State, seed: int, antithetic: bool) -> WeightSampler:
        generator = torch.Generator(device=device_of(self.model)).manual_seed(seed)
        return WeightSampler(state.layers, state.fitted.mean, state.inverses, generator, antithetic)

    def _batches(self, data: Iterable[Any], progress: bool) -> Iterator[Any]:
        with preserved_random_state(device_of(self.model)), Rewind(data):
            device = device_of(self.model)
            for batch in iterate(data, device, alignment=None, progress=progress, description="Predicting"):
                yield batch.inputs.value

    def _checked(self, x: Any, differentiable: bool = False) -> Inputs:
        check_mode(self.model)
        inputs = Inputs(x)
        tensors = tensors_of(inputs) if isinstance(x, (Tensor, tuple, list, Mapping)) else []
        if not tensors or tensors[0].numel() == 0:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"inputs must be a tensor with at least one example on its first axis, a tuple or dict of tensors as in the "
                f"fit, or a loader; got {got}. Turn arrays into tensors with torch.from_numpy."
            )
        if differentiable and not any(t.requires_grad for t in tensors):
            raise ValueError(
                "differentiable=True needs inputs that ask for gradients: x.requires_grad_() first (with a loader, on the "
                "inputs of every batch)."
            )
        device = device_of(self.model)
        for t in tensors:
            # Accelerators are not waited for: there, NaN inputs give NaN predictions.
            if device.type == "cpu" and t.is_floating_point() and not torch.isfinite(t).all():
                raise ValueError("the inputs contain NaN or infinite values.")
        return inputs.map(lambda t: t.to(device))


@contextmanager
def _gradients(wanted: bool) -> Iterator[None]:
    """Record a graph or not, wherever the caller is."""
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        yield


def _own_precision(value: Precision, layers: Sequence[Layer]) -> Tensor:
    if not layers and not is_number(value):
        value = 1.0  # nothing yet that it could belong to; `PriorOfLast` has it
    with torch.inference_mode(False):
        return precision_tensor(value, layers).detach().clone()


def _means(value: PriorMean, layers: Sequence[Layer]) -> dict[str, Tensor]:
    if not layers:
        return {}
    return {layer.name: mean for layer, mean in zip(layers, mean_by_layer(value, layers), strict=True)}


def _with_noise(likelihood: Likelihood) -> Gaussian:
    """The likelihood, if it is a Gaussian."""
    if not isinstance(likelihood, Gaussian):
        raise ValueError(f"noise_std belongs to the Gaussian likelihood; this posterior has {likelihood}.")
    return likelihood


def _positive(value: float | Tensor, name: str) -> float | Tensor:
    positive_number(value.item() if isinstance(value, Tensor) else value, name)
    return value
