"""A Fisher as the prior: what makes the posterior of one task the prior of the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronlaplace.blocks import Block, DiagonalBlock, KroneckerBlock
from kronlaplace.damping import DampedInverse
from kronlaplace.damping.kronecker_sum import JointBasis, joint_basis
from kronlaplace.damping.plus_diagonal import LARGEST_DENSE
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.layers import Layer
from kronlaplace.priors.mean import PriorMean, mean_by_layer
from kronlaplace.priors.prior import Prior

__all__ = ["KroneckerPrior"]


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerPrior(Prior):
    """A prior whose precision is a multiple of a Fisher plus a multiple of the identity, ``D = μ (s F₁ + δ I)``.

    If ``s`` is the number of examples, the prior is the Laplace posterior given the data of that Fisher; build it with
    `KronLaplace.as_prior`. The posterior precision of a layer, ``c F + μ (s F₁ + δ I)``, is exact for diagonal blocks, for
    Kronecker products with ``δ = 0``, and for every layer of up to 2,048 weights. For larger Kronecker products with
    ``δ > 0``, whose sum has three terms, it is approximated, with a warning (see `kronlaplace.damping.kronecker_sum`).

    Tuning finds ``μ``, one for all layers or one for each.

    Args:
        fisher: ``F₁``; it may have blocks for more layers than the posterior has.
        mean: The prior mean, usually the weights that the Fisher was estimated at (a state dict of them).
        scale: ``s``, positive: one number or ``{layer: number}``; None is ``fisher.n_examples``.
        plus: ``δ``, not negative: one number or ``{layer: number}``. Zero needs positive definite blocks.
        factor: ``μ``, positive: one number, one for each layer, or ``{layer: number}``.

    Raises:
        TypeError: If ``fisher`` is not a `KroneckerFisher`.
        ValueError: When it meets its layers: for missing blocks, other shapes, numbers out of range, or singular blocks.
    """

    fisher: KroneckerFisher
    _: KW_ONLY
    mean: PriorMean
    scale: float | Tensor | Mapping[str, float | Tensor] | None = None
    plus: float | Tensor | Mapping[str, float | Tensor] = 0.0
    factor: float | Tensor | Sequence[float] | Mapping[str, float | Tensor] = 1.0
    _joint: dict[str, tuple[Block, JointBasis]] = field(default_factory=dict, repr=False)
    kind: ClassVar[str] = "kronecker"

    def __post_init__(self) -> None:
        if not isinstance(self.fisher, KroneckerFisher):
            raise TypeError(
                f"KroneckerPrior takes a Fisher, as estimate_fisher returns it; got {type(self.fisher).__name__}. For "
                "numbers "
                "use IsotropicPrior, LayerwisePrior or DiagonalPrior."
            )

    def over(self, layers: Sequence[Layer]) -> KroneckerPrior:
        names = [layer.name for layer in layers]
        if missing := [name for name in names if name not in self.fisher]:
            raise ValueError(
                f"the prior's Fisher has no blocks for the layers {missing}, only for {list(self.fisher)}. Estimate it "
                "for all "
                "layers of the posterior, or give the posterior the same layers=."
            )
        fisher = self.fisher
        if list(fisher) != names:
            fisher = fisher.restricted_to(names)
        for layer in layers:
            if fisher[layer.name].shape != layer.shape:
                raise ValueError(
                    f"the prior's block of layer {layer.name!r} is for a weight of shape {fisher[layer.name].shape}, "
                    "and the "
                    f"layer's is {layer.shape}: the Fisher is of another network."
                )
        if any(
            fisher[layer.name].dtype != layer.dtype or fisher[layer.name].device != layer.device for layer in layers
        ):
            fisher = fisher.to(layers[0].device, {layer.name: layer.dtype for layer in layers})
        scale = self.fisher.n_examples if self.scale is None else self.scale
        with torch.inference_mode(False), torch.no_grad():
            fisher.decompose()
            prior = replace(
                self,
                fisher=fisher,
                mean=mean_by_layer(self.mean, layers),
                scale=_by_layer(scale, layers, "scale", 0.0),
                plus=_by_layer(self.plus, layers, "plus", None),
                factor=_factors(self.factor, layers),
                _joint={},
            )
            prior._check_regular()
        return prior

    def _check_regular(self) -> None:
        for name, block in self.fisher.items():
            values = block.eigenvalues()
            rounding = 0.0 if isinstance(block, (KroneckerBlock, DiagonalBlock)) else values.numel() * _eps(block)
            if not float(self._part("plus", name)) and not float(values.min()) > rounding * float(values.max()):
                raise ValueError(
                    f"the prior of layer {name!r} is improper: its Fisher block is singular and plus is 0. Give plus=, "
                    "such as "
                    "the prior precision that the earlier posterior had."
                )

    def _part(self, what: str, name: str) -> Tensor:
        parts = getattr(self, what)  # by layer, once it is tied to layers
        return parts[name]

    def _factor(self, name: str) -> Tensor:
        return self._part("factor", name) if isinstance(self.factor, Mapping) else self.multiples

    def _eigenvalues(self, name: str) -> Tensor:
        """Return the eigenvalues of the unit ``s F₁ + δ I``, in the block's own eigenbasis and the shape of its own."""
        return self._part("scale", name) * self.fisher[name].eigenvalues() + self._part("plus", name)

    def quadratic_form(self, name: str, deviation: Tensor) -> Tensor:
        return self._factor(name) * self._unit_form(deviation, name)

    def unit_penalty(self, weights: Tensor, name: str) -> Tensor:
        return self._unit_form(self.deviation(name, weights), name)

    def _unit_form(self, deviation: Tensor, name: str) -> Tensor:
        block = self.fisher[name]
        coordinates = block.to_eigenbasis(deviation.to(block.dtype)).double()
        return (block.expand(self._eigenvalues(name)) * coordinates.square()).sum()

    def logdet(self) -> Tensor:
        return torch.stack(
            [block.total((self._factor(name) * self._eigenvalues(name)).log()) for name, block in self.fisher.items()]
        ).sum()

    def damped(self, name: str, block: Block, scale: Tensor | float) -> DampedInverse:
        return self._joint_with(name, block).inverse(block.scaled(scale), scale, self._factor(name))

    def inexact(self, name: str, block: Block) -> bool:
        return not self._joint_with(name, block).exact

    inexactness: ClassVar[str] = (
        "the prior's multiple of the identity is added to the two Kronecker products of {layers} in a basis that is "
        "diagonal for "
        f"two of the three terms only, which is exact up to {LARGEST_DENSE:,} weights. Exact for all are plus=0, if the "
        "prior's "
        "Fisher is positive definite, and the estimator kl.Diagonal() for both."
    )

    def block_and_identity(self, name: str) -> tuple[Block, Tensor]:
        factor = self._factor(name)
        return self.fisher[name].scaled(factor * self._part("scale", name)), factor * self._part("plus", name)

    def least(self, name: str) -> Tensor:
        return self._factor(name) * self._eigenvalues(name).min()

    @property
    def precisions(self) -> Tensor:
        raise TypeError(
            "a KroneckerPrior has no precisions of its weights one by one; look at posterior.prior instead."
        )

    def shown(self) -> str:
        factors = ", ".join(f"{value:.4g}" for value in self.multiples.reshape(-1).tolist())
        return f"prior={factors if self.multiples.ndim == 0 else f'[{factors}]'} x KroneckerPrior"

    @property
    def multiples(self) -> Tensor:
        if isinstance(self.factor, Mapping):
            return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in self.factor.values()])
        return torch.as_tensor(self.factor, dtype=torch.float64)

    def with_multiples(self, multiples: Tensor) -> Prior:
        names = list(self.fisher)
        return replace(self, factor=dict(zip(names, multiples, strict=True)) if multiples.ndim else multiples)

    def same_unit(self, other: Prior) -> bool:
        return isinstance(other, KroneckerPrior) and self._joint is other._joint and self.mean is other.mean

    @property
    def unit_is_identity(self) -> bool:
        return False

    def unit_eigenvalues(self, name: str, block: Block) -> tuple[Tensor, Tensor | None]:
        joint = self._joint_with(name, block)
        return joint.curvature / joint.prior, None

    def _joint_with(self, name: str, block: Block) -> JointBasis:
        """Return the basis that a Fisher block shares with the prior; the last one is kept for all multiples."""
        kept = self._joint.get(name)
        if kept is not None and kept[0] is block:
            return kept[1]
        with torch.inference_mode(False):
            joint = joint_basis(block, self.fisher[name], self._part("scale", name), self._part("plus", name))
        self._joint[name] = block, joint
        return joint

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {f"prior/fisher/{name}": tensor for name, tensor in self.fisher.to_tensors().items()}
        tensors |= {f"prior_mean/{name}": mean for name, mean in self.means.items()}
        for what in ("scale", "plus"):
            tensors[f"prior/{what}"] = torch.stack([self._part(what, name) for name in self.fisher])
        return {**tensors, "prior/factor": self.multiples}

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "fisher": self.fisher.to_json()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], values: dict[str, Any], mean: PriorMean) -> KroneckerPrior:
        """Inverse of `to_tensors` (without the prefix ``prior/``) and `to_json`.

        Args:
            tensors: The tensors.
            values: Everything else.
            mean: The prior mean.
        """
        prefix = "fisher/"
        blocks = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        fisher = KroneckerFisher.from_tensors(blocks, values["fisher"])
        scale, plus = (dict(zip(fisher, tensors[what], strict=True)) for what in ("scale", "plus"))
        return cls(fisher, mean=mean, scale=scale, plus=plus, factor=tensors["factor"])


