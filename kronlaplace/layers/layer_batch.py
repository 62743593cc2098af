"""Everything that flows through one layer in one batch: its calls in a forward pass, and gradients along a direction."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kronlaplace.layers.base import Layer, Sums

__all__ = [
    "BatchGradient",
    "LayerBatch",
    "LayerCall",
    "LayerGradients",
    "MomentExamples",
    "SquaredGradients",
]

_SMALL = 2**20
"""Size, in numbers, that a temporary may always have."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        x: The input, with examples first.
        fold: Number of rows on the first axis that belong to one example: 1 unless the network folds positions into it.
        autocast: The dtype in which float32 products were computed under autocast, or None without autocast.
        mask: Which positions are no padding, ``(N, T)``, zero for those that are; None if all count.
    """

    x: Tensor
    fold: int = 1
    autocast: torch.dtype | None = None
    mask: Tensor | None = None

    def rows(self, rows: slice) -> LayerCall:
        """Return the call with some of the rows on its first axis, as views."""
        return replace(self, x=self.x[rows], mask=None if self.mask is None else self.mask[rows])


class MomentExamples(NamedTuple):
    """From how many of a batch's examples, the first ones, sums over all of them are taken, times the quotient."""

    inputs: int
    """For the moment of the inputs."""
    weight_gradients: int
    """For products of weight gradients ``X``."""


