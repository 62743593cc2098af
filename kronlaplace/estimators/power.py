"""The leading singular triple of a rearranged Fisher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kronlaplace.estimators.moments import activation_sum, frobenius, gradient_sum
from kronlaplace.estimators.truncation import Examples, batched_eigen, by_group, leading_eigenvector, unit
from kronlaplace.layers import LayerGradients
from kronlaplace.linalg import eigendecompose_symmetric, trace

__all__ = ["Items", "best_of_krylov", "items_of", "joined", "leading_triple", "made_psd"]


class Items(Protocol):
    """Examples, kept so that ``A ↦ Σ X A Xᵀ`` and ``G ↦ Σ Xᵀ G X`` can be evaluated again and again.

    `Pairs` keeps ``a`` and ``g``, `Matrices` keeps ``X = Σ_t g_t a_tᵀ``; `items_of` chooses.
    """

    def scaled(self, factor: float) -> Items:
        """The same, counting ``factor`` times as much."""

    def copied(self) -> Items:
        """The same in memory of its own."""

    def normalized(self) -> tuple[Items, Tensor]:
        """The same with a largest entry of one, and how much it counts, shape ``(K,)``, float64.

        Powers of small gradients would underflow: the power iteration has fourth ones.
        """

    def identity(self) -> Tensor:
        """The identity as ``A``, shape ``(K, p, p)``, in the sums' dtype and on their device."""

    def matrices(self) -> Tensor:
        """``X``, shape ``(K, M, q/K, p)``."""

    def examples(self, most: int) -> Examples | None:
        """Copies, if each example is one Kronecker product and there are at most ``most``."""

    def direct(self, max_iter: int, name: str) -> tuple[Tensor, Tensor] | None:
        """The leading ``(G, A)``, up to how the size is shared, where there is a cheaper way than `leading_triple`'s."""

    def to_gradient(self, activation: Tensor) -> Tensor:
        """``Σ X A Xᵀ``, shape ``(K, q/K, q/K)``."""

    def to_activation(self, gradient: Tensor) -> Tensor:
        """``Σ Xᵀ G X``, shape ``(K, p, p)``."""


class Pairs:
    """Examples by ``a`` and ``g``, for few positions.

    Args:
        a: ``(K, N, T, p)``.
        g: ``(K, M, T, q/K)``; ``M`` is ``N`` times the number of directions with the same inputs, direction by direction.
    """

    def __init__(self, a: Tensor, g: Tensor) -> None:
        self.a, self.g = a, g

    @property
    def positions(self) -> int:
        """``T``."""
        return self.a.shape[2]

    @property
    def directions(self) -> int:
        """How many directions have the same inputs."""
        return self.g.shape[1] // self.a.shape[1]

    def inputs(self) -> Tensor:
        """``a`` for every direction, ``(K, M, T, p)``."""
        return _repeated(self.a, self.directions)

    def scaled(self, factor: float) -> Pairs:
        return Pairs(self.a, self.g * factor**0.5)

    def copied(self) -> Pairs:
        return Pairs(self.a.clone(), self.g.clone())

    def normalized(self) -> tuple[Pairs, Tensor]:
        a, input_size = _normalized(self.a)
        g, gradient_size = _normalized(self.g)
        return Pairs(a, g), (input_size * gradient_size).square()

    def identity(self) -> Tensor:
        return _identity_for(self.a)

    def matrices(self) -> Tensor:
        return self.g.mT @ self.inputs()

    def examples(self, most: int) -> Examples | None:
        n = self.a.shape[1]
        if self.positions > 1 or n > most:
            return None
        return Examples(self.a.clone(), self.g[:, :, 0].unflatten(1, (-1, n)).transpose(1, 2).clone())

    def direct(self, max_iter: int, name: str) -> tuple[Tensor, Tensor] | None:
        if self.positions == 1:
            return self._of_one_input() if self.a.shape[1] == 1 else self._by_weights(max_iter)
        return _pair_of_one(self.matrices(), name) if self.g.shape[1] == 1 else None

    def _of_one_input(self) -> tuple[Tensor, Tensor]:
        """The pair itself of one example with the weights used once, ``Σ_v g gᵀ ⊗ a aᵀ``."""
        a, g = self.a[:, 0], self.g[:, :, 0]
        return g.mT @ g, a.mT @ a

    def _by_weights(self, max_iter: int) -> tuple[Tensor, Tensor] | None:
        """The pair by power iteration on the weights of the examples, where that is the cheaper space.

        With weights used once, all iterates are ``Σ_n α_n a_n a_nᵀ`` and ``Σ_n β_n g_n g_nᵀ``, and the maps are
        ``α = K_g β``, ``β = K_a α`` with the squared inner products of the examples: two small matrices. It goes on to
        rounding, which costs next to nothing.
        """
        a, g, directions = self.a[:, :, 0], self.g[:, :, 0], self.directions
        (groups, n, p), q = a.shape, g.shape[2]
        if n**2 * (p + directions**2 * q) > 6 * n * (p**2 + directions * q**2):
            return None
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
        square = frobenius(activation).square().clamp_min(torch.finfo(a.dtype).tiny)
        return (g * beta.repeat(1, directions, 1)).mT @ g / square, activation

    def to_gradient(self, activation: Tensor) -> Tensor:
        kernel = _repeated(self.a @ activation.unsqueeze(1) @ self.a.mT, self.directions)  # (K, M, T, T)
        mixed = kernel * self.g if self.positions == 1 else kernel @ self.g
        return self.g.flatten(1, 2).mT @ mixed.flatten(1, 2)

    def to_activation(self, gradient: Tensor) -> Tensor:
        kernel = self.g @ gradient.unsqueeze(1)
        kernel = (kernel * self.g).sum(3, keepdim=True) if self.positions == 1 else kernel @ self.g.mT  # (K, M, T, T)
        kernel = kernel.unflatten(1, (self.directions, -1)).sum(1)
        mixed = kernel * self.a if self.positions == 1 else kernel @ self.a
        return self.a.flatten(1, 2).mT @ mixed.flatten(1, 2)


