"""Directions of an output metric that is averaged over a posterior's outputs, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from kronlaplace.data.deferred_checks import Batch
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.laplace.predictive import classes_last
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.likelihoods import Likelihood, Sampling
from kronlaplace.likelihoods.links import is_whole, symmetric_root
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.likelihoods.tensors import one_element_at_a_time, output_elements

__all__ = ["AveragedSampling", "OfOneBatch"]


@dataclass(frozen=True, eq=False)
class AveragedSampling(DirectionSampling):
    """Rule that takes the directions from the metric ``E[M(f)]`` over a posterior's outputs ``f ~ N(f(x), J S Jᵀ)``.

    ``"exact"`` yields the columns of a root of it, and ``"mc"`` its symmetric root times random signs, which have the same
    second moments. Covariances and metrics are made for one batch at a time.

    Args:
        predictor: Predicts with the posterior.
    """

    _: KW_ONLY
    predictor: Predictor
    log_likelihoods: dict[int, Tensor | None] = field(default_factory=dict)
    """By batch, the sum of ``E[log p(y | f)]`` over its targets, 0-dim, float64; None without targets."""

    def of_batch(self, batch: Batch) -> DirectionSampling:
        return OfOneBatch(self.kind, self.mc_samples, self.seed, metric=self.metric(batch))

    @torch.no_grad()
    def metric(self, batch: Batch) -> tuple[Tensor, bool]:
        """Average over the outputs of a batch; return the metric, and whether that is its diagonal only."""
        likelihood = self.predictor.likelihood
        wanted = OutputCovariance.BY_POSITION
        if likelihood.outputs_are_independent:
            wanted = OutputCovariance.VARIANCES
        outputs, covariance = self.predictor.outputs_and_covariance(batch.inputs.value, wanted)
        mean, covariance = classes_last(outputs, covariance, likelihood.class_axis_of(outputs))
        averages = likelihood.averages(mean, covariance, batch.targets, self.generator(batch.index, outputs.device))
        self.log_likelihoods[batch.index] = averages.log_likelihood
        return averages.metric, not is_whole(mean, averages.metric)


@dataclass(frozen=True, eq=False)
class OfOneBatch(DirectionSampling):
    """Rule that takes the directions of one batch from its averaged metric.

    Args:
        metric: The metric as `Averages` has it, and whether that is its diagonal only.
    """

    _: KW_ONLY
    metric: tuple[Tensor, bool]
    root: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        metric, diagonal = self.metric
        root = _few_columns(metric) if self.kind is Sampling.EXACT and not diagonal else _smooth_root(metric, diagonal)
        object.__setattr__(self, "root", root)

    def squares(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        return None  # the metric is not the likelihood's

    def count(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor | None) -> int:
        if self.kind is Sampling.MC:
            return self.mc_samples
        shape = self.root.shape
        return math.prod(shape[1:]) if self.metric[1] else math.prod(shape[1:-2]) * shape[-1]

    def directions(
        self, likelihood: Likelihood, outputs: Tensor, targets: Tensor | None, index: int
    ) -> Iterator[Tensor]:
        axis = likelihood.class_axis_of(outputs)
        root = self.root.to(outputs.dtype)
        if self.kind is Sampling.MC:
            generator = self.generator(index, root.device)
            yield from (_as_outputs(d, outputs, axis) for d in self._signed(root, generator))
        elif self.metric[1]:
            yield from one_element_at_a_time(_as_outputs(root, outputs, axis))
        else:
            for position in output_elements(root.shape[:-2]):
                for column in root[position].unbind(-1):
                    direction = torch.zeros(root.shape[:-1], dtype=root.dtype, device=root.device)
                    direction[position] = column
                    yield _as_outputs(direction, outputs, axis)

    def _signed(self, root: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the root times random signs, ``(N, ..., C)``."""
        shape = root.shape if self.metric[1] else root.shape[:-1]
        for _ in range(self.mc_samples):
            bits = torch.randint(2, shape, generator=generator, device=root.device)
            signs = (2 * bits - 1).to(root.dtype) / math.sqrt(self.mc_samples)
            yield root * signs if self.metric[1] else (root @ signs.unsqueeze(-1)).squeeze(-1)


def _smooth_root(metric: Tensor, diagonal: bool) -> Tensor:
    """Return the symmetric root, which depends smoothly on the metric."""
    return metric.sqrt() if diagonal else symmetric_root(metric)


def _few_columns(metric: Tensor) -> Tensor:
    """Return a root ``R``, ``R Rᵀ = M``, of matrices ``(..., C, C)``, without columns that are zero to rounding in all."""
    values, vectors = torch.linalg.eigh(metric)  # ascending
    rounding = metric.shape[-1] * torch.finfo(metric.dtype).eps * values[..., -1:]
    values = torch.where(values > rounding, values, 0)
    some = values.flatten(0, -2).amax(0) > 0
    first = int(some.to(torch.int8).argmax()) if some.any() else len(some) - 1
    return (vectors * values.sqrt().unsqueeze(-2))[..., first:]


def _as_outputs(values: Tensor, outputs: Tensor, axis: int | None) -> Tensor:
    """Return values with the classes on the last axis in the layout of the outputs."""
    return values.reshape(outputs.shape) if axis is None else values.movedim(-1, axis)
