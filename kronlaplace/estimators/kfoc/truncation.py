"""Truncation of sums of Kronecker products to fewer terms.

Rearranged, ``Σ_i s_i G_i ⊗ A_i`` is the operator ``R = Σ_i s_i vec(G_i) vec(A_i)ᵀ`` (K-FOC Lemma 3.1), and its best
approximation by ``r`` terms consists of its ``r`` leading singular triples. Their factors are combinations of the ``m``
given factors, so the ``m x m`` Gram matrices determine them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kronlaplace.blocks import KroneckerBlock
from kronlaplace.blocks.eigendecomposition import Named, eigendecompose, trace
from kronlaplace.estimators.second_moments import factors_by_group, frobenius

__all__ = [
    "Examples",
    "Terms",
    "batched_eigen",
    "by_group",
    "concatenated",
    "factors_of",
    "leading_eigenvector",
    "terms_of",
    "truncated",
    "unit",
]

# Number of power iteration steps that `leading_eigenvector` takes in closed form. Eigenvalues with a relative difference
# below about 1 / _STEPS count as equal; the result falls short of the largest eigenvalue by less than that.
_STEPS = 2.0**26

_COLUMNS = 2**16  # number of columns of matrices that are converted to float64 at a time


class Terms(NamedTuple):
    """Sum ``Σ_i s_i G_i ⊗ A_i`` of ``m`` terms.

    Attributes:
        sizes: Sizes ``s``, shape ``(K, m)``, float64.
        gradients: Factors ``G``, shape ``(K, m, q/K, q/K)``, of unit Frobenius norm, or zero where the size is zero.
        activations: Factors ``A``, shape ``(K, m, p, p)``, likewise.
    """

    sizes: Tensor
    gradients: Tensor
    activations: Tensor


@dataclass(frozen=True)
class Examples:
    """Examples that use the weights once, ``Σ_n (Σ_v g_nv g_nvᵀ) ⊗ a_n a_nᵀ``, not multiplied out.

    Attributes:
        a: Activations, shape ``(K, N, 1, p)``.
        g: Gradients, shape ``(K, N, V, q/K)``.
    """

    a: Tensor
    g: Tensor

    def __len__(self) -> int:
        return self.a.shape[1]

    def scaled(self, factor: float) -> Examples:
        """Return a copy that counts ``factor`` times as much."""
        return replace(self, g=self.g * factor**0.5)


def terms_of(block: KroneckerBlock) -> Terms:
    """Return a Kronecker block as a sum with one term."""
    gradient, activation, scale = factors_by_group(block)
    norms = frobenius(gradient, torch.float64), frobenius(activation, torch.float64)
    unit_gradient, unit_activation = (
        (factor / norm.clamp_min(torch.finfo(factor.dtype).tiny)).to(factor.dtype)[:, None]
        for factor, norm in zip((gradient, activation), norms, strict=True)
    )
    return Terms((scale.double() * norms[0] * norms[1])[:, :, 0], unit_gradient, unit_activation)


def concatenated(parts: Sequence[Terms]) -> Terms:
    """Return the terms of all parts as one sum."""
    return Terms(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


def truncated(terms: Terms | None, examples: Sequence[Examples], rank: int, name: str) -> Terms:
    """Find the best approximation by ``rank`` terms of the sum of ``terms`` and ``examples``.

    Every example counts as one term. There is no iteration, only two eigendecompositions of size ``m``. For two terms and
    ``rank=1`` there is a closed form, which does not wait for the device.

    Args:
        terms: Terms of the sum, or None.
        examples: Examples in the sum; at least one if there are no terms.
        rank: Number of terms to keep, at most ``m``.
        name: Name of the sum in error messages.

    Returns:
        ``rank`` terms in descending order; both sets of factors are orthonormal. With ``rank=1`` both factors are positive
        semidefinite if those of all terms are.
    """
    if terms is not None and not examples and terms.sizes.shape[1] == 2 and rank == 1:
        return _best_of_two(terms)
    activations = _Factors(None if terms is None else terms.activations, [some.a for some in examples])
    gradients = _Factors(None if terms is None else terms.gradients, [some.g for some in examples])
    gram_a, gram_g = activations.gram(), gradients.gram()
    sizes = gram_a.new_ones(gram_a.shape[:2])
    if terms is not None:
        sizes[:, : terms.sizes.shape[1]] = terms.sizes
    # Coordinates of the activation factors in an orthonormal basis of their span. They are first scaled to unit norm so
    # that rounding is small relative to the smallest of them.
    norms = gram_a.diagonal(dim1=1, dim2=2).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    values, vectors = batched_eigen(inverse.unsqueeze(2) * gram_a * inverse.unsqueeze(1), name)
    root = vectors * values.sqrt().unsqueeze(1)
    # In that basis Rᵀ R is scaledᵀ gram_g scaled; for a right singular vector v, R v has these coefficients times v.
    scaled = (sizes * norms).unsqueeze(2) * root
    values, vectors = batched_eigen(scaled.mT @ gram_g @ scaled, name)
    right = vectors[:, :, -rank:].flip(2)
    if rank == 1:  # the power iteration from the sum of all activation factors
        right = leading_eigenvector(values, vectors, root.sum(1)).unsqueeze(2)
    left = scaled @ right
    images = gram_g @ left
    squares = (left * images).sum(1, keepdim=True).clamp_min(0)  # squared singular values
    tiny, eps = torch.finfo(squares.dtype).tiny, torch.finfo(squares.dtype).eps
    # A singular value below rounding does not belong to a real term, and the division must not amplify it.
    squares_above_rounding = squares.clamp_min(squares.amax(2, keepdim=True) * (eps * len(left[0]))).clamp_min(tiny)
    new_gradients = gradients.combined(left / squares_above_rounding.sqrt())
    new_activations = activations.combined(sizes.unsqueeze(2) * images / squares_above_rounding)
    sign = torch.where(trace(new_activations) < 0, -1.0, 1.0).to(new_activations.dtype)[..., None, None]
    return Terms(squares.sqrt()[:, 0], new_gradients * sign, new_activations * sign)


class _Factors:
    """Factors of one side: matrices, then sums of outer products ``Σ_v x_v x_vᵀ``.

    Args:
        matrices: Matrices, shape ``(K, r, d, d)``, or None.
        vectors: Vectors ``x``, shape ``(K, n, V, d)`` each; ``V`` may differ.
    """

    def __init__(self, matrices: Tensor | None, vectors: Sequence[Tensor]) -> None:
        if not vectors:
            assert matrices is not None
            vectors = [matrices.new_empty(len(matrices), 0, 1, matrices.shape[-1])]
        most = max(some.shape[2] for some in vectors)
        x = torch.cat([pad(some, (0, 0, 0, most - some.shape[2])) for some in vectors], dim=1)
        if matrices is None:
            matrices = x.new_empty(len(x), 0, x.shape[-1], x.shape[-1])
        if most**2 > x.shape[-1]:  # inner products of the matrices are cheaper than those of all vectors
            matrices = torch.cat([matrices, x.mT @ x], dim=1)
            x = x[:, :0]
        self._matrices, self._vectors = matrices, x

    def gram(self) -> Tensor:
        """Compute the inner products of all factors, shape ``(K, m, m)``, in float64."""
        flat = self._matrices.flatten(2)
        columns = (some.double() for some in flat.split(_COLUMNS, dim=2))
        gram = sum((some @ some.mT for some in columns), flat.new_zeros((), dtype=torch.float64))
        groups, n, directions, _ = self._vectors.shape
        if not n:
            return gram
        x = self._vectors.double().flatten(1, 2)
        among = (x @ x.mT).square_().view(groups, n, directions, n, directions).sum((2, 4))
        x = x.unsqueeze(1)
        mixed = ((x @ self._matrices.double()) * x).sum(3).view(groups, -1, n, directions).sum(3)
        return torch.cat([torch.cat([gram, mixed], dim=2), torch.cat([mixed.mT, among], dim=2)], dim=1)

    def combined(self, coefficients: Tensor) -> Tensor:
        """Compute ``Σ_i c_ij M_i`` for coefficients ``(K, m, r)``, shape ``(K, r, d, d)``."""
        r = self._matrices.shape[1]
        total = _combined(self._matrices, coefficients[:, :r])
        if self._vectors.shape[1]:
            x, c = self._vectors.unsqueeze(1), coefficients[:, r:].mT[..., None, None]
            total = total + (x * c.to(x.dtype)).flatten(2, 3).mT @ x.flatten(2, 3)
        return total


def _best_of_two(terms: Terms) -> Terms:
    """Truncate two positive semidefinite terms to one, in closed form.

    For ``v = Σ c_i A_i`` the map ``Rᵀ R`` is ``c ↦ S K_G S K_A c`` with the sizes ``S`` and the Gram matrices ``K_G`` and
    ``K_A``, which have ones on the diagonal and no negative entries.
    """
    tiny = torch.finfo(terms.sizes.dtype).tiny
    largest = terms.sizes.amax(1, keepdim=True)
    sizes = terms.sizes / largest.clamp_min(tiny)
    s, t = sizes.unbind(1)
    g, a = (
        torch.linalg.vecdot(some[:, 0].flatten(1), some[:, 1].flatten(1)).double().clamp_min(0)
        for some in (terms.gradients, terms.activations)
    )
    half = (s.square() - t.square()) / 2  # half the difference of the map's diagonal entries; the others are:
    upper, lower = s * (s * a + t * g), t * (t * a + s * g)
    root = torch.sqrt(half.square() + upper * lower)
    # (half + root, lower) and (upper, root - half) are both eigenvectors, or zero, and so is their sum. The sum is zero if
    # the terms are orthogonal and of equal size: then every combination is equally good.
    c = torch.stack([half + root + upper, root - half + lower], dim=1) + tiny
    c = c / c.sum(1, keepdim=True)
    inner = c + a.unsqueeze(1) * c.flip(1)  # inner products with A_1 and A_2
    inner = inner / (c * inner).sum(1, keepdim=True).sqrt()
    activation = _combined(terms.activations, c.unsqueeze(2))
    gradient = _combined(terms.gradients, (sizes * inner).unsqueeze(2))
    return Terms(largest * frobenius(gradient)[:, :, 0, 0].double(), unit(gradient), unit(activation))


def _combined(matrices: Tensor, coefficients: Tensor) -> Tensor:
    """Compute ``Σ_i c_ij M_i`` for matrices ``(K, m, d, d)`` and coefficients ``(K, m, r)``, shape ``(K, r, d, d)``."""
    total = coefficients.to(matrices.dtype).mT @ matrices.flatten(2)
    return total.unflatten(2, matrices.shape[2:])


def leading_eigenvector(values: Tensor, vectors: Tensor, start: Tensor) -> Tensor:
    """Return the leading eigenvector to which a long power iteration from ``start`` converges, shape ``(K, m)``.

    If the largest eigenvalue is multiple, or so nearly multiple that rounding would choose among its eigenvectors, this is
    the projection of ``start`` onto their span. It preserves what the map preserves, such as positive semidefiniteness.

    Args:
        values: Eigenvalues of positive semidefinite matrices, ascending, shape ``(K, m)``.
        vectors: Eigenvectors of these matrices, shape ``(K, m, m)``.
        start: Starting vectors, shape ``(K, m)``, not orthogonal to the leading eigenvectors.
    """
    tiny = torch.finfo(values.dtype).tiny
    shares = (values / values[:, -1:].clamp_min(tiny)) ** _STEPS
    end = vectors @ (shares.unsqueeze(2) * (vectors.mT @ start.unsqueeze(2)))
    return (end / torch.linalg.vector_norm(end, dim=1, keepdim=True).clamp_min(tiny))[:, :, 0]


def unit(matrices: Tensor) -> Tensor:
    """Divide matrices by their Frobenius norms; zeros stay zeros."""
    return matrices / frobenius(matrices).clamp_min(torch.finfo(matrices.dtype).tiny)


def by_group(matrices: Tensor, name: str) -> list[Named]:
    """Pair each of the matrices ``(K, n, n)`` with a name for messages, which includes the group if there are several."""
    if len(matrices) == 1:
        return [(name, matrices[0])]
    return [(f"{name} (group {k})", matrix) for k, matrix in enumerate(matrices)]


def batched_eigen(matrices: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending and not negative, and eigenvectors of positive semidefinite matrices ``(K, m, m)``."""
    parts = eigendecompose(by_group(matrices, name))
    return torch.stack([part.values for part in parts]), torch.stack([part.vectors for part in parts])


def factors_of(name: str) -> str:
    """Return the name of a layer's factors in error messages."""
    return f"the factors of layer {name!r}"
