"""The linearised predictive without Jacobians: the covariance of the outputs, layer by layer in the eigenbasis.

A layer's per-example Jacobian of output ``c`` is ``X_c = Σ_t g_c,t a_tᵀ``. With the posterior covariance
``Q_G ⊗ Q_A diag(w) (Q_G ⊗ Q_A)ᵀ``, ``h = g Q_G`` and ``b = a Q_A``, the layer adds

    Σ[c, c'] += Σ_ij w_ij R_c,ij R_c',ij,    R_c = Σ_t h_c,t b_tᵀ.

Where the layer is used once per example this is ``Σ_i h_c,i h_c',i (Σ_j w_ij b_j²)``, and ``R`` is never formed. Else
either ``R`` (``q·p`` numbers per example and output) or ``h`` (``T·q``) is kept until all outputs are there, whichever
is smaller, and in the second case ``R`` is formed a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from kronlaplace.collect import recording
from kronlaplace.inversion import DampedInverse
from kronlaplace.layers import Layer

__all__ = ["functional_covariance"]

_BUDGET = 2**24
"""Numbers that one chunk of examples may keep at a time (64 MiB in float32)."""

_MAX_CHUNK = 256
_FIRST_CHUNK = 16


def functional_covariance(
    model: nn.Module,
    layers: Sequence[Layer],
    inverses: Mapping[str, DampedInverse],
    x: Tensor,
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
        x: Inputs, first axis examples.
        diagonal: Whether only the variances are wanted.

    Returns:
        The outputs, detached, as the network gives them, ``(N, C)`` or ``(N,)``, and their covariance ``(N, C, C)``, or
        variances ``(N, C)``; ``C = 1`` for outputs ``(N,)``.
    """
    outputs, covariances = [], []
    start, chunk = 0, _FIRST_CHUNK
    while start < len(x):
        f, covariance, kept_per_example = _one_chunk(model, layers, inverses, x[start : start + chunk], diagonal)
        outputs.append(f)
        covariances.append(covariance)
        start += chunk
        chunk = max(1, min(_MAX_CHUNK, _BUDGET // max(kept_per_example, 1)))
    return torch.cat(outputs), torch.cat(covariances)


def _one_chunk(
    model: nn.Module, layers: Sequence[Layer], inverses: Mapping[str, DampedInverse], x: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor, int]:
    terms: dict[str, _Term] = {}

    def receive(layer: Layer, layer_input: Tensor, grad: Tensor) -> None:
        g = layer.gradients(grad)
        if layer.name not in terms:
            inverse = inverses[layer.name]
            b = layer.project(layer_input.to(layer.dtype), inverse.activation_basis)
            make = _SingleUse if g.shape[1] == 1 else _SharedWeights
            terms[layer.name] = make(inverse, b, diagonal)
        terms[layer.name].add(g.to(layer.dtype) @ inverses[layer.name].gradient_basis)

    with recording(model, layers, receive) as recorder:
        f = recorder.forward(x)
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

    def add(self, h: Tensor) -> None:
        """Take ``h = g Q_G`` of the next output, shape ``(N, T, q)``."""

    def result(self) -> Tensor:
        """The layer's part: ``(N, C, C)``, or ``(N, C)`` if only the diagonal is wanted."""

    def kept_per_example(self, n_outputs: int) -> int:
        """How many numbers are kept for each example."""


class _SingleUse:
    """A layer that each example uses once: ``h_c √(Σ_j w_ij b_j²)`` is all that is needed of output ``c``."""

    def __init__(self, inverse: DampedInverse, b: Tensor, diagonal: bool) -> None:
        self._root = (b.squeeze(1).square() @ inverse.weights.T).clamp_min(0).sqrt()  # (N, q)
        self._diagonal = diagonal
        self._rows: list[Tensor] = []

    def add(self, h: Tensor) -> None:
        row = h.squeeze(1) * self._root
        self._rows.append(row.square().sum(1) if self._diagonal else row)

    def result(self) -> Tensor:
        rows = torch.stack(self._rows, dim=1)
        return rows if self._diagonal else rows @ rows.mT

    def kept_per_example(self, n_outputs: int) -> int:
        return self._root.shape[1] * (1 if self._diagonal else n_outputs)


class _SharedWeights:
    """A layer that each example uses at ``T`` positions."""

    def __init__(self, inverse: DampedInverse, b: Tensor, diagonal: bool) -> None:
        self._root = inverse.weights.sqrt()  # (q, p)
        self._b = b  # (N, T, p)
        self._diagonal = diagonal
        _, positions, p = b.shape
        self._keep_h = not diagonal and positions < p
        self._rows: list[Tensor] = []

    def add(self, h: Tensor) -> None:
        if self._keep_h:
            self._rows.append(h)
        else:
            r = (h.mT @ self._b) * self._root  # (N, q, p)
            self._rows.append(r.square().sum((1, 2)) if self._diagonal else r.flatten(1))

    def result(self) -> Tensor:
        if not self._keep_h:
            rows = torch.stack(self._rows, dim=1)
            return rows if self._diagonal else rows @ rows.mT
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
