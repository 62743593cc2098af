"""The training loss on part of the last observed batch: its exact quadratic model, and how it really changes with a step.

Neither needs the targets. Hooks on the outputs show the gradient ``r`` of the user's loss with respect to them, and for a
likelihood with canonical outputs the loss at other outputs ``f'`` is, up to a constant, ``r · (f' − f)`` plus the mean
divergence ``KL(p(y|f) ‖ p(y|f'))``; otherwise this is correct to second order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace._precision import in_full_precision, wide
from kronlaplace.likelihoods import Likelihood
from kronlaplace.likelihoods.loss_factor import loss_factor
from kronlaplace.optim.fisher_products import fisher_inner_products, jacobian_products, outputs_at, part_of_batch
from kronlaplace.optim.gradient_scale import GradientScale

__all__ = ["BatchModel"]

_LARGEST_FACTOR = 2.1
"""Loss over mean negative log-likelihood above which the loss cannot be a mean: a squared error without the half has 2."""

Direction = Mapping[str, Tensor]
"""A direction in the space of the parameters, by parameter name."""


class BatchModel:
    """The loss on the first examples of an observed batch, as a function of the parameters.

    Args:
        model: The network, still with the parameters of the pass.
        likelihood: The likelihood whose mean negative log-likelihood the loss is.
        arguments: Positional and keyword arguments of the pass.
        outputs: Outputs of the pass; the gradient of the loss with respect to them is taken when it is propagated back.
        fraction: Fraction of the examples that are used.
        scale: The gradient scaler's scale, which is taken out of the gradient.
        targets: The targets, if they are known; they only show by which factor the loss differs from the mean negative
            log-likelihood, as `loss_factor`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        outputs: Tensor,
        fraction: float,
        scale: GradientScale,
        *,
        targets: Tensor | None = None,
    ) -> None:
        self._targets = targets
        self._scale = scale
        self.n_examples = len(outputs)
        """The number ``N`` of examples in the whole batch."""
        self.outputs = outputs.detach()
        """The outputs of the pass, without their graph."""
        self.gradient: Tensor | None = None
        """The gradient of the loss with respect to the outputs, or None before it was propagated back."""
        self._model = model
        self._likelihood = likelihood
        self._arguments = part_of_batch(*arguments, fraction, self.n_examples)
        self._count = math.ceil(fraction * self.n_examples - 1e-9)
        self.factor = torch.ones((), device=outputs.device)
        """By which factor the loss is larger than the mean negative log-likelihood, as found by `products`, 0-dim."""
        self._base: Tensor | None = None
        self._residuals = self.outputs
        outputs.register_hook(self._take)

    def _take(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach() if self.gradient is None else self.gradient + gradient.detach()

    @in_full_precision
    def products(self, directions: Sequence[Direction], slopes: Tensor, passes: int) -> tuple[Tensor, Tensor]:
        """Compute the matrix of ``v_iᵀ F v_j`` with the exact Fisher of the part, and the ``k`` slopes of its loss.

        The slopes, and later `change`, are those of the mean negative log-likelihood: the `factor` is taken out.

        Args:
            directions: The directions ``v_i``.
            slopes: ``∇hᵀv_i`` with the gradient of the loss with respect to the parameters, ``(k,)``. With those of the part
                they tell a gradient scaler's scale approximately.
            passes: Number of passes that were propagated back for this step, each with its part of the loss.

        Returns:
            The matrix, ``(k, k)``, and the slopes ``r · J v_i``, ``(k,)``, float64.
        """
        self._base, images = jacobian_products(self._model, *self._arguments, directions)
        matrix = fisher_inner_products(self._likelihood, self._base, images)
        assert self.gradient is not None
        self._residuals = wide(self.gradient) * (self.n_examples * passes)
        raw = torch.stack([self._slope(image) for image in images])
        scaler = self._scale.power_of_two(raw[0] / slopes[0])
        self._residuals = self._residuals / scaler.to(self._residuals.dtype)
        self.factor = loss_factor(self._likelihood, self.outputs, self._residuals, self._targets)
        self._residuals = self._residuals / self.factor
        return matrix, raw / (scaler * self.factor)

    def curvature_along(self, gradient: Direction, passes: int) -> Tensor:
        """Compute ``gᵀFg / gᵀg`` along the gradient of the loss with the exact Fisher of the part, 0-dim, float64.

        Args:
            gradient: The gradient of the loss with respect to the parameters.
            passes: As for `products`.
        """
        size = torch.stack([v.square().sum(dtype=torch.float64) for v in gradient.values()]).sum()
        matrix, _ = self.products([gradient], size.unsqueeze(0), passes)
        return matrix[0, 0] / size

    def check(self) -> tuple[Tensor, str]:
        """Check that the loss can be the mean negative log-likelihood, except for a mean over positions; after `products`.

        Returns:
            As `Likelihood.check_gradient`.
        """
        assert self.gradient is not None
        residuals = self._residuals.to(self.gradient.dtype)  # which tells how closely it can be right
        right, message = self._likelihood.check_gradient(self.outputs, residuals, self._targets)
        return right & (self.factor < _LARGEST_FACTOR), message

    def largest_decrease(self) -> Tensor | None:
        """Return by how much the mean negative log-likelihood can decrease at most, 0-dim; after `products`.

        None as `Likelihood.largest_decrease`.
        """
        total = self._likelihood.largest_decrease(self.outputs, self._residuals)
        return None if total is None else total / self.n_examples

    def _slope(self, image: Tensor) -> Tensor:
        part = self._residuals[: self._count]
        return (part * wide(image)).sum(dtype=torch.float64) / self._count

    @in_full_precision
    def change(self, step: Direction) -> Tensor:
        """Compute by how much a step really changes the mean negative log-likelihood of the part, 0-dim, float64.

        Args:
            step: The step ``θ' − θ``; the model still has the parameters ``θ``. `products` must have been called before.
        """
        assert self._base is not None
        parameters = dict(self._model.named_parameters())
        moved = {name: parameters[name].detach() + v.to(parameters[name].dtype) for name, v in step.items()}
        return self._loss(outputs_at(self._model, *self._arguments, moved)) - self._loss(self._base)

    def _loss(self, outputs: Tensor) -> Tensor:
        """Return the mean loss of the part above that in the observed pass.

        With dropout, or with batch norm on part of a batch, the outputs differ from those of that pass, to which the
        observed gradient belongs, even where the parameters are the same.
        """
        observed, outputs = wide(self.outputs[: self._count]), wide(outputs)
        divergence = self._likelihood.divergence(observed, outputs).to(torch.float64) / self._count
        return self._slope(outputs - observed) + divergence
