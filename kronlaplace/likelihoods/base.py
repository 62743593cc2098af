"""What a likelihood is: the five questions that it answers, and how it becomes known by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kronlaplace._arguments import Choice
from kronlaplace._registry import ClassRegistry
from kronlaplace.likelihoods.links import Link
from kronlaplace.likelihoods.prediction import Prediction

__all__ = ["LIKELIHOODS", "Likelihood", "Sampling", "register_likelihood"]


class Sampling(Choice):
    """How the directions of one output metric are chosen.

    ``EXACT`` takes a complete square root of the metric (Fisher type 2, equal to the generalized Gauss-Newton
    matrix), ``MC`` draws labels from the model's own predictive distribution, ``EMPIRICAL`` uses the labels of
    the data (which is not the Fisher).
    """

    EXACT = "exact"
    MC = "mc"
    EMPIRICAL = "empirical"


@dataclass(frozen=True)
class Likelihood(ABC):
    """Base class; see the package's docstring for the five questions.

    A likelihood whose noise can be tuned is a dataclass with a field ``noise_std`` and takes a second argument in
    ``log_likelihood(statistics, noise_std=None)``, a number or 0-dim tensor that replaces its own and may carry a gradient.
    """

    @property
    def noise_std(self) -> float | None:
        """Standard deviation (or another scale) of the observation noise, in the targets' unit; None if there is no such
        number.
        """
        return None

    def with_noise_std(self, noise_std: float) -> Likelihood:
        """Return a copy with another noise.

        Raises:
            ValueError: If this likelihood has no ``noise_std``.
        """
        if self.noise_std is None:
            raise ValueError(f"noise_std belongs to the Gaussian likelihood; this posterior has {self}.")
        return replace(self, noise_std=noise_std)  # type: ignore[call-arg]  # a field of those that have it

    def log_likelihood_at(self, statistics: Tensor, noise_std: Tensor | float | None) -> Tensor:
        """Log-likelihood of all data with another noise; None stands for the likelihood's own.

        Args:
            statistics: The summed `statistics`.
            noise_std: A number or 0-dim tensor, which may carry a gradient.
        """
        if noise_std is None or self.noise_std is None:
            return self.log_likelihood(statistics)
        return self.log_likelihood(statistics, noise_std)  # type: ignore[call-arg]

    def noise_derivatives(self, statistics: Tensor, noise_std: float) -> tuple[float, float]:
        """First and second derivative of the log-likelihood of all data in the logarithm of the noise."""
        with torch.inference_mode(False), torch.enable_grad():
            log = torch.tensor(math.log(noise_std), dtype=torch.float64, device=statistics.device, requires_grad=True)
            value = self.log_likelihood_at(statistics.clone(), log.exp())
            (first,) = torch.autograd.grad(value, log, create_graph=True)
            second = torch.autograd.grad(first, log)[0] if first.requires_grad else torch.zeros(())
        return float(first.detach()), float(second)

    def training_error(self, statistics: Tensor) -> float:
        """Typical error of the outputs on the data, in the targets' unit: about this the noise is searched for.

        Args:
            statistics: The summed `statistics`.

        Raises:
            ValueError: If this likelihood has no ``noise_std``.
        """
        if self.noise_std is None:
            raise ValueError(f"{self} has no noise_std.")
        return self.noise_std

    def noise_exponent(self, sampling: Sampling) -> int:
        """The power of the noise that the Fisher is proportional to; 0 if there is no noise.

        With residuals over ``σ²`` as gradients the empirical Fisher goes with ``σ⁻⁴``, all others with ``σ⁻²``.
        """
        if self.noise_std is None:
            return 0
        return -4 if sampling is Sampling.EMPIRICAL else -2

    @property
    def has_normalizer(self) -> bool:
        """Whether `log_likelihood` is that of a normalized density, so that there is an evidence."""
        return True

    @property
    def predictions_match_outputs(self) -> bool:
        """Whether predictions have the shape of the network's outputs."""
        return True

    def completed_by(self, other: Likelihood) -> Likelihood:
        """Return this likelihood with what it leaves open taken from another, such as one that `informed_by` returned.

        That is the ``class_axis`` of a `Categorical`; all else stays as it is.
        """
        return self

    accepts_logits: ClassVar[bool] = False
    """Whether the outputs are logits, so that a network that ends with a softmax or sigmoid is refused."""

    accepts_log_softmax: ClassVar[bool] = False
    """Whether outputs that come out of a log-softmax are as good as logits."""

    @property
    def ignored_target(self) -> int | None:
        """The integer that targets have where they are ignored, as labels of padded tokens are; None if there is none."""
        return None

    def check_outputs(self, outputs: Tensor) -> None:
        """Check the shape of the network's outputs, ``(N, ...)``.

        Raises:
            ValueError: If this likelihood needs another.
        """
        if outputs.ndim == 0:
            raise ValueError(
                f"{type(self).__name__} needs outputs with the examples on the first axis, (N,), (N, C) or (N, ...); the "
                "network returned a single number. Return the outputs themselves, not their sum or loss."
            )

    @abstractmethod
    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        """Check the targets of one batch against the outputs.

        Shapes and dtypes are checked at once. Values are not looked at on the host.

        Args:
            outputs: Network outputs, as the network gives them, shape ``(N, ...)``.
            targets: Their targets.

        Returns:
            A boolean 0-dim tensor, true if every value is allowed, and the message to raise if it is not.

        Raises:
            ValueError: If the shape or dtype does not fit.
        """

    @abstractmethod
    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sufficient statistics of the log-likelihood, shape ``(2,)``, float64, to be summed over batches."""

    @abstractmethod
    def log_likelihood(self, statistics: Tensor) -> Tensor:
        """Log-likelihood of all data, from the summed `statistics`."""

    def n_directions(self, outputs: Tensor, sampling: Sampling, mc_samples: int, targets: Tensor | None = None) -> int:
        """Number ``V`` of directions that `directions` yields for the same arguments.

        Args:
            outputs: Network outputs, shape ``(N, ...)``; only the shape is used.
            sampling: The rule that picks the directions.
            mc_samples: Number of label draws.
            targets: The data's targets, if there are any; only the shape is used.

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

        One at a time: all of them together would be ``C²N`` numbers in exact sampling.

        Args:
            outputs: Network outputs ``f``, shape ``(N, ...)``, without graph.
            sampling: The rule that picks the directions.
            mc_samples: Number of label draws (``MC`` only); each direction is divided by its square root.
            targets: The data's targets. Needed for ``EMPIRICAL``; in the others they only tell `Categorical` which
                positions are ignored and which axis holds the classes, so pass them wherever there are any.
            generator: Source of the draws (``MC`` only).

        Raises:
            ValueError: If targets are needed and not given. As a generator does, at the first step.
        """
        if sampling is Sampling.EXACT:
            yield from self._exact_directions(outputs, targets)
        elif sampling is Sampling.MC:
            for _ in range(mc_samples):
                yield self._sampled_direction(outputs, targets, generator) / math.sqrt(mc_samples)
        elif targets is None:
            raise ValueError(
                f'sampling="empirical" is made of the data\'s targets and none were given to {self}. Give targets, or use '
                'sampling="mc" or "exact".'
            )
        else:
            yield self._gradient(outputs, targets)

    def metric_product(self, outputs: Tensor, vectors: Tensor, targets: Tensor | None = None) -> Tensor:
        """Multiply the Fisher information of each example's outputs with vectors: ``M(f) v``, as in ``vᵀFv = (Jv)ᵀM(Jv)``.

        Args:
            outputs: Network outputs ``f``, shape ``(N, ...)``, without graph.
            vectors: ``v``, one or several for each example, shape ``(..., N, ...)`` that ends with the outputs' shape.
            targets: The data's targets, which only tell `Categorical` which positions are ignored and which axis holds the
                classes.

        Returns:
            The products, of the shape of ``vectors``.

        Raises:
            ValueError: If the vectors have another shape; and as `check_outputs`.
        """
        self.check_outputs(outputs)
        if vectors.shape[max(0, vectors.ndim - outputs.ndim) :] != outputs.shape:
            raise ValueError(
                f"vectors must have the shape of the outputs, {tuple(outputs.shape)}, with any axes in front; got "
                f"{tuple(vectors.shape)}."
            )
        return self._metric_product(outputs, vectors, targets)

    def _metric_product(self, outputs: Tensor, vectors: Tensor, targets: Tensor | None) -> Tensor:
        """``M(f) v`` for vectors of a shape that fits; from the exact directions unless overridden."""
        axes = tuple(range(1 - outputs.ndim, 0))
        total = torch.zeros_like(vectors)
        for direction in self._exact_directions(outputs, targets):
            product = direction * vectors
            total += direction * (product.sum(axes, keepdim=True) if axes else product)
        return total

    def class_axis_of(self, outputs: Tensor) -> int | None:
        """The axis of the outputs that holds the classes, not negative; None if the outputs are not classes.

        Args:
            outputs: Network outputs, shape ``(N, ...)``; only the shape is used.

        Raises:
            ValueError: If the axis is neither given nor told by the shape (`Categorical`), or as `check_outputs`.
        """
        return None

    def informed_by(self, outputs: Tensor, targets: Tensor | None) -> Likelihood:
        """Return this likelihood with what the shapes of a batch teach, so that it needs no targets to know it later.

        That is the ``class_axis`` of a `Categorical` whose outputs have more than two axes; all else stays as it is.

        Args:
            outputs: Network outputs, shape ``(N, ...)``; only the shape is used.
            targets: Their targets, if there are any; only the shape is used.

        Raises:
            ValueError: If the targets are of a shape that `check_targets` refuses.
        """
        return self

    @abstractmethod
    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Tensor | Prediction:
        """Predictive distribution when the outputs are Gaussian.

        Args:
            mean: Mean of the outputs, shape ``(..., C)`` with any number of leading axes, such as ``(N, C)`` or
                ``(N, H, W, C)``: classes are on the last axis here, wherever the network has them.
            covariance: Their covariance at each position, ``(..., C, C)``, or only its diagonal, ``(..., C)``.
            link: How probabilities are formed (classification only).
            n_samples: Number of draws for ``Link.MC``, each of the size of ``mean``, all in memory at once.
            generator: Source of those draws.

        Returns:
            Probabilities, or a `Prediction`, of the shape of ``mean``, in at least float32.

        Raises:
            ValueError: If the covariance has another shape.
        """

    @abstractmethod
    def predictive_nll(self, prediction: Tensor | Prediction, targets: Tensor) -> Tensor:
        """Summed negative log predictive density of the targets, in nats, and their number.

        Shape ``(2,)``, float64, to be summed over batches; the quotient is the mean. Values of targets are not looked at:
        check them with `check_targets`.

        Args:
            prediction: In classification probabilities of the shape of the network's outputs, with the classes on the
                same axis (`Bernoulli`: of a one); they are clamped at the smallest normal number of their dtype, so
                that a zero does not make the sum infinite. In regression a `Prediction`, whose density is Gaussian with
                its ``total_variance``.
            targets: Targets as in `check_targets`.

        Raises:
            TypeError: For a prediction of the other kind.
            ValueError: If the shapes do not fit.
            NotImplementedError: If the likelihood has no noise model.
        """

    @abstractmethod
    def sample_mean(self, outputs: Tensor) -> Tensor:
        """Mean of the targets given outputs: probabilities in classification, the predicted means in regression.

        In at least float32, as all that predictions are made of.
        """

    def noise_variance(self, outputs: Tensor) -> Tensor | None:
        """Variance of the observation noise given outputs, in regression; None where predictions are probabilities.

        Raises:
            NotImplementedError: If the likelihood has no noise model.
        """
        return None

    @property
    def links(self) -> tuple[Link, ...]:
        """The links that `predictive` offers; none if the predictive needs no link."""
        return (Link.PROBIT, Link.MC)

    def _n_exact_directions(self, outputs: Tensor, targets: Tensor | None) -> int:
        """One per output element of an example, unless overridden."""
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
        """Return its name and parameters as JSON-compatible values; see `kronlaplace._registry.ClassRegistry.to_json`.

        Raises:
            TypeError: If a parameter is something that JSON cannot hold.
        """
        return LIKELIHOODS.to_json(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Likelihood:
        """Inverse of `to_json`.

        Raises:
            ValueError: If the likelihood is not registered, or has other parameters.
        """
        return LIKELIHOODS.from_json(values)


LIKELIHOODS: ClassRegistry[Likelihood] = ClassRegistry(Likelihood, "likelihood", lambda cls: cls.__name__)  # type: ignore[type-abstract]
"""The likelihoods that files can name, by the name of their class."""

_Class = TypeVar("_Class", bound=type[Likelihood])


def register_likelihood(likelihood: _Class) -> _Class:
    """Make a likelihood of your own known by its name, so that what was saved with it can be loaded.

    May be used as a decorator, above that of the dataclass. A class that is defined again, as in a notebook, replaces the
    one before. `kronlaplace.testing.check_likelihood` tells whether it keeps the laws of a likelihood.

    Args:
        likelihood: The class, a frozen dataclass derived from `Likelihood`, with fields that JSON can hold.

    Returns:
        The class.

    Raises:
        TypeError: If it is not such a class.
        ValueError: If another likelihood has that name, or a field is called ``name`` or ``defined_in``.
    """
    LIKELIHOODS.register(likelihood)
    return likelihood
