"""The contribution of one layer to the covariance of the outputs, in the eigenbasis of its posterior covariance.

A layer's per-example Jacobian of output ``c`` is ``X_c = Σ_t g_c,t a_tᵀ``. With the posterior covariance
``Q_G ⊗ Q_A diag(w) (Q_G ⊗ Q_A)ᵀ``, ``h = g Q_G`` and ``b = a Q_A``, the layer adds

    Σ[c, c'] += Σ_ij w_ij R_c,ij R_c',ij,    R_c = Σ_t h_c,t b_tᵀ.

Where the layer is used once per example this is ``Σ_i h_c,i h_c',i (Σ_j w_ij b_j²)``, and ``R`` is never formed. Else
either ``R`` (``q·p`` numbers per example and output) or ``h`` (``T·q``) is kept until all outputs are there, whichever
is smaller, and in the second case ``R`` is formed a few rows at a time. Blocks with another eigenbasis ``U`` than a
Kronecker product, and layers with groups of rows, have ``R_c = Uᵀ vec(X_c)``.

Where ``Q_A`` is truncated, all ``w_ij`` of its rest are equal, and only the inner products ``K = r rᵀ`` of the inputs' parts
``r`` in the rest matter: they add ``Σ_i w_i,rest h_c,iᵀ K h_c',i``. So there are ``k`` columns instead of ``p``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from kronlaplace.blocks import DiagonalBlock
from kronlaplace.blocks.basis import Basis
from kronlaplace.damping import DampedInverse
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.layers import LayerBatch, LayerGradients
from kronlaplace.layers.embedding import EmbeddingLayer

__all__ = ["BUDGET", "LayerCovariance", "LookUps", "covariance_of_layer", "projected"]

BUDGET = 2**24
"""Numbers that one chunk of examples may keep at a time (64 MiB in float32)."""


_FEW_GROUPS = 8
"""Groups of rows that are taken one by one."""


class LayerCovariance(Protocol):
    """The contribution of one layer to the covariance; `add` is called once per output, in order."""

    def add(self, gradients: LayerGradients) -> None:
        """Take the gradients of the next output."""

    def result(self) -> Tensor:
        """Return the layer's part for the ``C`` outputs since the last result.

        Shape ``(N, C, C)``, or ``(N, C)`` if only variances are wanted, or ``(N·C, N·C)`` with covariances between examples.
        """

    def kept_per_example(self, n_outputs: int) -> int:
        """Return the number of numbers that are kept for each example."""


def covariance_of_layer(inverse: DampedInverse, batch: LayerBatch, wanted: OutputCovariance) -> LayerCovariance:
    """Make the term of a layer from its inputs in the forward pass."""
    bases = inverse.bases()
    groups = batch.layer.groups
    if bases is not None and 1 < groups <= _FEW_GROUPS and not any(basis.truncated for basis in bases):
        return _Groups(inverse, bases, batch.project(bases[1].vectors), wanted)
    if bases is None or groups > 1:
        if _only_look_ups(batch) and isinstance(inverse.block, DiagonalBlock) and wanted is not OutputCovariance.JOINT:
            return LookUps(inverse, wanted)
        return _AnyBlock(inverse, wanted)
    gradient_basis, activation_basis = bases
    b = projected(batch, activation_basis)
    make = _SingleUse if b.shape[1] == 1 and wanted is not OutputCovariance.JOINT else _SharedWeights
    return make(inverse.weights, gradient_basis, activation_basis, b, wanted)


def projected(batch: LayerBatch, basis: Basis) -> Tensor:
    """Return ``b = a Q_A``, ``(N, T, p)``, for a layer without groups."""
    return (basis.coordinates(batch.activations()) if basis.truncated else batch.project(basis.vectors))[0]


class _SingleUse:
    """A layer that each example uses once: ``h_c`` and ``Σ_j w_ij b_j²`` are all that is needed of output ``c``."""

    def __init__(
        self,
        weights: Tensor,
        gradient_basis: Basis,
        activation_basis: Basis,
        b: Tensor,
        wanted: OutputCovariance,
    ) -> None:
        spread = activation_basis.gather(b.squeeze(1).square()) @ weights.T
        self._spread = gradient_basis.expand(spread)  # (N, q)
        self._basis = gradient_basis
        self._wanted = wanted
        self._rows: list[Tensor] = []

    def add(self, gradients: LayerGradients) -> None:
        self.add_rows(gradients.gradients())

    def add_rows(self, g: Tensor) -> None:
        """Take the gradients of the next output, ``(1, N, 1, q)``."""
        h = self._basis.coordinates(g)[0].squeeze(1)
        self._rows.append((h.square() * self._spread).sum(1) if self._wanted.variances else h)

    def result(self) -> Tensor:
        rows = torch.stack(self._rows, dim=1)
        self._rows.clear()
        return rows if self._wanted.variances else (rows * self._spread.unsqueeze(1)) @ rows.mT

    def kept_per_example(self, n_outputs: int) -> int:
        return self._spread.shape[1] * (1 if self._wanted.variances else n_outputs)


class _SharedWeights:
    """A layer that each example uses at ``T`` positions."""

    def __init__(
        self,
        weights: Tensor,
        gradient_basis: Basis,
        activation_basis: Basis,
        b: Tensor,
        wanted: OutputCovariance,
    ) -> None:
        root = weights.sqrt()
        if gradient_basis.truncated:
            root = gradient_basis.expand(root.T).T
        self._basis = gradient_basis
        self._wanted = wanted
        _, positions, p = b.shape
        # Inner products in the rest are cheaper than its columns if there are few positions.
        self._rest: tuple[Tensor, Tensor] | None = None
        if positions < activation_basis.rest and wanted is not OutputCovariance.JOINT:
            in_rest = b[..., : activation_basis.rest]
            self._rest = in_rest @ in_rest.mT, root[:, 0].square()  # (N, T, T), (q,)
            self._b, self._root = b[..., activation_basis.rest :], root[:, 1:]
        else:
            self._b, self._root = b, activation_basis.expand(root)  # (N, T, p), (q, p)
        self._keep_h = not wanted.variances and positions < p
        self._rows: list[Tensor] = []

    def add(self, gradients: LayerGradients) -> None:
        self.add_rows(gradients.gradients())

    def add_rows(self, g: Tensor) -> None:
        """Take the gradients of the next output, ``(1, N, T, q)``."""
        if self._keep_h:
            self._rows.append(self._basis.coordinates(g)[0])
            return
        _, positions, p = self._b.shape
        if positions < p or self._rest is not None:  # the cheaper order
            h = self._basis.coordinates(g)[0]  # (N, T, q)
            r = h.mT @ self._b * self._root  # (N, q, p)
        else:
            r = self._basis.coordinates((self._b.mT @ g[0]).unsqueeze(0))[0].mT * self._root
        if not self._wanted.variances:
            self._rows.append(r.flatten(1))
            return
        variance = r.square().sum((1, 2))
        if self._rest is not None:
            products, weights = self._rest
            variance = variance + (((products @ h) * h).sum(1) * weights).sum(1)
        self._rows.append(variance)

    def result(self) -> Tensor:
        rows = torch.stack(self._rows, dim=1)
        self._rows.clear()
        if not self._keep_h:
            return _products(rows, self._wanted)
        _, c, positions, _ = rows.shape
        p = self._b.shape[2]
        by_kernel = positions * (positions * p + c * positions + c**2) < c * p * (positions + c)
        total = (
            self._by_kernel(rows) if by_kernel and self._wanted is not OutputCovariance.JOINT else self._by_rows(rows)
        )
        if self._rest is not None:
            products, weights = self._rest
            total += (products.unsqueeze(1) @ (rows * weights)).flatten(2) @ rows.flatten(2).mT
        return total

    def _by_rows(self, rows: Tensor) -> Tensor:
        """Form ``R``, a few rows at a time, from ``h``, ``(N, C, T, q)``."""
        n, n_outputs, _, q = rows.shape
        p = self._b.shape[2]
        total: Tensor | None = None
        for part in _slices(q, n * n_outputs * p):
            r = torch.einsum("ncti,ntj->ncij", rows[..., part], self._b).mul_(self._root[part])
            products_of_rows = _products(r.flatten(2), self._wanted)
            total = products_of_rows if total is None else total + products_of_rows
        assert total is not None
        return total

    def _by_kernel(self, rows: Tensor) -> Tensor:
        """Compute ``Σ_i h_cᵢᵀ K_i h_c'ᵢ`` with ``K_i = b diag(w_i) bᵀ``, ``(T, T)``: less work at few positions."""
        n, n_outputs, positions, q = rows.shape
        b = self._b.unsqueeze(1)  # (N, 1, T, p)
        total = rows.new_zeros(n, n_outputs, n_outputs)
        for part in _slices(q, n * positions * max(self._b.shape[2], n_outputs)):
            kernel = b * self._root[part].square().unsqueeze(1) @ b.mT  # (N, i, T, T)
            h = rows[..., part].permute(0, 3, 1, 2)  # (N, i, C, T)
            weighted = (h @ kernel).transpose(1, 2).flatten(2)
            total.baddbmm_(weighted, h.transpose(1, 2).flatten(2).mT)
        return total

    def kept_per_example(self, n_outputs: int) -> int:
        _, positions, p = self._b.shape
        q = len(self._root)
        if self._wanted.variances:
            return positions * p + q * p
        return positions * (p if self._rest is None else p + positions) + n_outputs * q * min(positions, p)