class LayerBatch:
    """The inputs of one layer in one batch: its calls in one forward pass, all of whose positions share the weights.

    Args:
        layer: The layer.
        calls: The calls of the layer.
        moment_examples: From how many examples sums over all are taken; None means from all.
    """

    def __init__(self, layer: Layer, calls: Sequence[LayerCall], moment_examples: MomentExamples | None = None) -> None:
        self.layer = layer
        self.calls = list(calls)
        self.moment_examples = moment_examples

    @property
    def n_examples(self) -> int:
        """The number ``N`` of examples."""
        return len(self.calls[0].x) // self.calls[0].fold

    def along(self, gradients: Sequence[Tensor]) -> LayerGradients:
        """Combine the inputs with the gradients at the calls' outputs, one tensor per call with examples first."""
        return LayerGradients(self, gradients)

    @property
    def input_positions(self) -> int:
        """The number ``T`` as far as the inputs alone tell it."""
        return sum(call.fold * self.layer.input_positions(call.x) for call in self.calls)

    def with_moments_of(self, examples: MomentExamples | None) -> LayerBatch:
        """Return the batch with moments from only its first examples, or from all for None."""
        return LayerBatch(self.layer, self.calls, examples)

    def first(self, n_examples: int) -> LayerBatch:
        """Return the batch with only its first examples, as views."""
        return LayerBatch(self.layer, [c.rows(slice(n_examples * c.fold)) for c in self.calls])

    @property
    def mask(self) -> Tensor | None:
        """Which positions are no padding, ``(N, T)``; None if all count, or if the layer is called more than once."""
        return self.calls[0].mask if len(self.calls) == 1 else None

    def activations(self) -> Tensor:
        """Return ``a``, shape ``(K, N, T, p)``."""
        return self._joined([self.layer.activations(call.x) for call in self.calls])

    def project(self, basis: Tensor) -> Tensor:
        """Return ``a Q``, shape ``(K, N, T, k)``, for ``Q`` of shape ``(K, p, k)``."""
        return self._joined([self.layer.project(call.x, basis) for call in self.calls])

    def add_activation_moment(self, sums: Sums) -> None:
        """Add ``Σ_n Σ_t a aᵀ`` to ``sums``, in the form that `Layer.activation_moment` reads.

        If only some of the examples are used, this is the sum over them, times ``N`` over their number.
        """
        n = self.n_examples
        some = n if self.moment_examples is None else self.moment_examples.inputs
        if some >= n:
            for call in self.calls:
                self.layer.add_activation_moment(call.x, sums)
            return
        own: Sums = {}
        for call in self.calls:
            self.layer.add_activation_moment(call.x[: some * call.fold], own)
        for key, value in own.items():
            sums[key] = sums[key].add_(value, alpha=n / some) if key in sums else value.mul_(n / some)

    def moment_activations(self) -> Tensor:
        """Return rows ``(K, n, T, p)`` whose sum ``Σ a aᵀ`` is the one that `add_activation_moment` adds."""
        a, n = self.activations(), self.n_examples
        some = n if self.moment_examples is None else self.moment_examples.inputs
        return a if some >= n else a[:, :some] * (n / some) ** 0.5

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate the calls along the axis of the positions."""
        unfolded = [
            t if call.fold == 1 else t.unflatten(1, (-1, call.fold)).flatten(2, 3)
            for t, call in zip(tensors, self.calls, strict=True)
        ]
        return unfolded[0] if len(unfolded) == 1 else torch.cat(unfolded, dim=2)


class LayerGradients:
    """One layer's inputs in one batch, together with the gradients at its outputs along one direction ``d_v``.

    Args:
        batch: The inputs.
        tensors: The gradient of each example's own negative log-likelihood at the output of every call, with examples first.
    """

    only_squares = False
    """Whether the gradients stand for others that are uncorrelated between outputs and positions, so that only their squares
    mean anything; see `SquaredGradients`."""

    def __init__(self, batch: LayerBatch, tensors: Sequence[Tensor]) -> None:
        self.batch = batch
        self.tensors = list(tensors)

    @property
    def layer(self) -> Layer:
        """The layer."""
        return self.batch.layer

    @property
    def n_examples(self) -> int:
        """The number ``N`` of examples."""
        return self.batch.n_examples

    @property
    def positions(self) -> int | Tensor:
        """The total ``T`` of all calls, of shape ``(K, 1, 1)`` if it differs between groups."""
        total: int | Tensor = 0
        for call, grad in self._pairs():
            total = total + call.fold * self.layer.positions(call.x, grad)
        return total

    @property
    def once_per_example(self) -> bool:
        """Whether each example uses the layer's weights at only one position."""
        return isinstance(positions := self.positions, int) and positions == 1

    def activations(self) -> Tensor:
        """Return ``a``, shape ``(K, N, T, p)``."""
        return self.batch.activations()

    def gradients(self) -> Tensor:
        """Return ``g``, shape ``(K, N, T, q/K)``."""
        return self.batch._joined([self.layer.gradients(grad) for grad in self.tensors])

    def project(self, basis: Tensor) -> Tensor:
        """Return ``a Q``, shape ``(K, N, T, k)``, for ``Q`` of shape ``(K, p, k)``."""
        return self.batch.project(basis)

    def weight_gradients(self) -> Tensor:
        """Return ``X = Σ_t g_t a_tᵀ``, summed over all calls, shape ``(K, N, q/K, p)``."""
        total: Tensor | None = None
        for call, grad in self._pairs():
            part = self.layer.weight_gradients(call.x, grad)
            if call.fold > 1:
                part = part.unflatten(1, (-1, call.fold)).sum(2)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def with_moments_of(self, examples: MomentExamples | None) -> LayerGradients:
        """Return the same with moments from only the first examples, or from all for None."""
        result = copy.copy(self)
        result.batch = self.batch.with_moments_of(examples)
        return result

    def sampled(self) -> tuple[LayerGradients, float]:
        """Return the examples from which sums of products of ``X`` are taken, and ``N`` over their number."""
        n, examples = self.n_examples, self.batch.moment_examples
        if examples is None or examples.weight_gradients >= n:
            return self, 1.0
        return self.first(examples.weight_gradients), n / examples.weight_gradients

    def vectors(self) -> Tensor:
        """Return ``vec(X)`` of each example, shape ``(N, q·p)``, in the row order of ``W̄``."""
        return self.weight_gradients().transpose(0, 1).flatten(1)

    def total_weight_gradient(self) -> tuple[Tensor, Tensor]:
        """Return ``Σ_n X_n``, shape ``(q, p)``, and a bound on its rounding error, 0-dim."""
        total: Tensor | None = None
        bound = torch.zeros((), dtype=self.layer.dtype, device=self.layer.device)
        for part in [self] if self.layer.totals_are_products else self.parts():
            for call, grad in part._pairs():
                found = self.layer.total_weight_gradient(call.x, grad)
                total = found if total is None else total.add_(found)
                bound += self.layer.input_norm(call.x) * torch.linalg.vector_norm(grad.to(bound))
        assert total is not None
        return total, 100 * max(_rounding(call.x, call.autocast), _rounding(grad, call.autocast)) * bound

    def add_gradient_moment(self, out: Tensor) -> None:
        """Add ``1/T · Σ_n Σ_t g gᵀ`` to ``out`` of shape ``(K, q/K, q/K)``."""
        positions = self.positions
        for grad in self.tensors:
            self.layer.add_gradient_moment(grad, out, positions)

    def add_squared_weight_gradients(self, out: Tensor) -> None:
        """Add ``Σ_n X ∘ X`` to ``out`` of shape ``(q, p)``."""
        pairs = [(call.x, grad) for call, grad in self._pairs()]
        folded = any(call.fold > 1 for call in self.batch.calls)
        if not folded and self.layer.squared_weight_gradients(pairs, out):
            return
        for part in self.parts():
            out += part.weight_gradients().square_().sum(1).view_as(out)

    def first(self, n_examples: int) -> LayerGradients:
        """Return the inputs and gradients of only the first examples, as views."""
        tensors = [g[: n_examples * call.fold] for call, g in self._pairs()]
        return type(self)(self.batch.first(n_examples), tensors)

    def parts(self, *, activations: bool = False) -> Iterator[LayerGradients]:
        """Yield parts of a few examples each, so that what is computed from a part (``a``, ``g`` or ``X``) takes no more
        memory than the inputs and outputs of the whole batch take anyway.

        Args:
            activations: Whether ``a`` will be formed in any case.
        """
        layer, n = self.layer, self.n_examples
        held = sum(call.x.numel() + grad.numel() for call, grad in self._pairs())
        needed = sum(layer.temporaries(call.x, grad, activations) for call, grad in self._pairs())
        count = max(1, min(n, n * max(held, _SMALL) // max(needed, 1)))
        if count >= n or not layer.divisible:
            yield self
            return
        for start in range(0, n, count):
            calls, tensors = [], []
            for call, grad in self._pairs():
                rows = slice(start * call.fold, (start + count) * call.fold)
                calls.append(call.rows(rows))
                tensors.append(grad[rows])
            yield type(self)(LayerBatch(layer, calls), tensors)

    def _pairs(self) -> Iterator[tuple[LayerCall, Tensor]]:
        return zip(self.batch.calls, self.tensors, strict=True)


class SquaredGradients(LayerGradients):
    """Roots of the sums of the squares of the gradients along all directions, for estimators that take only these.

    Of a layer whose outputs are the network's own they are the roots of the output metric's diagonal, without a backward
    pass.
    """

    only_squares = True


class BatchGradient(LayerGradients):
    """The sum of the gradients of all examples, which stands for one gradient.

    With directions that are independent and have the mean zero, such as those of drawn labels, the mean of its square is the
    sum of the squares of the examples.

    Args:
        batch: A batch of one row.
        tensors: The gradient, ``(1, q, p)``.
        n_summed: The number of examples in it.
    """

    def __init__(self, batch: LayerBatch, tensors: Sequence[Tensor], n_summed: int) -> None:
        super().__init__(batch, tensors)
        self._n_summed = n_summed

    def first(self, n_examples: int) -> LayerGradients:
        """Return a gradient that has the size which that of so many examples would have."""
        share = (n_examples / self._n_summed) ** 0.5
        return BatchGradient(self.batch, [share * grad for grad in self.tensors], n_examples)


def _rounding(tensor: Tensor, autocast: torch.dtype | None) -> float:
    """Return the relative rounding error of products with a tensor, or 0 for indices.

    The network may multiply float32 tensors in lower precision: under autocast, or in TF32 on CUDA.
    """
    if not tensor.is_floating_point():
        return 0.0
    if autocast is not None and tensor.dtype == torch.float32:
        return torch.finfo(autocast).eps
    coarse = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if tensor.is_cuda and tensor.dtype == torch.float32 and coarse:
        return 2.0**-11
    return torch.finfo(tensor.dtype).eps