class Matrices:
    """Examples by ``X``, for many positions.

    Args:
        x: ``(K, M, q/K, p)``.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def scaled(self, factor: float) -> Matrices:
        return Matrices(self._x * factor**0.5)

    def copied(self) -> Matrices:
        return self  # X is a product, and no view of anything

    def normalized(self) -> tuple[Matrices, Tensor]:
        x, size = _normalized(self._x)
        return Matrices(x), size.square()

    def identity(self) -> Tensor:
        return _identity_for(self._x)

    def matrices(self) -> Tensor:
        return self._x

    def examples(self, most: int) -> Examples | None:
        return None  # as a sum of Kronecker products an example has as many terms as X has singular values, squared

    def direct(self, max_iter: int, name: str) -> tuple[Tensor, Tensor] | None:
        return _pair_of_one(self._x, name) if self._x.shape[1] == 1 else self._by_block(name)

    def _by_block(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The pair from the whole rearranged block, for layers with so few outputs that it costs less than a few steps."""
        groups, _, q, p = self._x.shape
        if q > min(p, 8) or groups * (q * p) ** 2 > 2**22:
            return None
        flat = self._x.flatten(2)
        block = (flat.mT @ flat).view(groups, q, p, q, p)
        rearranged = block.transpose(2, 3).flatten(3).flatten(1, 2).double()  # (K, q², p²)
        start = rearranged @ torch.eye(p, dtype=torch.float64, device=flat.device).flatten()
        gradient = leading_eigenvector(*batched_eigen(rearranged @ rearranged.mT, name), start).unsqueeze(2)
        activation = rearranged.mT @ gradient
        return gradient.view(groups, q, q).to(flat.dtype), activation.view(groups, p, p).to(flat.dtype)

    def to_gradient(self, activation: Tensor) -> Tensor:
        return gradient_sum(self._x, activation)

    def to_activation(self, gradient: Tensor) -> Tensor:
        return activation_sum(self._x, gradient)


def items_of(gradients: LayerGradients) -> Items:
    """All examples of one direction, in the form that takes the least memory."""
    p = gradients.layer.shape[1]
    g = gradients.gradients()
    if gradients.once_per_example or g.shape[2] * (p + g.shape[3]) < g.shape[3] * p:
        return Pairs(gradients.activations(), g)
    return Matrices(torch.cat([part.weight_gradients() for part in gradients.parts()], dim=1))


def joined(parts: Sequence[Items], *, same_inputs: bool) -> Items:
    """All items together; with ``same_inputs`` the parts are directions of one batch."""
    if len(parts) == 1:
        return parts[0]
    pairs = [part for part in parts if isinstance(part, Pairs)]
    if len(pairs) < len(parts) or len({part.positions for part in pairs}) > 1:  # sequences of several lengths
        return Matrices(torch.cat([part.matrices() for part in parts], dim=1))
    g = torch.cat([part.g for part in pairs], dim=1)
    return Pairs(pairs[0].a if same_inputs else torch.cat([part.inputs() for part in pairs], dim=1), g)


def _repeated(tensor: Tensor, times: int) -> Tensor:
    """``(K, N, ·, ·)`` several times over along the examples."""
    return tensor if times == 1 else tensor.repeat(1, times, 1, 1)


def _identity_for(tensor: Tensor) -> Tensor:
    """The identity ``(K, p, p)`` for ``(K, ..., p)``."""
    groups, p = tensor.shape[0], tensor.shape[-1]
    return torch.eye(p, dtype=tensor.dtype, device=tensor.device).expand(groups, p, p)


