"""The leading singular pair of a rearranged Fisher, and best approximations of sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronlaplace.estimators.moments import activation_sum, frobenius, gradient_sum, trace
from kronlaplace.linalg import eigendecompose

__all__ = ["Items", "compress", "leading_pair", "nearest_psd"]


class Items:
    """Examples, kept so that ``A ↦ Σ X A Xᵀ`` and ``G ↦ Σ Xᵀ G X`` can be evaluated again and again.

    Args:
        a: ``(K, N, T, p)``.
        g: ``(K, M, T, q/K)``; ``M`` may be a multiple of ``N``, several directions with the same inputs.
    """

    def __init__(self, a: Tensor, g: Tensor, x: Tensor | None = None) -> None:
        self._a, self._g, self._x = a, g, x

    @classmethod
    def of_weight_gradients(cls, x: Tensor) -> Items:
        """From ``X`` itself, shape ``(K, N, q/K, p)``."""
        return cls(x[:, :0], x[:, :0], x)

    @classmethod
    def joined(cls, parts: Sequence[Items], *, same_inputs: bool) -> Items:
        """All items together; with ``same_inputs`` the parts are directions of one batch."""
        if len(parts) == 1:
            return parts[0]
        if parts[0]._x is not None:
            return cls.of_weight_gradients(torch.cat([part._x for part in parts if part._x is not None], dim=1))
        g = torch.cat([part._g for part in parts], dim=1)
        if same_inputs:
            return cls(parts[0]._a, g)
        return cls(torch.cat([part._inputs for part in parts], dim=1), g)

    @property
    def _inputs(self) -> Tensor:
        """``a`` for every direction, ``(K, M, T, p)``."""
        times = self._g.shape[1] // self._a.shape[1]
        return self._a if times == 1 else self._a.repeat(1, times, 1, 1)

    @property
    def _some(self) -> Tensor:
        return self._a if self._x is None else self._x

    @property
    def groups(self) -> int:
        """``K``."""
        return len(self._some)

    @property
    def p(self) -> int:
        """``p``."""
        return self._some.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the sums."""
        return self._some.dtype

    @property
    def device(self) -> torch.device:
        """Device of the sums."""
        return self._some.device

    def scale(self, factor: float) -> None:
        """Make all items count ``factor`` times as much."""
        if self._x is not None:
            self._x = self._x * factor**0.5
        self._g = self._g * factor**0.5

    def rank_one(self) -> tuple[Tensor, Tensor] | None:
        """The pair itself, ``(G, A)``, where the sum has one term in the Kronecker space or is that of one matrix ``X``.

        One example with the weights used once is ``Σ_v g gᵀ ⊗ a aᵀ``; for one ``X = Σ s_i u_i v_iᵀ`` the leading pair
        is ``s_1² u_1 u_1ᵀ ⊗ v_1 v_1ᵀ``.
        """
        if self._x is None and self._a.shape[1:3] == (1, 1):
            a, g = self._a[:, 0], self._g[:, :, 0]
            norm = a.square().sum(2, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
            return (g.mT @ g) * norm, a.mT @ a / norm
        x = self._x
        if x is None and self._g.shape[1] == 1:
            x = self._g.mT @ self._a
        if x is None or x.shape[1] != 1:
            return None
        u, s, vh = torch.linalg.svd(x[:, 0], full_matrices=False)
        left, right = u[:, :, :1] * s[:, None, :1], vh[:, :1]
        return left @ left.mT, right.mT @ right

    def to_gradient(self, activation: Tensor) -> Tensor:
        """``Σ X A Xᵀ``, shape ``(K, q/K, q/K)``."""
        if self._x is not None:
            return gradient_sum(self._x, activation)
        kernel = self._a @ activation.unsqueeze(1) @ self._a.mT  # (K, N, T, T)
        times = self._g.shape[1] // self._a.shape[1]
        kernel = kernel if times == 1 else kernel.repeat(1, times, 1, 1)
        mixed = kernel * self._g if kernel.shape[2] == 1 else kernel @ self._g
        return self._g.flatten(1, 2).mT @ mixed.flatten(1, 2)

    def to_activation(self, gradient: Tensor) -> Tensor:
        """``Σ Xᵀ G X``, shape ``(K, p, p)``."""
        if self._x is not None:
            return activation_sum(self._x, gradient)
        if self._g.shape[2] == 1:
            kernel = ((self._g @ gradient.unsqueeze(1)) * self._g).sum(3, keepdim=True)
        else:
            kernel = self._g @ gradient.unsqueeze(1) @ self._g.mT
        times = self._g.shape[1] // self._a.shape[1]
        kernel = kernel.unflatten(1, (times, -1)).sum(1)
        mixed = kernel * self._a if kernel.shape[2] == 1 else kernel @ self._a
        return self._a.flatten(1, 2).mT @ mixed.flatten(1, 2)


def leading_pair(items: Items, start: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor]:
    """The best ``G ⊗ A`` for the sum over all items: ``A`` of unit Frobenius norm, ``G`` with the scale.

    The power iteration (K-FOC Algorithm 1), with the best combination of all iterates taken instead of the last one
    (Golub and Kahan's bidiagonalisation): the same limit, reached in fewer steps. Each step waits for the device once,
    to see whether it is over.

    Args:
        items: The items.
        start: Where ``A`` starts, shape ``(K, p, p)``.
        max_iter: Most steps.
        tol: Relative residual at which it stops.
    """
    direct = items.rank_one()
    if direct is not None:
        gradient, activation = direct
        norm = _norm(activation)
        return gradient * norm, activation / norm
    u = start / _norm(start)
    v = items.to_gradient(u)
    alpha = frobenius(v)
    v = v / alpha.clamp_min(torch.finfo(v.dtype).tiny)
    us, vs, alphas = [u], [v], [alpha]
    betas: list[Tensor] = []
    coefficients, value = _leading(alphas, betas)
    for _ in range(max_iter - 1 if max_iter > 1 else 0):
        w = _orthogonal(items.to_activation(vs[-1]), us)
        beta = frobenius(w)
        if bool((beta * coefficients[:, -1:, None].abs() <= tol * value).all()):
            break
        us.append(w / beta.clamp_min(torch.finfo(w.dtype).tiny))
        z = _orthogonal(items.to_gradient(us[-1]), vs)
        alphas.append(frobenius(z))
        betas.append(beta)
        vs.append(z / alphas[-1].clamp_min(torch.finfo(z.dtype).tiny))
        coefficients, value = _leading(alphas, betas)
    # A last half step, from the gradient factor: for one iterate only it is the power iteration's.
    gradient = torch.einsum("ki,ikab->kab", coefficients, torch.stack(vs))
    activation = items.to_activation(gradient)
    activation = activation * torch.sign(trace(activation)).view(-1, 1, 1)
    activation = activation / _norm(activation)
    return items.to_gradient(activation), activation


def _leading(alphas: list[Tensor], betas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Leading left singular vector, ``(K, m)``, and singular value, ``(K, 1, 1)``, of the bidiagonal matrix."""
    m = len(alphas)
    groups = len(alphas[0])
    # R u_1 = α_1 v_1,  R u_{i+1} = β_i v_i + α_{i+1} v_{i+1}
    matrix = alphas[0].new_zeros(groups, m, m, dtype=torch.float64)
    for i, alpha in enumerate(alphas):
        matrix[:, i, i] = alpha[:, 0, 0]
    for i, beta in enumerate(betas):
        matrix[:, i, i + 1] = beta[:, 0, 0]
    left, values, _ = torch.linalg.svd(matrix)
    dtype = alphas[0].dtype
    return left[:, :, 0].to(dtype), values[:, :1, None].to(dtype)


def _orthogonal(w: Tensor, basis: list[Tensor]) -> Tensor:
    for _ in range(2):  # once is not enough in floating point
        for b in basis:
            w = w - b * (w * b).sum((1, 2), keepdim=True)
    return w


def compress(gradients: Tensor, activations: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best sum of ``rank`` Kronecker products for a sum of ``m``: no iteration, an SVD of size ``m``.

    Args:
        gradients: ``(m, K, q/K, q/K)``.
        activations: ``(m, K, p, p)``.
        rank: How many terms to keep.

    Returns:
        Terms of the same shapes, ``m = rank``; the first is the best one, with activation factors of unit norm.
    """
    left, left_inverse = _root_of_gram(gradients)
    right, right_inverse = _root_of_gram(activations)
    p, s, qh = torch.linalg.svd(left.mT @ right)
    keep_left = left_inverse.mT @ (p * s.unsqueeze(1))[:, :, :rank]  # (K, m, rank)
    keep_right = right_inverse.mT @ qh.mT[:, :, :rank]
    new_gradients = torch.einsum("mkab,kmr->rkab", gradients, keep_left.to(gradients.dtype))
    new_activations = torch.einsum("mkab,kmr->rkab", activations, keep_right.to(activations.dtype))
    signs = torch.sign(trace(new_activations))[..., None, None]
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return new_gradients * signs, new_activations * signs


def _root_of_gram(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``L`` with ``L Lᵀ`` the Gram matrix of ``m`` matrices, and its (pseudo-)inverse, ``(K, m, m)``, float64."""
    flat = matrices.flatten(2).transpose(0, 1)  # (K, m, ·)
    gram = (flat @ flat.mT).double()
    values, vectors = torch.linalg.eigh(gram)
    floor = values[:, -1:] * torch.finfo(matrices.dtype).eps * len(matrices)
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(values > floor, 1 / root.clamp_min(torch.finfo(root.dtype).tiny), torch.zeros_like(root))
    return vectors * root.unsqueeze(1), inverse.unsqueeze(2) * vectors.mT


def nearest_psd(matrices: Tensor, name: str) -> Tensor:
    """The nearest positive semidefinite matrices, shape ``(K, n, n)``."""
    parts = eigendecompose({f"a factor of layer {name!r}{' ' * k}": m for k, m in enumerate(matrices)})
    return torch.stack([(e.vectors * e.values) @ e.vectors.T for e in parts.values()])


def _norm(matrices: Tensor) -> Tensor:
    return frobenius(matrices).clamp_min(torch.finfo(matrices.dtype).tiny)
