"""Quadratic penalties of a network's weights, such as a log-prior, whose curvature an optimizer can know.

An optimizer needs no number of examples for that: it sees in the backward pass with which weight the penalty is part of the
loss, ``1/N`` for a mean over ``N`` examples, and multiplies the curvature by the same weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks import Block
from kronlaplace.layers import find_layers
from kronlaplace.network.hooks import Hook
from kronlaplace.priors.prior import IsotropicPrior, LayerwisePrior, Prior

__all__ = ["LayerPrecision", "PriorPenalty", "QuadraticPenalty", "layer_precision"]


@dataclass(frozen=True, eq=False)
class LayerPrecision:
    """Curvature of a penalty in a layer, ``Σ_i Λ_i + δ I``.

    Attributes:
        blocks: Blocks ``Λ_i``, positive semidefinite, all of the layer's shape.
        identity: Number ``δ``, 0-dim, float64, not negative.
    """

    blocks: tuple[Block, ...]
    identity: Tensor

    def scaled(self, factor: Tensor | float) -> LayerPrecision:
        """Return the precision times a number, which is not read."""
        return LayerPrecision(tuple(block.scaled(factor) for block in self.blocks), self.identity * factor)

    def __add__(self, other: LayerPrecision) -> LayerPrecision:
        return LayerPrecision((*self.blocks, *other.blocks), self.identity + other.identity)

    def matmul(self, matrices: Tensor) -> Tensor:
        """Multiply it with ``vec(M)``, for ``M`` of shape ``(..., q, p)``; same shape."""
        total = matrices * self.identity.to(matrices)
        for block in self.blocks:
            total = total + block.matmul(matrices)
        return total


class QuadraticPenalty(ABC):
    """A penalty ``½ (θ − m)ᵀ Λ (θ − m)`` of a network's weights, independent between layers, in nats of all data together.

    The base class of `ContinualLaplace` and `PriorPenalty`, for optimizers that take it as ``prior=``.
    """

    model: nn.Module
    """The network."""

    _observers: tuple[Hook, ...] = ()

    @abstractmethod
    def penalty(self) -> Tensor:
        """Return the penalty at the weights now, 0-dim, differentiable; a subclass returns what `_shown` makes of it."""

    @abstractmethod
    def precision(self) -> Mapping[str, LayerPrecision]:
        """Return ``Λ``, the second derivatives of the penalty, by the names of the layers that are trainable now."""

    @property
    @abstractmethod
    def version(self) -> object:
        """What compares unequal after ``Λ`` has changed."""

    def observe(self, observer: Any, method: str) -> None:
        """Let an object see the gradient of every loss with respect to the penalty in it.

        Args:
            observer: The object, which is not kept alive.
            method: Name of its method, which takes the gradient, 0-dim.
        """
        self._observers = (*(hook for hook in self._observers if hook.alive), Hook(observer, method))

    def _shown(self, value: Tensor) -> Tensor:
        if value.requires_grad:
            for hook in self._observers:
                value.register_hook(hook)
        return value


class PriorPenalty(QuadraticPenalty):
    """A Gaussian prior as a penalty, ``½ (θ − m)ᵀ D (θ − m)``, such as for fine-tuning from a network's posterior.

        >>> penalty = kl.PriorPenalty(model, posterior.as_prior())                           # doctest: +SKIP
        >>> optimizer = kl.NaturalGradient(model, "classification", prior=penalty)           # doctest: +SKIP
        >>> loss = loss_function(outputs, y) + penalty.penalty() / n_examples                # doctest: +SKIP

    Args:
        model: The network, held by reference.
        prior: The prior over its trainable layers, or over some of them if it is tied to layers, as the result of
            `KronLaplace.as_prior` is; the others have no penalty.

    Raises:
        TypeError, ValueError: If it is no prior, or does not fit the layers.
    """

    def __init__(self, model: nn.Module, prior: Prior) -> None:
        if not isinstance(prior, Prior):
            raise TypeError(
                f"prior must be a prior such as kl.IsotropicPrior(1.0) or posterior.as_prior(), got "
                f"{type(prior).__name__}."
            )
        self.model = model
        found = find_layers(model)
        if isinstance(prior.mean, Mapping) and set(prior.mean) <= {layer.name for layer in found}:
            found = [layer for layer in found if layer.name in prior.mean]
        self._layers = found
        self._prior = prior.over(found)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._prior!r})"

    @property
    def version(self) -> object:
        return self._prior

    @in_full_precision
    def penalty(self) -> Tensor:
        """Return the penalty at the weights now, 0-dim, float64, differentiable, in nats of all data together."""
        weights = {layer.name: layer.matrix(detach=False) for layer in self._layers}
        return self._shown(0.5 * self._prior.penalty(weights))

    def precision(self) -> Mapping[str, LayerPrecision]:
        return {layer.name: layer_precision(self._prior, layer.name) for layer in self._layers}


@torch.no_grad()
def layer_precision(prior: Prior, name: str) -> LayerPrecision:
    """Return the precision of a layer."""
    if isinstance(prior, (IsotropicPrior, LayerwisePrior)):
        return LayerPrecision((), prior.least(name))
    block, identity = prior.block_and_identity(name)
    return LayerPrecision((block,), identity)