def _normalized(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """``(K, ·, ·, ·)`` over its largest absolute entry (zeros stay zeros), and that entry, ``(K,)``, float64."""
    size = torch.linalg.vector_norm(tensor, ord=torch.inf, dim=(1, 2, 3), keepdim=True)
    return tensor / size.clamp_min(torch.finfo(tensor.dtype).tiny), size.double().flatten()


def _pair_of_one(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The leading pair of one ``X = Σ s_i u_i v_iᵀ``, shape ``(K, 1, q/K, p)``: ``s_1² u_1 u_1ᵀ ⊗ v_1 v_1ᵀ``."""
    x = x[:, 0]
    wide = x.shape[1] < x.shape[2]
    one = x.mT if wide else x  # (K, m, n) with n ≤ m
    right = batched_eigen((one.mT @ one).double(), name)[1][:, :, -1:].to(x.dtype)
    left = one @ right
    left, right = left @ left.mT, right @ right.mT
    return (right, left) if wide else (left, right)


def leading_triple(
    items: Items, start: Tensor, max_iter: int, tol: float, name: str, *, to_rounding: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``s · G ⊗ A`` for the sum over all items.

    The power iteration (K-FOC Algorithms 1 and 2), with the best combination of all iterates taken instead of the last one
    (Golub and Kahan's bidiagonalisation): the same limit, reached in fewer steps. It waits for the device in every step,
    to see whether it is over.

    Args:
        items: The items.
        start: Where ``A`` starts, shape ``(K, p, p)``.
        max_iter: Most steps. One step is an evaluation of both maps.
        tol: Relative error of the factors at which it stops. The error is seen in what more steps would still add to the
            captured norm, by extrapolation of what the last ones gained: that is its square. In single precision it
            stops too where the square is lost in the rounding of the norm.
        name: What an error calls it.
        to_rounding: Go on until the residual ``|Rᵀ v − σ u|`` is below ``tol · σ`` instead.

    Returns:
        ``s``, shape ``(K,)``, float64, not negative; ``G``, shape ``(K, q/K, q/K)``, and ``A``, shape ``(K, p, p)``, of unit
        Frobenius norm. Where all items are zero all three are.
    """
    items, unit_size = items.normalized()
    gradient, activation = items.direct(max_iter, name) or _iterated(items, start, max_iter, tol, name, to_rounding)
    lengths = frobenius(gradient), frobenius(activation)
    size = lengths[0].double() * lengths[1].double()
    # Where nothing is left both factors are zero. Rounding does not decide: the largest entries of the items are one.
    some = (size > 0).to(gradient.dtype)
    gradient, activation = (
        matrix * (some / length.clamp_min(torch.finfo(length.dtype).tiny))
        for matrix, length in zip((gradient, activation), lengths, strict=True)
    )
    return size[:, 0, 0] * unit_size, gradient, activation


def _iterated(
    items: Items, start: Tensor, max_iter: int, tol: float, name: str, to_rounding: bool
) -> tuple[Tensor, Tensor]:
    """The leading ``(G, A)``, up to how the size is shared, by the iteration of `leading_triple`."""
    rounding = 4 * torch.finfo(start.dtype).eps
    loss = 0.0 if to_rounding else tol**2
    if 0 < loss < rounding:  # in double precision the residual tells the factors' error from there on
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
        activation = _combination(value.unsqueeze(1) * right, us)
    # Else it is the best u for the best v, and its length is the size already.
    sign = torch.where(trace(activation) < 0, -1.0, 1.0).to(activation.dtype).view(-1, 1, 1)
    return gradient * sign, activation * sign


def _leading_vectors(matrix: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors, ``(K, m)`` each, and value, ``(K,)``, of matrices ``(K, m, m)``."""
    if matrix.shape[1] == 1:
        one = torch.ones_like(matrix[:, 0])
        return one, matrix[:, 0, 0], one
    try:  # in every step, so by the quickest way
        left, values, right = torch.linalg.svd(matrix)
        return left[:, :, 0], values[:, 0], right[:, 0]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        right = batched_eigen(matrix.mT @ matrix, name)[1][:, :, -1]
    left = (matrix @ right.unsqueeze(2))[:, :, 0]
    value = torch.linalg.vector_norm(left, dim=1)
    return left / value.clamp_min(torch.finfo(value.dtype).tiny).unsqueeze(1), value, right


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


def best_of_krylov(
    gradients: Sequence[Tensor],
    activations: Sequence[Tensor],
    name: str,
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
        name: What an error calls them.
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
    start = inner.new_tensor([1.0, 0.0, 0.0]).expand(len(inner), 3)  # u_1, which is positive semidefinite
    right = leading_eigenvector(*batched_eigen(inner.mT @ inner, name), start)
    left = (inner @ right.unsqueeze(2)).mT  # with the size
    return _combination((left @ to_v)[:, 0], gradients), _combination((right.unsqueeze(1) @ to_u)[:, 0], activations)


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


def _gram(matrices: Sequence[Tensor]) -> Tensor:
    """Inner products of a few matrices ``(K, ·, ·)`` of about unit norm, summed in their dtype: ``(K, m, m)``, float64."""
    m = len(matrices)
    gram = torch.empty(len(matrices[0]), m, m, dtype=torch.float64, device=matrices[0].device)
    for i in range(m):
        for j in range(i, m):
            gram[:, i, j] = gram[:, j, i] = torch.linalg.vecdot(matrices[i].flatten(1), matrices[j].flatten(1)).double()
    return gram


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
    parts = eigendecompose_symmetric(by_group(matrices, name))
    return torch.stack([(e.vectors * e.values.abs()) @ e.vectors.T for e in parts])
