"""K-FAC, KFC on convolutions, and SUA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.estimators.base import Estimator, State, kind_of
from kronlaplace.estimators.moments import factors_by_group, mean_factors, squeezed
from kronlaplace.layers import ConvolutionLayer, Layer, LayerBatch, LayerGradients
from kronlaplace.options import Choice, choice

__all__ = ["KFAC", "SUA", "WeightSharing"]


class WeightSharing(Choice):
    """How positions that share weights enter: each for itself (``EXPAND``), or averaged first (``REDUCE``)."""

    EXPAND = "expand"
    REDUCE = "reduce"


@dataclass(frozen=True)
class KFAC(Estimator):
    """Kronecker-factored approximate curvature (K-FAC Eq. 1), on shared weights by the rule of KFC (Eq. 30–32).

    ``A = E_n[Σ_t a_t a_tᵀ]`` and ``G = 1/T · E_n[Σ_v Σ_t g_t g_tᵀ]``, means over examples, ``scale = 1``. On a plain
    linear layer ``T = 1``. If ``T`` differs between batches, each batch is weighted with its own ``1/T``.

    Args:
        weight_sharing: What happens to the positions of shared weights outside convolutions (tokens, time steps):
            ``"expand"`` treats them like those of a convolution, ``"reduce"`` takes ``A = E[ā āᵀ]``,
            ``G = E[Σ_v g̅ g̅ᵀ]`` with ``ā`` the mean and ``g̅`` the sum over positions (Eschenhagen et al. 2023).
    """

    name: ClassVar[str] = "kfac"
    weight_sharing: WeightSharing | str = WeightSharing.EXPAND

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_sharing", choice(WeightSharing, self.weight_sharing, "weight_sharing"))

    def _reduces(self, layer: Layer) -> bool:
        return self.weight_sharing is WeightSharing.REDUCE and not layer.shares_weights_over_space

    def start(self, layer: Layer) -> State:
        return {}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        block = kind_of(block, KroneckerBlock, layer)
        gradient, activation, scale = (t.to(layer.device, layer.dtype) for t in factors_by_group(block))
        return {"gradient": weight * scale * gradient, "activation": weight * activation}

    def add_inputs(self, state: State, batch: LayerBatch) -> None:
        if not self._reduces(batch.layer):
            batch.add_activation_moment(state)

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        out = gradients.layer.sum_of(state, "gradient")
        if not self._reduces(gradients.layer):
            gradients.add_gradient_moment(out)
            return
        state.setdefault("positions", gradients.positions)
        g = gradients.gradients().sum(2)
        out.baddbmm_(g.mT, g)

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        positions = state.pop("positions", None)
        if positions is not None:
            a = batch.activations().sum(2) / positions
            batch.layer.sum_of(state, "activation").baddbmm_(a.mT, a)

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        # In place: the factors of a wide layer are larger than all else in a pass.
        activation = layer.activation_moment(state).div_(weight)
        return KroneckerBlock(squeezed(state["gradient"].div_(weight)), squeezed(activation), name=layer.name)

    def combine(self, first: Block, second: Block, weights: tuple[float, float]) -> Block:
        gradient, activation = mean_factors(first, second, weights, scaled_activation=False)
        return KroneckerBlock(squeezed(gradient), squeezed(activation), name=first.name)


@dataclass(frozen=True)
class SUA(Estimator):
    """Spatially uncorrelated activations and white derivatives, the limit of PRONG (KFC §4.2 and Theorem 4).

    Activations are correlated within a pixel only, with the same moments everywhere:
    ``A[(j,δ), (j',δ')] = β(δ,δ') · (Σ(j,j') 1[δ=δ'] + M(j) M(j'))`` with the channels' covariance ``Σ`` and mean ``M`` and
    the number ``β`` of output positions at which both taps of the kernel are on the image. Derivatives are white:
    ``G = I``, and ``scale`` is their mean square. On layers that are no convolutions ``A`` is K-FAC's.
    """

    name: ClassVar[str] = "sua"
    constants: ClassVar[frozenset[str]] = frozenset({"uses"})
    not_combinable: ClassVar[str] = (
        "on a convolution the activation factor holds products of the channels' means, which do not tell the means (not "
        "even their signs), and the products of the means of all data are needed"
    )

    def start(self, layer: Layer) -> State:
        return {}

    def add_inputs(self, state: State, batch: LayerBatch) -> None:
        layer = batch.layer
        if not isinstance(layer, ConvolutionLayer):
            batch.add_activation_moment(state)
            return
        for call in batch.calls:
            layer.add_pixel_moments(call.x, state, 1 / (call.fold * len(batch.calls)))

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        layer = gradients.layer
        groups, positions = layer.groups, gradients.positions
        square = torch.zeros(groups, 1, 1, dtype=layer.dtype, device=layer.device)
        for grad in gradients.tensors:
            square += layer.gradients(grad).square().sum((1, 2, 3)).view(groups, 1, 1)
        square /= positions
        state["square"] = square if "square" not in state else state["square"] + square
        if isinstance(layer, ConvolutionLayer) and "uses" not in state:
            state["uses"] = square.new_tensor(float(sum(call.fold for call in gradients.batch.calls)))

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        rows = layer.shape[0] // layer.groups
        uses = state.pop("uses", None)
        if isinstance(layer, ConvolutionLayer):
            activation = layer.uncorrelated_moment(state, weight) * uses
        else:
            activation = layer.activation_moment(state).div_(weight)
        scale = squeezed(state["square"][:, 0, 0] / (rows * weight))
        identity = torch.eye(rows, dtype=layer.dtype, device=layer.device).expand(layer.groups, rows, rows)
        return KroneckerBlock(squeezed(identity), squeezed(activation), scale, layer.name)
