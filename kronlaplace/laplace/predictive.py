"""The linearised predictive without Jacobians: the covariance of the outputs, layer by layer in the eigenbasis.

A layer's per-example Jacobian of output ``c`` is ``X_c = Σ_t g_c,t a_tᵀ``. With the posterior covariance
``Q_G ⊗ Q_A diag(w) (Q_G ⊗ Q_A)ᵀ``, ``h = g Q_G`` and ``b = a Q_A``, the layer adds

    Σ[c, c'] += Σ_ij w_ij R_c,ij R_c',ij,    R_c = Σ_t h_c,t b_tᵀ.

Where the layer is used once per example this is ``Σ_i h_c,i h_c',i (Σ_j w_ij b_j²)``, and ``R`` is never formed. Else
either ``R`` (``q·p`` numbers per example and output) or ``h`` (``T·q``) is kept until all outputs are there, whichever
is smaller, and in the second case ``R`` is formed a few rows at a time. Blocks with another eigenbasis ``U`` than a
Kronecker product, and layers with groups of rows, have ``R_c = Uᵀ vec(X_c)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from kronlaplace.batches import Inputs
from kronlaplace.blocks import EigenBlock, KroneckerBlock
from kronlaplace.collect import recording
from kronlaplace.inversion import DampedInverse
from kronlaplace.layers import Calls, Layer

__all__ = ["functional_covariance"]

_BUDGET = 2**24
"""Numbers that one chunk of examples may keep at a time (64 MiB in float32)."""

_MAX_CHUNK = 256
_FIRST_CHUNK = 16


def functional_covariance(
    model: nn.Module,
    layers: Sequence[Layer],
    inverses: Mapping[str, DampedInverse],
    x: Inputs,
    input_axis: int,
    *,
    diagonal: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs of the network and their covariance under the linearised model.

    One forward pass and one backward pass per output, in chunks of examples that bound the memory. No tensor has the
    shape ``(N, C, P)``.

    Args:
        model: The network.
        layers: The layers that have a posterior.
        inverses: Their posterior covariances, by layer name.
        x: Inputs.
        input_axis: Their axis that counts the examples.
        diagonal: Whether only the variances are wanted.

    Returns:
        The outputs, detached, as the network gives them, ``(N, C)`` or ``(N,)``, and their covariance ``(N, C, C)``, or
        variances ``(N, C)``; ``C = 1`` for outputs ``(N,)``.
    """
    outputs, covariances = [], []
    start, chunk = 0, _FIRST_CHUNK
    while start < x.count(input_axis):
        part = x.examples(input_axis, start, start + chunk)
        f, covariance, kept_per_example = _one_chunk(model, layers, inverses, part, diagonal)
        outputs.append(f)
        covariances.append(covariance)
        start += chunk
        chunk = max(1, min(_MAX_CHUNK, _BUDGET // max(kept_per_example, 1)))
    return torch.cat(outputs), torch.cat(covariances)


def _one_chunk(
    model: nn.Module, layers: Sequence[Layer], inverses: Mapping[str, DampedInverse], x: Inputs, diagonal: bool
) -> tuple[Tensor, Tensor, int]:
    terms: dict[str, _Term] = {}

    def receive(calls: Calls, grads: list[Tensor]) -> None:
        layer = calls.layer
        if layer.name not in terms:
            terms[layer.name] = _make_term(inverses[layer.name], calls, grads, diagonal)
        terms[layer.name].add(calls, grads)

    with recording(model, layers, receive) as recorder:
        f = recorder.forward(x)
        if f.ndim > 2:
            raise NotImplementedError(
                f"the linearised predictive needs outputs of shape (N, C) or (N,); the network returned {tuple(f.shape)}. "
                'Use predict(x, method="sample"), or a module that returns the outputs of interest as columns.'
            )
        n, n_outputs = len(f), f.shape[1] if f.ndim == 2 else 1
        for c in range(n_outputs):
            direction = torch.zeros(n, n_outputs, dtype=f.dtype, device=f.device)
            direction[:, c] = 1
            recorder.backward(f, direction, retain_graph=c < n_outputs - 1)
    results = (term.result() for term in terms.values())
    covariance = next(results)
    for result in results:
        covariance += result
    kept = sum(term.kept_per_example(n_outputs) for term in terms.values())
    return f.detach(), covariance, kept


class _Term(Protocol):
    """What one layer adds to the covariance; `add` is called once per output, in order."""

    def add(self, calls: Calls, grads: list[Tensor]) -> None:
        """Take the gradients of the next output."""

    def result(self) -> Tensor:
        """The layer's part: ``(N, C, C)``, or ``(N, C)`` if only the diagonal is wanted."""

    def kept_per_example(self, n_outputs: int) -> int:
        """How many numbers are kept for each example."""


def _make_term(inverse: DampedInverse, calls: Calls, grads: list[Tensor], diagonal: bool) -> _Term:
    block = inverse.block
    if not isinstance(block, (KroneckerBlock, EigenBlock)) or calls.layer.groups > 1:
        return _AnyBlock(inverse, diagonal)
    gradient_basis, activation_basis = block.bases()
    b = calls.project(activation_basis)[0]
    make = _SingleUse if b.shape[1] == 1 else _SharedWeights
    return make(inverse, gradient_basis[0], b, diagonal)


class _SingleUse:
    """A layer that each example uses once: ``h_c √(Σ_j w_ij b_j²)`` is all that is needed of output ``c``."""

    def __init__(self, inverse: DampedInverse, gradient_basis: Tensor, b: Tensor, diagonal: bool) -> None:
        self._root = (b.squeeze(1).square() @ inverse.weights.T).clamp_min(0).sqrt()  # (N, q)
        self._basis = gradient_basis
        self._diagonal = diagonal
        self._rows: list[Tensor] = []

    def add(self, calls: Calls, grads: list[Tensor]) -> None:
        row = (calls.gradients(grads)[0] @ self._basis).squeeze(1) * self._root
        self._rows.append(row.square().sum(1) if self._diagonal else row)

    def result(self) -> Tensor:
        return _joined(self._rows, self._diagonal)

    def kept_per_example(self, n_outputs: int) -> int:
        return self._root.shape[1] * (1 if self._diagonal else n_outputs)


class _SharedWeights:
    """A layer that each example uses at ``T`` positions."""

    def __init__(self, inverse: DampedInverse, gradient_basis: Tensor, b: Tensor, diagonal: bool) -> None:
        self._root = inverse.weights.sqrt()  # (q, p)
        self._basis = gradient_basis
        self._b = b  # (N, T, p)
        self._diagonal = diagonal
        _, positions, p = b.shape
        self._keep_h = not diagonal and positions < p
        self._rows: list[Tensor] = []

    def add(self, calls: Calls, grads: list[Tensor]) -> None:
        h = calls.gradients(grads)[0] @ self._basis
        if self._keep_h:
            self._rows.append(h)
        else:
            r = (h.mT @ self._b) * self._root  # (N, q, p)
            self._rows.append(r.square().sum((1, 2)) if self._diagonal else r.flatten(1))

    def result(self) -> Tensor:
        if not self._keep_h:
            return _joined(self._rows, self._diagonal)
        h = torch.stack(self._rows, dim=1)  # (N, C, T, q)
        n, n_outputs, _, q = h.shape
        p = self._b.shape[2]
        rows_at_a_time = max(1, min(q, _BUDGET // (n * n_outputs * p)))
        total = h.new_zeros(n, n_outputs, n_outputs)
        for i in range(0, q, rows_at_a_time):
            part = slice(i, i + rows_at_a_time)
            r = torch.einsum("ncti,ntj->ncij", h[..., part], self._b) * self._root[part]
            r = r.flatten(2)
            total += r @ r.mT
        return total

    def kept_per_example(self, n_outputs: int) -> int:
        _, positions, p = self._b.shape
        q = len(self._root)
        if self._diagonal:
            return positions * p + q * p
        return positions * p + n_outputs * q * min(positions, p)


class _AnyBlock:
    """A block of any kind: the example's whole gradient ``X_c`` in the block's eigenbasis."""

    def __init__(self, inverse: DampedInverse, diagonal: bool) -> None:
        self._block = inverse.block
        self._root = inverse.weights.sqrt()  # (q, p)
        self._diagonal = diagonal
        self._rows: list[Tensor] = []

    def add(self, calls: Calls, grads: list[Tensor]) -> None:
        rows = []
        for part, part_grads in calls.parts(grads):
            x = part.weight_gradients(part_grads).transpose(0, 1).flatten(1, 2)  # (N, q, p)
            r = self._block.to_eigenbasis(x) * self._root
            rows.append(r.square().sum((1, 2)) if self._diagonal else r.flatten(1))
        self._rows.append(torch.cat(rows))

    def result(self) -> Tensor:
        return _joined(self._rows, self._diagonal)

    def kept_per_example(self, n_outputs: int) -> int:
        return self._root.numel() * (1 if self._diagonal else n_outputs)


def _joined(rows: list[Tensor], diagonal: bool) -> Tensor:
    joined = torch.stack(rows, dim=1)
    return joined if diagonal else joined @ joined.mT
