"""The block-tridiagonal inverse of the Fisher of a chain of linear layers (K-FAC section 3.3).

The approximate Fisher ``F̂`` has the blocks ``G_i ⊗ A_i`` on its diagonal, damped, ``G_{i,i+1} ⊗ A_{i,i+1}`` next to it, and
whatever blocks elsewhere make its inverse block-tridiagonal. That inverse is ``Ξᵀ Λ Ξ``, from

    Ψ^G_i = G_{i,i+1} G_{i+1}⁻¹        Ψ^A_i = A_{i,i+1} A_{i+1}⁻¹        (Ξ V)_i = V_i − Ψ^G_i V_{i+1} Ψ^A_iᵀ
    Σ_i = G_i ⊗ A_i − (Ψ^G_i G_{i+1} Ψ^G_iᵀ) ⊗ (Ψ^A_i A_{i+1} Ψ^A_iᵀ)        Λ = diag(Σ_1⁻¹, …, Σ_ℓ⁻¹),  Σ_ℓ = G_ℓ ⊗ A_ℓ

where ``A_i`` is the moment of the inputs of layer ``i``, the paper's ``Ā_{i−1,i−1}``.

**The inverse of** ``Σ_i``. With Cholesky factors ``G_i = L Lᵀ`` and ``G_{i+1} = R Rᵀ``, the singular values of
``W = L⁻¹ G_{i,i+1} R⁻ᵀ`` are canonical correlations, and ``L⁻¹ (Ψ^G G_{i+1} Ψ^Gᵀ) L⁻ᵀ = W Wᵀ = E S Eᵀ``. Likewise for ``A``.
Then ``Σ_i = K⁻ᵀ (I ⊗ I − S_G ⊗ S_A) K⁻¹`` with ``K = L⁻ᵀ E`` on both sides (K-FAC appendix I), whose inverse is

    Σ_i⁻¹ = G_i⁻¹ ⊗ A_i⁻¹ + (P_G ⊗ P_A) diag(1 / (1 − s_G s_Aᵀ)) (P_G ⊗ P_A)ᵀ,    P = L⁻ᵀ E S^½

a sum of positive semidefinite terms, in which nothing cancels. Since ``W Wᵀ`` and ``Wᵀ W`` have the same nonzero
eigenvalues, the smaller one is decomposed, and ``P`` has no more columns than the narrower of the two layers.

**Near singularity.** The inputs and gradients of the next layer may determine those of a layer, so that ``1 − s_G s_A``
vanishes. But with damping ``ε`` in a factor ``D = c M + ε I``, ``s ≤ 1 − ε / ‖D‖`` whatever the moments are, so that
``Σ_i ⪰ γ I``, where ``γ`` is the product of both ``ε``. Rounding can violate this bound on ``s``, which is then applied.
Without damping, such layers are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks import KroneckerBlock
from kronlaplace.blocks.eigendecomposition import Eigen, eigendecompose_symmetric
from kronlaplace.damping import Damping, Tikhonov
from kronlaplace.damping.inversion import SingularBlockError
from kronlaplace.optim.chain_accumulation import CrossMoments

__all__ = ["TridiagonalInverse"]


class TridiagonalInverse:
    """The inverse ``F̂⁻¹`` for a chain of linear layers, which is applied to the matrices of all its layers together.

    Decompositions run in float64; what is kept, and what `solve` computes, has the dtype of the blocks.

    Args:
        blocks: The K-FAC blocks of the layers, from the first to the last.
        cross: The moments between each layer and the next, one fewer.
        damping: Damping of the factors on the diagonal, such as `FactoredTikhonov`, or one for each layer. The blocks next
            to the diagonal are not damped.

    Raises:
        TypeError: If the damping is not a damping of factors, such as `Tikhonov`.
        ValueError: If factors are singular up to rounding and the damping is zero, if there are NaN or infinite entries,
            or for moments of other shapes.
    """

    def __init__(
        self, blocks: Sequence[KroneckerBlock], cross: Sequence[CrossMoments], damping: Damping | Sequence[Damping]
    ) -> None:
        _check_shapes(blocks, cross)
        self._parts = _parts(blocks, cross, [damping] * len(blocks) if isinstance(damping, Damping) else damping)

    def __repr__(self) -> str:
        return f"TridiagonalInverse({list(self._parts)})"

    @in_full_precision
    def solve(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``F̂⁻¹ v = Ξᵀ Λ Ξ v``.

        Args:
            matrices: The matrix of every layer, by name, shape ``(..., q, p)``.

        Returns:
            Matrices of the same shapes.

        Raises:
            ValueError: If layers are missing or not in the chain, or for other shapes.
        """
        self._check(matrices)
        parts = list(self._parts.values())
        vectors = [matrices[name] for name in self._parts]
        for i, part in enumerate(parts[:-1]):
            vectors[i] = vectors[i] - _product(part["gradient_map"], vectors[i + 1], part["activation_map"].mT)
        vectors = [_solve_conditional(part, v) for part, v in zip(parts, vectors, strict=True)]
        for i, part in reversed(list(enumerate(parts[:-1]))):
            vectors[i + 1] = vectors[i + 1] - _product(part["gradient_map"].mT, vectors[i], part["activation_map"])
        return dict(zip(self._parts, vectors, strict=True))

    def _check(self, matrices: Mapping[str, Tensor]) -> None:
        if set(matrices) != set(self._parts):
            raise ValueError(f"solve needs matrices for the layers {list(self._parts)}, got {list(matrices)}.")
        for name, part in self._parts.items():
            shape = len(part["gradient_inverse"]), len(part["activation_inverse"])
            if matrices[name].shape[-2:] != shape:
                raise ValueError(
                    f"matrices for layer {name!r} must have the shape (..., {shape[0]}, {shape[1]}); got "
                    f"{tuple(matrices[name].shape)}."
                )

    def to_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the inverse by layer, from the first to the last; `from_tensors` is the inverse."""
        return {name: dict(part) for name, part in self._parts.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Mapping[str, Tensor]]) -> TridiagonalInverse:
        """Make the inverse from its tensors; it solves to the bit as the one that they come from."""
        inverse = cls.__new__(cls)
        inverse._parts = {name: dict(part) for name, part in tensors.items()}
        return inverse


def _check_shapes(blocks: Sequence[KroneckerBlock], cross: Sequence[CrossMoments]) -> None:
    if len(cross) != len(blocks) - 1:
        raise ValueError(f"{len(blocks)} layers have {len(blocks) - 1} moments between them, got {len(cross)}.")
    for block, after, moments in zip(blocks, blocks[1:], cross, strict=False):
        (q, p), (q_1, p_1) = block.shape, after.shape
        if moments.activation.shape != (p, p_1) or moments.gradient.shape != (q, q_1):
            raise ValueError(
                f"the moments between the layers {block.name!r} and {after.name!r} must have the shapes {(p, p_1)} for the "
                f"inputs and {(q, q_1)} for the gradients; got {tuple(moments.activation.shape)} and "
                f"{tuple(moments.gradient.shape)}."
            )


def _solve_conditional(part: Mapping[str, Tensor], v: Tensor) -> Tensor:
    """Return ``Σ⁻¹ v`` for one layer."""
    result = _product(part["gradient_inverse"], v, part["activation_inverse"])
    if "weights" in part:  # all layers but the last
        gradient, activation = part["gradient_roots"], part["activation_roots"]
        inside = _product(gradient.mT, v, activation) * part["weights"]
        result = result + _product(gradient, inside, activation.mT)
    return result


def _product(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """Return ``L M R``, in the order that takes fewer operations."""
    (m, k), (j, n) = left.shape, right.shape
    return left @ middle @ right if m * j * (k + n) <= k * n * (j + m) else left @ (middle @ right)


class _Factor(NamedTuple):
    """A damped factor ``D = c M + ε I`` in float64."""

    name: str
    scale: Tensor
    """The number ``c``, 0-dim."""
    shift: Tensor
    """The number ``ε``, 0-dim."""
    matrix: Tensor
    """The damped factor ``D``."""
    cholesky: Tensor
    """Its lower Cholesky factor."""

    def correlation_bound(self) -> Tensor:
        """Return the largest ``s`` of this factor and any other that the damping allows, ``1 − ε / ‖D‖``, 0-dim."""
        norms = [torch.linalg.matrix_norm(self.matrix, kind) for kind in (torch.inf, "fro")]
        return 1 - self.shift / torch.minimum(*norms)


class _Link:
    """One side of two adjacent layers: what maps one to the other, and the whitened moment ``W``, in float64.

    Args:
        before: Damped factor of the first layer.
        after: Damped factor of the second.
        moment: The moment between them, which is scaled as they are, so that the correlations stay the same.
    """

    def __init__(self, before: _Factor, after: _Factor, moment: Tensor) -> None:
        self._before = before
        self.name = f"the moment between {before.name} and {after.name}"
        scaled = (before.scale * after.scale).sqrt() * moment.double()
        half = torch.linalg.solve_triangular(after.cholesky, scaled.T, upper=False)
        self.map = torch.linalg.solve_triangular(after.cholesky.T, half, upper=True).T  # Ψ
        self._whitened = torch.linalg.solve_triangular(before.cholesky, half.T, upper=False)
        self._narrows = self._whitened.shape[1] < self._whitened.shape[0]
        self._bound = torch.minimum(before.correlation_bound(), after.correlation_bound())

    def gram(self) -> Tensor:
        """Return the smaller of ``W Wᵀ`` and ``Wᵀ W``."""
        w = self._whitened
        return w.T @ w if self._narrows else w @ w.T

    def roots(self, eigen: Eigen) -> tuple[Tensor, Tensor]:
        """Return ``P``, shape ``(n, r)``, and ``s``, shape ``(r,)``, from the decomposition of `gram`."""
        half = self._whitened @ eigen.vectors if self._narrows else eigen.vectors * eigen.values.clamp_min(0).sqrt()
        roots = torch.linalg.solve_triangular(self._before.cholesky.T, half, upper=True)
        return roots, torch.minimum(eigen.values.clamp_min(0), self._bound)


def _parts(
    blocks: Sequence[KroneckerBlock], cross: Sequence[CrossMoments], dampings: Sequence[Damping]
) -> dict[str, dict[str, Tensor]]:
    """Compute the tensors of the inverse, by layer."""
    undamped = {block.name: block for block, damping in zip(blocks, dampings, strict=True) if damping.is_zero}
    if undamped:
        Tikhonov(0.0).invert_all(undamped)  # refuses singular blocks
    gradients, activations = _damped(blocks, dampings)
    gradient_links = [_Link(*pair, link.gradient) for pair, link in zip(pairwise(gradients), cross, strict=True)]
    activation_links = [_Link(*pair, link.activation) for pair, link in zip(pairwise(activations), cross, strict=True)]
    links = gradient_links + activation_links
    eigen = eigendecompose_symmetric([(link.name, link.gram()) for link in links])
    roots = [link.roots(part) for link, part in zip(links, eigen, strict=True)]
    result = {}
    for i, block in enumerate(blocks):
        part = {
            "gradient_inverse": torch.cholesky_inverse(gradients[i].cholesky),
            "activation_inverse": torch.cholesky_inverse(activations[i].cholesky),
        }
        if i < len(cross):
            (gradient, s_gradient), (activation, s_activation) = roots[i], roots[len(cross) + i]
            remainder = 1 - s_gradient.unsqueeze(1) * s_activation
            if dampings[i].is_zero and dampings[i + 1].is_zero:
                _refuse_determined(block, blocks[i + 1], remainder)
            part |= {
                "gradient_map": gradient_links[i].map,
                "activation_map": activation_links[i].map,
                "gradient_roots": gradient,
                "activation_roots": activation,
                "weights": remainder.reciprocal(),
            }
        result[block.name] = {key: tensor.to(block.dtype).contiguous() for key, tensor in part.items()}
    return result


def _damped(blocks: Sequence[KroneckerBlock], dampings: Sequence[Damping]) -> tuple[list[_Factor], list[_Factor]]:
    """Return the damped gradient and activation factors of all layers.

    Where rounding has made a moment so indefinite that its damping does not outweigh it, negative eigenvalues are first
    replaced by zero.

    Raises:
        TypeError: If the damping is not one of factors.
        ValueError: If a damped factor is singular all the same, naming its layer.
    """
    factors, infos = [], []
    for block, damping in zip(blocks, dampings, strict=True):
        numbers = damping.damped_factors(block)
        if numbers is None:
            raise TypeError(
                "the block-tridiagonal inverse needs a damping of each factor, such as kl.damping.FactoredTikhonov(...); "
                f"got {damping!r}."
            )
        c_G, s_G, c_A, s_A = (number.squeeze(0) for number in numbers)
        for which, c, s, moment in (
            ("gradient", c_G, s_G, block.gradient_factor),
            ("activation", c_A, s_A, block.activation_factor),
        ):
            factor, info = _factorized(f"the {which} factor of layer {block.name!r}", c, s, moment.double())
            factors.append(factor)
            infos.append(info)
    if failed := [i for i, info in enumerate(torch.stack(infos).tolist()) if info]:
        moments = [factor for block in blocks for factor in (block.gradient_factor, block.activation_factor)]
        parts = eigendecompose_symmetric([(factors[i].name, moments[i].double()) for i in failed])
        for i, (values, vectors, _) in zip(failed, parts, strict=True):
            name, scale, shift, _, _ = factors[i]
            factors[i], info = _factorized(name, scale, shift, (vectors * values.clamp_min(0)) @ vectors.T)
            if info:
                raise SingularBlockError(
                    f"{name} is singular up to rounding, damped by {dampings[i // 2]!r}; use a larger damping."
                )
    return factors[::2], factors[1::2]


def _factorized(name: str, scale: Tensor, shift: Tensor, moment: Tensor) -> tuple[_Factor, Tensor]:
    """Return a damped factor, and a number that is zero if its Cholesky factor is right."""
    matrix = scale * (moment + moment.T) / 2
    matrix.diagonal().add_(shift)
    cholesky, info = torch.linalg.cholesky_ex(matrix)
    return _Factor(name, scale, shift, matrix, cholesky), info


def _refuse_determined(block: KroneckerBlock, after: KroneckerBlock, remainder: Tensor) -> None:
    """Refuse a singular conditional covariance.

    Raises:
        ValueError: If an entry of ``1 − s_G s_Aᵀ`` may be rounding.
    """
    if not (remainder > max(remainder.shape) * torch.finfo(block.dtype).eps).all():
        raise SingularBlockError(
            f"the inputs and gradients of layer {after.name!r} determine those of layer {block.name!r} in some directions, "
            "so that the block-tridiagonal inverse does not exist; use a damping larger than 0."
        )