class _Groups:
    """A layer with a few groups of rows, such as attention's input projections: each group is a layer by itself."""

    def __init__(self, inverse: DampedInverse, bases: tuple[Basis, Basis], b: Tensor, wanted: OutputCovariance) -> None:
        groups, _, positions, _ = b.shape
        make = _SingleUse if positions == 1 and wanted is not OutputCovariance.JOINT else _SharedWeights
        weights = inverse.weights.chunk(groups)
        gradient, activation = (basis.vectors.split(1) for basis in bases)
        self._terms = [make(weights[k], Basis(gradient[k]), Basis(activation[k]), b[k], wanted) for k in range(groups)]

    def add(self, gradients: LayerGradients) -> None:
        for term, g in zip(self._terms, gradients.gradients().split(1), strict=True):
            term.add_rows(g)

    def result(self) -> Tensor:
        first, *others = [term.result() for term in self._terms]
        return sum(others, first)

    def kept_per_example(self, n_outputs: int) -> int:
        return sum(term.kept_per_example(n_outputs) for term in self._terms)


class _AnyBlock:
    """A block of any kind: the example's whole gradient ``X_c`` in the block's eigenbasis."""

    def __init__(self, inverse: DampedInverse, wanted: OutputCovariance) -> None:
        self._inverse = inverse
        self._root = inverse.expand(inverse.weights.sqrt())  # (q, p)
        self._wanted = wanted
        self._rows: list[Tensor] = []

    def add(self, gradients: LayerGradients) -> None:
        rows = []
        for part in gradients.parts():
            x = part.weight_gradients().transpose(0, 1).flatten(1, 2)  # (N, q, p)
            r = self._inverse.coordinates(x) * self._root
            rows.append(r.square().sum((1, 2)) if self._wanted.variances else r.flatten(1))
        self._rows.append(torch.cat(rows))

    def result(self) -> Tensor:
        rows = torch.stack(self._rows, dim=1)
        self._rows.clear()
        return _products(rows, self._wanted)

    def kept_per_example(self, n_outputs: int) -> int:
        return self._root.numel() * (1 if self._wanted.variances else n_outputs)


