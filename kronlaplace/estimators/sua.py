"""SUA: spatially uncorrelated activations on convolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.estimators.base import Estimator, State
from kronlaplace.estimators.second_moments import squeezed
from kronlaplace.layers import ConvolutionLayer, Layer, LayerBatch, LayerGradients, Sums

__all__ = ["SUA"]


@dataclass(frozen=True)
class SUA(Estimator):
    """Spatially uncorrelated activations and white derivatives, the limit of PRONG (KFC §4.2 and Theorem 4).

    Activations are only correlated within a pixel, with the same moments everywhere:
    ``A[(j,δ), (j',δ')] = β(δ,δ') · (Σ(j,j') 1[δ=δ'] + M(j) M(j'))``, where ``Σ`` and ``M`` are the covariance and mean of
    the channels and ``β`` is the number of output positions at which both taps of the kernel lie inside the image.
    Derivatives are white: ``G = I``, and ``scale`` is their mean square. On other layers ``A`` is the same as for K-FAC.
    """

    name: ClassVar[str] = "sua"
    constants: ClassVar[frozenset[str]] = frozenset({"uses"})
    not_combinable: ClassVar[str] = (
        "on a convolution the activation factor holds products of the channels' means, which do not determine the means "
        "(not even their signs), and the products of the means of all data are needed"
    )

    def start(self, layer: Layer) -> State:
        return {}

    def add_inputs(self, state: State, batch: LayerBatch) -> None:
        layer = batch.layer
        if not isinstance(layer, ConvolutionLayer):
            batch.add_activation_moment(state)
            return
        for call in batch.calls:
            _add_pixel_moments(layer, call.x, state, 1 / (call.fold * len(batch.calls)))

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
            activation = _uncorrelated_moment(layer, state, weight) * uses
        else:
            activation = layer.activation_moment(state).div_(weight)
        scale = squeezed(state["square"][:, 0, 0] / (rows * weight))
        identity = torch.eye(rows, dtype=layer.dtype, device=layer.device).expand(layer.groups, rows, rows)
        return KroneckerBlock(squeezed(identity), squeezed(activation), scale, layer.name)


def _add_pixel_moments(layer: ConvolutionLayer, x: Tensor, sums: Sums, weight: float) -> None:
    """Add ``weight`` times the sums over examples that `_uncorrelated_moment` needs: moments of a pixel's channels.

    Args:
        layer: The layer.
        x: Input of a call. If padding repeats pixels, the padded image counts as the image.
        sums: The sums, which are modified in place.
        weight: One over the number of calls.
    """
    n = len(x)
    image = x if layer.module.padding_mode == "zeros" else layer.padded(x)
    pixels = image.flatten(2).to(layer.dtype)
    count = pixels.shape[2]
    grouped = pixels.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)  # (K, C/K, n·pixels)
    inside = torch.ones(1, 1, *x.shape[2:], dtype=layer.dtype, device=x.device)
    taps = layer.windows(layer.padded(inside)).reshape(math.prod(layer.module.kernel_size), -1)
    parts = {
        "pixel": grouped @ grouped.mT * (weight / count),
        "mean": grouped.sum(2) * (weight / count),
        "overlap": taps @ taps.T * (n * weight),
        "inside": taps.sum(1) * (n * weight),
        "positions": taps.new_full((), float(n * weight * taps.shape[1])),
    }
    for key, value in parts.items():
        sums[key] = sums[key].add_(value) if key in sums else value


def _uncorrelated_moment(layer: ConvolutionLayer, sums: Sums, weight: float) -> Tensor:
    """Return ``E[Σ_t a aᵀ]`` as if pixels were uncorrelated (KFC Theorem 4), shape ``(K, p, p)``.

    Args:
        layer: The layer.
        sums: Sums from `_add_pixel_moments`, which are removed from the dict.
        weight: Number of examples.
    """
    pixel, mean, overlap, inside, positions = (
        sums.pop(key) / weight for key in ("pixel", "mean", "overlap", "inside", "positions")
    )
    taps = len(overlap)
    means = torch.einsum("kc,kd->kcd", mean, mean)
    same = torch.eye(taps, dtype=pixel.dtype, device=pixel.device)
    moment = torch.einsum("st,kcd->kcsdt", overlap * (1 - same), means)
    moment += torch.einsum("st,kcd->kcsdt", overlap * same, pixel)
    flat = moment.flatten(3).flatten(1, 2)
    if not layer.bias:
        return flat
    total = flat.new_empty(layer.groups, layer.shape[1], layer.shape[1])
    total[:, :-1, :-1] = flat
    total[:, :-1, -1] = total[:, -1, :-1] = torch.einsum("kc,s->kcs", mean, inside).flatten(1)
    total[:, -1, -1] = positions
    return total
