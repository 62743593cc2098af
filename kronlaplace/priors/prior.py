"""The Gaussian prior over the weights, as an object: its precision and its mean.

A prior is given in the user's terms (a number, one value per layer, tensors by parameter name), and `Prior.over` ties it to
layers: values are checked, cut up by layer and moved to the layers' device. The result is a prior of the same class, keyed
by layer names, so that another `Prior.over` restricts it to fewer layers or follows them to another device or dtype.
Everything else needs a prior that is tied to its layers.

Tuning sees every prior as **multiples of a unit precision** ``B``: the precision is ``D = μ B`` with one ``μ`` for all
weights, one per layer, or one per weight. ``B`` is the identity, except for a `KroneckerPrior`, which is its own unit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronlaplace._arguments import Choice
from kronlaplace.blocks import Block, DiagonalBlock
from kronlaplace.damping import DampedInverse, Tikhonov
from kronlaplace.damping.plus_diagonal import LARGEST_DENSE, PlusDiagonal
from kronlaplace.layers import Layer
from kronlaplace.priors.mean import PriorMean, by_layer, joined, mean_by_layer
from kronlaplace.priors.precision import multiples_by_layer, precision_tensor

__all__ = [
    "DIAGONAL_KINDS",
    "DiagonalPrior",
    "IsotropicPrior",
    "LayerwisePrior",
    "Prior",
    "PriorStructure",
    "prior_from_multiples",
]


_CHUNK = 2**18
"""Numbers that are converted to float64 at a time."""


class PriorStructure(Choice):
    """How prior precisions are shared: ``SCALAR`` one for all weights, ``LAYERWISE`` one for each block,
    ``DIAGONAL`` one for each weight.
    """

    SCALAR = "scalar"
    LAYERWISE = "layerwise"
    DIAGONAL = "diagonal"


class Prior(ABC):
    """A Gaussian prior ``N(m, D⁻¹)`` over the weights, independent between layers.

    Attributes:
        mean: ``m``, as given; ``{layer: (q, p)}`` once the prior is tied to its layers.
    """

    kind: ClassVar[str]
    """Name in saved files."""

    inexactness: ClassVar[str] = (
        "precisions of single weights are added to the curvature of {layers} in its Kronecker eigenbasis, which is "
        "exact up to "
        f"{LARGEST_DENSE:,} weights only. Exact for all are one precision per layer, or the estimator kl.Diagonal()."
    )
    """Warning about `inexact` layers, ``{layers}``, with the ways out."""

    mean: PriorMean

    def __repr__(self) -> str:
        shown = (f"{f.name}={_shown(getattr(self, f.name))}" for f in fields(self) if f.repr)  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"

    @abstractmethod
    def over(self, layers: Sequence[Layer]) -> Prior:
        """Tie the prior to layers: check its values, cut them up by layer and move them to the layers' device.

        Args:
            layers: The layers; if the prior is tied to layers already, some of these.

        Raises:
            TypeError, ValueError: If its values do not fit the layers.
        """

    def with_mean(self, mean: PriorMean) -> Prior:
        """Return the prior with another mean."""
        return replace(self, mean=mean)  # type: ignore[type-var]  # every prior is a dataclass

    @property
    def means(self) -> Mapping[str, Tensor]:
        """Mean of every layer, ``{layer: (q, p)}``."""
        assert isinstance(self.mean, Mapping)
        return self.mean

    def deviation(self, name: str, weights: Tensor) -> Tensor:
        """``W̄ − m`` of a layer, ``(q, p)``, float64."""
        return weights.double() - self.means[name].double()

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor:
        """``(θ − m)ᵀ D (θ − m)``, 0-dim, float64, differentiable in the weights.

        Args:
            weights: Every layer's matrix ``W̄``, ``{layer: (q, p)}``.
        """
        return torch.stack([self.quadratic_form(name, self.deviation(name, w)) for name, w in weights.items()]).sum()

    @abstractmethod
    def quadratic_form(self, name: str, deviation: Tensor) -> Tensor:
        """``Δᵀ D Δ`` of a layer, for a deviation ``Δ`` of shape ``(q, p)`` from any center, 0-dim, differentiable."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """``log det D`` of all layers, 0-dim, float64."""

    @abstractmethod
    def damped(self, name: str, block: Block, scale: Tensor | float) -> DampedInverse:
        """Return the posterior covariance of a layer, ``(c F + D)⁻¹``.

        Args:
            name: The layer.
            block: ``F``.
            scale: ``c``, a number or 0-dim tensor.
        """

    def inexact(self, name: str, block: Block) -> bool:
        """Tell whether `damped` is an approximation because the layer is large."""
        return False

    @abstractmethod
    def block_and_identity(self, name: str) -> tuple[Block, Tensor]:
        """Return ``D`` of a layer as a block, and a multiple of the identity, 0-dim, float64."""

    @abstractmethod
    def least(self, name: str) -> Tensor:
        """Return the smallest precision in a layer, 0-dim, float64."""

    # -- as multiples of a unit --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def multiples(self) -> Tensor:
        """``μ``, float64: 0-dim, one per layer, ``(L,)``, or one per weight, ``(P,)``."""

    @abstractmethod
    def with_multiples(self, multiples: Tensor) -> Prior:
        """Return the prior with the precision ``μ B`` for the same unit ``B``, and the same mean."""

    def same_unit(self, other: Prior) -> bool:
        """Tell whether another prior has the same unit and mean, so that the two differ only in their multiples."""
        return self.kind in DIAGONAL_KINDS and other.kind in DIAGONAL_KINDS and self.mean is other.mean

    @property
    def precisions(self) -> Tensor:
        """Return the precisions of a diagonal prior, 0-dim, ``(L,)`` or ``(P,)``, float64.

        Raises:
            TypeError: If the precision is not diagonal.
        """
        return self.multiples

    def shown(self) -> str:
        """Describe the prior for the posterior's repr."""
        values = self.multiples
        if values.ndim == 0:
            return f"prior_precision={float(values):.4g}"
        if values.numel() > len(self.means):
            return f"prior_precision={len(values)} values"
        return "prior_precision=[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"

    @property
    def unit_is_identity(self) -> bool:
        """Whether ``B`` is the identity, so that multiples are precisions."""
        return True

    def unit_eigenvalues(self, name: str, block: Block) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues of ``B^{-1/2} F B^{-1/2}`` of a layer, and how often each counts, float64, or None for once."""
        return block.spectrum()

    def unit_penalty(self, weights: Tensor, name: str) -> Tensor:
        """``(θ − m)ᵀ B (θ − m)`` of a layer with the weights ``θ``, ``(q, p)``; 0-dim, float64."""
        rows = max(
            1, _CHUNK // max(weights.shape[1], 1)
        )  # in float64, a large layer takes more memory than the network
        total = torch.zeros((), dtype=torch.float64, device=weights.device)
        for part, mean in zip(weights.split(rows), self.means[name].split(rows), strict=True):
            total = total + (part.double() - mean).square().sum()
        return total

    # -- files -------------------------------------------------------------------------------------------------

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for saving."""
        return {"prior_precision": self.multiples, **{f"prior_mean/{name}": m for name, m in self.means.items()}}

    def to_json(self) -> dict[str, Any]:
        """Return everything that is not a tensor, as JSON-compatible values."""
        return {"kind": self.kind}


