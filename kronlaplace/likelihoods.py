"""Likelihoods: what the network's output means, and the metric on it that the Fisher pulls back.

A likelihood is a small frozen object. It answers four questions, each about a batch of network outputs ``f`` as the
network gives them, of shape ``(N,)``, ``(N, C)`` or ``(N, ...)``:

* do the targets fit the outputs (`check_targets`);
* how well do the outputs explain them (`statistics`, additive over batches, and `log_likelihood`);
* which gradients are propagated back (`directions`): vectors ``d_v`` of the outputs' shape with
  ``Σ_v d_v d_vᵀ = M(f)``, the Fisher information of one example's (flattened) output;
* what is predicted when the outputs themselves are Gaussian (`predictive`).

| likelihood | outputs ``f`` | metric ``M(f)`` of one example | exact directions |
| --- | --- | --- | --- |
| `Categorical` | logits ``(N, C)``, ``(N, C, ...)`` or ``(N, ..., C)`` | ``diag(π) − ππᵀ`` by position | ``C − 1`` each |
| `Bernoulli` | logits ``(N, ...)`` | ``diag(π (1 − π))`` | one per output |
| `Gaussian` | means ``(N, ...)`` | ``I / σ²`` | one per output |
| `Euclidean` | ``(N, ...)`` | ``I`` | one per output |
| `HeteroscedasticGaussian` | means, log-variances ``s``: ``(N, 2C)`` | ``diag(e⁻ˢ, ½)`` | one per output |

Directions are always of **one example's** negative log-likelihood, summed over its positions, never of a reduced batch
loss, so no ``reduction=`` in the user's own loss can change a Fisher. No method but `log_likelihood` and `predictive`
waits for an accelerator.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from kronlaplace.links import Link, laplace_bridge, mean_over_samples, probit_scaled, variance_of
from kronlaplace.options import resolve

__all__ = [
    "Bernoulli",
    "Categorical",
    "Euclidean",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "Prediction",
    "Sampling",
    "resolve_likelihood",
]


class Sampling(str, Enum):
    """How the directions of one output metric are chosen.

    ``EXACT`` takes a complete square root of the metric (Fisher type 2, equal to the generalized Gauss-Newton
    matrix), ``MC`` draws labels from the model's own predictive distribution, ``EMPIRICAL`` uses the labels of
    the data (which is not the Fisher).
    """

    EXACT = "exact"
    MC = "mc"
    EMPIRICAL = "empirical"


@dataclass(frozen=True)
class Prediction:
    """A regression prediction: a Gaussian for every output of every example.

    Attributes:
        mean: Predicted mean, shape ``(N, C)`` (or ``(N,)`` if the network returns that).
        variance: Variance of the *function value*, same shape. It does **not** contain the noise.
        noise_variance: Variance of the observation noise: a 0-dim tensor ``σ²`` where it is the same everywhere
            (`Gaussian`), or of the shape of ``mean`` where the network predicts it (`HeteroscedasticGaussian`).
    """

    mean: Tensor
    variance: Tensor
    noise_variance: Tensor

    @property
    def total_variance(self) -> Tensor:
        """Variance of a new observation: function variance plus noise, same shape as ``mean``."""
        return self.variance + self.noise_variance


@dataclass(frozen=True)
class Likelihood(ABC):
    """Base class; see the module's docstring for the four questions."""

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

    @abstractmethod
    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Tensor | Prediction:
        """Predictive distribution when the outputs are Gaussian.

        Args:
            mean: Mean of the outputs, shape ``(N, C)``.
            covariance: Their covariance, ``(N, C, C)``, or only its diagonal, ``(N, C)``.
            link: How probabilities are formed (classification only).
            n_samples: Number of draws for ``Link.MC``.
            generator: Source of those draws.
        """

    @abstractmethod
    def sample_mean(self, outputs: Tensor) -> Tensor:
        """Mean of the targets given outputs: probabilities in classification, the predicted means in regression."""

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

    def to_metadata(self) -> dict[str, Any]:
        """Name and parameters, as JSON-compatible values."""
        return {"name": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_metadata(metadata: dict[str, Any]) -> Likelihood:
        """Inverse of `to_metadata`."""
        parameters = dict(metadata)
        return _BY_NAME[parameters.pop("name")](**parameters)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One class out of ``C``, for each example or at each of its positions (pixels, tokens), which are independent.

    The outputs are logits: ``(N, C)``; segmentation ``(N, C, d1, d2, ...)``, the convention of torch's
    ``cross_entropy``; tokens ``(N, T, C)``. The targets are class indices of the same shape without the class axis.

    Args:
        ignore_index: Targets of this value contribute nothing: the direction is zero at their position in every
            sampling, and they count neither in the log-likelihood nor in the number of targets.
        class_axis: Axis of the classes, 1 or -1, where the outputs have more than two. None infers it from the shape of
            the targets; without targets, three axes are ambiguous and four or more have it at 1.

    Raises:
        ValueError, TypeError: For another axis, or an index that is not an integer.
    """

    ignore_index: int = -100
    class_axis: int | None = None

    def __post_init__(self) -> None:
        if type(self.ignore_index) is not int:
            raise TypeError(f"ignore_index must be an integer, such as -100, got {self.ignore_index!r}.")
        if self.class_axis is not None and (type(self.class_axis) is not int or self.class_axis not in (1, -1)):
            raise ValueError(
                f"class_axis must be 1 for outputs (N, C, ...), -1 for outputs (N, ..., C), or None to infer it from the "
                f"targets; got {self.class_axis!r}."
            )

    def __repr__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Categorical({', '.join(given)})"

    def check_outputs(self, outputs: Tensor) -> None:
        axes = {None: (1, -1), 1: (1,), -1: (-1,)}[self.class_axis]
        if outputs.ndim < 2 or max(outputs.shape[axis] for axis in axes) < 2:
            raise self._too_few_classes(outputs)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        axis = self._axis(outputs, targets)
        c = outputs.shape[axis]
        if c < 2:
            raise self._too_few_classes(outputs)
        integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
        if targets.shape != _without(outputs.shape, axis) or not integer:
            raise self._bad_targets(outputs, targets, [axis])
        message = (
            f"class labels must lie in 0 … {c - 1} for a network with {c} outputs; some do not. "
            "Relabel them, or give the network as many outputs as there are classes; targets of value "
            f"{self.ignore_index} are ignored (Categorical(ignore_index=...) sets another)."
        )
        labels = targets.long()
        return ((labels >= 0) & (labels < c) | (labels == self.ignore_index)).all(), message

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood and the number of targets, both without the ignored ones."""
        axis = self._axis(outputs, targets)
        log_pi = F.log_softmax(_wide(outputs), dim=axis)
        nll = -log_pi.gather(axis, _index(targets, outputs.shape[axis]).unsqueeze(axis)).squeeze(axis)
        ignored = self._ignored(targets)
        return torch.stack([nll.masked_fill(ignored, 0).double().sum(), (~ignored).double().sum()])

    def log_likelihood(self, statistics: Tensor) -> Tensor:
        return -statistics[0]

    def _n_exact_directions(self, outputs: Tensor, targets: Tensor | None) -> int:
        axis = self._axis(outputs, targets)
        return math.prod(_without(outputs.shape, axis)[1:]) * (outputs.shape[axis] - 1)

    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        """At one position after the other, the ``C − 1`` non-zero columns of the Cholesky factor of ``diag(π) − ππᵀ``.

        With tail sums ``r_j = Σ_{k≥j} π_k``, ``L_jj = √(π_j r_{j+1} / r_j)`` and
        ``L_ij = −π_i √(π_j / (r_j r_{j+1}))`` below it (Tanabe and Sagae 1992). In log space, so that tiny
        probabilities stay exact; one backward pass fewer than the symmetric root.
        """
        axis = self._axis(outputs, targets)
        log_pi_everywhere = F.log_softmax(_wide(outputs), dim=axis).clamp_min(-1e30).movedim(axis, -1)
        log_tail_everywhere = log_pi_everywhere.flip(-1).logcumsumexp(-1).flip(-1)
        ignored = None if targets is None else self._ignored(targets)
        for position in _positions(log_pi_everywhere.shape[:-1]):
            log_pi, log_tail = log_pi_everywhere[position], log_tail_everywhere[position]  # (N, C)
            for j in range(log_pi.shape[1] - 1):
                column = torch.zeros_like(log_pi)
                half = 0.5 * (log_pi[:, j] - log_tail[:, j])
                column[:, j] = torch.exp(half + 0.5 * log_tail[:, j + 1])
                column[:, j + 1 :] = -torch.exp(log_pi[:, j + 1 :] + (half - 0.5 * log_tail[:, j + 1]).unsqueeze(1))
                if ignored is not None:
                    column = column.masked_fill(ignored[position].unsqueeze(1), 0)
                direction = torch.zeros_like(outputs)
                direction.movedim(axis, -1)[position] = column.to(outputs.dtype)
                yield direction

    def _sampled_direction(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        axis = self._axis(outputs, targets)
        logits = _wide(outputs)
        # Gumbel-max: exact draws from the softmax that never wait for the device.
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
        gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(uniform.dtype).tiny)))
        drawn = (logits + gumbel).argmax(axis)
        return self._gradient_at(outputs, drawn, None if targets is None else self._ignored(targets), axis)

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        axis = self._axis(outputs, targets)
        return self._gradient_at(outputs, _index(targets, outputs.shape[axis]), self._ignored(targets), axis)

    @staticmethod
    def _gradient_at(outputs: Tensor, labels: Tensor, ignored: Tensor | None, axis: int) -> Tensor:
        """``π − e_label`` at every position, zero at those ignored; ``labels`` are class indices of type int64."""
        gradient = F.softmax(_wide(outputs), dim=axis)
        index = labels.unsqueeze(axis)
        gradient = gradient.scatter(axis, index, gradient.gather(axis, index) - 1)
        if ignored is not None:
            gradient = gradient.masked_fill(ignored.unsqueeze(axis), 0)
        return gradient.to(outputs.dtype)

    def _ignored(self, targets: Tensor) -> Tensor:
        return targets.long() == self.ignore_index  # as int64: in uint8, -100 would be 156

    def _axis(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """The axis that holds the classes, not negative.

        Raises:
            ValueError: If it is neither given nor told by the shapes.
        """
        last = outputs.ndim - 1
        if last <= 1:
            return 1
        if self.class_axis is not None:
            return 1 if self.class_axis == 1 else last
        if targets is None:
            if last > 2:
                return 1
            reason = "there are no targets whose shape could tell"
        else:
            fitting = [axis for axis in (1, last) if targets.shape == _without(outputs.shape, axis)]
            if len(fitting) == 1:
                return fitting[0]
            if not fitting:
                raise self._bad_targets(outputs, targets, [1, last])
            reason = f"targets of shape {tuple(targets.shape)} fit both"
        raise ValueError(
            f"Categorical cannot tell whether the classes of outputs of shape {tuple(outputs.shape)} are on axis 1 or on "
            f"the last: {reason}. Give kl.Categorical(class_axis=1) for outputs (N, C, ...) or "
            "kl.Categorical(class_axis=-1) for outputs (N, ..., C)."
        )

    def _too_few_classes(self, outputs: Tensor) -> ValueError:
        given = "" if self.class_axis is None else f" with class_axis={self.class_axis}"
        return ValueError(
            f"Categorical{given} needs one logit per class, outputs of shape (N, C), (N, C, ...) or (N, ..., C) with C of "
            f"at least 2; the network returned {tuple(outputs.shape)}. For one logit and labels 0 and 1 use Bernoulli."
        )

    def _bad_targets(self, outputs: Tensor, targets: Tensor, axes: list[int]) -> ValueError:
        shapes = " or ".join(f"{tuple(_without(outputs.shape, axis))} (classes on axis {axis})" for axis in axes)
        axis = axes[0] if len(axes) == 1 else "axis"
        given = "" if self.class_axis is None else f" and class_axis={self.class_axis}"
        return ValueError(
            f"Categorical targets must be integer class indices of shape {shapes} for outputs of shape "
            f"{tuple(outputs.shape)}{given}; got shape {tuple(targets.shape)}, dtype {targets.dtype}. "
            f"Use targets.argmax({axis}) if yours are one-hot, targets.squeeze({axis}).long() if they have one column."
        )

    @property
    def links(self) -> tuple[Link, ...]:
        return (Link.PROBIT, Link.MC, Link.BRIDGE)

    def sample_mean(self, outputs: Tensor) -> Tensor:
        return F.softmax(outputs, dim=self._axis(outputs))

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Class probabilities, shape ``(N, C)``, by ``link``."""
        if link is Link.PROBIT:
            return F.softmax(probit_scaled(mean, covariance), dim=1)
        if link is Link.MC:
            return mean_over_samples(F.softmax, mean, covariance, n_samples, generator)
        return laplace_bridge(mean, covariance)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent yes/no outputs: logits of any shape ``(N, ...)``, targets in ``[0, 1]`` of that shape."""

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        _check_same_shape("Bernoulli", outputs, targets)
        message = "Bernoulli targets must lie between 0 and 1; some do not. Map your two labels to 0 and 1."
        return ((targets >= 0) & (targets <= 1)).all(), message

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood and the number of targets."""
        logits = _wide(outputs)
        nll = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        return _sum_and_count(nll)

    def log_likelihood(self, statistics: Tensor) -> Tensor:
        return -statistics[0]

    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        """``√(π_c (1 − π_c))`` in output ``c``, nothing elsewhere; in log space, so exact in the tails."""
        logits = _wide(outputs)
        root = torch.exp(0.5 * (F.logsigmoid(logits) + F.logsigmoid(-logits))).to(outputs.dtype)
        yield from _columns(root)

    def _sampled_direction(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        probability = torch.sigmoid(_wide(outputs))
        uniform = torch.rand(outputs.shape, generator=generator, device=outputs.device, dtype=probability.dtype)
        return self._gradient(outputs, (uniform < probability).to(probability.dtype))

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        probability = torch.sigmoid(_wide(outputs))
        return (probability - targets.to(probability.dtype)).to(outputs.dtype)

    def sample_mean(self, outputs: Tensor) -> Tensor:
        return torch.sigmoid(outputs)

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Probabilities of a one, shape ``(N, C)``, by ``link``."""
        if link is Link.PROBIT:
            return torch.sigmoid(probit_scaled(mean, covariance))
        return mean_over_samples(lambda f, dim: torch.sigmoid(f), mean, covariance, n_samples, generator)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Regression with independent Gaussian noise; outputs of any shape ``(N, ...)``, targets of the same shape.

    Args:
        noise_std: Standard deviation ``σ`` of the noise, in the targets' unit.
    """

    noise_std: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.noise_std, (int, float)) and 0 < self.noise_std < math.inf):
            raise ValueError(f"noise_std must be a positive finite number, got {self.noise_std!r}.")

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        _check_same_shape("Gaussian", outputs, targets)
        return _finite(targets)

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of squared errors and the number of targets (so that ``σ`` can still change)."""
        return _sum_and_count((_wide(targets) - _wide(outputs)).double().square())

    def log_likelihood(self, statistics: Tensor, noise_std: Tensor | float | None = None) -> Tensor:
        """``−SSE / (2σ²) − n log(σ √(2π))``; ``noise_std`` overrides the object's own and may carry a gradient."""
        sigma = torch.as_tensor(
            self.noise_std if noise_std is None else noise_std, dtype=torch.float64, device=statistics.device
        )
        squared_error, count = statistics
        return -squared_error / (2 * sigma**2) - count * (torch.log(sigma) + 0.5 * math.log(2 * math.pi))

    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        yield from _columns(torch.full_like(outputs, 1 / self.noise_std))

    def _sampled_direction(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return (_standard_normal(_wide(outputs), generator) / self.noise_std).to(outputs.dtype)

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets.to(outputs.dtype)) / self.noise_std**2

    @property
    def links(self) -> tuple[Link, ...]:
        return ()

    def sample_mean(self, outputs: Tensor) -> Tensor:
        return outputs

    def noise_variance(self, outputs: Tensor) -> Tensor:
        return outputs.new_tensor(self.noise_std**2)

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Prediction:
        """Mean, function variance and noise; closed form."""
        return Prediction(mean, variance_of(covariance), mean.new_tensor(self.noise_std**2))


_NO_NOISE = (
    "Euclidean has no noise model, so it predicts no distribution of the targets. Use "
    "kl.Gaussian(noise_std=...), which has the same metric divided by noise_std², for predictions."
)


@dataclass(frozen=True)
class Euclidean(Likelihood):
    """The plain Gauss-Newton metric, the identity: the loss of one example is ``½ ‖f − y‖²``.

    Outputs of any shape ``(N, ...)``, targets of the same shape. There is no noise model behind it: the log-likelihood
    has no normaliser, and nothing is predicted. With one, it is `Gaussian`.
    """

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        _check_same_shape("Euclidean", outputs, targets)
        return _finite(targets)

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of squared errors and the number of targets."""
        return _sum_and_count((_wide(targets) - _wide(outputs)).double().square())

    def log_likelihood(self, statistics: Tensor) -> Tensor:
        """``−½ SSE``, the negative loss; without the normaliser, which only a noise model has."""
        return -0.5 * statistics[0]

    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        yield from _columns(torch.ones_like(outputs))

    def _sampled_direction(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return _standard_normal(_wide(outputs), generator).to(outputs.dtype)

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - targets.to(outputs.dtype)

    @property
    def links(self) -> tuple[Link, ...]:
        return ()

    def sample_mean(self, outputs: Tensor) -> Tensor:
        return outputs

    def noise_variance(self, outputs: Tensor) -> NoReturn:
        raise NotImplementedError(_NO_NOISE)

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> NoReturn:
        """Not offered.

        Raises:
            NotImplementedError: Always, with the way out.
        """
        raise NotImplementedError(_NO_NOISE)


@dataclass(frozen=True)
class HeteroscedasticGaussian(Likelihood):
    """Regression with Gaussian noise whose variance the network predicts, too.

    Outputs ``(N, 2C)``: first the ``C`` means ``μ``, then the ``C`` log-variances ``s``. Targets ``(N, C)``, or ``(N,)``
    for one mean. The negative log-likelihood of one target is ``½ [(y − μ)² e⁻ˢ + s + log 2π]``; its Fisher is
    ``diag(e⁻ˢ, ½)`` in ``(μ, s)``, without the targets that the Hessian would contain.
    """

    def check_outputs(self, outputs: Tensor) -> None:
        if outputs.ndim != 2 or outputs.shape[1] == 0 or outputs.shape[1] % 2:
            raise ValueError(
                "HeteroscedasticGaussian needs outputs of shape (N, 2C), the C means and then their C log-variances; the "
                f"network returned {tuple(outputs.shape)}. Give the last layer two outputs per target, or use "
                "Gaussian(noise_std=...) if the noise is the same everywhere."
            )

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        n, c = len(outputs), outputs.shape[1] // 2
        if targets.shape != (n, c) and not (c == 1 and targets.shape == (n,)):
            shapes = f"({n}, 1) or ({n},)" if c == 1 else f"({n}, {c})"
            raise ValueError(
                f"HeteroscedasticGaussian targets must have shape {shapes} for outputs of shape {tuple(outputs.shape)}, "
                f"one target for each mean and log-variance; got {tuple(targets.shape)}. Check the number of columns of "
                "the targets and of the last layer, which needs twice as many."
            )
        return _finite(targets)

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood and the number of targets."""
        mean, log_variance = _wide(outputs).chunk(2, dim=1)
        error = _wide(targets).reshape(mean.shape) - mean
        return _sum_and_count(0.5 * (error.square() * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi)))

    def log_likelihood(self, statistics: Tensor) -> Tensor:
        return -statistics[0]

    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        """``e^{−s/2}`` in each mean, ``1/√2`` in each log-variance."""
        log_variance = _wide(outputs).chunk(2, dim=1)[1]
        root = torch.cat([torch.exp(-0.5 * log_variance), torch.full_like(log_variance, math.sqrt(0.5))], dim=1)
        yield from _columns(root.to(outputs.dtype))

    def _sampled_direction(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """The gradient at ``y = μ + e^{s/2} z`` with standard normal ``z``; ``μ`` cancels."""
        log_variance = _wide(outputs).chunk(2, dim=1)[1]
        z = _standard_normal(log_variance, generator)
        return torch.cat([-z * torch.exp(-0.5 * log_variance), 0.5 * (1 - z.square())], dim=1).to(outputs.dtype)

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_variance = _wide(outputs).chunk(2, dim=1)
        error = _wide(targets).reshape(mean.shape) - mean
        precision = torch.exp(-log_variance)
        return torch.cat([-error * precision, 0.5 * (1 - error.square() * precision)], dim=1).to(outputs.dtype)

    @property
    def links(self) -> tuple[Link, ...]:
        return ()

    def sample_mean(self, outputs: Tensor) -> Tensor:
        """The predicted means, shape ``(N, C)``."""
        return outputs.chunk(2, dim=1)[0]

    def noise_variance(self, outputs: Tensor) -> Tensor:
        return outputs.chunk(2, dim=1)[1].exp()

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Prediction:
        """Means, their variances, and the expected noise variance ``E[eˢ] = e^{s + var(s)/2}``, each ``(N, C)``.

        Mean and covariance are of all outputs, ``(N, 2C)`` and ``(N, 2C, 2C)`` or its diagonal.
        """
        mu, log_variance = mean.chunk(2, dim=1)
        variance_mu, variance_log_variance = variance_of(covariance).chunk(2, dim=1)
        return Prediction(mu, variance_mu, torch.exp(log_variance + 0.5 * variance_log_variance))


_BY_NAME: dict[str, type[Likelihood]] = {
    c.__name__: c for c in (Categorical, Bernoulli, Gaussian, Euclidean, HeteroscedasticGaussian)
}
_SHORTHANDS: dict[str, Callable[[], Likelihood]] = {
    "classification": Categorical,
    "binary": Bernoulli,
    "regression": Gaussian,
    "euclidean": Euclidean,
    "heteroscedastic": HeteroscedasticGaussian,
}


def resolve_likelihood(likelihood: Likelihood | str) -> Likelihood:
    """Turn a shorthand into its likelihood; a likelihood passes through. Raises as `kronlaplace.options.resolve`."""
    return resolve(likelihood, Likelihood, _SHORTHANDS, "likelihood")  # type: ignore[type-abstract]


def _wide(x: Tensor) -> Tensor:
    """At least float32: half-precision probabilities and errors are too coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _index(targets: Tensor, n_classes: int) -> Tensor:
    """Class indices as int64, clamped so that a wrong label cannot abort a CUDA kernel; `check_targets` reports it."""
    return targets.long().clamp(0, n_classes - 1)


def _without(shape: torch.Size, axis: int) -> torch.Size:
    """``shape`` with one axis left out."""
    return shape[:axis] + shape[axis + 1 :]


def _positions(shape: torch.Size) -> Iterator[tuple[slice | int, ...]]:
    """Indices of the elements of one example, each of them taken in all examples; ``shape`` is ``(N, ...)``."""
    for index in itertools.product(*map(range, shape[1:])):
        yield (slice(None), *index)


def _columns(values: Tensor) -> Iterator[Tensor]:
    """Yield, for each output element of an example, a tensor that holds ``values`` there and zeros elsewhere."""
    for position in _positions(values.shape):
        column = torch.zeros_like(values)
        column[position] = values[position]
        yield column


def _standard_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _sum_and_count(values: Tensor) -> Tensor:
    """Shape ``(2,)``, float64; the count is filled in on the device, which a copy from the host would wait for."""
    total = values.double().sum()
    return torch.stack([total, torch.full_like(total, values.numel())])


def _finite(targets: Tensor) -> tuple[Tensor, str]:
    return torch.isfinite(targets).all(), "targets contain NaN or infinite values; drop or repair those rows."


def _check_same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape:
        raise ValueError(
            f"{name} targets must have the shape of the network's outputs, {tuple(outputs.shape)}; got "
            f"{tuple(targets.shape)}. Use targets.unsqueeze(1) or targets.reshape({tuple(outputs.shape)}): "
            "broadcasting would silently compare every output with every target."
            if targets.numel() == outputs.numel()
            else f"{name} targets must have the shape of the network's outputs, {tuple(outputs.shape)}; got "
            f"{tuple(targets.shape)}. Check the number of columns of the targets and of the last layer."
        )