def _only_look_ups(batch: LayerBatch) -> bool:
    """Return whether a layer is an embedding whose table multiplies no inputs."""
    return isinstance(batch.layer, EmbeddingLayer) and not any(call.x.is_floating_point() for call in batch.calls)


class LookUps:
    """A diagonal block of an embedding: of an example's gradient only the rows of its own tokens are not zero."""

    def __init__(self, inverse: DampedInverse, wanted: OutputCovariance) -> None:
        self._weights = inverse.weights
        self._wanted = wanted
        self._rows: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._calls: set[tuple[int, ...]] = set()
        self._size = 0

    def add(self, gradients: LayerGradients) -> None:
        layer = gradients.layer
        assert isinstance(layer, EmbeddingLayer)
        pairs = [(call.x, grad) for call, grad in zip(gradients.batch.calls, gradients.tensors, strict=True)]
        found = layer.sums_by_token(pairs, gradients.n_examples)
        assert found is not None
        token, sums = found
        r = sums * self._weights[token].sqrt()
        self._size = r[0].numel()
        if self._wanted.variances:
            self._rows.append(r.square().sum((1, 2)))
            return
        self._rows.append(r)
        self._tokens.append(token)
        self._calls.add(tuple(x.data_ptr() for x, _ in pairs))

    def result(self) -> Tensor:
        rows = self._rows
        if len(self._calls) > 1:  # not all outputs depend on all calls, so that their rows are of different tokens
            rows = [self._in_table(token, r) for token, r in zip(self._tokens, rows, strict=True)]
        stacked = torch.stack(rows if self._wanted.variances else [r.flatten(1) for r in rows], dim=1)
        self._rows, self._tokens = [], []
        self._calls.clear()
        return _products(stacked, self._wanted)

    def _in_table(self, token: Tensor, rows: Tensor) -> Tensor:
        table = rows.new_zeros(len(rows), *self._weights.shape)
        return table.scatter_add_(1, token.unsqueeze(2).expand_as(rows), rows)

    def kept_per_example(self, n_outputs: int) -> int:
        return self._size * (1 if self._wanted.variances else n_outputs)


def _slices(size: int, numbers: int) -> Iterator[slice]:
    """Yield slices of so many rows that each row times ``numbers`` stays within the budget."""
    step = max(1, min(size, BUDGET // numbers))
    for start in range(0, size, step):
        yield slice(start, start + step)


def _products(rows: Tensor, wanted: OutputCovariance) -> Tensor:
    """Inner products of rows ``(N, C, d)``; variances ``(N, C)`` are there already."""
    if wanted.variances:
        return rows
    if wanted is OutputCovariance.JOINT:
        rows = rows.flatten(0, 1)
    return rows @ rows.mT