@dataclass(frozen=True, eq=False, repr=False)
class IsotropicPrior(Prior):
    """A prior with one precision for all weights, ``D = δ I``.

    Args:
        precision: ``δ``, positive: a number or a 0-dim tensor.
        mean: ``m``: one number, one per weight (a flat tensor), or tensors by parameter name (a state dict).
    """

    precision: float | Tensor = 1.0
    mean: PriorMean = 0.0
    kind: ClassVar[str] = "isotropic"

    def over(self, layers: Sequence[Layer]) -> IsotropicPrior:
        precision = precision_tensor(self.precision, layers)
        if precision.ndim:
            raise ValueError(
                f"IsotropicPrior has one precision for all weights; got {len(precision)}. Use LayerwisePrior or "
                "DiagonalPrior."
            )
        return IsotropicPrior(precision, mean_by_layer(self.mean, layers))

    def quadratic_form(self, name: str, deviation: Tensor) -> Tensor:
        return self.multiples.to(deviation.device) * deviation.square().sum()

    def logdet(self) -> Tensor:
        return self.multiples.log() * sum(mean.numel() for mean in self.means.values())

    def damped(self, name: str, block: Block, scale: Tensor | float) -> DampedInverse:
        return Tikhonov(self.multiples).invert_multiple(block, scale)

    def block_and_identity(self, name: str) -> tuple[Block, Tensor]:
        return DiagonalBlock(torch.zeros_like(self.means[name]), name), self.least(name)

    def least(self, name: str) -> Tensor:
        return self.multiples

    @property
    def multiples(self) -> Tensor:
        return torch.as_tensor(self.precision, dtype=torch.float64)

    def with_multiples(self, multiples: Tensor) -> Prior:
        return prior_from_multiples(multiples, self.means)


