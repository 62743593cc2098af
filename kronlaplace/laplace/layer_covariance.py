"""The contribution of one layer to the covariance of the outputs, in the eigenbasis of its posterior covariance.

A layer's per-example Jacobian of output ``c`` is ``X_c = Σ_t g_c,t a_tᵀ``. With the posterior covariance
``Q_G ⊗ Q_A diag(w) (Q_G ⊗ Q_A)ᵀ``, ``h = g Q_G`` and ``b = a Q_A``, the layer adds

    Σ[c, c'] += Σ_ij w_ij R_c,ij R_c',ij,    R_c = Σ_t h_c,t b_tᵀ.

Where the layer is used once per example this is ``Σ_i h_c,i h_c',i (Σ_j w_ij b_j²)``, and ``R`` is never formed. Else
either ``R`` (``q·p`` numbers per example and output) or ``h`` (``T·q``) is kept until all outputs are there, whichever
is smaller, and in the second case ``R`` is formed a few rows at a time. Blocks with another eigenbasis ``U`` than a
Kronecker product, and layers with groups of rows, have ``R_c = Uᵀ vec(X_c)``.

Where the layer's output is the network's own, ``g_c`` is the unit vector ``e_c``: nothing is propagated back, and the
variances are ``Σ_j u_cj b_j²`` with ``u_cj = Σ_i (Q_G)_ci² w_ij``, which is made once. With ``s_i = Σ_j w_ij b_j²`` the
margin between ``c`` and ``t`` has the variance ``Σ_i ((Q_G)_ci − (Q_G)_ti)² s_i``.

Where ``Q_A`` is truncated, all ``w_ij`` of its rest are equal, and only the inner products ``K = r rᵀ`` of the inputs' parts
``r`` in the rest matter: they add ``Σ_i w_i,rest h_c,iᵀ K h_c',i``. So there are ``k`` columns instead of ``p``.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

import torch
from torch import Tensor

from kronlaplace.blocks.basis import Basis
from kronlaplace.damping import DampedInverse
from kronlaplace.layers import LayerBatch, LayerGradients

__all__ = ["BUDGET", "OutputCovariance", "LayerCovariance", "covariance_of_layer", "output_layer_part"]

BUDGET = 2**24
"""Numbers that one chunk of examples may keep at a time (64 MiB in float32)."""


class OutputCovariance(Enum):
    """Which covariances of the outputs are wanted."""

    VARIANCES = auto()
    """Variances only."""
    CENTERED_VARIANCES = auto()
    """Variances only, of the classes less the mean of all classes at their position."""
    MARGIN_VARIANCES = auto()
    """Variances only, of the classes less the most probable class at their position."""
    BY_POSITION = auto()
    """The classes at one position of one example."""
    BY_EXAMPLE = auto()
    """Covariances between all outputs of one example."""
    JOINT = auto()
    """Covariances between all outputs of all examples."""

    @property
    def variances(self) -> bool:
        """Whether only variances are requested."""
        return self is OutputCovariance.VARIANCES or self.relative

    @property
    def by_class(self) -> bool:
        """Whether the classes at one position belong together."""
        return self is OutputCovariance.BY_POSITION or self.relative

    @property
    def relative(self) -> bool:
        """Whether the variances are of differences between classes."""
        return self in (OutputCovariance.CENTERED_VARIANCES, OutputCovariance.MARGIN_VARIANCES)


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
    if bases is None or batch.layer.groups > 1:
        return _AnyBlock(inverse, wanted)
    gradient_basis, activation_basis = bases
    b = _projected(batch, activation_basis)
    make = _SingleUse if b.shape[1] == 1 and wanted is not OutputCovariance.JOINT else _SharedWeights
    return make(inverse, gradient_basis, activation_basis, b, wanted)


def _projected(batch: LayerBatch, basis: Basis) -> Tensor:
    """Return ``b = a Q_A``, ``(N, T, p)``, for a layer without groups."""
    return (basis.coordinates(batch.activations()) if basis.truncated else batch.project(basis.vectors))[0]


def output_layer_part(
    inverse: DampedInverse, batch: LayerBatch, outputs: Tensor, wanted: OutputCovariance
) -> Tensor | None:
    """Return what a linear layer adds to the covariance of its own outputs, or None where that takes backward passes.

    Args:
        inverse: The layer's posterior covariance.
        batch: The inputs of its one call.
        outputs: Its outputs, ``(N, ..., C)``.
        wanted: Which covariances are wanted.

    Returns:
        Variances of the shape of the outputs, or covariances ``(N, ..., C, C)`` between the last axis.
    """
    bases = inverse.bases()
    positions = outputs.ndim > 2
    if bases is None or wanted is OutputCovariance.JOINT or (positions and wanted is OutputCovariance.BY_EXAMPLE):
        return None
    gradient_basis, activation_basis = bases
    squares = activation_basis.gather(_projected(batch, activation_basis).square())  # (N, T, p), compact
    if wanted.variances:
        weights = inverse.row_weights if wanted is OutputCovariance.VARIANCES else inverse.centered_row_weights
        variances = squares @ weights.T  # (N, T, C)
        if wanted is OutputCovariance.MARGIN_VARIANCES:
            top = outputs.reshape(variances.shape).argmax(-1)
            variances = _margin_variances(variances, squares @ inverse.weights.T, gradient_basis, top)
        return variances.reshape(outputs.shape)
    spread = (squares @ inverse.weights.T).reshape(*outputs.shape[:-1], -1)  # (N, ..., q), compact
    rest, spread = gradient_basis.split(spread)
    (basis,) = gradient_basis.vectors
    if rest is None:
        return (basis * spread.unsqueeze(-2)) @ basis.T
    covariance = (basis * (spread - rest).unsqueeze(-2)) @ basis.T
    return covariance + torch.diag_embed(rest.expand(*rest.shape[:-1], len(basis)))


def _margin_variances(centered: Tensor, spread: Tensor, gradient_basis: Basis, top: Tensor) -> Tensor:
    """Return the variances of the outputs less one of them, ``(N, T, q)``.

    All three terms are of centered outputs: a shift common to all would drown the margins in rounding.

    Args:
        centered: Variances of the outputs less their mean, ``(N, T, q)``.
        spread: ``Σ_j w_ij b_j²``, ``(N, T, q)``, compact.
        gradient_basis: ``Q_G``.
        top: The index of the output that is subtracted, ``(N, T)``.
    """
    (basis,) = gradient_basis.vectors
    shift = basis.mean(0)
    rest, spread = gradient_basis.split(spread)
    spread_of_top = (spread if rest is None else spread - rest) * (basis[top] - shift)
    with_top = spread_of_top @ basis.T - (spread_of_top @ shift).unsqueeze(-1)
    if rest is not None:  # times the inner product of both outputs' unit vectors, less their mean
        n = len(basis)
        with_top = (with_top - rest / n).scatter_add(-1, top.unsqueeze(-1), rest)
    return (centered + centered.gather(-1, top.unsqueeze(-1)) - 2 * with_top).clamp_min(0)


class _SingleUse:
    """A layer that each example uses once: ``h_c`` and ``Σ_j w_ij b_j²`` are all that is needed of output ``c``."""

    def __init__(
        self,
        inverse: DampedInverse,
        gradient_basis: Basis,
        activation_basis: Basis,
        b: Tensor,
        wanted: OutputCovariance,
    ) -> None:
        spread = activation_basis.gather(b.squeeze(1).square()) @ inverse.weights.T
        self._spread = gradient_basis.expand(spread)  # (N, q)
        self._basis = gradient_basis
        self._wanted = wanted
        self._rows: list[Tensor] = []

    def add(self, gradients: LayerGradients) -> None:
        h = self._basis.coordinates(gradients.gradients())[0].squeeze(1)
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
        inverse: DampedInverse,
        gradient_basis: Basis,
        activation_basis: Basis,
        b: Tensor,
        wanted: OutputCovariance,
    ) -> None:
        root = inverse.weights.sqrt()
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
        g = gradients.gradients()
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
        n, n_outputs, _, q = rows.shape
        p = self._b.shape[2]
        rows_at_a_time = max(1, min(q, BUDGET // (n * n_outputs * p)))
        total: Tensor | None = None
        if self._rest is not None:
            products, weights = self._rest
            total = (products.unsqueeze(1) @ (rows * weights)).flatten(2) @ rows.flatten(2).mT
        for i in range(0, q, rows_at_a_time):
            part = slice(i, i + rows_at_a_time)
            r = torch.einsum("ncti,ntj->ncij", rows[..., part], self._b).mul_(self._root[part])
            products_of_rows = _products(r.flatten(2), self._wanted)
            total = products_of_rows if total is None else total + products_of_rows
        assert total is not None
        return total

    def kept_per_example(self, n_outputs: int) -> int:
        _, positions, p = self._b.shape
        q = len(self._root)
        if self._wanted.variances:
            return positions * p + q * p
        return positions * (p if self._rest is None else p + positions) + n_outputs * q * min(positions, p)


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


def _products(rows: Tensor, wanted: OutputCovariance) -> Tensor:
    """Inner products of rows ``(N, C, d)``; variances ``(N, C)`` are there already."""
    if wanted.variances:
        return rows
    if wanted is OutputCovariance.JOINT:
        rows = rows.flatten(0, 1)
    return rows @ rows.mT
