"""Inverse of ``c F + t P`` for a Fisher block ``F`` and ``P = s F₁ + δ I`` of an earlier block, for any ``c`` and ``t``.

A basis ``W``, not orthogonal in general, makes both diagonal, ``Wᵀ F W = diag(λ)`` and ``Wᵀ P W = diag(π)``. Then
``(c F + t P)⁻¹ = W diag(1 / (c λ + t π)) Wᵀ``: everything that a `DampedInverse` provides follows from this, and changing
``c`` and ``t`` needs no new decomposition. Truncated factors get a whole basis here, with the memory and time that it takes.

| blocks | ``W`` | |
| --- | --- | --- |
| both diagonal, or with the same eigenbasis | that basis | exact |
| Kronecker products, ``δ = 0`` | ``W_G ⊗ W_A`` of the problems ``(G, G₁)`` and ``(A, A₁)`` | exact |
| Kronecker products, and one side has a single row or column | likewise, with ``δ`` in the other side's factor | exact |
| any others of up to `LARGEST_DENSE` weights | from the dense problem ``(F, P)``, by groups of rows | exact |
| larger Kronecker products, ``δ > 0`` | ``W_G ⊗ W_A`` of ``(G, s G₁ + ε I)`` and ``(A, A₁ + ε' I)`` | approximate |
| all others | none | rejected |

``F + s G₁ ⊗ A₁ + δ I`` has three terms, which no Kronecker basis makes diagonal in general. In the approximate case ``ε ε'
= δ`` (factored damping, with the ratio from the trace norms) only determines the basis: ``π`` is the diagonal of the true
``Wᵀ P W``, and the off-diagonal entries are dropped. This is exact if the two Fishers share an eigenbasis, and if one of
them vanishes. Otherwise the determinant is too large (Hadamard).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks import Block, DiagonalBlock, KroneckerBlock, RotatedBlock
from kronlaplace.blocks.base import two_sided
from kronlaplace.blocks.basis import Basis
from kronlaplace.blocks.eigendecomposition import eigendecompose_symmetric
from kronlaplace.damping.inverse import DampedInverse
from kronlaplace.damping.plus_diagonal import LARGEST_DENSE

__all__ = ["JointBasis", "JointInverse", "joint_basis"]


class _Basis(ABC):
    """Basis ``W``."""

    @abstractmethod
    def coordinates(self, matrices: Tensor) -> Tensor:
        """Return ``Wᵀ vec(M)`` for ``M`` of shape ``(..., q, p)``, in the same shape."""

    @abstractmethod
    def combined(self, coordinates: Tensor) -> Tensor:
        """Return ``W vec(C)`` for ``C`` of shape ``(..., q, p)``, in the same shape."""

    @abstractmethod
    def diagonal_of(self, weights: Tensor) -> Tensor:
        """Return the diagonal of ``W diag(w) Wᵀ`` for ``w`` of shape ``(q, p)``, in the same shape."""

    def factors(self) -> tuple[Basis, Basis] | None:
        """Return ``W_G`` and ``W_A`` if ``W`` is a Kronecker product, otherwise None."""
        return None


class _Identity(_Basis):
    def coordinates(self, matrices: Tensor) -> Tensor:
        return matrices

    def combined(self, coordinates: Tensor) -> Tensor:
        return coordinates

    def diagonal_of(self, weights: Tensor) -> Tensor:
        return weights


class _Product(_Basis):
    """Kronecker product ``W_G ⊗ W_A`` by groups of rows, shapes ``(K, q/K, q/K)`` and ``(K, p, p)``."""

    def __init__(self, gradient: Tensor, activation: Tensor) -> None:
        self._gradient = gradient
        self._activation = activation

    def coordinates(self, matrices: Tensor) -> Tensor:
        return two_sided(self._gradient.mT, matrices, self._activation)

    def combined(self, coordinates: Tensor) -> Tensor:
        return two_sided(self._gradient, coordinates, self._activation.mT)

    def diagonal_of(self, weights: Tensor) -> Tensor:
        return two_sided(self._gradient.square(), weights, self._activation.square().mT)

    def factors(self) -> tuple[Basis, Basis]:
        return Basis(self._gradient), Basis(self._activation)


class _Dense(_Basis):
    """Dense matrix for each group of rows, shape ``(K, m, m)`` with ``m = q p / K``."""

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors

    def coordinates(self, matrices: Tensor) -> Tensor:
        return _by_group(self._vectors.mT, matrices)

    def combined(self, coordinates: Tensor) -> Tensor:
        return _by_group(self._vectors, coordinates)

    def diagonal_of(self, weights: Tensor) -> Tensor:
        return _by_group(self._vectors.square(), weights)


@in_full_precision
def _by_group(matrices: Tensor, vectors: Tensor) -> Tensor:
    flat = vectors.flatten(-2).unflatten(-1, (len(matrices), -1))  # (..., K, m)
    return (matrices @ flat.unsqueeze(-1)).reshape(vectors.shape)


@dataclass(frozen=True, eq=False)
class JointBasis:
    """Basis that makes a Fisher block ``F`` and a precision ``P`` diagonal.

    Attributes:
        basis: Basis ``W``, in the block's dtype.
        curvature: Diagonal ``λ`` of ``Wᵀ F W``, shape ``(q, p)``, float64.
        prior: Diagonal ``π`` of ``Wᵀ P W``, shape ``(q, p)``, float64, positive.
        log_volume: Value of ``−2 log |det W|``, 0-dim, float64.
        exact: Whether both are exactly diagonal.
    """

    basis: _Basis
    curvature: Tensor
    prior: Tensor
    log_volume: Tensor
    exact: bool = True

    def inverse(self, block: Block, scale: Tensor | float, multiple: Tensor | float) -> JointInverse:
        """Return ``(c F + t P)⁻¹``.

        Args:
            block: Block ``F``.
            scale: Factor ``c``.
            multiple: Factor ``t``.
        """
        return JointInverse(block, self, scale * self.curvature + multiple * self.prior)


class JointInverse(DampedInverse):
    """Inverse of ``c F + t P`` in a basis that is not orthogonal, ``W diag(w) Wᵀ``.

    Its `eigenvalues` are relative to that basis, ``c λ + t π``, and `sqrt_solve` applies the root ``W diag(√w)``, which is
    not symmetric but still turns white noise into samples.

    Args:
        block: Block ``F``.
        joint: The basis.
        eigenvalues: Eigenvalues ``c λ + t π``, shape ``(q, p)``, float64.
    """

    def __init__(self, block: Block, joint: JointBasis, eigenvalues: Tensor) -> None:
        super().__init__(block, eigenvalues)
        self._joint = joint

    def bases(self) -> tuple[Basis, Basis] | None:
        return self._joint.basis.factors()

    def expand(self, values: Tensor) -> Tensor:
        return values

    def coordinates(self, matrices: Tensor) -> Tensor:
        return self._joint.basis.coordinates(matrices)

    def _combined(self, coordinates: Tensor) -> Tensor:
        return self._joint.basis.combined(coordinates)

    def sqrt_solve(self, matrices: Tensor) -> Tensor:
        """Multiply a root ``R`` of the inverse ``R Rᵀ`` with ``vec(M)``, which turns white noise into samples."""
        return self._combined(self._checked(matrices) * self.weights.sqrt())

    def logdet(self) -> Tensor:
        return self._eigenvalues.log().sum() + self._joint.log_volume

    def diagonal(self) -> Tensor:
        return self._joint.basis.diagonal_of(self.weights)


@torch.no_grad()
def joint_basis(block: Block, earlier: Block, scale: Tensor, plus: Tensor) -> JointBasis:
    """Find the basis for a block ``F`` and a precision ``P = s F₁ + δ I``; see the module's table.

    Args:
        block: Block ``F``.
        earlier: Block ``F₁`` of the same shape.
        scale: Factor ``s``, 0-dim, float64, positive.
        plus: Number ``δ``, 0-dim, float64, not negative; if it is zero, ``F₁`` must be positive definite.

    Raises:
        NotImplementedError: For blocks of different kinds, or in different eigenbases, that are too large to be made dense.
    """
    shape = block.shape
    precision = earlier.expand(scale * earlier.eigenvalues() + plus)
    none = precision.new_zeros(())
    if isinstance(block, DiagonalBlock) and isinstance(earlier, DiagonalBlock):
        return JointBasis(_Identity(), block.eigenvalues(), precision, none)
    groups = _groups(block, earlier)
    if groups and _same_bases(block, earlier):
        assert isinstance(block, RotatedBlock)
        product = _Product(*(basis.full() for basis in block.bases()))
        return JointBasis(product, block.expand(block.eigenvalues()), precision, none)
    if isinstance(block, KroneckerBlock) and isinstance(earlier, KroneckerBlock) and groups:
        pair = _Factors(block, earlier, scale, plus)
        if not float(plus) or 1 in (shape[0] // groups, shape[1]):
            return pair.exactly()
        if math.prod(shape) > LARGEST_DENSE:
            return pair.approximately()
    if math.prod(shape) > LARGEST_DENSE:
        raise NotImplementedError(
            f"layer {block.name!r} has a {block.kind} block and its prior a {earlier.kind} block. Their sum can be "
            f"inverted exactly only for up to {LARGEST_DENSE:,} weights, but this layer has {math.prod(shape):,}. Use an "
            "estimator with Kronecker products for both (kl.KFAC, kl.TKFAC, kl.KFOC), kl.Diagonal for both, or leave the "
            "layer out (layers=)."
        )
    return _dense(block, earlier, precision, groups or 1)


def _groups(block: Block, earlier: Block) -> int:
    """Return the number of groups of rows; zero unless both have a Kronecker basis with the same number of groups."""
    if not (isinstance(block, RotatedBlock) and isinstance(earlier, RotatedBlock)):
        return 0
    one, other = len(block.bases()[0]), len(earlier.bases()[0])
    return one if one == other else 0


def _same_bases(block: Block, earlier: Block) -> bool:
    assert isinstance(block, RotatedBlock) and isinstance(earlier, RotatedBlock)
    return all(a.equals(b) for a, b in zip(block.bases(), earlier.bases(), strict=True))


class _Factors:
    """Two Kronecker products, as eigendecompositions of their factors in float64, with a leading axis of groups."""

    def __init__(self, block: KroneckerBlock, earlier: KroneckerBlock, scale: Tensor, plus: Tensor) -> None:
        (gradient, activation), (gradient_1, activation_1) = _whole(block), _whole(earlier)
        groups = block.groups
        self._block = block
        self._names = f"the gradient factors of layer {block.name!r}", f"the activation factors of layer {block.name!r}"
        self._plus = plus
        self._roots = [vectors * values.sqrt().unsqueeze(1) for values, vectors in (gradient, activation)]
        self._roots[0] = self._roots[0] * block.scale.double().expand(groups).sqrt().view(-1, 1, 1)
        self._bases_1 = [gradient_1[1], activation_1[1]]
        scales = (scale * earlier.scale.double()).expand(groups).unsqueeze(1)
        self._values_1 = [scales * gradient_1[0], activation_1[0]]  # the scale in the first

    def exactly(self) -> JointBasis:
        """Find the basis if ``δ = 0`` or one factor is a number, so that ``P`` itself is a Kronecker product."""
        gradient, activation = self._values_1
        if float(self._plus):
            if gradient.shape[1] == 1:
                gradient, activation = torch.ones_like(gradient), gradient * activation + self._plus
            else:
                gradient, activation = gradient * activation + self._plus, torch.ones_like(activation)
        return self._joint(gradient, activation, None)

    def approximately(self) -> JointBasis:
        """Find the basis of the factored damping and the diagonal of the true precision in it."""
        gradient, activation = self._values_1
        means = activation.mean(1, keepdim=True), gradient.mean(1, keepdim=True)
        alive = (means[0] > 0) & (means[1] > 0)
        pi = torch.sqrt(torch.where(alive, means[0], 1.0) / torch.where(alive, means[1], 1.0))
        root = self._plus.sqrt()
        # A product that vanishes because one of its factors does must not influence the basis.
        gradient, activation = gradient * alive, activation * alive
        norms = [torch.linalg.matrix_norm(factor, keepdim=True) for factor in self._roots]
        self._roots = [factor * ((norms[0] > 0) & (norms[1] > 0)) for factor in self._roots]
        return self._joint(gradient + root / pi, activation + pi * root, self._values_1)

    def _joint(self, gradient: Tensor, activation: Tensor, true_values: Sequence[Tensor] | None) -> JointBasis:
        """Return the basis for a precision whose factors have these eigenvalues.

        ``true_values`` are the eigenvalues of the true precision's factors, or None if it is this precision.
        """
        values, bases = [], []
        parts = zip(self._names, self._roots, self._bases_1, (gradient, activation), strict=True)
        for name, root, basis, precision in parts:
            found = _simultaneous(name, root, basis * precision.rsqrt().unsqueeze(1))
            values.append(found[0])
            bases.append(found[1])
        curvature = _outer(*values)
        prior = torch.ones_like(curvature)
        if true_values is not None:
            by_factor = [
                ((w.mT @ basis).square() @ d.unsqueeze(2)).squeeze(2)  # diag(Wᵀ G₁ W)
                for w, basis, d in zip(bases, self._bases_1, true_values, strict=True)
            ]
            prior = _outer(*by_factor) + self._plus * _outer(*(w.square().sum(1) for w in bases))
        r, p = gradient.shape[1], activation.shape[1]
        log_volume = p * gradient.log().sum() + r * activation.log().sum()
        product = _Product(bases[0].to(self._block.dtype), bases[1].to(self._block.dtype))
        return JointBasis(product, curvature, prior, log_volume, exact=true_values is None)


def _dense(block: Block, earlier: Block, precision: Tensor, groups: int) -> JointBasis:
    """Solve the dense problem, by groups of rows."""
    root = _dense_basis(block, groups) * block.expand(block.eigenvalues()).view(groups, 1, -1).sqrt()
    whitening = _dense_basis(earlier, groups) * precision.view(groups, 1, -1).rsqrt()
    values, vectors = _simultaneous(f"the precision of layer {block.name!r}", root, whitening)
    curvature = values.reshape(block.shape)
    return JointBasis(_Dense(vectors.to(block.dtype)), curvature, torch.ones_like(curvature), precision.log().sum())


def _simultaneous(name: str, root: Tensor, whitening: Tensor) -> tuple[Tensor, Tensor]:
    """Solve generalized eigenproblems, by groups.

    Args:
        name: Name of the matrices in error messages.
        root: Root ``R`` with ``R Rᵀ = F``, shape ``(K, n, n)``, float64.
        whitening: Matrix ``B`` with ``Bᵀ P B = I``, same shape.

    Returns:
        ``λ``, shape ``(K, n)``, and ``W``, shape ``(K, n, n)``, with ``Wᵀ F W = diag(λ)`` and ``Wᵀ P W = I``.
    """
    half = whitening.mT @ root
    parts = eigendecompose_symmetric([(name, matrix) for matrix in half @ half.mT])
    values = torch.stack([part.values for part in parts]).clamp_min(0)
    return values, whitening @ torch.stack([part.vectors for part in parts])


def _dense_basis(block: Block, groups: int) -> Tensor:
    """Return the eigenvectors as matrices, shape ``(K, m, m)``, float64."""
    if isinstance(block, RotatedBlock):
        parts = zip(*(basis.full().double() for basis in block.bases()), strict=True)
        dense = [torch.kron(g.contiguous(), a.contiguous()) for g, a in parts]
        return torch.stack(dense) if len(dense) == groups else torch.block_diag(*dense).unsqueeze(0)
    size = math.prod(block.shape)
    unit = torch.eye(size, dtype=block.dtype, device=block.device)
    return block.from_eigenbasis(unit.view(size, *block.shape)).flatten(1).T.double().unsqueeze(0)


def _whole(block: KroneckerBlock) -> list[tuple[Tensor, Tensor]]:
    """Return eigenvalues ``(K, n)`` and eigenvectors ``(K, n, n)`` of both factors, in float64, also of truncated ones."""
    return [
        (basis.expand(eigen.values.double()), basis.full().double())
        for eigen, basis in zip(block.eigen(), block.bases(), strict=True)
    ]


def _outer(gradient: Tensor, activation: Tensor) -> Tensor:
    """Compute ``x yᵀ`` by groups: shapes ``(K, q/K)`` and ``(K, p)`` to ``(q, p)``."""
    return (gradient.unsqueeze(2) * activation.unsqueeze(1)).flatten(0, 1)