@dataclass(frozen=True, eq=False, repr=False)
class LayerwisePrior(Prior):
    """A prior with one precision for each layer, ``D = δ_l I``.

    Args:
        precision: ``δ_l``, positive: one for each layer, in their order, or ``{layer: number}``.
        mean: As in `IsotropicPrior`.
    """

    precision: Sequence[float] | Tensor | Mapping[str, Tensor | float]
    mean: PriorMean = 0.0
    kind: ClassVar[str] = "layerwise"

    def over(self, layers: Sequence[Layer]) -> LayerwisePrior:
        names = [layer.name for layer in layers]
        values = self.precision
        if isinstance(values, Mapping):
            if missing := [name for name in names if name not in values]:
                raise ValueError(f"LayerwisePrior has no precision for {missing}; there are {list(values)}.")
            values = torch.stack([torch.as_tensor(values[name], dtype=torch.float64) for name in names])
        precision = precision_tensor(values, layers)
        if precision.shape != (len(layers),):
            raise ValueError(
                f"LayerwisePrior needs {len(layers)} precisions, one for each of {names}; got shape "
                f"{tuple(precision.shape)}."
            )
        return LayerwisePrior(dict(zip(names, precision, strict=True)), mean_by_layer(self.mean, layers))

    @property
    def _by_name(self) -> Mapping[str, Tensor]:
        assert isinstance(self.precision, Mapping)
        return self.precision  # type: ignore[return-value]  # tensors once it is tied to layers

    def quadratic_form(self, name: str, deviation: Tensor) -> Tensor:
        return self._by_name[name] * deviation.square().sum()

    def logdet(self) -> Tensor:
        return torch.stack([p.log() * self.means[name].numel() for name, p in self._by_name.items()]).sum()

    def damped(self, name: str, block: Block, scale: Tensor | float) -> DampedInverse:
        return Tikhonov(self._by_name[name]).invert_multiple(block, scale)

    def block_and_identity(self, name: str) -> tuple[Block, Tensor]:
        return DiagonalBlock(torch.zeros_like(self.means[name]), name), self.least(name)

    def least(self, name: str) -> Tensor:
        return self._by_name[name]

    @property
    def multiples(self) -> Tensor:
        return torch.stack(list(self._by_name.values()))

    def with_multiples(self, multiples: Tensor) -> Prior:
        return prior_from_multiples(multiples, self.means)


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalPrior(Prior):
    """A prior with one precision for each weight.

    Args:
        precision: The precisions, positive: the row-major flattened matrices of all layers joined, shape ``(P,)``, or
            ``{parameter name: tensor of its shape}``. See `kronlaplace.damping.plus_diagonal.PlusDiagonal` for where that
            is exact.
        mean: As in `IsotropicPrior`.
    """

    precision: Tensor | Mapping[str, Tensor]
    mean: PriorMean = 0.0
    kind: ClassVar[str] = "diagonal"

    def over(self, layers: Sequence[Layer]) -> DiagonalPrior:
        precision = precision_tensor(self.precision, layers)
        shapes = [layer.shape for layer in layers]
        if precision.shape != (sum(map(math.prod, shapes)),):
            raise ValueError(
                f"DiagonalPrior needs {sum(map(math.prod, shapes))} precisions, one for each weight; got shape "
                f"{tuple(precision.shape)}."
            )
        parts = zip([layer.name for layer in layers], by_layer(precision, shapes), strict=True)
        return DiagonalPrior(dict(parts), mean_by_layer(self.mean, layers))

    @property
    def _by_name(self) -> Mapping[str, Tensor]:
        assert isinstance(self.precision, Mapping)
        return self.precision

    def quadratic_form(self, name: str, deviation: Tensor) -> Tensor:
        return (self._by_name[name] * deviation.square()).sum()

    def logdet(self) -> Tensor:
        return torch.stack([p.log().sum() for p in self._by_name.values()]).sum()

    def damped(self, name: str, block: Block, scale: Tensor | float) -> DampedInverse:
        return Tikhonov(self._by_name[name]).invert(block.scaled(scale))

    def inexact(self, name: str, block: Block) -> bool:
        return not PlusDiagonal(block).exact

    def block_and_identity(self, name: str) -> tuple[Block, Tensor]:
        precision = self._by_name[name]
        return DiagonalBlock(precision.to(self.means[name].dtype), name), precision.new_zeros(())

    def least(self, name: str) -> Tensor:
        return self._by_name[name].amin()

    @property
    def multiples(self) -> Tensor:
        return joined(list(self._by_name.values()))

    def with_multiples(self, multiples: Tensor) -> Prior:
        return prior_from_multiples(multiples, self.means)


DIAGONAL_KINDS = (IsotropicPrior.kind, LayerwisePrior.kind, DiagonalPrior.kind)


def prior_from_multiples(precision: Tensor, means: Mapping[str, Tensor]) -> Prior:
    """Return the prior with these precisions, 0-dim, ``(L,)`` or ``(P,)``, and means by layer."""
    if precision.ndim == 0:
        return IsotropicPrior(precision, means)
    parts = multiples_by_layer(precision, [(m.shape[0], m.shape[1]) for m in means.values()])
    by_name = dict(zip(means, parts, strict=True))
    return DiagonalPrior(by_name, means) if parts[0].ndim else LayerwisePrior(by_name, means)


def _shown(value: object) -> str:
    """Describe a precision or a mean in a repr: numbers as they are, tensors by their shape."""
    if isinstance(value, Mapping):
        return f"values for {list(value)}"
    if isinstance(value, Tensor) and value.ndim:
        return f"{'x'.join(map(str, value.shape))} values"
    return f"{float(value):.4g}" if isinstance(value, (Tensor, int, float)) else repr(value)
