"""Likelihoods: what the network's output means, and the metric on it that the Fisher pulls back.

A likelihood is a small frozen object. It answers four questions, each about a batch of network outputs
``f`` of shape ``(N, C)``:

* do the targets fit the outputs (`check_targets`);
* how well do the outputs explain them (`statistics`, additive over batches, and `log_likelihood`);
* which gradients are propagated back (`directions`): vectors ``d_v`` of shape ``(N, C)`` with
  ``Σ_v d_v d_vᵀ = M(f)``, the Fisher information of one example's output;
* what is predicted when the outputs themselves are Gaussian (`predictive`).

Directions are always of **one example's** negative log-likelihood, never of a reduced batch loss, so no
``reduction=`` in the user's own loss can change a Fisher.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kronlaplace.links import Link, laplace_bridge, mean_over_samples, probit_scaled, variance_of
from kronlaplace.options import resolve

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
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
        noise_variance: Variance of the observation noise ``σ²``, a 0-dim tensor.
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
        """Check the shape of the network's outputs, ``(N, C)`` or ``(N,)``.

        Raises:
            ValueError: If this likelihood needs another.
        """
        return

    @abstractmethod
    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        """Check the targets of one batch against the outputs.

        Shapes and dtypes are checked at once. Values are not looked at on the host.

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

    def n_directions(self, n_outputs: int, sampling: Sampling, mc_samples: int) -> int:
        """Number ``V`` of directions that `directions` yields."""
        if sampling is Sampling.EXACT:
            return self._n_exact_directions(n_outputs)
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
        """Yield the ``V`` vectors ``d_v`` that are propagated back, each of shape ``(N, C)``.

        One at a time: all of them together would be ``C²N`` numbers in exact sampling.

        Args:
            outputs: Network outputs ``f``, shape ``(N, C)``, without graph.
            sampling: The rule that picks the directions.
            mc_samples: Number of label draws (``MC`` only); each direction is divided by its square root.
            targets: The data's labels (``EMPIRICAL`` only).
            generator: Source of the draws (``MC`` only).
        """
        if sampling is Sampling.EXACT:
            yield from self._exact_directions(outputs)
        elif sampling is Sampling.MC:
            for _ in range(mc_samples):
                yield self._sampled_direction(outputs, generator) / math.sqrt(mc_samples)
        else:
            assert targets is not None
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
        """Mean of the targets given outputs: probabilities in classification, the outputs in regression."""

    @property
    def links(self) -> tuple[Link, ...]:
        """The links that `predictive` offers; none if the predictive needs no link."""
        return (Link.PROBIT, Link.MC)

    @abstractmethod
    def _n_exact_directions(self, n_outputs: int) -> int: ...

    @abstractmethod
    def _exact_directions(self, outputs: Tensor) -> Iterator[Tensor]: ...

    @abstractmethod
    def _sampled_direction(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor: ...

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
    """One class out of ``C``; the outputs are logits of shape ``(N, C)``, the targets class indices ``(N,)``."""

    def check_outputs(self, outputs: Tensor) -> None:
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"Categorical needs one logit per class, outputs of shape (N, C) with C of at least 2; the network "
                f"returned {tuple(outputs.shape)}. For one logit and labels 0 and 1 use Bernoulli."
            )

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        n, c = outputs.shape
        if targets.shape != (n,) or targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(
                f"Categorical targets must be integer class indices of shape ({n},) for outputs of shape "
                f"({n}, {c}); got shape {tuple(targets.shape)}, dtype {targets.dtype}. "
                "Use targets.argmax(1) if yours are one-hot, targets.squeeze(1).long() if they have one column."
            )
        message = (
            f"class labels must lie in 0 … {c - 1} for a network with {c} outputs; some do not. "
            "Relabel them, or give the network as many outputs as there are classes."
        )
        return ((targets >= 0) & (targets < c)).all(), message

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood and the number of examples."""
        c = outputs.shape[1]
        # Clamped so that a wrong label cannot abort a CUDA kernel; `check_targets` reports it.
        nll = F.cross_entropy(_wide(outputs), targets.long().clamp(0, c - 1), reduction="none")
        return torch.stack([nll.double().sum(), nll.new_tensor(len(targets), dtype=torch.float64)])

    def log_likelihood(self, statistics: Tensor) -> Tensor:
        return -statistics[0]

    def _n_exact_directions(self, n_outputs: int) -> int:
        return n_outputs - 1

    def _exact_directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """The ``C − 1`` non-zero columns of the Cholesky factor of ``diag(π) − ππᵀ`` (Tanabe and Sagae 1992).

        With tail sums ``r_j = Σ_{k≥j} π_k``, ``L_jj = √(π_j r_{j+1} / r_j)`` and
        ``L_ij = −π_i √(π_j / (r_j r_{j+1}))`` below it. In log space, so that tiny probabilities stay exact;
        one backward pass fewer than the symmetric root.
        """
        log_pi = F.log_softmax(_wide(outputs), dim=1).clamp_min(-1e30)
        log_tail = log_pi.flip(1).logcumsumexp(1).flip(1)
        for j in range(self._n_exact_directions(outputs.shape[1])):
            column = torch.zeros_like(log_pi)
            half = 0.5 * (log_pi[:, j] - log_tail[:, j])
            column[:, j] = torch.exp(half + 0.5 * log_tail[:, j + 1])
            column[:, j + 1 :] = -torch.exp(log_pi[:, j + 1 :] + (half - 0.5 * log_tail[:, j + 1]).unsqueeze(1))
            yield column.to(outputs.dtype)

    def _sampled_direction(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        logits = _wide(outputs)
        # Gumbel-max: exact draws from the softmax that never wait for the device.
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
        gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(uniform.dtype).tiny)))
        return self._gradient(outputs, (logits + gumbel).argmax(1))

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        c = outputs.shape[1]
        one_hot = F.one_hot(targets.long().clamp(0, c - 1), c)
        return (F.softmax(_wide(outputs), dim=1) - one_hot).to(outputs.dtype)

    @property
    def links(self) -> tuple[Link, ...]:
        return (Link.PROBIT, Link.MC, Link.BRIDGE)

    def sample_mean(self, outputs: Tensor) -> Tensor:
        return F.softmax(outputs, dim=-1)

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
    """Independent yes/no outputs: logits of shape ``(N, C)`` or ``(N,)``, targets in ``[0, 1]`` of that shape."""

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        _check_same_shape("Bernoulli", outputs, targets)
        message = "Bernoulli targets must lie between 0 and 1; some do not. Map your two labels to 0 and 1."
        return ((targets >= 0) & (targets <= 1)).all(), message

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood and the number of targets."""
        logits = _wide(outputs)
        nll = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        return torch.stack([nll.double().sum(), nll.new_tensor(nll.numel(), dtype=torch.float64)])

    def log_likelihood(self, statistics: Tensor) -> Tensor:
        return -statistics[0]

    def _n_exact_directions(self, n_outputs: int) -> int:
        return n_outputs

    def _exact_directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """``√(π_c (1 − π_c))`` in output ``c``, nothing elsewhere; in log space, so exact in the tails."""
        logits = _wide(outputs)
        root = torch.exp(0.5 * (F.logsigmoid(logits) + F.logsigmoid(-logits))).to(outputs.dtype)
        yield from _columns(root)

    def _sampled_direction(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
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
    """Regression with independent Gaussian noise; outputs ``(N, C)`` or ``(N,)``, targets of the same shape.

    Args:
        noise_std: Standard deviation ``σ`` of the noise, in the targets' unit.
    """

    noise_std: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.noise_std, (int, float)) and 0 < self.noise_std < math.inf):
            raise ValueError(f"noise_std must be a positive finite number, got {self.noise_std!r}.")

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        _check_same_shape("Gaussian", outputs, targets)
        return torch.isfinite(targets).all(), "targets contain NaN or infinite values; drop or repair those rows."

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of squared errors and the number of targets (so that ``σ`` can still change)."""
        error = _wide(targets) - _wide(outputs)
        return torch.stack([error.double().square().sum(), error.new_tensor(error.numel(), dtype=torch.float64)])

    def log_likelihood(self, statistics: Tensor, noise_std: Tensor | float | None = None) -> Tensor:
        """``−SSE / (2σ²) − n log(σ √(2π))``; ``noise_std`` overrides the object's own and may carry a gradient."""
        sigma = torch.as_tensor(
            self.noise_std if noise_std is None else noise_std, dtype=torch.float64, device=statistics.device
        )
        squared_error, count = statistics
        return -squared_error / (2 * sigma**2) - count * (torch.log(sigma) + 0.5 * math.log(2 * math.pi))

    def _n_exact_directions(self, n_outputs: int) -> int:
        return n_outputs

    def _exact_directions(self, outputs: Tensor) -> Iterator[Tensor]:
        yield from _columns(torch.full_like(outputs, 1 / self.noise_std))

    def _sampled_direction(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        wide = _wide(outputs)
        noise = torch.randn(wide.shape, generator=generator, device=wide.device, dtype=wide.dtype)
        return (noise / self.noise_std).to(outputs.dtype)

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets.to(outputs.dtype)) / self.noise_std**2

    @property
    def links(self) -> tuple[Link, ...]:
        return ()

    def sample_mean(self, outputs: Tensor) -> Tensor:
        return outputs

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Prediction:
        """Mean, function variance and noise; closed form."""
        return Prediction(mean, variance_of(covariance), mean.new_tensor(self.noise_std**2))


_BY_NAME: dict[str, type[Likelihood]] = {c.__name__: c for c in (Categorical, Bernoulli, Gaussian)}
_SHORTHANDS: dict[str, Callable[[], Likelihood]] = {
    "classification": Categorical,
    "binary": Bernoulli,
    "regression": Gaussian,
}


def resolve_likelihood(likelihood: Likelihood | str) -> Likelihood:
    """Turn a shorthand into its likelihood; a likelihood passes through. Raises as `kronlaplace.options.resolve`."""
    return resolve(likelihood, Likelihood, _SHORTHANDS, "likelihood")  # type: ignore[type-abstract]


def _wide(x: Tensor) -> Tensor:
    """At least float32: half-precision probabilities and errors are too coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _columns(values: Tensor) -> Iterator[Tensor]:
    """Yield, for each output ``c``, a tensor that holds ``values[:, c]`` there and zeros elsewhere."""
    for c in range(values.shape[1]):
        column = torch.zeros_like(values)
        column[:, c] = values[:, c]
        yield column


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
