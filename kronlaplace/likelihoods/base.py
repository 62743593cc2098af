"""Base class of the likelihoods, with the five questions that each answers, and their registry."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kronlaplace._arguments import Choice
from kronlaplace._precision import wide
from kronlaplace._registry import ClassRegistry
from kronlaplace.likelihoods.averages import Averages
from kronlaplace.likelihoods.gradient_check import equal_gradients, explainable
from kronlaplace.likelihoods.links import Link
from kronlaplace.likelihoods.prediction import Prediction

__all__ = ["LIKELIHOODS", "Likelihood", "Sampling", "register_likelihood"]


class Sampling(Choice):
    """Rule that picks the directions of an output metric.

    ``EXACT`` takes a complete square root of the metric (Fisher type 2, equal to the generalized Gauss-Newton
    matrix), ``MC`` draws labels from the model's own predictive distribution, and ``EMPIRICAL`` uses the labels in
    the data (the result is not the Fisher).
    """

    EXACT = "exact"
    MC = "mc"
    EMPIRICAL = "empirical"


@dataclass(frozen=True)
class Likelihood(ABC):
    """Base class of the likelihoods; see the package's docstring for the five questions that each answers.

    A likelihood with tunable noise is a dataclass with a field ``noise_std``. Its ``log_likelihood(statistics,
    noise_std=None)`` takes a second argument, a number or 0-dim tensor that overrides the field and may carry a gradient.
    """

    @property
    def noise_std(self) -> float | None:
        """Standard deviation (or another scale) of the observation noise, in target units, or None if there is none."""
        return None

    @property
    def noise_known(self) -> bool:
        """Whether the noise is known, so that it is tuned on request only."""
        return False

    def with_noise_std(self, noise_std: float) -> Likelihood:
        """Return a copy with a different noise, known or not as before.

        Raises:
            ValueError: If this likelihood has no ``noise_std``.
        """
        if self.noise_std is None:
            raise ValueError(f"noise_std only applies to the Gaussian likelihood; this posterior has {self}.")
        return replace(self, noise_std=noise_std)  # type: ignore[call-arg]  # only some likelihoods have this field

    def log_likelihood_at(self, statistics: Tensor, noise_std: Tensor | float | None) -> Tensor:
        """Compute the log-likelihood of all data with a different noise.

        Args:
            statistics: The summed `statistics`.
            noise_std: A number or 0-dim tensor, which may carry a gradient; None uses the likelihood's own noise.
        """
        if noise_std is None or self.noise_std is None:
            return self.log_likelihood(statistics)
        return self.log_likelihood(statistics, noise_std)  # type: ignore[call-arg]

    def noise_derivatives(self, statistics: Tensor, noise_std: float) -> tuple[float, float]:
        """Return the first and second derivative of the log-likelihood of all data with respect to ``log(noise_std)``."""
        with torch.inference_mode(False), torch.enable_grad():
            log = torch.tensor(math.log(noise_std), dtype=torch.float64, device=statistics.device, requires_grad=True)
            value = self.log_likelihood_at(statistics.clone(), log.exp())
            (first,) = torch.autograd.grad(value, log, create_graph=True)
            second = torch.autograd.grad(first, log)[0] if first.requires_grad else torch.zeros(())
        return float(first.detach()), float(second)

    def training_error(self, statistics: Tensor) -> float:
        """Return the typical error of the outputs on the data, in target units; the noise is searched for around it.

        Args:
            statistics: The summed `statistics`.

        Raises:
            ValueError: If this likelihood has no ``noise_std``.
        """
        if self.noise_std is None:
            raise ValueError(f"{self} has no noise_std.")
        return self.noise_std

    def noise_exponent(self, sampling: Sampling) -> int:
        """Return the exponent of the power of the noise to which the Fisher is proportional; 0 if there is no noise.

        With residuals over ``σ²`` as gradients, the empirical Fisher scales as ``σ⁻⁴`` and all others as ``σ⁻²``.
        """
        if self.noise_std is None:
            return 0
        return -4 if sampling is Sampling.EMPIRICAL else -2

    @property
    def has_normalizer(self) -> bool:
        """Whether `log_likelihood` belongs to a normalized density, so that an evidence exists."""
        return True

    @property
    def predictions_match_outputs(self) -> bool:
        """Whether predictions have the shape of the network's outputs."""
        return True

    def completed_by(self, other: Likelihood) -> Likelihood:
        """Return a copy with unset fields taken from another likelihood, such as one returned by `informed_by`.

        Only the ``class_axis`` of a `Categorical` can be unset; everything else stays the same.
        """
        return self

    accepts_logits: ClassVar[bool] = False
    """Whether the outputs are logits, so that a network that ends in a softmax or sigmoid is rejected."""

    accepts_log_softmax: ClassVar[bool] = False
    """Whether the outputs of a log-softmax are accepted in place of logits."""

    metric_is_constant: ClassVar[bool] = False
    """Whether the output metric is the same at all outputs, so that averages over outputs do not change it."""

    outputs_are_independent: ClassVar[bool] = False
    """Whether `averages` needs the variances of the outputs only, not their covariances."""

    @property
    def ignored_target(self) -> int | None:
        """Integer that marks ignored targets, such as the labels of padded tokens, or None if there is none."""
        return None

    def check_outputs(self, outputs: Tensor) -> None:
        """Check the shape of the network's outputs, ``(N, ...)``.

        Raises:
            ValueError: If this likelihood needs a different shape.
        """
        if outputs.ndim == 0:
            raise ValueError(
                f"{type(self).__name__} needs outputs with the examples on the first axis, (N,), (N, C) or (N, ...); the "
                "network returned a single number. Return the outputs themselves, not their sum or a loss."
            )

    @abstractmethod
    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        """Check the targets of one batch against the outputs.

        Shapes and dtypes are checked immediately. Values are not read on the host.

        Args:
            outputs: Network outputs, as the network returns them, shape ``(N, ...)``.
            targets: Targets of these outputs.

        Returns:
            A boolean 0-dim tensor, true if every value is allowed, and the message of the error to raise otherwise.

        Raises:
            ValueError: If the shape or dtype does not fit.
        """

    @abstractmethod
    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute sufficient statistics of the log-likelihood, shape ``(2,)``, float64, to be summed over batches."""

    @abstractmethod
    def log_likelihood(self, statistics: Tensor) -> Tensor:
        """Compute the log-likelihood of all data from the summed `statistics`."""

    def n_directions(self, outputs: Tensor, sampling: Sampling, mc_samples: int, targets: Tensor | None = None) -> int:
        """Return the number ``V`` of directions that `directions` yields for the same arguments.

        Args:
            outputs: Network outputs, shape ``(N, ...)``; only the shape is used.
            sampling: Rule that picks the directions.
            mc_samples: Number of label draws.
            targets: Targets in the data, if there are any; only the shape is used.

        Raises:
            ValueError: As `directions`.
        """
        if sampling is Sampling.EXACT:
            return self._n_exact_directions(outputs, targets)
        return mc_samples if sampling is Sampling.MC else 1

    def directions(
        self,
        outputs: Tensor,
        sampling: Sampling,
        *,
        mc_samples: int = 1,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the ``V`` vectors ``d_v`` that are propagated back, each of the shape and dtype of ``outputs``.

        They are made one at a time: all of them together would be ``C²N`` numbers in exact sampling.

        Args:
            outputs: Network outputs ``f``, shape ``(N, ...)``, without a graph.
            sampling: Rule that picks the directions.
            mc_samples: Number of label draws (``MC`` only); each direction is divided by its square root.
            targets: Targets in the data. Required for ``EMPIRICAL``; otherwise they only show `Categorical` which positions
                are ignored and which axis holds the classes, so pass them whenever there are any.
            generator: Source of the draws (``MC`` only).

        Raises:
            ValueError: If targets are required but missing; raised at the first step of the iteration.
        """
        if sampling is Sampling.EXACT:
            yield from self._exact_directions(outputs, targets)
        elif sampling is Sampling.MC:
            for _ in range(mc_samples):
                yield self._sampled_direction(outputs, targets, generator) / math.sqrt(mc_samples)
        elif targets is None:
            raise ValueError(
                f'sampling="empirical" needs the targets in the data, but none were given to {self}. Pass targets, or use '
                'sampling="mc" or "exact".'
            )
        else:
            yield self._gradient(outputs, targets)

    def metric_product(self, outputs: Tensor, vectors: Tensor, targets: Tensor | None = None) -> Tensor:
        """Multiply the Fisher information of each example's outputs with vectors: ``M(f) v``, as in ``vᵀFv = (Jv)ᵀM(Jv)``.

        Args:
            outputs: Network outputs ``f``, shape ``(N, ...)``, without a graph.
            vectors: One or several vectors ``v`` per example, shape ``(..., N, ...)``, ending with the outputs' shape.
            targets: Targets in the data, which only show `Categorical` which positions are ignored and which axis holds
                the classes.

        Returns:
            The products, of the shape of ``vectors``.

        Raises:
            ValueError: If the vectors have a different shape; and as `check_outputs`.
        """
        self.check_outputs(outputs)
        if vectors.shape[max(0, vectors.ndim - outputs.ndim) :] != outputs.shape:
            raise ValueError(
                f"vectors must have the shape of the outputs, {tuple(outputs.shape)}, after any leading axes; got "
                f"{tuple(vectors.shape)}."
            )
        return self._metric_product(outputs, vectors, targets)

    def _metric_product(self, outputs: Tensor, vectors: Tensor, targets: Tensor | None) -> Tensor:
        """Compute ``M(f) v`` for vectors of a valid shape, from the exact directions unless overridden."""
        axes = tuple(range(1 - outputs.ndim, 0))
        total = torch.zeros_like(vectors)
        for direction in self._exact_directions(outputs, targets):
            product = direction * vectors
            total += direction * (product.sum(axes, keepdim=True) if axes else product)
        return total

    def metric_diagonal(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the diagonal of the Fisher information ``M(f)`` of each example's outputs, in at least float32.

        Args:
            outputs: Network outputs ``f``, shape ``(N, ...)``, without a graph.
            targets: Targets in the data, as in `metric_product`.

        Returns:
            The diagonal, of the shape of the outputs.
        """
        self.check_outputs(outputs)
        return self._metric_diagonal(wide(outputs), targets)

    def _metric_diagonal(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Sum the squares of the exact directions, of which there may be many, unless overridden."""
        total = torch.zeros_like(outputs)
        for direction in self._exact_directions(outputs, targets):
            total += direction.square()
        return total

    def divergence(self, outputs: Tensor, new_outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Compute ``Σ_n KL(p(y|f_n) ‖ p(y|f'_n))``, 0-dim, in at least float32.

        Unless a likelihood overrides `_divergence`, this is ``½ (f' − f)ᵀ M(f) (f' − f)``, which is exact if the metric is
        constant and otherwise correct to second order.

        Args:
            outputs: Network outputs ``f``, shape ``(N, ...)``.
            new_outputs: Other outputs ``f'`` of the same examples, of the same shape.
            targets: Targets in the data, as in `metric_product`.

        Raises:
            ValueError: If the outputs have different shapes; and as `check_outputs` and `class_axis_of`.
        """
        self._check_like_outputs(outputs, new_outputs, "new_outputs")
        return self._divergence(wide(outputs), wide(new_outputs), targets)

    def _divergence(self, outputs: Tensor, new_outputs: Tensor, targets: Tensor | None) -> Tensor:
        change = new_outputs - outputs
        return 0.5 * (change * self._metric_product(outputs, change, targets)).sum()

    def check_gradient(self, outputs: Tensor, gradient: Tensor, targets: Tensor | None = None) -> tuple[Tensor, str]:
        """Check whether gradients at the outputs can be those of this negative log-likelihood, without reading values.

        Args:
            outputs: Network outputs ``f``, shape ``(N, ...)``.
            gradient: Gradient of each example's loss, ``N ∂h/∂f`` for a mean loss ``h``, of the same shape.
            targets: Targets in the data; without them, the gradient may be that for any targets, also soft ones.

        Returns:
            A boolean 0-dim tensor, false if no targets explain the gradient, and the message of the error to raise then.

        Raises:
            ValueError: If the shapes do not fit; and as `check_outputs` and `class_axis_of`.
        """
        self._check_like_outputs(outputs, gradient, "gradient")
        if targets is None:
            return explainable(str(self), self._gradient_error(wide(outputs), wide(gradient)), gradient)
        self.check_targets(outputs, targets)  # for the shapes
        return explainable(str(self), equal_gradients(gradient, self._gradient(outputs, targets)), gradient)

    def largest_decrease(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        """Return by how much the negative log-likelihood of the examples can decrease at most, or None for no known bound.

        For canonical outputs the gradient tells the target mean, and this is the divergence of the prediction from it. It
        is None also where no bound is needed, because the loss is its own second-order expansion, as for `Gaussian`.

        Args:
            outputs: Network outputs ``f``, shape ``(N, ...)``.
            gradient: Gradient of each example's loss, of the same shape.

        Returns:
            A sum over the examples, 0-dim, float64, at least 0.
        """
        return None

    def likely_targets(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        """Return the only hard targets that gradients at the outputs can come from, or None if any targets are possible.

        Args:
            outputs: Network outputs ``f``, shape ``(N, ...)``.
            gradient: Positive multiples of the gradient of each example's loss, of the same shape.
        """
        return None

    def _gradient_error(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        """Return how far gradients are from those for any targets, relative to one; zero if every gradient is possible."""
        return torch.zeros((), device=outputs.device)

    def _check_like_outputs(self, outputs: Tensor, other: Tensor, name: str) -> None:
        self.check_outputs(outputs)
        if other.shape != outputs.shape:
            raise ValueError(
                f"{name} must have the shape of the outputs, {tuple(outputs.shape)}; got {tuple(other.shape)}."
            )

    def class_axis_of(self, outputs: Tensor) -> int | None:
        """Return the axis of the outputs that holds the classes, not negative, or None if there are no classes.

        Args:
            outputs: Network outputs, shape ``(N, ...)``; only the shape is used.

        Raises:
            ValueError: If the axis is neither given nor determined by the shape (`Categorical`), or as `check_outputs`.
        """
        return None

    def informed_by(self, outputs: Tensor, targets: Tensor | None) -> Likelihood:
        """Return a copy with fields inferred from the shapes of a batch, so that no targets are needed for them later.

        Only the ``class_axis`` of a `Categorical` whose outputs have more than two axes is inferred; everything else stays
        the same.

        Args:
            outputs: Network outputs, shape ``(N, ...)``; only the shape is used.
            targets: Targets of these outputs, if there are any; only the shape is used.

        Raises:
            ValueError: If the targets have a shape that `check_targets` rejects.
        """
        return self

    @abstractmethod
    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Tensor | Prediction:
        """Compute the predictive distribution for Gaussian outputs.

        Args:
            mean: Mean of the outputs, shape ``(..., C)`` with any number of leading axes, such as ``(N, C)`` or
                ``(N, H, W, C)``: here the classes are on the last axis, whatever their axis in the network.
            covariance: Covariance of the outputs at each position, ``(..., C, C)``, or only its diagonal, ``(..., C)``.
            link: How probabilities are formed (classification only).
            n_samples: Number of draws for ``Link.MC``, each of the size of ``mean``.
            generator: Source of the draws.

        Returns:
            Probabilities, or a `Prediction`, of the shape of ``mean``, in at least float32.

        Raises:
            ValueError: If the covariance has a different shape.
        """

    @abstractmethod
    def predictive_nll(self, prediction: Tensor | Prediction, targets: Tensor) -> Tensor:
        """Compute the summed negative log predictive density of the targets, in nats, and the number of targets.

        The result has shape ``(2,)``, is float64 and is to be summed over batches; the quotient is the mean. The values of
        the targets are not checked; use `check_targets` for that.

        Args:
            prediction: In classification, probabilities of the shape of the network's outputs, with the classes on the
                same axis (for `Bernoulli`, the probability of a one); they are clamped at the smallest normal number of
                their dtype, so that a zero does not make the sum infinite. In regression, a `Prediction`, whose density is
                Gaussian with variance ``total_variance``.
            targets: Targets, as in `check_targets`.

        Raises:
            TypeError: If the prediction is of the other kind.
            ValueError: If the shapes do not fit.
            NotImplementedError: If the likelihood has no noise model.
        """

    def averages(
        self, mean: Tensor, covariance: Tensor, targets: Tensor | None, generator: torch.Generator
    ) -> Averages:
        """Compute the output metric and the log-likelihood of the targets, both averaged over Gaussian outputs.

        `KronLaplace.fit_variational` needs it, and a likelihood without it cannot be used there.

        Args:
            mean: Mean of the outputs, ``(N, ..., C)``, with the classes on the last axis.
            covariance: Covariance at each position, ``(N, ..., C, C)``, or, if `outputs_are_independent`, variances of the
                shape of ``mean``.
            targets: Targets in the data, as in `check_targets`, if there are any.
            generator: Source of draws.

        Raises:
            NotImplementedError: If the likelihood does not define it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define its averages over Gaussian outputs (Likelihood.averages), which "
            "variational curvature consists of. Define the method, or use fit, whose curvature is at the trained weights."
        )

    @abstractmethod
    def sample_mean(self, outputs: Tensor) -> Tensor:
        """Compute the mean of the targets given outputs: probabilities in classification, predicted means in regression.

        Like all parts of a prediction, it is in at least float32.
        """

    def noise_variance(self, outputs: Tensor) -> Tensor | None:
        """Compute the variance of the observation noise given outputs, in regression; None for probabilities.

        Raises:
            NotImplementedError: If the likelihood has no noise model.
        """
        return None

    @property
    def links(self) -> tuple[Link, ...]:
        """Links that `predictive` supports, the default one first; empty if it needs no link."""
        return (Link.PROBIT, Link.MC)

    def _n_exact_directions(self, outputs: Tensor, targets: Tensor | None) -> int:
        """Return the number of exact directions: one per output element of an example, unless overridden."""
        return math.prod(outputs.shape[1:])

    @abstractmethod
    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]: ...

    @abstractmethod
    def _sampled_direction(
        self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor: ...

    @abstractmethod
    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor: ...

    def to_json(self) -> dict[str, Any]:
        """Return the name and parameters as JSON-compatible values; see `kronlaplace._registry.ClassRegistry.to_json`.

        Raises:
            TypeError: If a parameter cannot be represented in JSON.
        """
        return LIKELIHOODS.to_json(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Likelihood:
        """Restore a likelihood from the result of `to_json`.

        Raises:
            ValueError: If the likelihood is not registered, or has different parameters.
        """
        return LIKELIHOODS.from_json({**_OF_EARLIER_FILES.get(values.get("name", ""), {}), **values})


_OF_EARLIER_FILES: Mapping[str, Mapping[str, Any]] = {
    "Gaussian": {"noise_known": False, "relative_noise": None},
    "Categorical": {"class_weights": None, "label_smoothing": 0.0},
}
"""By class what files may lack that were written before it had the field."""


LIKELIHOODS: ClassRegistry[Likelihood] = ClassRegistry(Likelihood, "likelihood", lambda cls: cls.__name__)  # type: ignore[type-abstract]
"""Registry of the likelihoods that files can name, by class name."""

_Class = TypeVar("_Class", bound=type[Likelihood])


def register_likelihood(likelihood: _Class) -> _Class:
    """Register a likelihood of your own by its class name, so that files saved with it can be loaded.

    It can be used as a decorator, above the dataclass decorator. A class that is defined again, as in a notebook, replaces
    the previous one. `kronlaplace.testing.check_likelihood` checks whether it obeys the laws of a likelihood.

    Args:
        likelihood: The class, a frozen dataclass derived from `Likelihood`, with fields that JSON can represent.

    Returns:
        The class.

    Raises:
        TypeError: If it is not such a class.
        ValueError: If another likelihood has the same name, or a field is called ``name`` or ``defined_in``.
    """
    LIKELIHOODS.register(likelihood)
    return likelihood
