"""`KronLaplace`: a Gaussian over a trained network's weights, from its Kronecker-factored Fisher."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace.batches import Inputs, device_of, tensors_of
from kronlaplace.collect import check_mode, check_model
from kronlaplace.damping import Tikhonov
from kronlaplace.estimators import Estimator, estimator_from_metadata, estimator_to_metadata, resolve_estimator
from kronlaplace.fingerprint import WeightsGuard
from kronlaplace.fisher import check_belongs, estimate_fisher
from kronlaplace.inversion import DampedInverse
from kronlaplace.kronecker import KroneckerFisher
from kronlaplace.laplace.evidence import Evidence, PriorStructure, maximise, noise_rescaling
from kronlaplace.laplace.predictive import functional_covariance
from kronlaplace.layers import Unsupported, find_layers
from kronlaplace.likelihoods import Euclidean, Gaussian, Likelihood, Prediction, Sampling, resolve_likelihood
from kronlaplace.links import Link
from kronlaplace.options import choice, positive_integer, seed_number
from kronlaplace.serialization import load_tensors, save_tensors

__all__ = ["KronLaplace"]


class KronLaplace:
    """Laplace posterior of a trained network with a Kronecker-factored Fisher.

    The posterior is ``N(θ, H⁻¹)`` around the trained weights ``θ``, with one block per layer,
    ``H = N · F / temperature + δ I``: ``F`` is the Fisher as a mean over the ``N`` examples, ``δ`` the prior precision.
    Parameters without a block (see ``layers``) stay at their trained values.

    The model is held by reference and never changed; keep its weights as they were at `fit`.

    Args:
        model: The trained network, in the mode in which it predicts (``model.eval()``).
        likelihood: `Categorical`, `Bernoulli`, `Gaussian`, or ``"classification"``, ``"binary"``, ``"regression"``.
        estimator: How the Fisher's blocks are made, such as `KFAC`, or its shorthand.
        prior_precision: ``δ``: one number, or one per block, in the order of the blocks.
        temperature: Divides the log-likelihood; below 1 the posterior is sharper than Bayes ("cold").
        layers: Names of the modules that get a posterior; None means all with trainable parameters.
        unsupported: ``"error"``, or ``"fixed"``: parameters that cannot have a block stay at their trained values.

    Raises:
        ValueError, TypeError, NotImplementedError: As `estimate_fisher`.
    """

    _likelihood: Likelihood
    _prior_precision: Tensor
    _temperature: float

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        estimator: Estimator | str = "kfac",
        *,
        prior_precision: float | Sequence[float] | Tensor = 1.0,
        temperature: float = 1.0,
        layers: Sequence[str] | None = None,
        unsupported: Unsupported | str = Unsupported.ERROR,
    ) -> None:
        check_model(model)
        self.model = model
        self.estimator = resolve_estimator(estimator)
        self._layers = find_layers(model, layers, choice(Unsupported, unsupported, "unsupported"))
        self._fisher: KroneckerFisher | None = None
        self._guard: WeightsGuard | None = None
        self._mean: dict[str, Tensor] = {}
        self._covariance: dict[str, DampedInverse] | None = None  # follows from the rest; forgotten when that changes
        self.likelihood = resolve_likelihood(likelihood)
        self.prior_precision = prior_precision
        self.temperature = temperature

    def __repr__(self) -> str:
        state = f"fitted to {self._fisher.n_examples} examples" if self._fisher else "not fitted"
        names = [layer.name for layer in self._layers]
        return f"KronLaplace({self.likelihood}, {self.estimator}, layers={names}, {state})"

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood; in regression with the noise that predictions use, which may be set or tuned after the fit."""
        return self._likelihood

    @likelihood.setter
    def likelihood(self, likelihood: Likelihood) -> None:
        if self._fisher is not None and type(likelihood) is not type(self._likelihood):
            raise ValueError(f"the posterior was fitted with {self._likelihood}; {likelihood} needs a new fit.")
        self._likelihood = likelihood
        self._covariance = None

    @property
    def prior_precision(self) -> Tensor:
        """``δ``, 0-dim or one per block, float64. May be set to numbers after the fit: that costs no new pass."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Sequence[float] | Tensor) -> None:
        self._prior_precision = _as_precision(value, len(self._layers), device_of(self.model)).detach().clone()
        self._covariance = None

    @property
    def temperature(self) -> float:
        """Divides the log-likelihood; may be set after the fit."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"temperature must be a positive finite number, got {value!r}.")
        self._temperature = float(value)
        self._covariance = None

    def fit(
        self,
        data: Iterable[Any] | None = None,
        *,
        fisher: KroneckerFisher | None = None,
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
                may have more blocks than the posterior has layers; `estimator` becomes the one that it was made with.
            sampling: As in `estimate_fisher`, with ``data`` only. The default is the exact generalized Gauss-Newton
                matrix; ``"mc"`` is cheaper where there are many outputs.
            mc_samples: As in `estimate_fisher`.
            seed: As in `estimate_fisher`.
            progress: Whether to show a progress bar.

        Returns:
            The posterior itself.

        Raises:
            TypeError: If not exactly one of ``data`` and ``fisher`` is given.
            ValueError, NotImplementedError: As `estimate_fisher`; or if ``fisher`` is of another model or likelihood.
        """
        if (data is None) == (fisher is None):
            raise TypeError("fit takes either data or fisher=, exactly one of them.")
        if isinstance(data, KroneckerFisher):
            raise TypeError("a ready-made Fisher is given by name: fit(fisher=...).")
        likelihood = self.likelihood
        if fisher is None:
            assert data is not None
            fisher = estimate_fisher(
                self.model,
                data,
                likelihood,
                self.estimator,
                sampling=sampling,
                mc_samples=mc_samples,
                layers=[layer.name for layer in self._layers],
                seed=seed,
                progress=progress,
            )
        else:
            check_model(self.model)
            names = [layer.name for layer in self._layers]
            if set(names) < set(fisher):  # estimated once for all layers, used here for some
                fisher = fisher.restricted_to(names)
            if type(fisher.metadata.likelihood) is not type(likelihood):
                raise ValueError(
                    f"the fisher was estimated with {fisher.metadata.likelihood}, the posterior has {likelihood}."
                )
            check_belongs(fisher, self._layers, self.model, "the fisher", "estimated")
        self._adopt(fisher)
        return self

    def _adopt(self, fisher: KroneckerFisher) -> None:
        """Become the posterior of ``fisher``, which is of this network at its present weights."""
        self._mean = {layer.name: layer.matrix() for layer in self._layers}
        self._fisher = fisher
        if estimator_to_metadata(self.estimator) != fisher.metadata.settings:
            self.estimator = estimator_from_metadata(fisher.metadata.settings)
        self._covariance = None
        self._guard = WeightsGuard(self.model, fisher.metadata.weights)

    @property
    def fisher(self) -> KroneckerFisher:
        """The Fisher that the posterior was fitted with.

        Raises:
            RuntimeError: Before `fit`.
        """
        if self._fisher is None:
            raise RuntimeError("the posterior is not fitted yet: call fit(loader) first.")
        return self._fisher

    def covariance(self) -> dict[str, DampedInverse]:
        """The posterior covariance ``H⁻¹`` by layer, as the damped inverse of ``N · F / temperature + δ I``.

        Computed once for given hyperparameters: eigendecompositions at the first call, sums of eigenvalues later.
        """
        if self._covariance is None:
            fisher = self.fisher
            fisher.decompose()
            noise = self.likelihood.noise_std if isinstance(self.likelihood, Gaussian) else None
            rescaling = noise_rescaling(fisher.metadata.likelihood, noise, self._noise_exponent)
            scale = fisher.n_examples / self.temperature * rescaling
            precisions = self.prior_precision.expand(len(fisher))
            self._covariance = {
                name: Tikhonov(precision).invert(block.scaled(scale))
                for (name, block), precision in zip(fisher.items(), precisions, strict=True)
            }
        return self._covariance

    def log_marginal_likelihood(
        self,
        prior_precision: float | Sequence[float] | Tensor | None = None,
        noise_std: float | Tensor | None = None,
    ) -> Tensor:
        """The Laplace evidence ``log p(D)``, see `kronlaplace.laplace.evidence`.

        Args:
            prior_precision: ``δ``, one number or one per block; None is the posterior's own. A tensor may carry a
                gradient.
            noise_std: ``σ``, Gaussian likelihood only; None is the posterior's own. A tensor may carry a gradient.

        Returns:
            0-dim tensor, float64, in nats, differentiable in its arguments.

        Raises:
            ValueError: If the fit saw no targets, or ``noise_std`` is given without a Gaussian likelihood.
        """
        evidence = self._evidence()
        if isinstance(self.likelihood, Gaussian):
            noise_std = self.likelihood.noise_std if noise_std is None else noise_std
        elif noise_std is not None:
            raise ValueError(f"noise_std belongs to the Gaussian likelihood; this posterior has {self.likelihood}.")
        precision = (
            self.prior_precision
            if prior_precision is None
            else _as_precision(prior_precision, len(self._layers), self.prior_precision.device)
        )
        return evidence(precision, noise_std)

    def tune(self, *, method: str = "evidence", structure: PriorStructure | str = PriorStructure.SCALAR) -> KronLaplace:
        """Set the prior precision, and in regression the noise with it, where the evidence is largest.

        Costs milliseconds after the fit: only sums over cached eigenvalues.

        Args:
            method: ``"evidence"``, the log marginal likelihood.
            structure: ``"scalar"``, one prior precision for all weights, or ``"layerwise"``, one per block.

        Returns:
            The posterior itself, with new `prior_precision` and `likelihood`.

        Raises:
            ValueError: For an unknown method or structure, or if the fit saw no targets.

        Warns:
            UserWarning: If the evidence has no maximum inside the bounds.
        """
        if method != "evidence":
            raise ValueError(f"unknown method {method!r}; allowed is 'evidence'.")
        structure = choice(PriorStructure, structure, "structure")
        result = maximise(self._evidence(), structure)
        self.prior_precision = result.prior_precision
        if result.noise_std is not None:
            assert isinstance(self.likelihood, Gaussian)
            self.likelihood = replace(self.likelihood, noise_std=result.noise_std)
        return self

    def functional_variance(self, x: Any, diagonal: bool = False) -> Tensor:
        """Covariance of the network's outputs under the linearised model; the noise is not in it.

        Args:
            x: Inputs as in the fit, first axis examples.
            diagonal: Whether only the variances are wanted.

        Returns:
            Shape ``(N, C, C)``, or ``(N, C)`` with ``diagonal=True``.
        """
        return self._linearised(x, diagonal)[1]

    def predict(
        self,
        x: Any,
        *,
        method: str = "glm",
        link: Link | str | None = None,
        n_samples: int | None = None,
        seed: int = 0,
    ) -> Tensor | Prediction:
        """Posterior predictive distribution.

        Args:
            x: Inputs as in the fit, a tensor or a tuple or dict of tensors, first axis examples; any number, they are
                worked off in chunks.
            method: ``"glm"``, the linearised model: a Gaussian over the outputs in closed form, then the link.
                ``"sample"``: the network itself, averaged over ``n_samples`` draws of its weights.
            link: Classification with ``"glm"``: ``"probit"`` (the default), ``"mc"`` (``n_samples`` draws of the outputs)
                or ``"bridge"`` (Laplace bridge; several classes only).
            n_samples: Number of draws, where there are any; 100 if not given.
            seed: Seed of the draws; the global random state is neither used nor changed.

        Returns:
            Classification: probabilities, shape ``(N, C)`` (``Bernoulli``: of a one; ``(N,)`` if the network returns
            that). Regression: a `Prediction`; its ``variance`` is of the function, without the noise.

        Raises:
            ValueError: For an unknown method or link, or inputs that are empty or, on the CPU, not finite.
        """
        if method not in ("glm", "sample"):
            raise ValueError(f"unknown method {method!r}; allowed are 'glm', 'sample'.")
        links = self.likelihood.links
        if link is not None and (method == "sample" or not links):
            reason = 'method="sample" needs none' if method == "sample" else f"{self.likelihood} needs none"
            raise ValueError(f"link={link!r} would have no effect: {reason}. Leave it out.")
        link = Link.PROBIT if link is None else choice(Link, link, "link")
        if links and link not in links:
            raise ValueError(
                f"link {link.value!r} is not for {self.likelihood}; allowed are {[k.value for k in links]}."
            )
        if n_samples is not None and method == "glm" and link is not Link.MC:
            raise ValueError(
                f'n_samples={n_samples} would have no effect: draws are made with method="sample" or link="mc".'
            )
        n_samples = positive_integer(100 if n_samples is None else n_samples, "n_samples")
        generator = torch.Generator(device=device_of(self.model)).manual_seed(seed_number(seed))
        if method == "sample":
            return self._predict_by_sampling(x, n_samples, generator)
        needs_covariance = link is not Link.PROBIT and bool(self.likelihood.links)
        f, covariance = self._linearised(x, diagonal=not needs_covariance)
        mean = f.unsqueeze(1) if f.ndim == 1 else f
        prediction = self.likelihood.predictive(mean, covariance.to(mean.dtype), link, n_samples, generator)
        if isinstance(prediction, Prediction):
            if f.ndim == 1:
                prediction = replace(prediction, mean=prediction.mean[:, 0], variance=prediction.variance[:, 0])
            return prediction
        return prediction.reshape(f.shape)

    def sample(self, n: int, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw parameters from the posterior.

        Args:
            n: Number of draws.
            seed: Seed of the draws; the global random state is neither used nor changed.

        Returns:
            ``{parameter name: (n, *shape)}`` for the parameters that have a posterior, as `torch.func.functional_call`
            takes them one by one.
        """
        n = positive_integer(n, "n")
        generator = torch.Generator(device=device_of(self.model)).manual_seed(seed_number(seed))
        self._check_weights()
        return self._draw(n, generator)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file: the posterior's mean and factors, hyperparameters, how they came about.

        A fingerprint of all the network's weights goes with them, so that `load` can tell whether it is the same network.

        Raises:
            RuntimeError: Before `fit`, or if the weights changed after it.
            FileNotFoundError: If the folder is not there.
        """
        fisher = self.fisher
        self._check_weights()
        tensors = {f"fisher/{name}": tensor for name, tensor in fisher.to_tensors().items()}
        tensors |= {f"mean/{name}": tensor for name, tensor in self._mean.items()}
        tensors["prior_precision"] = self.prior_precision
        values = {
            "fisher": fisher.to_json(),
            "likelihood": self.likelihood.to_metadata(),
            "temperature": self.temperature,
        }
        save_tensors(path, "posterior", tensors, values)

    @classmethod
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
        device = device_of(model)
        tensors, values = load_tensors(path, "posterior", device)
        fisher = KroneckerFisher.from_tensors(_with_prefix(tensors, "fisher/"), values["fisher"])
        known = [layer.name for layer in find_layers(model, unsupported=Unsupported.FIXED)]
        for name in fisher:
            if name not in known:
                raise ValueError(
                    f"{path} is a posterior of another network: it has a layer {name!r}, the model has not; the model's "
                    f"layers are {known}."
                )
        check_belongs(fisher, find_layers(model, list(fisher)), model, str(path), "fitted")
        posterior = cls(
            model,
            Likelihood.from_metadata(values["likelihood"]),
            estimator_from_metadata(fisher.metadata.settings),
            prior_precision=tensors["prior_precision"],
            temperature=values["temperature"],
            layers=list(fisher),
        )
        posterior._adopt(fisher)
        return posterior

    @property
    def _noise_exponent(self) -> int:
        """The Fisher is ``∝ σ⁻²``; the empirical one, made of residuals over ``σ²``, is ``∝ σ⁻⁴``."""
        return -4 if self.fisher.metadata.sampling is Sampling.EMPIRICAL else -2

    def _evidence(self) -> Evidence:
        fisher = self.fisher
        if isinstance(self.likelihood, Euclidean):
            raise NotImplementedError(
                "Euclidean has no noise model, so there is no evidence. Use Gaussian(noise_std), whose noise is tuned."
            )
        if fisher.statistics is None:
            raise ValueError("the evidence needs targets: fit with batches of (inputs, targets).")
        fisher.decompose()
        scale = fisher.n_examples / self.temperature
        return Evidence(
            blocks=[block.scaled(scale) for block in fisher.values()],
            squared_norms=torch.stack([self._mean[name].double().square().sum() for name in fisher]),
            likelihood=fisher.metadata.likelihood,
            statistics=fisher.statistics,
            temperature=self.temperature,
            noise_exponent=self._noise_exponent,
        )

    def _check_weights(self) -> None:
        """The posterior is at the weights of its fit; predicting with others would be silently wrong."""
        changed = None if self._guard is None else self._guard.changed()
        if changed is not None:
            raise RuntimeError(
                f"the model's {changed!r} changed after the posterior was fitted. Fit again, or restore the weights."
            )

    def _linearised(self, x: Any, diagonal: bool) -> tuple[Tensor, Tensor]:
        inputs = self._checked(x)
        axis = self.fisher.metadata.input_axis
        return functional_covariance(self.model, self._layers, self.covariance(), inputs, axis, diagonal=diagonal)

    def _checked(self, x: Any) -> Inputs:
        check_mode(self.model)
        self._check_weights()
        inputs = Inputs(x)
        tensors = tensors_of(inputs) if isinstance(x, (Tensor, tuple, list, Mapping)) else []
        if not tensors or tensors[0].numel() == 0:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"inputs must be a tensor with at least one example on its first axis, or a tuple or dict of tensors as in "
                f"the fit; got {got}. Turn arrays into tensors with torch.from_numpy, and predict batch by batch from a "
                "loader."
            )
        device = device_of(self.model)
        for t in tensors:
            # Accelerators are not waited for: there, NaN inputs give NaN predictions.
            if device.type == "cpu" and t.is_floating_point() and not torch.isfinite(t).all():
                raise ValueError("the inputs contain NaN or infinite values.")
        return inputs.map(lambda t: t.to(device))

    def _draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        draws: dict[str, Tensor] = {}
        inverses = self.covariance()
        for layer in self._layers:
            noise = torch.randn(
                n, *layer.shape, generator=generator, device=generator.device, dtype=self.fisher[layer.name].dtype
            )
            matrices = self._mean[layer.name] + inverses[layer.name].sqrt_solve(noise)
            draws |= layer.split(matrices.to(self._mean[layer.name].dtype))
        return draws

    def _predict_by_sampling(self, x: Any, n_samples: int, generator: torch.Generator) -> Tensor | Prediction:
        inputs = self._checked(x)
        average = scatter = noise = torch.zeros((), device=device_of(self.model))
        with torch.no_grad():
            for i in range(n_samples):
                parameters = {name: draw[0] for name, draw in self._draw(1, generator).items()}
                outputs = inputs.run(self.model, parameters)
                mean = self.likelihood.sample_mean(outputs)
                # Welford's update: a difference of two large sums would lose a small variance to rounding.
                deviation = mean - average
                average = average + deviation / (i + 1)
                scatter = scatter + deviation * (mean - average)
                variance = self.likelihood.noise_variance(outputs)
                if variance is not None:
                    noise = noise + (variance - noise) / (i + 1)
        if variance is None:
            return average
        return Prediction(average, scatter / max(n_samples - 1, 1), noise)


def _as_precision(value: float | Sequence[float] | Tensor, n_layers: int, device: torch.device) -> Tensor:
    try:
        precision = torch.as_tensor(value, dtype=torch.float64, device=device)
    except (TypeError, ValueError):
        raise TypeError(f"prior_precision must be a number, or one number per block, got {value!r}.") from None
    if precision.shape not in ((), (n_layers,)):
        raise ValueError(
            f"prior_precision must be one number or {n_layers} (one per block), got shape {tuple(precision.shape)}."
        )
    if not ((precision > 0) & torch.isfinite(precision)).all():
        raise ValueError(f"prior_precision must be positive and finite, got {precision.detach().tolist()}.")
    return precision


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
