"""The exact Gauss-Newton matrix of a small regression table, in the space of its outputs.

With the Jacobian ``J`` of all training outputs, ``(n, P)``, the Gauss-Newton matrix of all layers together is ``JᵀJ / σ²``,
and ``J Jᵀ`` has the same eigenvalues other than zero, in a matrix that is small if the table is (Khan et al. 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.loader import Rewind, iterate
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.laplace.layer_covariance import BUDGET
from kronlaplace.layers import Layer, LayerGradients, LinearLayer
from kronlaplace.likelihoods import Gaussian, Sampling
from kronlaplace.network.forward import NetworkForward

__all__ = ["LARGEST", "OutputKernel", "output_kernel"]

LARGEST = 1024
"""Number of training targets up to which there is a kernel."""

_COLUMNS = 2**12
"""Number of weights whose gradients are in float64 at a time."""


@dataclass(frozen=True, eq=False)
class OutputKernel:
    """``J Jᵀ`` of all training outputs and all weights of the posterior's layers.

    Attributes:
        matrix: ``(n, n)``, float64, on the CPU.
    """

    matrix: Tensor

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.matrix)
        return values.clamp(min=0), vectors.square()

    @property
    def eigenvalues(self) -> Tensor:
        """``κ``, shape ``(n,)``, ascending."""
        return self._eigen[0]

    def leverages(self, ridge: float) -> Tensor:
        """Return the diagonal of ``J Jᵀ (J Jᵀ + ρ)⁻¹``, between 0 and 1: how far each target moves its own prediction.

        Args:
            ridge: ``ρ > 0``, prior precision times noise variance.

        Returns:
            Shape ``(n,)``, float64.
        """
        values, squares = self._eigen
        return squares @ (values / (values + ridge))


def output_kernel(
    model: nn.Module, layers: Sequence[Layer], data: Iterable[Any], fisher: KroneckerFisher
) -> OutputKernel | None:
    """Return the kernel of the data of a fit, in one more pass; None where there is none.

    There is one for a `Gaussian` likelihood and up to `LARGEST` targets, unless the Fisher is the empirical one, the data
    can be read only once, or the gradients do not fit into the memory that a chunk of predictions may take.

    Args:
        model: The network, at the weights of the fit.
        layers: The posterior's layers.
        data: The batches that the Fisher was estimated from.
        fisher: The Fisher.
    """
    metadata, statistics = fisher.metadata, fisher.statistics
    if not isinstance(metadata.likelihood, Gaussian) or metadata.sampling is Sampling.EMPIRICAL or statistics is None:
        return None
    n = int(statistics[1])
    if n > LARGEST or isinstance(data, Iterator):
        return None
    device = device_of(model)
    parts = {layer.name: _LayerPart(layer, n) for layer in layers}
    seen = 0
    with (
        preserved_random_state(device),
        Rewind(data),
        NetworkForward(model, layers, layout=metadata.layout) as forward,
    ):
        try:
            batches = list(iterate(data, device, alignment=None, progress=False, description=""))
        except ValueError:  # nothing is left of a stream that the Fisher was estimated from
            return None
        for batch in batches:
            outputs = forward(batch.inputs)
            count, width = len(outputs), outputs[0].numel()
            observer = forward.observer
            observer.layer_batches(count)

            def receive(gradients: LayerGradients) -> None:
                parts[gradients.layer.name].add(gradients)

            whitening = (torch.ones_like(outputs[0]) / metadata.likelihood.relative_to(outputs)).flatten()
            for element in range(width):
                direction = outputs.new_zeros(count, width)
                direction[:, element] = whitening[element]
                observer.backward(outputs, direction, receive, retain_graph=element < width - 1)
            seen += outputs.numel()
            if not all(part.end_of_batch() for part in parts.values()):
                return None
    return OutputKernel(sum(part.kernel() for part in parts.values())) if seen == n else None  # type: ignore[arg-type]


class _LayerPart:
    """The gradients of a layer's weights, or, where each example uses them once, the two factors of which they are made."""

    def __init__(self, layer: Layer, n: int) -> None:
        self._factored = type(layer) is LinearLayer and layer.groups == 1
        self._size = n * layer.shape[0] * layer.shape[1]
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._of_batch: list[tuple[Tensor, Tensor]] = []

    def add(self, gradients: LayerGradients) -> None:
        self._factored = self._factored and gradients.once_per_example
        if self._factored:
            self._of_batch.append((gradients.gradients()[0].squeeze(1), gradients.activations()[0].squeeze(1)))
        elif self._size <= BUDGET:
            rows = gradients.vectors()
            self._of_batch.append((rows, rows.new_ones(len(rows), 1)))

    def end_of_batch(self) -> bool:
        """Join the rows of the batch, outputs of an example side by side; return whether all were kept."""
        complete = bool(self._of_batch)
        if complete:
            left, right = zip(*self._of_batch, strict=True)
            self._left.append(torch.stack(left, dim=1).flatten(0, 1).cpu())
            self._right.append(torch.stack(right, dim=1).flatten(0, 1).cpu())
        self._of_batch.clear()
        return complete

    def kernel(self) -> Tensor:
        """Return ``J Jᵀ`` of the layer, ``(n, n)``."""
        return _gram(torch.cat(self._left)) * _gram(torch.cat(self._right))


def _gram(rows: Tensor) -> Tensor:
    """Return all inner products of rows, summed in float64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for columns in rows.split(_COLUMNS, dim=1):
        total.addmm_(columns.double(), columns.double().T)
    return total