def _eps(block: Block) -> float:
    return torch.finfo(block.dtype).eps


def _by_layer(value: object, layers: Sequence[Layer], what: str, above: float | None) -> dict[str, Tensor]:
    """Return one number for each layer, float64, checked to be above a bound or, without a bound, not negative."""
    result = {}
    for layer in layers:
        given = value
        if isinstance(value, Mapping):
            if layer.name not in value:
                raise ValueError(
                    f"{what} of the prior has no entry for the layer {layer.name!r}; there are {list(value)}."
                )
            given = value[layer.name]
        try:
            number = torch.as_tensor(given, dtype=torch.float64).detach()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{what} of the prior must be a number or {{layer: number}}; got {value!r}.") from None
        good = number.ndim == 0 and math.isfinite(number) and (number >= 0 if above is None else number > above)
        if not good:
            raise ValueError(
                f"{what} of the prior must be "
                f"{'a finite number, not negative' if above is None else 'positive and finite'}; got "
                f"{given!r}."
            )
        result[layer.name] = number.to(layer.device)
    return result


def _factors(value: object, layers: Sequence[Layer]) -> Tensor | dict[str, Tensor]:
    if isinstance(value, (Sequence, Tensor)) and not isinstance(value, str):
        numbers = torch.as_tensor(value, dtype=torch.float64)
        if numbers.ndim == 1:
            if len(numbers) != len(layers):
                raise ValueError(
                    f"factor of the prior must be one number or {len(layers)}, one per layer; got {len(numbers)}."
                )
            value = {layer.name: number for layer, number in zip(layers, numbers, strict=True)}
    parts = _by_layer(value, layers, "factor", 0.0)
    return parts if isinstance(value, Mapping) else parts[layers[0].name]
