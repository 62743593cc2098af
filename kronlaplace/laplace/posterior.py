"""`KronLaplace`: a Gaussian over a trained network's weights, from its Kronecker-factored Fisher."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from kronlaplace._arguments import choice, positive_number, seed_number
from kronlaplace._log import logged
from kronlaplace._precision import in_full_precision
from kronlaplace._wrappers import unwrapped
from kronlaplace.blocks import Truncation
from kronlaplace.blocks.truncation import checked_truncation
from kronlaplace.damping import DampedInverse
from kronlaplace.data.device import device_of
from kronlaplace.data.kept_examples import KeptExamples
from kronlaplace.estimators import Estimator, estimator_from_json, estimator_to_json, resolve_estimator
from kronlaplace.fisher.estimation import with_metadata
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.laplace import files
from kronlaplace.laplace.calibration import has_logit_scale, keeping
from kronlaplace.laplace.layer_choice import LayerChoice
from kronlaplace.laplace.migration import told_of
from kronlaplace.laplace.output_kernel import OutputKernel, output_kernel
from kronlaplace.laplace.posterior_as_prior import posterior_as_prior
from kronlaplace.laplace.posterior_tuning import PosteriorTuning, TuningMethod
from kronlaplace.laplace.settings import ONE_CHANGE
from kronlaplace.laplace.state import Fit, FittedWeights, State
from kronlaplace.laplace.variational import (
    LowerBound,
    VariationalFit,
    VariationalOptions,
    check_curved,
    find_fixed_point,
    lower_bound,
)
from kronlaplace.layers import Layer, Unsupported, find_layers, rules_of, with_rules
from kronlaplace.likelihoods import Likelihood, Sampling, resolve_likelihood
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.fingerprint import WeightsGuard, fingerprint
from kronlaplace.network.preconditions import check_model
from kronlaplace.priors.given import GivenPrior
from kronlaplace.priors.kronecker import KroneckerPrior
from kronlaplace.priors.mean import PriorMean
from kronlaplace.priors.precision import Precision
from kronlaplace.priors.prior import Prior, PriorStructure

__all__ = ["KronLaplace", "TuningMethod"]

_DEFAULT_TRUNCATION = Truncation()


class KronLaplace(PosteriorTuning):
    """Laplace posterior of a trained network with a Kronecker-factored Fisher.

    The posterior is ``N(θ, H⁻¹)`` around the trained weights ``θ``, with one block per layer,
    ``H = N · F / temperature + D``: ``F`` is the Fisher as a mean over the ``N`` examples, ``D`` the prior precision.
    Parameters without a block (see ``layers``) stay at their trained values.

    The model is held by reference and never changed (except by `to`); keep its weights as they were at `fit`.

    Args:
        model: The trained network, in the mode in which it predicts (``model.eval()``). Of a wrapper (`torch.compile`,
            ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel``) it is the network inside, by whose names the
            layers are called.
        likelihood: `Categorical`, `Bernoulli`, `Gaussian`, `HeteroscedasticGaussian`, or ``"classification"``,
            ``"binary"``, ``"regression"``, ``"heteroscedastic"``.
        estimator: How the Fisher's blocks are computed, such as `KFAC`, or its shorthand.
        prior_precision: A `Prior`, such as what `as_prior` of an earlier task's posterior returned; or ``δ``: one number;
            one per block, in the order of the blocks; or one per weight, as the
            row-major flattened matrices of all blocks joined, shape ``(P,)``, or ``{parameter name: tensor}``. Where
            weights have precisions of their own see `kronlaplace.damping.plus_diagonal.PlusDiagonal` for what is exact.
        prior_mean: Mean of the prior: one number, a flat tensor ``(P,)``, or ``{parameter name: tensor}`` (a state dict). A
            `Prior` has its own mean.
        temperature: Divides the log-likelihood; below 1 the posterior is sharper than Bayes ("cold").
        layers: Which modules get a posterior: their names, or patterns that match these, such as ``"encoder.*.query"``, as
            in `estimate_fisher`; None means all with trainable parameters. ``"last"`` is the layer whose output is the
            network's; `fit` finds it, and anything specific to single weights or layers is unknown until then.
        exclude: Names or patterns of modules that get no posterior.
        unsupported: What happens to parameters whose use no rule describes, as in `estimate_fisher`: ``"diagonal"`` (the
            default), ``"fixed"`` or ``"error"``. Layers of which only `fit` shows that they stay fixed, or have no effect
            on the outputs, are gone after it, and so are their entries in the prior; the Fisher's `coverage` has the
            reasons. They do not come back in later fits.
        truncation: Which factors of Kronecker blocks are so large that `fit` keeps only their leading eigenpairs and one
            value for the rest, and how many pairs; see `Truncation`. None keeps all of them whole, at a cost that grows with
            the cube of their size.

    Raises:
        ValueError, TypeError, NotImplementedError: As `estimate_fisher`.
    """

    @told_of
    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        estimator: Estimator | str = "kfac",
        *,
        prior_precision: Prior | Precision = 1.0,
        prior_mean: PriorMean = 0.0,
        temperature: float = 1.0,
        layers: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str = (),
        unsupported: Unsupported | str = Unsupported.DIAGONAL,
        truncation: Truncation | None = _DEFAULT_TRUNCATION,
    ) -> None:
        model = unwrapped(model)
        check_model(model)
        self.model = model
        self.estimator = resolve_estimator(estimator)
        self.truncation = checked_truncation(truncation)
        self._choice = LayerChoice.of(model, layers, exclude, unsupported)
        found = self._choice.find()
        given = GivenPrior(prior_precision, prior_mean)
        self._state = State(
            found,
            resolve_likelihood(likelihood),
            given.over(found) if found else given,
            positive_number(temperature, "temperature"),
        )

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
        """Return the state on the network's device and in its dtype."""
        if not state.layers:
            return state
        layers = with_rules(find_layers(self.model, [layer.name for layer in state.layers]), rules_of(state.layers))
        moved = state.over(layers)
        if state.fit is None:
            return moved
        fisher = state.fit.fisher.to(device_of(self.model), {layer.name: layer.dtype for layer in layers})
        fisher.metadata = replace(fisher.metadata, weights=fingerprint(self.model))
        was, now = state.fit.mean.dtype, next(iter(layers[0].parameters.values())).dtype
        examples = state.fit.examples.to(device_of(self.model), None if was == now else now)
        return replace(moved, fit=self._fit_of(fisher, layers, state.fit.kernel, examples))

    @told_of
    @in_full_precision
    @logged(lambda posterior: f"fitted the posterior; {posterior.fisher.coverage().summary()}")
    def fit(
        self,
        data: Iterable[Any] | None = None,
        *,
        fisher: KroneckerFisher | None = None,
        add: bool = False,
        sampling: Sampling | str | None = None,
        mc_samples: int = 1,
        seed: int = 0,
        progress: bool = False,
    ) -> KronLaplace:
        """Fit the posterior: estimate the Fisher in one pass over ``data``, or take a ready-made one.

        The posterior changes only if everything succeeds.

        Args:
            data: Batches ``(inputs, targets)`` of the training data, such as a DataLoader.
            fisher: Instead of data: what `estimate_fisher` returned for this model and likelihood, at these weights. It
                may have more blocks than the posterior has layers, none for layers that have no effect on the outputs, and,
                with ``unsupported="fixed"``, none for layers that could not have one; `estimator` becomes the one that it
                was made with. A Fisher that was made of blocks alone is taken to be of this network at its present
                weights, by the posterior's likelihood and estimator.
                The exact evidence (see `tune`) needs ``data``.
            add: Whether the data come in addition to those of earlier fits, at the same weights. The result is that of one
                fit to all of them, where no factor is truncated; possible for `KFAC`, `TKFAC`, `Diagonal`, `ExactBlock`.
            sampling: As in `estimate_fisher`, with ``data`` only. The default is the exact generalized Gauss-Newton
                matrix for up to 1,024 directions per example, and drawn labels, ``"mc"``, for more.
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
        before = None if state.fit is None or not add else state.fit.fisher
        if before is not None:
            likelihood = before.metadata.likelihood  # with the noise of that fit; it may have been tuned since
        ready_made = fisher is not None
        examples = KeptExamples(seed_number(seed))
        if fisher is None:
            assert data is not None
            options = {"sampling": sampling, "mc_samples": mc_samples, "seed": seed, "progress": progress}
            watch = keeping(examples) if has_logit_scale(likelihood) else None
            fisher = self._choice.estimate(data, likelihood, self.estimator, watch, **options)
            names = list(fisher)
        else:
            if not fisher.has_metadata:
                fisher = with_metadata(fisher, self.model, likelihood, self.estimator)
            names = self._choice.check_ready_made(fisher, state, likelihood)
        remaining, fisher = self._choice.settle(state, fisher, names, ready_made, before)
        with torch.inference_mode(False):
            fisher = self._decomposed(fisher)
            kernel = None
            if data is not None and before is None:
                kernel = output_kernel(self.model, remaining.layers, data, fisher)
            if before is not None and state.fit is not None:
                examples.merge(state.fit.examples)
            self._adopt(fisher, remaining, kernel, examples)
        return self

    def _decomposed(self, fisher: KroneckerFisher) -> KroneckerFisher:
        """Return a Fisher with large factors truncated and all others decomposed.

        All that follows a fit needs it, and a factor that cannot be inverted is found here.
        """
        if self.truncation is not None:
            fisher = fisher.truncated(self.truncation)
        fisher.decompose()
        return fisher

    @in_full_precision
    def fit_variational(
        self,
        data: Iterable[Any],
        *,
        rounds: int = 1,
        tolerance: float = 1e-2,
        structure: PriorStructure | str = PriorStructure.SCALAR,
        sampling: Sampling | str = Sampling.MC,
        mc_samples: int = 1,
        seed: int = 0,
        progress: bool = False,
    ) -> VariationalFit[KronLaplace]:
        """Fit the posterior with variational curvature, and set its prior precision with it.

        The output metric is averaged over the posterior of the outputs instead of taken at the trained weights, where it
        nearly vanishes if the network is certain (see `kronlaplace.laplace.variational`). After a plain fit, every round
        takes a step toward the fixed point; the first one goes most of the way. For `Categorical`, `Bernoulli` and
        `HeteroscedasticGaussian`.

        The posterior changes only if everything succeeds. It is then like any other: it predicts, and `tune` and the
        evidence work, with the new curvature; `tune` also finds the `logit_scale`, which is 1 here.

        Args:
            data: Batches ``(inputs, targets)`` of the training data that can be read several times, such as a DataLoader.
            rounds: At most so many steps. Each costs one backward pass per output, for the covariances of the outputs of a
                batch at a time, and what `fit` costs with the same sampling; an estimator of several passes needs the
                covariances in each.
            tolerance: Gain of the evidence lower bound from step to step, in nats, below which the rounds end. A step that
                lowers it by as much is taken back and halved.
            structure: What has a prior precision of its own, as in `tune`.
            sampling: ``"mc"``: a root of the averaged metric times random signs, one backward pass for each of
                ``mc_samples``; in the plain fit, drawn labels. ``"exact"``: all columns of a root, for small data sets.
            mc_samples: As in `estimate_fisher`.
            seed: Seed of the signs and, for `Categorical`, of the draws of outputs. All rounds have the same draws.
            progress: Whether to show progress bars.

        Returns:
            The posterior itself, with the history of the bound.

        Raises:
            ValueError: As `fit`; without targets; for a likelihood whose metric is constant (`Gaussian`, `Euclidean`), where
                the plain fit is already variational; for ``sampling="empirical"``.
            TypeError: For data that can be read only once.
            NotImplementedError: As `fit`; for a likelihood of your own without `Likelihood.averages`, or an estimator of
                your own whose blocks cannot be added.

        Warns:
            UserWarning: As `fit` and `tune`.
        """
        rule = DirectionSampling(choice(Sampling, sampling, "sampling"), mc_samples, seed)
        options = VariationalOptions(rounds, tolerance, structure, rule, progress, self.truncation)
        check_curved(self.likelihood)
        if isinstance(data, Iterator):
            raise TypeError("data must be readable again and again, such as a DataLoader or a list; got an iterator.")
        plain = copy.copy(self)
        plain.logit_scale = 1.0
        plain.fit(data, sampling=sampling, mc_samples=mc_samples, seed=seed, progress=progress)
        with torch.inference_mode(False):
            state, history, converged = find_fixed_point(self.model, plain._state, self.estimator, data, options)
        with ONE_CHANGE:
            self._state = replace(state, temperature=self.temperature)  # it may have been set meanwhile
        return VariationalFit(self, history, converged)

    @in_full_precision
    def evidence_lower_bound(self, data: Iterable[Any], *, seed: int = 0, progress: bool = False) -> LowerBound:
        """Compute the evidence lower bound of the linearized network, ``E_q[log p(D | f)] / τ − KL(q ‖ prior)``.

        It is what `fit_variational` maximizes, and can be computed for any posterior, at the trained weights as its mean
        (without the `logit_scale`). Costs one prediction of the data.

        Args:
            data: Batches ``(inputs, targets)`` of the data that the posterior was fitted to.
            seed: Seed of the draws of outputs (`Categorical` only; the others have closed forms or quadrature).
            progress: Whether to show a progress bar.

        Raises:
            RuntimeError: Before `fit`, or if the weights changed after it.
            ValueError: For a likelihood whose metric is constant: its evidence is known exactly.
            TypeError: For data without targets.
            NotImplementedError: For a likelihood of your own without `Likelihood.averages`.
        """
        check_curved(self.likelihood)
        state = replace(self._at_its_weights(), logit_scale=1.0)
        with torch.inference_mode(False):
            return lower_bound(self.model, state, data, seed_number(seed), progress)

    def _adopt(
        self,
        fisher: KroneckerFisher,
        remaining: State,
        kernel: OutputKernel | None,
        examples: KeptExamples,
    ) -> None:
        """Become the posterior of ``fisher``, which is of this network at its present weights, over the remaining layers."""
        fit = self._fit_of(fisher, remaining.layers, kernel, examples)
        if estimator_to_json(self.estimator) != fisher.metadata.settings:
            self.estimator = estimator_from_json(fisher.metadata.settings)
        with ONE_CHANGE:
            changes: dict[str, Any] = {"fit": fit}
            if remaining.layers is not self._layers:  # else the prior may have been set meanwhile
                changes |= {"layers": remaining.layers, "given": remaining.given}
            self._change(likelihood=self.likelihood.completed_by(fisher.metadata.likelihood), **changes)

    def _fit_of(
        self, fisher: KroneckerFisher, layers: Sequence[Layer], kernel: OutputKernel | None, examples: KeptExamples
    ) -> Fit:
        guard = WeightsGuard(self.model, fisher.metadata.weights)
        return Fit(fisher, FittedWeights(layers), guard, kernel, examples)

    @property
    def fisher(self) -> KroneckerFisher:
        """The Fisher that the posterior was fitted with.

        Raises:
            RuntimeError: Before `fit`.
        """
        return self._state.fitted.fisher

    @in_full_precision
    def covariance(self) -> dict[str, DampedInverse]:
        """Return the posterior covariance ``H⁻¹`` by layer, as the damped inverse of ``N · F / temperature + D``.

        Computed once for given hyperparameters, from the eigendecompositions that `fit` made.

        Raises:
            RuntimeError: Before `fit`, or if the weights changed after it.

        Warns:
            UserWarning: If weights of a large layer have precisions of their own, which is not exact there.
        """
        return self._at_its_weights().inverses

    @in_full_precision
    def as_prior(self) -> KroneckerPrior:
        """Return the posterior as a prior for other data: its precision ``N · F / temperature + D``, its mean the weights.

        For continual learning: train on the next task with half its `Prior.penalty` added to the summed loss, then fit a
        `KronLaplace` with ``prior_precision=`` this prior. Where the posterior's own prior is not one precision for each
        layer, its precision becomes one block for each layer: exactly for up to 2,048 weights and for diagonal blocks,
        otherwise by the nearest Kronecker product, with a warning.

        Raises:
            RuntimeError: Before `fit`, or if the weights changed after it.
            NotImplementedError: If a large layer's precision is a sum of blocks of different kinds.
        """
        with torch.inference_mode(False):
            return posterior_as_prior(self._at_its_weights())

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
                fit.fisher,
                fit.mean,
                state.prior,
                state.likelihood,
                state.temperature,
                state.logit_scale,
                fit.kernel,
                self.truncation,
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
        model = unwrapped(model)
        check_model(model)
        stored = files.read(path, model)
        posterior = cls(
            model,
            stored.likelihood,
            estimator_from_json(stored.fisher.metadata.settings),
            prior_precision=stored.prior,
            temperature=stored.temperature,
            layers=list(stored.fisher),
            truncation=stored.truncation,
        )
        state = posterior._state
        layers = with_rules(state.layers, stored.fisher.metadata.rules)
        posterior._adopt(stored.fisher, replace(state, layers=layers), stored.kernel, KeptExamples())
        posterior.logit_scale = stored.logit_scale
        return posterior

    def _at_its_weights(self) -> State:
        """Return the state, after checking that the network still has the weights that it belongs to."""
        state = self._state
        changed = None if state.fit is None else state.fit.guard.changed()
        if changed is not None:
            raise RuntimeError(
                f"the model's {changed!r} changed after the posterior was fitted. Fit again, or restore the weights; for "
                "another dtype use posterior.to(dtype)."
            )
        if state.fit is not None and device_of(self.model) != state.fit.device:
            state = self._state = self._following(state)
        return state
