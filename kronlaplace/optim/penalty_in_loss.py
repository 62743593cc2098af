"""The penalty in the loss of a step: its weight there, and its curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks import Block
from kronlaplace.blocks.least_trace import with_least_trace
from kronlaplace.layers import Layer
from kronlaplace.optim.gradient_scale import GradientScale
from kronlaplace.optim.penalized_blocks import penalized
from kronlaplace.optim.preconditioner import Amount
from kronlaplace.optim.vectors import Vector, assembled
from kronlaplace.priors.penalty import LayerPrecision, QuadraticPenalty

__all__ = ["PenaltyInLoss"]

_ROUNDING = 1e-2


class PenaltyInLoss:
    """A penalty that is part of the user's loss with some weight ``w``, such as ``1/N`` for ``penalty() / N``.

    The weight is the gradient of the loss with respect to the penalty, which a hook on the penalty sees. So the curvature
    ``w Λ`` is that of the loss, whatever the user has written.

    Args:
        penalty: The penalty.
        model: The network that is trained.
        layers: Layers that follow the natural gradient.

    Raises:
        TypeError: If it is not a penalty.
        ValueError: If it is one of another network.
    """

    def __init__(self, penalty: QuadraticPenalty, model: nn.Module, layers: Sequence[Layer]) -> None:
        if not isinstance(penalty, QuadraticPenalty):
            raise TypeError(
                "prior must be a penalty of the model's weights, a kl.ContinualLaplace or kl.PriorPenalty(model, prior); "
                f"got a {type(penalty).__name__}."
            )
        if penalty.model is not model:
            raise ValueError("prior is a penalty of another model's weights. Make it for the model that is trained.")
        self._penalty = penalty
        self._layers = {layer.name: layer for layer in layers}
        self._propagated: Tensor | None = None
        self._listens = True
        self._examples = 0
        self._version: object = None
        self.weight: Tensor | None = None
        """The weight ``w`` in the last step, 0-dim, float64; None before the first."""
        self.factor: Tensor | float = 1.0
        """By which factor the loss is larger than the mean negative log-likelihood; curvature and slopes are without it."""
        penalty.observe(self, "_note")

    def _note(self, gradient: Tensor) -> None:
        if self._listens:
            seen = gradient.detach().double()
            self._propagated = seen if self._propagated is None else self._propagated + seen

    def add_pass(self, n_examples: int) -> None:
        """Count the examples of a forward pass."""
        self._examples += n_examples

    def forget(self) -> None:
        """Begin a new step."""
        self._propagated, self._examples = None, 0

    def forget_gradient(self) -> None:
        """Forget the gradients so far, as when the parameters' gradients are cleared."""
        self._propagated = None

    @property
    def has_changed(self) -> bool:
        """Whether the penalty's second derivatives have changed since `added_to`."""
        return self._version != self._penalty.version

    def settle(self, scale: GradientScale) -> tuple[Tensor, str]:
        """Find the weight in this step.

        Args:
            scale: A gradient scaler's scale.

        Returns:
            Whether the weight is possible, boolean, 0-dim, and the message if it is not.

        Raises:
            RuntimeError: If the penalty is not part of the loss.
        """
        if self._propagated is None:
            raise RuntimeError(
                "the optimizer has a prior, and its penalty is not part of the loss. In every step, add "
                "prior.penalty() / n_examples to the mean loss, with the prior that the optimizer has and the number of "
                "examples in the whole task."
            )
        self.weight = self._propagated / scale.power_of_two(torch.ones_like(self._propagated))
        largest = (1 + _ROUNDING) / max(self._examples, 1)
        return (self.weight > 0) & (self.weight <= largest), (
            f"the penalty has a weight of {_shown(self.weight)} in the loss, and this step alone has {self._examples} "
            "examples. It belongs to the sum over all examples of the task: divide it by their number, "
            "prior.penalty() / n_examples, beside the mean loss. For a stronger penalty, change the penalty itself "
            "(memory.strength)."
        )

    def precision(self) -> dict[str, LayerPrecision]:
        """Return its curvature, ``w Λ``, by layer.

        Raises:
            ValueError: If a layer has another shape in the penalty than in the optimizer.
        """
        return {name: part.scaled(self._share.to(part.identity.device)) for name, part in self._parts().items()}

    def restore(self, factor: Tensor | float) -> None:
        """Restore the factor from a checkpoint, whose inverse has the penalty as it is now."""
        self.factor, self._version = factor, self._penalty.version

    def added_to(
        self, blocks: Mapping[str, Block], amounts: Mapping[str, Amount]
    ) -> tuple[dict[str, Block], dict[str, Amount]]:
        """Return Fisher blocks with the penalty's added, and its multiples of the identity added to other amounts.

        Args:
            blocks: Fisher blocks by layer.
            amounts: What is added to the damping of each layer anyway.

        Raises:
            NotImplementedError: As `penalized`.
        """
        self._version = self._penalty.version
        result, total = dict(blocks), dict(amounts)
        for name, part in self.precision().items():
            result[name] = penalized(blocks[name], part.blocks)
            identity = part.identity
            total[name] = amounts[name] + (float(identity) if identity.device.type == "cpu" else identity)
        return with_least_trace(result), total

    @property
    def _share(self) -> Tensor:
        assert self.weight is not None
        return self.weight / self.factor

    def _parts(self) -> Mapping[str, LayerPrecision]:
        parts = {name: part for name, part in self._penalty.precision().items() if name in self._layers}
        for name, part in parts.items():
            for block in part.blocks:
                if block.shape != self._layers[name].shape:
                    raise ValueError(
                        f"layer {name!r} is a matrix of shape {block.shape} in the prior and {self._layers[name].shape} in "
                        "the optimizer. Give both the same layers."
                    )
        return parts

    @in_full_precision
    def products(self, vectors: Sequence[Vector]) -> Tensor:
        """Return the matrix of ``v_iᵀ w Λ v_j``, shape ``(k, k)``, float64."""
        total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=self._share.device)
        for name, part in self._parts().items():
            layer = self._layers[name]
            if next(iter(layer.parameters.values())) not in vectors[0]:
                continue
            matrices = torch.stack([assembled(layer, vector) for vector in vectors])
            images = part.matmul(matrices)
            total += (matrices.flatten(1).double() @ images.flatten(1).double().T).to(total.device)
        return self._share * (total + total.T) / 2

    def slope(self, step: Vector) -> Tensor:
        """Return the derivative of ``w`` times the penalty along a step, 0-dim, float64."""
        parameters = list(step)
        self._listens = False
        try:
            with torch.enable_grad():
                value = self._penalty.penalty()
                grads = torch.autograd.grad(value, parameters, allow_unused=True)
        finally:
            self._listens = True
        parts = [
            (g * step[p]).sum(dtype=torch.float64) for p, g in zip(parameters, grads, strict=True) if g is not None
        ]
        return self._share * sum(parts, start=torch.zeros_like(self._share))


def _shown(weight: Tensor) -> str:
    return f"{float(weight):.3g}" if weight.device.type == "cpu" else "more than 1 / n_examples"
