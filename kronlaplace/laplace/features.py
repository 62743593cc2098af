"""The covariance of many outputs through the few features that a last linear layer takes.

If the outputs are ``f = W h + b``, all other layers act through the features ``h``, and their part of the covariance of the
outputs is ``W Σ Wᵀ`` with their covariance ``Σ`` of the features. So there is one backward pass for each feature instead of
one for each output, and variances cost ``C d²`` for ``C`` outputs and ``d`` features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks.basis import Basis, CoordinateBasis
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.laplace.tied import TiedProducts

__all__ = ["FactoredCovariance", "of_outputs"]

_CHUNK = 2**20
"""Numbers that products with some of the rows of ``W`` may have."""


@dataclass(frozen=True, eq=False)
class FactoredCovariance:
    """Covariances ``W Σ Wᵀ + Q diag(s) Qᵀ`` of the outputs at some positions, which are never formed.

    Attributes:
        weight: ``W``, shape ``(C, d)``.
        features: ``Σ``, shape ``(n, d, d)``; None if there is no other layer.
        basis: ``Q``.
        spread: ``s``, compact, shape ``(n, k')``.
        diagonal: The variances, shape ``(n, C)``.
        tied: What is added where ``W`` also has other uses; None where it has none.
    """

    weight: Tensor
    features: Tensor | None
    basis: Basis
    spread: Tensor
    diagonal: Tensor
    tied: TiedProducts | None = None

    @classmethod
    def joined(cls, parts: Sequence[FactoredCovariance]) -> FactoredCovariance:
        """Join the covariances of several batches."""
        first = parts[0]
        features = [part.features for part in parts if part.features is not None]
        return cls(
            first.weight,
            torch.cat(features) if features else None,
            first.basis,
            torch.cat([part.spread for part in parts]),
            torch.cat([part.diagonal for part in parts]),
            TiedProducts.joined([part.tied for part in parts if part.tied is not None]),
        )

    @in_full_precision
    def of_kind(self, outputs: Tensor, wanted: OutputCovariance) -> Tensor:
        """Return the wanted covariances of the outputs, ``(N, ..., C)``, formed, where ``Q`` is the identity."""
        assert isinstance(self.basis, CoordinateBasis) and self.features is not None
        shape = outputs.shape
        features = self.features.view(*shape[:-1], *self.features.shape[1:])
        through = of_outputs(self.weight, features, outputs, wanted, self.tied)
        if not wanted.variances:
            return through + self.basis.covariances(self.spread).view_as(through)
        own = self.spread
        if wanted is OutputCovariance.CENTERED_VARIANCES:
            own = self.basis.centered_variances(own)
        elif wanted is OutputCovariance.MARGIN_VARIANCES:
            own = self.basis.margin_variances(own, own, outputs.argmax(-1).flatten())
        return (through + own.view(shape)).clamp_min(0)

    @in_full_precision
    def times(self, vectors: Tensor) -> Tensor:
        """Multiply each covariance with a vector, ``(n, C)``, in the same shape and dtype."""
        v = vectors.to(self.spread.dtype)
        coordinates = self.basis.coordinates(v.view(1, *v.shape))[0] * self.basis.expand(self.spread)
        result = self.basis.combined(coordinates.unsqueeze(0))[0]
        if self.features is not None:
            wide = self.weight.to(self.features.dtype)
            through = torch.einsum("nde,ne->nd", self.features, v.to(wide) @ wide)
            result = result + (through @ wide.T).to(result)
            if self.tied is not None:
                result = result + self.tied.times(v.to(wide), wide).to(result)
        return result.to(vectors.dtype)

    def rows(self, chosen: Tensor) -> FactoredCovariance:
        """Return those of some of the positions, ``(n,)`` booleans."""
        features = None if self.features is None else self.features[chosen]
        tied = None if self.tied is None else self.tied.rows(chosen)
        return FactoredCovariance(self.weight, features, self.basis, self.spread[chosen], self.diagonal[chosen], tied)


@in_full_precision
def of_outputs(
    weight: Tensor, features: Tensor, outputs: Tensor, wanted: OutputCovariance, tied: TiedProducts | None = None
) -> Tensor:
    """Return the part of the covariance of the outputs that comes through the features.

    Args:
        weight: ``W``, shape ``(C, d)``.
        features: ``Σ``, shape ``(N, ..., d, d)``.
        outputs: The outputs, ``(N, ..., C)``.
        wanted: Which covariances are wanted: variances, or those between the last axis.
        tied: What is added where ``W`` also has other uses.

    Returns:
        Variances of the shape of the outputs, or covariances ``(N, ..., C, C)``.
    """
    if not wanted.variances:
        wide = weight.to(features.dtype)
        covariances = wide @ features @ wide.T
        return covariances if tied is None else covariances + tied.covariances(wide).view_as(covariances)
    top = outputs.argmax(-1).flatten() if wanted is OutputCovariance.MARGIN_VARIANCES else None
    mean = weight.mean(0).to(features.dtype) if wanted is OutputCovariance.CENTERED_VARIANCES else None
    variances = features.new_empty(outputs[..., 0].numel(), len(weight))
    for i, covariance in enumerate(features.flatten(0, -3)):
        subtracted = mean if top is None else weight[top[i]].to(features.dtype)
        for rows, part in _rows(weight, features.dtype):
            part = part if subtracted is None else part - subtracted
            variances[i, rows] = torch.einsum("cd,cd->c", part @ covariance, part)
        if tied is not None:
            variances[i] += tied.variances(i, weight, subtracted, None if top is None else top[i])
    return (variances.clamp_min_(0) if tied is None else variances).view(outputs.shape)


def _rows(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows of a matrix at a time, and which."""
    count = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        yield rows, weight[rows].to(dtype)
