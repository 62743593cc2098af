"""`Categorical`: one class out of ``C`` for each example, or at each of its positions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kronlaplace._precision import wide
from kronlaplace.likelihoods.averages import Averages, average_softmax
from kronlaplace.likelihoods.base import Likelihood
from kronlaplace.likelihoods.class_indices import advice, index
from kronlaplace.likelihoods.divergence import explained_by_softmax, softmax_divergence
from kronlaplace.likelihoods.gradient_check import distance_to_simplex
from kronlaplace.likelihoods.links import (
    Link,
    centered_probit_scaled,
    laplace_bridge,
    margin_scaled,
    mean_over_samples,
    probit_scaled,
)
from kronlaplace.likelihoods.prediction import Prediction, require_probabilities
from kronlaplace.likelihoods.tensors import drop_axis, log_at_least_tiny, output_elements, positive_numbers

__all__ = ["Categorical"]


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One class out of ``C`` for each example, or at each of its positions (pixels, tokens), which are independent.

    The outputs are logits: ``(N, C)``; segmentation ``(N, C, d1, d2, ...)``, the convention of torch's
    ``cross_entropy``; tokens ``(N, T, C)``. The targets are class indices of the same shape without the class axis.

    Args:
        ignore_index: Value of targets that contribute nothing: the direction is zero at their position with every
            sampling, and they count neither in the log-likelihood nor in the number of targets.
        class_axis: Axis of the classes if the outputs have more than two axes: 1, or the last one, as -1 or by its number.
            None infers it from the shape of the targets; without targets, it is ambiguous for three axes, and 1 for four
            or more.
        class_weights: Weights ``w`` of the classes, positive numbers, as a sequence or tensor of length ``C``: the negative
            log-likelihood of an example and its Fisher are multiplied by the weight of its target, which every batch must
            therefore have. Means over targets divide by the sum of these factors.
        label_smoothing: ``ε``, at least 0 and less than 1: the target of an example is ``q = (1 − ε) e_y + ε/C`` instead of
            the one-hot ``e_y``, and its negative log-likelihood ``−Σ_c w_c q_c log π_c``. Its Hessian is the Fisher of the
            unsmoothed one, times ``Σ_c w_c q_c``.

    Weighted or smoothed, the likelihood is not that of a normalized distribution of the targets: evidences can be compared
    between posteriors with the same weights and the same smoothing only.

    Raises:
        ValueError: For any other axis, weights that are not positive, or another ``label_smoothing``.
        TypeError: For an ``ignore_index`` that is not an integer.
    """

    accepts_logits: ClassVar[bool] = True
    accepts_log_softmax: ClassVar[bool] = True
    ignore_index: int = -100
    class_axis: int | None = None
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if type(self.ignore_index) is not int:
            raise TypeError(f"ignore_index must be an integer, such as -100, got {self.ignore_index!r}.")
        axis = self.class_axis
        if axis is not None and (type(axis) is not int or axis == 0 or axis < -1):
            raise ValueError(
                "class_axis must be 1 for outputs (N, C, ...), -1 for outputs (N, ..., C) or the number of their last axis, "
                f"such as 2 for (N, T, C), or None to infer it from the targets; got {axis!r}."
            )
        if self.class_weights is not None:
            weights = positive_numbers(self.class_weights)
            if weights is None or len(weights) < 2:
                raise ValueError(
                    f"class_weights must be one positive number per class; got {self.class_weights!r}. To leave a class "
                    "out, mark its targets with ignore_index."
                )
            object.__setattr__(self, "class_weights", weights)
        if not (isinstance(self.label_smoothing, (int, float)) and 0 <= self.label_smoothing < 1):
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {self.label_smoothing!r}.")

    def __repr__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Categorical({', '.join(given)})"

    @property
    def ignored_target(self) -> int:
        return self.ignore_index

    def check_outputs(self, outputs: Tensor) -> None:
        if outputs.ndim < 2:
            raise self._too_few_classes(outputs)
        axes = (1, -1) if self.class_axis is None else (self._axis(outputs),)
        if max(outputs.shape[axis] for axis in axes) < 2:
            raise self._too_few_classes(outputs)
        if self.class_weights is not None and all(outputs.shape[axis] != len(self.class_weights) for axis in axes):
            shape = tuple(outputs.shape)
            raise ValueError(f"there are {len(self.class_weights)} class_weights, for outputs of shape {shape}.")

    def check_targets(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        axis = self._axis(outputs, targets)
        c = outputs.shape[axis]
        if c < 2:
            raise self._too_few_classes(outputs)
        if self.class_weights is not None and c != len(self.class_weights):
            raise ValueError(f"there are {len(self.class_weights)} class_weights, for {c} classes; pass one per class.")
        integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
        if targets.shape != drop_axis(outputs.shape, axis) or not integer:
            raise self._bad_targets(outputs, targets, [axis])
        message = (
            f"class labels must lie in 0 … {c - 1} for a network with {c} outputs; some do not. "
            "Relabel them, or give the network as many outputs as there are classes; targets of value "
            f"{self.ignore_index} are ignored (Categorical(ignore_index=...) sets another)."
        )
        labels = targets.long()
        return ((labels >= 0) & (labels < c) | (labels == self.ignore_index)).all(), message

    def statistics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the summed negative log-likelihood and the number (weighted: the weights) of targets not ignored."""
        axis = self._axis(outputs, targets)
        return self._nll(F.log_softmax(wide(outputs), dim=axis), targets, axis)

    def _nll(self, log_pi: Tensor, targets: Tensor, axis: int) -> Tensor:
        """Compute minus the sum of the targets' log-probabilities and the number of targets, without the ignored ones."""
        if self.class_weights is not None or self.label_smoothing:
            labels = self.weighted_labels(targets, log_pi.shape[axis]).movedim(-1, axis)
            terms = (labels * log_pi.double()).masked_fill(labels == 0, 0)
            return torch.stack([-terms.sum(), labels.sum()])
        nll = -log_pi.gather(axis, index(targets, log_pi.shape[axis]).unsqueeze(axis)).squeeze(axis)
        ignored = self._ignored(targets)
        return torch.stack([nll.masked_fill(ignored, 0).double().sum(), (~ignored).double().sum()])

    def weighted_labels(self, targets: Tensor, n_classes: int) -> Tensor:
        """Compute ``w ∘ q``, the weights times the smoothed one-hot targets.

        Args:
            targets: Class indices of any shape.
            n_classes: ``C``.

        Returns:
            A tensor of the targets' shape with a last axis for the classes, float64, zero where targets are ignored. Its sum
            over the classes is the factor of the example's Fisher.
        """
        labels = F.one_hot(index(targets, n_classes), n_classes).double()
        labels = (1 - self.label_smoothing) * labels + self.label_smoothing / n_classes
        if self.class_weights is not None:
            labels = labels * labels.new_tensor(self.class_weights)
        return labels.masked_fill(self._ignored(targets).unsqueeze(-1), 0)

    def _factors(self, outputs: Tensor, targets: Tensor | None, axis: int) -> Tensor | None:
        """Return the factor of the Fisher at every position, of the targets' shape, or None if all are 1.

        Raises:
            ValueError: If there are class weights but no targets.
        """
        if self.class_weights is None:
            return None
        if targets is None:
            raise ValueError(
                "class_weights need the targets of every batch, which say what weight an example has: pass batches of "
                "(inputs, targets). The optimizers, which do without targets, take a Categorical without class_weights."
            )
        return self.weighted_labels(targets, outputs.shape[axis]).sum(-1).to(wide(outputs).dtype)

    def log_likelihood(self, statistics: Tensor) -> Tensor:
        return -statistics[0]

    def _n_exact_directions(self, outputs: Tensor, targets: Tensor | None) -> int:
        axis = self._axis(outputs, targets)
        return math.prod(drop_axis(outputs.shape, axis)[1:]) * (outputs.shape[axis] - 1)

    def _exact_directions(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        """Yield the ``C − 1`` nonzero columns of the Cholesky factor of ``diag(π) − ππᵀ``, position by position.

        With tail sums ``r_j = Σ_{k≥j} π_k``, ``L_jj = √(π_j r_{j+1} / r_j)`` and
        ``L_ij = −π_i √(π_j / (r_j r_{j+1}))`` below it (Tanabe and Sagae 1992). Working in log space keeps tiny
        probabilities exact. The symmetric root would need one more backward pass.
        """
        axis = self._axis(outputs, targets)
        log_pi_everywhere = F.log_softmax(wide(outputs), dim=axis).clamp_min(-1e30).movedim(axis, -1)
        log_tail_everywhere = log_pi_everywhere.flip(-1).logcumsumexp(-1).flip(-1)
        ignored = None if targets is None else self._ignored(targets)
        factors = self._factors(outputs, targets, axis)
        for position in output_elements(log_pi_everywhere.shape[:-1]):
            log_pi, log_tail = log_pi_everywhere[position], log_tail_everywhere[position]  # (N, C)
            for j in range(log_pi.shape[1] - 1):
                column = torch.zeros_like(log_pi)
                half = 0.5 * (log_pi[:, j] - log_tail[:, j])
                column[:, j] = torch.exp(half + 0.5 * log_tail[:, j + 1])
                column[:, j + 1 :] = -torch.exp(log_pi[:, j + 1 :] + (half - 0.5 * log_tail[:, j + 1]).unsqueeze(1))
                if factors is not None:
                    column = column * factors[position].sqrt().unsqueeze(1)
                if ignored is not None:
                    column = column.masked_fill(ignored[position].unsqueeze(1), 0)
                direction = torch.zeros_like(outputs)
                direction.movedim(axis, -1)[position] = column.to(outputs.dtype)
                yield direction

    def _metric_diagonal(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        axis = self._axis(outputs, targets)
        pi = F.softmax(outputs, dim=axis)
        return self._counted(pi * (1 - pi), outputs, targets, axis)

    def _metric_product(self, outputs: Tensor, vectors: Tensor, targets: Tensor | None) -> Tensor:
        axis = self._axis(outputs, targets)
        pi = F.softmax(wide(outputs), dim=axis)
        mean = (pi * vectors).sum(axis - outputs.ndim, keepdim=True)
        return self._counted(pi * (vectors - mean), outputs, targets, axis).to(vectors.dtype)

    def _counted(self, values: Tensor, outputs: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        """Multiply values at every position by its factor, and set them to zero where the target is ignored."""
        factors = self._factors(outputs, targets, axis)
        values = values if factors is None else values * factors.unsqueeze(axis)
        return values if targets is None else values.masked_fill(self._ignored(targets).unsqueeze(axis), 0)

    def _divergence(self, outputs: Tensor, new_outputs: Tensor, targets: Tensor | None) -> Tensor:
        axis = self._axis(outputs, targets)
        divergence = softmax_divergence(outputs, new_outputs, axis)
        factors = self._factors(outputs, targets, axis)
        if factors is not None:
            divergence = divergence * factors
        return (divergence if targets is None else divergence.masked_fill(self._ignored(targets), 0)).sum()

    def largest_decrease(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        """Compute ``Σ KL(t ‖ π)``, see `Likelihood.largest_decrease`; with class weights, only approximately."""
        return explained_by_softmax(outputs, gradient, self.class_axis_of(outputs))

    def likely_targets(self, outputs: Tensor, gradient: Tensor) -> Tensor | None:
        return None if self.class_weights is not None else gradient.argmin(self.class_axis_of(outputs))

    def _gradient_error(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        if self.class_weights is not None:  # the weights of unknown targets explain any
            return super()._gradient_error(outputs, gradient)
        axis = self._axis(outputs)
        return distance_to_simplex(F.softmax(outputs, dim=axis), gradient, axis)

    def _sampled_direction(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        axis = self._axis(outputs, targets)
        logits = wide(outputs)
        # Gumbel-max: exact draws from the softmax that never wait for the device.
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
        gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(uniform.dtype).tiny)))
        drawn = (logits + gumbel).argmax(axis)
        direction = self._gradient_at(outputs, drawn, None if targets is None else self._ignored(targets), axis)
        factors = self._factors(outputs, targets, axis)
        return direction if factors is None else (direction * factors.sqrt().unsqueeze(axis)).to(outputs.dtype)

    def _gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        axis = self._axis(outputs, targets)
        if self.class_weights is not None or self.label_smoothing:
            labels = self.weighted_labels(targets, outputs.shape[axis]).movedim(-1, axis)
            pi = F.softmax(wide(outputs), dim=axis)
            return (labels.sum(axis, keepdim=True) * pi - labels).to(outputs.dtype)
        return self._gradient_at(outputs, index(targets, outputs.shape[axis]), self._ignored(targets), axis)

    @staticmethod
    def _gradient_at(outputs: Tensor, labels: Tensor, ignored: Tensor | None, axis: int) -> Tensor:
        """Compute ``π − e_label`` at every position, and zero at ignored ones; ``labels`` are int64 class indices."""
        gradient = F.softmax(wide(outputs), dim=axis)
        index = labels.unsqueeze(axis)
        gradient = gradient.scatter(axis, index, gradient.gather(axis, index) - 1)
        if ignored is not None:
            gradient = gradient.masked_fill(ignored.unsqueeze(axis), 0)
        return gradient.to(outputs.dtype)

    def _ignored(self, targets: Tensor) -> Tensor:
        return targets.long() == self.ignore_index  # as int64: in uint8, -100 would become 156

    def _axis(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """Return the axis that holds the classes, not negative.

        Raises:
            ValueError: If it is neither given nor determined by the shapes, or given as the number of an axis that is not
                the last.
        """
        last = outputs.ndim - 1
        if self.class_axis is not None and self.class_axis > 1 and self.class_axis != last:
            raise ValueError(
                f"class_axis={self.class_axis} is not the last axis of outputs of shape {tuple(outputs.shape)}; classes are "
                "on axis 1 or on the last. Pass kl.Categorical(class_axis=1) for outputs (N, C, ...) or "
                "kl.Categorical(class_axis=-1) for outputs (N, ..., C)."
            )
        if last <= 1:
            return 1
        if self.class_axis is not None:
            return 1 if self.class_axis == 1 else last
        if targets is None:
            if last > 2:
                return 1
            reason = "there are no targets to infer it from"
        else:
            fitting = [axis for axis in (1, last) if targets.shape == drop_axis(outputs.shape, axis)]
            if len(fitting) == 1:
                return fitting[0]
            if not fitting:
                raise self._bad_targets(outputs, targets, [1, last])
            reason = f"targets of shape {tuple(targets.shape)} fit both"
        raise ValueError(
            f"Categorical cannot determine whether the classes of outputs of shape {tuple(outputs.shape)} are on axis 1 or "
            f"on the last: {reason}. Pass kl.Categorical(class_axis=1) for outputs (N, C, ...) or "
            "kl.Categorical(class_axis=-1) for outputs (N, ..., C)."
        )

    def class_axis_of(self, outputs: Tensor) -> int:
        self.check_outputs(outputs)
        return self._axis(outputs)

    def informed_by(self, outputs: Tensor, targets: Tensor | None) -> Categorical:
        """Return a copy with ``class_axis`` inferred from the shapes, 1 or -1.

        The likelihood itself is returned if the axis is already set or cannot be inferred without targets.
        """
        if self.class_axis is not None or outputs.ndim <= 2 or (targets is None and outputs.ndim == 3):
            return self
        return replace(self, class_axis=1 if self._axis(outputs, targets) == 1 else -1)

    def _too_few_classes(self, outputs: Tensor) -> ValueError:
        given = "" if self.class_axis is None else f" with class_axis={self.class_axis}"
        return ValueError(
            f"Categorical{given} needs one logit per class: outputs of shape (N, C), (N, C, ...) or (N, ..., C) with C at "
            f"least 2; the network returned {tuple(outputs.shape)}. For one logit and labels 0 and 1 use Bernoulli."
        )

    def _bad_targets(self, outputs: Tensor, targets: Tensor, axes: list[int]) -> ValueError:
        shapes = " or ".join(f"{tuple(drop_axis(outputs.shape, axis))} (classes on axis {axis})" for axis in axes)
        given = "" if self.class_axis is None else f" and class_axis={self.class_axis}"
        return ValueError(
            f"Categorical targets must be integer class indices of shape {shapes} for outputs of shape "
            f"{tuple(outputs.shape)}{given}; got shape {tuple(targets.shape)}, dtype {targets.dtype}. "
            f"{advice(outputs, targets, axes)}"
        )

    def completed_by(self, other: Likelihood) -> Likelihood:
        if self.class_axis is not None or not isinstance(other, Categorical):
            return self
        return replace(self, class_axis=other.class_axis)

    @property
    def links(self) -> tuple[Link, ...]:
        return (Link.MARGIN, Link.PROBIT, Link.CENTERED_PROBIT, Link.MC, Link.BRIDGE)

    def averages(
        self, mean: Tensor, covariance: Tensor, targets: Tensor | None, generator: torch.Generator
    ) -> Averages:
        """Compute both averages over 64 mirrored draws, see `Likelihood.averages`; ignored positions have no metric."""
        metric, normalizer = average_softmax(mean, covariance, generator)
        if targets is None:
            self._factors(mean, None, -1)
            return Averages(metric, None)
        ignored = self._ignored(targets)
        labels = self.weighted_labels(targets, mean.shape[-1])
        factors = labels.sum(-1)
        log_likelihood = ((labels * mean.double()).sum(-1) - factors * normalizer).masked_fill(ignored, 0).sum()
        metric = metric * factors[..., None, None].to(metric.dtype)
        return Averages(metric.masked_fill(ignored[..., None, None], 0), log_likelihood)

    def sample_mean(self, outputs: Tensor) -> Tensor:
        return F.softmax(wide(outputs), dim=self._axis(outputs))

    def predictive(
        self, mean: Tensor, covariance: Tensor, link: Link, n_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Compute class probabilities by ``link``, of the shape of ``mean``, in at least float32."""
        mean, covariance = wide(mean), wide(covariance)
        scaled = {Link.MARGIN: margin_scaled, Link.PROBIT: probit_scaled, Link.CENTERED_PROBIT: centered_probit_scaled}
        if link in scaled:
            return F.softmax(scaled[link](mean, covariance), dim=-1)
        if link is Link.MC:
            return mean_over_samples(F.softmax, mean, covariance, n_samples, generator)
        return laplace_bridge(mean, covariance)

    def predictive_nll(self, prediction: Tensor | Prediction, targets: Tensor) -> Tensor:
        """Compute the sum and the count (weighted: the weights) over the targets that are not ignored."""
        pi = require_probabilities(self, prediction)
        self.check_targets(pi, targets)  # for the shapes
        return self._nll(log_at_least_tiny(pi, pi.dtype), targets, self._axis(pi, targets))
