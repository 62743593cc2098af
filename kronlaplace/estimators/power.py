"""The leading singular pair of a rearranged Fisher, and best approximations of sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronlaplace.estimators.moments import activation_sum, frobenius, gradient_sum
from kronlaplace.linalg import eigendecompose_symmetric, trace

__all__ = ["Items", "best_of_krylov", "compress", "leading_pair", "made_psd"]


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

    def scaled(self, factor: float) -> Items:
        """The same, counting ``factor`` times as much."""
        root = factor**0.5
        return Items(self._a, self._g * root, None if self._x is None else self._x * root)

    def terms(self, most: int) -> tuple[Tensor, Tensor] | None:
        """The sum itself as Kronecker products, ``(m, K, q/K, q/K)`` and ``(m, K, p, p)``, if there are at most ``most``."""
        if self._x is not None or self._a.shape[2] > 1 or self._a.shape[1] > most:
            return None
        n = self._a.shape[1]
        a, g = self._a[:, :, 0].transpose(0, 1), self._g[:, :, 0].transpose(0, 1)
        gradients = (g.unsqueeze(3) * g.unsqueeze(2)).unflatten(0, (-1, n)).sum(0)
        activations = a.unsqueeze(3) * a.unsqueeze(2)
        norms = _norm(activations)
        return gradients * norms, activations / norms

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

    def by_weights(self, max_iter: int) -> tuple[Tensor, Tensor] | None:
        """The pair by power iteration on the weights of the examples, where that is the cheaper space.

        With weights used once, all iterates are ``Σ_n α_n a_n a_nᵀ`` and ``Σ_n β_n g_n g_nᵀ``, and the maps are
        ``α = K_g β``, ``β = K_a α`` with the squared inner products of the examples: two small matrices. It goes on to
        rounding, which costs next to nothing.
        """
        if self._x is not None or self._a.shape[2] > 1:
            return None
        (groups, n, _, p), q = self._a.shape, self._g.shape[3]
        directions = self._g.shape[1] // n
        if n**2 * (p + directions**2 * q) > 6 * n * (p**2 + directions * q**2):
            return None
        a, g = self._a[:, :, 0], self._g[:, :, 0]
        by_input = (a @ a.mT).square_()
        by_gradient = (g @ g.mT).square_().view(groups, directions, n, directions, n).sum((1, 3))
        beta = torch.diagonal(by_input, dim1=1, dim2=2).sqrt().unsqueeze(2)  # from A = I
        tolerance = 8 * torch.finfo(a.dtype).eps
        alpha = beta
        for _ in range(max_iter):
            alpha = by_gradient @ beta
            alpha = alpha / torch.linalg.vector_norm(alpha, dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
            new = by_input @ alpha
            change = torch.linalg.vector_norm(new - beta, dim=1) - tolerance * torch.linalg.vector_norm(new, dim=1)
            beta = new
            if bool((change <= 0).all()):
                break
        activation = (a * alpha).mT @ a
        return (g * beta.repeat(1, directions, 1)).mT @ g / _norm(activation) / _norm(activation), activation

    def by_block(self) -> tuple[Tensor, Tensor] | None:
        """The pair from the whole rearranged block, for layers with so few outputs that it costs less than a few steps."""
        if self._x is None:
            return None
        groups, _, q, p = self._x.shape
        if q > min(p, 8) or groups * (q * p) ** 2 > 2**22:
            return None
        flat = self._x.flatten(2)
        block = (flat.mT @ flat).view(groups, q, p, q, p)
        rearranged = block.transpose(2, 3).flatten(3).flatten(1, 2).double()  # (K, q², p²)
        vectors = torch.linalg.eigh(rearranged @ rearranged.mT).eigenvectors
        gradient = vectors[:, :, -1:]
        activation = (rearranged.mT @ gradient).view(groups, p, p).to(flat.dtype)
        gradient = gradient.view(groups, q, q).to(flat.dtype)
        sign = torch.sign(trace(activation)).view(-1, 1, 1)
        return gradient * sign, activation * sign

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


def leading_pair(
    items: Items, start: Tensor, max_iter: int, tol: float, *, to_rounding: bool = False
) -> tuple[Tensor, Tensor]:
    """The best ``G ⊗ A`` for the sum over all items: ``A`` of unit Frobenius norm, ``G`` with the scale.

    The power iteration (K-FOC Algorithm 1), with the best combination of all iterates taken instead of the last one
    (Golub and Kahan's bidiagonalisation): the same limit, reached in fewer steps. It waits for the device in every step,
    to see whether it is over.

    Args:
        items: The items.
        start: Where ``A`` starts, shape ``(K, p, p)``.
        max_iter: Most steps. One step is an evaluation of both maps.
        tol: Relative error of the factors at which it stops. The error is seen in what more steps would still add to the
            captured norm, by extrapolation of what the last ones gained: that is its square. In single precision it
            stops too where the square is lost in the rounding of the norm.
        to_rounding: Go on until the residual ``|Rᵀ v − σ u|`` is below ``tol · σ`` instead.
    """
    rounding = 4 * torch.finfo(start.dtype).eps
    loss = 0.0 if to_rounding else tol**2
    if 0 < loss < rounding:  # in double precision the residual tells the factors' error from there on
        loss = 0.0 if start.dtype == torch.float64 else rounding
    direct = items.rank_one() or items.by_weights(max_iter) or items.by_block()
    if direct is not None:
        gradient, activation = direct
        norm = _norm(activation)
        return gradient * norm, activation / norm
    tiny = torch.finfo(start.dtype).tiny
    us = [start / _norm(start)]
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
        left, value, right = _leading_vectors(matrix)
        captured.append(value)
        if step and _settled(captured, loss):
            break
        ws.append(items.to_activation(vs[-1]))
        activation = _combination(left, ws)
        captured.append(frobenius(activation)[:, 0, 0].double())
        w = _orthogonal(ws[-1], us)
        beta = frobenius(w)
        remaining = (beta[:, 0, 0] * left[:, -1].abs()).double()
        if bool((remaining <= tol * captured[-1]).all()) or _settled(captured, loss):
            break
        us.append(w / beta.clamp_min(tiny))
    gradient = _combination(left, vs)
    if len(ws) < len(vs):
        activation = _combination(right, us)
        scale = value.to(start.dtype).view(-1, 1, 1)
    else:  # from the best v the best u for it: its length is the scale
        scale = _norm(activation)
        activation = activation / scale
    sign = torch.sign(trace(activation)).view(-1, 1, 1)
    return gradient * (scale * sign), activation * sign


def _leading_vectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors, ``(K, m)`` each, and value, ``(K,)``, of matrices ``(K, m, m)``."""
    if matrix.shape[1] == 1:
        one = torch.ones_like(matrix[:, 0])
        return one, matrix[:, 0, 0], one
    left, values, right = torch.linalg.svd(matrix)
    return left[:, :, 0], values[:, 0], right[:, 0]


def _settled(captured: list[Tensor], loss: float) -> bool:
    """Whether the gains of the last half steps, continued as a geometric series, come to less than ``loss``."""
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


def compress(gradients: Tensor, activations: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best sum of ``rank`` Kronecker products for a sum of ``m``: no iteration, an SVD of size ``m``.

    Args:
        gradients: ``(m, K, q/K, q/K)``.
        activations: ``(m, K, p, p)``.
        rank: How many terms to keep.

    Returns:
        Terms of the same shapes, ``m = rank``; the first is the best one, with activation factors of unit norm.
    """
    if len(gradients) == 2 and rank == 1:
        return _best_of_two(gradients, activations)
    # Of unit terms, so that rounding is small against the smallest of them.
    lengths = torch.linalg.matrix_norm(gradients) * torch.linalg.matrix_norm(activations)  # (m, K)
    gradients, activations = (some / _norm(some) for some in (gradients, activations))
    left, left_inverse = _root_of_gram(gradients)
    right, right_inverse = _root_of_gram(activations)
    p, s, qh = torch.linalg.svd(left.mT @ (lengths.T.double().unsqueeze(2) * right))
    keep_left = left_inverse.mT @ (p * s.unsqueeze(1))[:, :, :rank]  # (K, m, rank)
    keep_right = right_inverse.mT @ qh.mT[:, :, :rank]
    new_gradients = torch.einsum("mkab,kmr->rkab", gradients, keep_left.to(gradients.dtype))
    new_activations = torch.einsum("mkab,kmr->rkab", activations, keep_right.to(activations.dtype))
    signs = torch.sign(trace(new_activations))[..., None, None]
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return new_gradients * signs, new_activations * signs


def _best_of_two(gradients: Tensor, activations: Tensor) -> tuple[Tensor, Tensor]:
    """`compress` from two positive semidefinite terms to one, in closed form.

    For ``u = Σ c_i A_i`` the map ``Rᵀ R`` is ``c ↦ K_G K_A c`` with the Gram matrices, which have no negative entries.
    """
    gram_g, gram_a = (_gram(some).clamp_min(0) for some in (gradients, activations))
    m = gram_g @ gram_a
    half = (m[:, 0, 0] - m[:, 1, 1]) / 2
    root = torch.sqrt(half.square() + m[:, 0, 1] * m[:, 1, 0])
    # (λ − m_11, m_10) and (m_01, λ − m_00) are both eigenvectors, or zero; their sum is one.
    c = torch.stack([half + root + m[:, 0, 1], root - half + m[:, 1, 0]], dim=1)
    c = c / c.sum(1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny)
    activation = _combination(c, list(activations))
    inner = (gram_a @ c.unsqueeze(2))[:, :, 0]  # <A_i, u>
    norm = _norm(activation)
    return (_combination(inner, list(gradients)) / norm).unsqueeze(0), (activation / norm).unsqueeze(0)


def _gram(matrices: Sequence[Tensor] | Tensor) -> Tensor:
    """Inner products of ``m`` matrices ``(K, ·, ·)``, shape ``(K, m, m)``, summed in their dtype, given as float64."""
    m = len(matrices)
    gram = torch.empty(len(matrices[0]), m, m, dtype=torch.float64, device=matrices[0].device)
    for i in range(m):
        for j in range(i, m):
            gram[:, i, j] = gram[:, j, i] = torch.linalg.vecdot(matrices[i].flatten(1), matrices[j].flatten(1)).double()
    return gram


def _root_of_gram(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``L`` with ``L Lᵀ`` the Gram matrix of ``m`` matrices, and its (pseudo-)inverse, ``(K, m, m)``, float64."""
    gram = _gram(matrices)
    values, vectors = torch.linalg.eigh(gram)
    floor = values[:, -1:] * torch.finfo(matrices.dtype).eps * len(matrices)
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(values > floor, 1 / root.clamp_min(torch.finfo(root.dtype).tiny), torch.zeros_like(root))
    return vectors * root.unsqueeze(1), inverse.unsqueeze(2) * vectors.mT


def best_of_krylov(
    gradients: Sequence[Tensor],
    activations: Sequence[Tensor],
    length_activation: Tensor,
    length_gradient: Tensor,
    new_length_activation: Tensor,
    new_length_gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """The best pair in the span of three successive iterates, from what two passes have seen of the operator ``R``.

    With unit iterates ``u_0, u_1, u_2`` (activations) and ``v_0, v_1, v_2`` (gradients), a pass gives ``R u_i = l v_{i+1}``
    and ``Rᵀ v_i = l' u_{i+1}``. So all entries ``v_iᵀ R u_j`` are known but that of the two newest; the part of it that the
    others do not imply is guessed (`_completion`). The leading singular pair of that 3x3 matrix is nearer to the operator's
    than the newest iterates are.

    Args:
        gradients: ``v_0, v_1, v_2``, shape ``(K, q/K, q/K)``.
        activations: ``u_0, u_1, u_2``, shape ``(K, p, p)``.
        length_activation: ``|Rᵀ v_0|``, shape ``(K, 1, 1)``, float64.
        length_gradient: ``|R u_0|``.
        new_length_activation: ``|Rᵀ v_1|``.
        new_length_gradient: ``|R u_1|``.

    Returns:
        ``G`` with the scale, and ``A`` of unit norm.
    """
    gram_u, gram_v = _gram(activations), _gram(gradients)
    known = torch.zeros_like(gram_u)
    known[:, :, 0] = length_gradient[:, 0] * gram_v[:, :, 1]
    known[:, :, 1] = new_length_gradient[:, 0] * gram_v[:, :, 2]
    known[:, 0, 2] = length_activation[:, 0, 0] * gram_u[:, 1, 2]
    known[:, 1, 2] = new_length_activation[:, 0, 0]
    tolerance = torch.finfo(activations[0].dtype).eps ** (1 / 3)
    to_u, to_v = _orthonormal(gram_u, tolerance), _orthonormal(gram_v, tolerance)
    inner = to_v @ known @ to_u.mT
    inner[:, 2, 2] = _completion(inner)
    left, values, right = torch.linalg.svd(inner)
    activation = _combination((right[:, :1] @ to_u)[:, 0], activations)
    gradient = _combination((left[:, None, :, 0] @ to_v)[:, 0], gradients) * values[:, :1, None].to(gradients[0].dtype)
    sign = torch.sign(trace(activation)).view(-1, 1, 1)
    return gradient * sign, activation * sign


def _completion(inner: Tensor) -> Tensor:
    """A guess at the last entry of matrices ``(K, 3, 3)``: the one that would leave them rank two, shrunk if it is large.

    Large against the singular value it comes from dividing by little; then the least in norm, zero, is the better guess.
    """
    corner = inner[:, :2, :2]
    size = torch.linalg.matrix_norm(corner, keepdim=True).clamp_min(1e-140)  # its square is a number yet
    ridge = (0.03 * size) ** 2 * torch.eye(2, dtype=inner.dtype, device=inner.device)
    guess = inner[:, 2:, :2] @ corner.mT @ torch.linalg.solve(corner @ corner.mT + ridge, inner[:, :2, 2:])
    guess = guess[:, 0, 0]
    return guess / (1 + 9 * (guess / size[:, 0, 0]) ** 2)


def _orthonormal(gram: Tensor, tolerance: float) -> Tensor:
    """Coefficients that make three unit vectors with this Gram matrix orthonormal, ``(K, 3, 3)``, in the order 1, 0, 2.

    The last row is of the newest vector. Where it is hardly a new direction, rounding would be blown up: rows shorter than
    the tolerance fade out (smoothly, so that nothing hangs on which side of a threshold rounding puts it).
    """
    rows: list[Tensor] = []
    for index in (1, 0, 2):
        row = torch.zeros_like(gram[:, 0])
        row[:, index] = 1
        for earlier in rows:
            row = row - earlier * torch.einsum("ki,kij,kj->k", earlier, gram, row).unsqueeze(1)
        square = torch.einsum("ki,kij,kj->k", row, gram, row).clamp_min(0).unsqueeze(1)
        floor = tolerance**4 if rows else torch.finfo(square.dtype).tiny
        rows.append(row * square**1.5 / (square.square() + floor))
    return torch.stack(rows, dim=1)


def _combination(coefficients: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``Σ_i c_i M_i`` for coefficients ``(K, m)`` and ``m`` matrices ``(K, ·, ·)``."""
    weights = coefficients.to(matrices[0].dtype).unsqueeze(2).unsqueeze(3)
    total = weights[:, 0] * matrices[0]
    for i in range(1, len(matrices)):
        total = total + weights[:, i] * matrices[i]
    return total


def made_psd(matrices: Tensor, name: str) -> Tensor:
    """Symmetric matrices ``(K, n, n)`` with their eigenvalues below zero, which are small, reflected.

    Cut off, they would leave eigenvectors of zero that are arbitrary, and `EKFAC` takes the eigenvectors.
    """
    parts = eigendecompose_symmetric({f"a factor of layer {name!r}{' ' * k}": m for k, m in enumerate(matrices)})
    return torch.stack([(e.vectors * e.values.abs()) @ e.vectors.T for e in parts.values()])


def _norm(matrices: Tensor) -> Tensor:
    return frobenius(matrices).clamp_min(torch.finfo(matrices.dtype).tiny)
