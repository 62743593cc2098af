"""Leading singular triple of a rearranged Fisher by power iteration (K-FOC Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronlaplace.blocks.eigendecomposition import eigendecompose_symmetric, trace
from kronlaplace.estimators.kfoc.kept_examples import KeptExamples
from kronlaplace.estimators.kfoc.options import Initialization
from kronlaplace.estimators.kfoc.truncation import batched_eigen, by_group, unit
from kronlaplace.estimators.second_moments import frobenius

__all__ = ["PowerIteration", "leading_triple", "linear_combination", "made_psd"]


@dataclass(frozen=True)
class PowerIteration:
    """Settings of a power iteration.

    Args:
        max_iter: Maximum number of steps.
        tol: Relative error of the factors at which the iteration stops.
        init: Starting point of the iteration.
        seed: Seed of a random starting point.
    """

    max_iter: int
    tol: float
    init: Initialization
    seed: int

    def leading_triple(
        self, examples: KeptExamples, name: str, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best ``s · G ⊗ A`` of the examples, starting from ``start`` if it is given."""
        start = self._start(examples) if start is None else start
        return leading_triple(examples, start, self.max_iter, self.tol, name)

    def to_rounding(self, examples: KeptExamples, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best ``s · G ⊗ A``, iterated until the relative residual is below ``tol²``."""
        return leading_triple(examples, self._start(examples), self.max_iter, self.tol**2, name, to_rounding=True)

    def _start(self, examples: KeptExamples) -> Tensor:
        identity = examples.identity()
        if self.init is Initialization.IDENTITY:
            return identity
        generator = torch.Generator(device=identity.device).manual_seed(self.seed)
        draw = torch.randn(identity.shape, generator=generator, dtype=identity.dtype, device=identity.device)
        # The maps do not mix symmetric and antisymmetric matrices, and the leading pair is symmetric. The formulas by which
        # they are evaluated only hold for symmetric matrices.
        return (draw + draw.mT) / 2


def leading_triple(
    items: KeptExamples, start: Tensor, max_iter: int, tol: float, name: str, *, to_rounding: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best ``s · G ⊗ A`` for the sum over all items.

    This is the power iteration of K-FOC Algorithms 1 and 2, except that it takes the best combination of all iterates
    instead of the last one (Golub and Kahan's bidiagonalization), which reaches the same limit in fewer steps. It waits
    for the device in every step to check for convergence.

    Args:
        items: The examples.
        start: Starting point of ``A``, shape ``(K, p, p)``.
        max_iter: Maximum number of steps. Each step evaluates both maps.
        tol: Relative error of the factors at which the iteration stops. Its square is estimated by extrapolating how much
            further steps would add to the captured norm. In single precision the iteration also stops when the square is
            lost in the rounding of the norm.
        name: Name of the factors in error messages.
        to_rounding: Whether to continue until the residual ``|Rᵀ v − σ u|`` is below ``tol · σ`` instead.

    Returns:
        ``s``, shape ``(K,)``, float64, not negative; ``G``, shape ``(K, q/K, q/K)``, and ``A``, shape ``(K, p, p)``, of unit
        Frobenius norm. If all items are zero, all three are zero.
    """
    items, unit_size = items.normalized()
    gradient, activation = items.direct(max_iter, name) or _iterated(items, start, max_iter, tol, name, to_rounding)
    lengths = frobenius(gradient), frobenius(activation)
    size = lengths[0].double() * lengths[1].double()
    # If nothing is left, both factors are zero. Rounding does not decide this: the largest entries of the items are one.
    some = (size > 0).to(gradient.dtype)
    gradient, activation = (
        matrix * (some / length.clamp_min(torch.finfo(length.dtype).tiny))
        for matrix, length in zip((gradient, activation), lengths, strict=True)
    )
    return size[:, 0, 0] * unit_size, gradient, activation


def _iterated(
    items: KeptExamples, start: Tensor, max_iter: int, tol: float, name: str, to_rounding: bool
) -> tuple[Tensor, Tensor]:
    """Return the leading ``(G, A)``, with the size split arbitrarily, by the iteration of `leading_triple`."""
    rounding = 4 * torch.finfo(start.dtype).eps
    loss = 0.0 if to_rounding else tol**2
    if 0 < loss < rounding:  # in double precision the residual measures the error from there on
        loss = 0.0 if start.dtype == torch.float64 else rounding
    tiny = torch.finfo(start.dtype).tiny
    us = [unit(start)]
    vs: list[Tensor] = []
    ws: list[Tensor] = []
    captured: list[Tensor] = []
    matrix = start.new_zeros(len(start), 0, 0, dtype=torch.float64)  # R u_j = Σ_i matrix[i, j] v_i
    for step in range(max_iter):
        z = items.to_gradient(us[-1])
        inner = [(z * v).sum((1, 2)) for v in vs]
        z = _orthogonal(z, vs)
        inner.append(frobenius(z)[:, 0, 0])
        matrix = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
        matrix[:, :, -1] = torch.stack(inner, dim=1).double()
        vs.append(z / inner[-1].clamp_min(tiny).view(-1, 1, 1))
        left, value, right = _leading_vectors(matrix, name)
        captured.append(value)
        if step and _settled(captured, loss):
            break
        ws.append(items.to_activation(vs[-1]))
        activation = linear_combination(left, ws)
        captured.append(frobenius(activation)[:, 0, 0].double())
        w = _orthogonal(ws[-1], us)
        beta = frobenius(w)
        remaining = (beta[:, 0, 0] * left[:, -1].abs()).double()
        if bool((remaining <= tol * captured[-1]).all()) or _settled(captured, loss):
            break
        us.append(w / beta.clamp_min(tiny))
    gradient = linear_combination(left, vs)
    if len(ws) < len(vs):
        activation = linear_combination(value.unsqueeze(1) * right, us)
    # Otherwise it is the best u for the best v, and its norm is already the size.
    sign = torch.where(trace(activation) < 0, -1.0, 1.0).to(activation.dtype).view(-1, 1, 1)
    return gradient * sign, activation * sign


def _leading_vectors(matrix: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular vectors, ``(K, m)`` each, and value, ``(K,)``, of matrices ``(K, m, m)``."""
    if matrix.shape[1] == 1:
        one = torch.ones_like(matrix[:, 0])
        return one, matrix[:, 0, 0], one
    try:  # this runs in every step, so the fastest way comes first
        left, values, right = torch.linalg.svd(matrix)
        return left[:, :, 0], values[:, 0], right[:, 0]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        right = batched_eigen(matrix.mT @ matrix, name)[1][:, :, -1]
    left = (matrix @ right.unsqueeze(2))[:, :, 0]
    value = torch.linalg.vector_norm(left, dim=1)
    return left / value.clamp_min(torch.finfo(value.dtype).tiny).unsqueeze(1), value, right


def _settled(captured: list[Tensor], loss: float) -> bool:
    """Return whether the gains of the last half steps, continued as a geometric series, sum to less than ``loss``."""
    if len(captured) < 3 or not loss:
        return False
    before, last = captured[-2] - captured[-3], captured[-1] - captured[-2]
    ratio = (last / before.clamp_min(torch.finfo(last.dtype).tiny)).clamp(0, 0.95)
    return bool((last.clamp_min(0) * ratio / (1 - ratio) <= loss * captured[-1]).all())


def _orthogonal(w: Tensor, basis: list[Tensor]) -> Tensor:
    for _ in range(2):  # once is not enough in floating point
        for b in basis:
            w = w - b * (w * b).sum((1, 2), keepdim=True)
    return w


def linear_combination(coefficients: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Compute ``Σ_i c_i M_i`` for coefficients ``(K, m)`` and ``m`` matrices ``(K, ·, ·)``."""
    weights = coefficients.to(matrices[0].dtype).unsqueeze(2).unsqueeze(3)
    total = weights[:, 0] * matrices[0]
    for i in range(1, len(matrices)):
        total = total + weights[:, i] * matrices[i]
    return total


def made_psd(matrices: Tensor, name: str) -> Tensor:
    """Return symmetric matrices ``(K, n, n)`` with their negative eigenvalues, which are small, reflected.

    Setting them to zero would make their eigenvectors arbitrary, and `EKFAC` uses the eigenvectors.
    """
    parts = eigendecompose_symmetric(by_group(matrices, name))
    return torch.stack([(e.vectors * e.values.abs()) @ e.vectors.T for e in parts])
