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
vanishes. But with damping ``ε`` in a factor ``M + ε I``, ``s ≤ 1 − ε / ‖M + ε I‖`` whatever the moments are, so that
``Σ_i ⪰ γ I``, where ``γ`` is the product of both ``ε``. Rounding can violate this bound on ``s``, which is then applied.
Without damping, such layers are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks import KroneckerBlock
from kronlaplace.blocks.eigendecomposition import Eigen, Named, eigendecompose_symmetric, trace
from kronlaplace.damping import Damping, FactoredTikhonov
from kronlaplace.optim.chain_accumulation import CrossMoments

__all__ = ["TridiagonalInverse"]


class TridiagonalInverse:
    """The inverse ``F̂⁻¹`` for a chain of linear layers, which is applied to the matrices of all its layers together.

    Decompositions run in float64; what is kept, and what `solve` computes, has the dtype of the blocks.

    Args:
        blocks: The K-FAC blocks of the layers, from the first to the last.
        cross: The moments between each layer and the next, one fewer.
        damping: Damping of the factors on the diagonal. The blocks next to it are not damped.

    Raises:
        TypeError: If the damping is not `FactoredTikhonov`.
        ValueError: If factors are singular up to rounding and the damping is zero, if there are NaN or infinite entries,
            or for moments of other shapes.
    """

    def __init__(self, blocks: Sequence[KroneckerBlock], cross: Sequence[CrossMoments], damping: Damping) -> None:
        if not isinstance(damping, FactoredTikhonov):
            raise TypeError(
                f"the block-tridiagonal inverse needs a damping of each factor: kl.damping.FactoredTikhonov(...); got "
                f"{damping!r}."
            )
        _check_shapes(blocks, cross)
        self._parts = _parts(blocks, cross, damping)

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
            vectors[i] = vectors[i] - part["gradient_map"] @ vectors[i + 1] @ part["activation_map"].mT
        vectors = [_solve_conditional(part, v) for part, v in zip(parts, vectors, strict=True)]
        for i, part in reversed(list(enumerate(parts[:-1]))):
            vectors[i + 1] = vectors[i + 1] - part["gradient_map"].mT @ vectors[i] @ part["activation_map"]
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
    result = part["gradient_inverse"] @ v @ part["activation_inverse"]
    if "weights" in part:  # all layers but the last
        gradient, activation = part["gradient_roots"], part["activation_roots"]
        result = result + gradient @ ((gradient.mT @ v @ activation) * part["weights"]) @ activation.mT
    return result


class _Factor(NamedTuple):
    """A damped factor ``M + ε I`` in float64, with its Cholesky factor."""

    name: str
    matrix: Tensor
    damping: Tensor
    cholesky: Tensor

    def correlation_bound(self) -> Tensor:
        """Return the largest ``s`` of this factor and any other that the damping allows, ``1 − ε / ‖M + ε I‖``, 0-dim."""
        norms = [torch.linalg.matrix_norm(self.matrix, kind) for kind in (torch.inf, "fro")]
        return 1 - self.damping / torch.minimum(*norms)


class _Link:
    """One side of two adjacent layers: the moment between them, and its whitened version ``W``, in float64."""

    def __init__(self, before: _Factor, after: _Factor, moment: Tensor) -> None:
        self._before = before
        self.name = f"the moment between {before.name} and {after.name}"
        self.map = torch.cholesky_solve(moment.T, after.cholesky).T  # Ψ
        half = torch.linalg.solve_triangular(after.cholesky, moment.T, upper=False)
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
    blocks: Sequence[KroneckerBlock], cross: Sequence[CrossMoments], damping: FactoredTikhonov
) -> dict[str, dict[str, Tensor]]:
    """Compute the tensors of the inverse, by layer."""
    if damping.is_zero:
        damping.invert_all({block.name: block for block in blocks})  # refuses singular blocks
    gradients, activations = _damped(blocks, damping)
    scales = [block.scale.double().sqrt() for block in blocks]
    gradient_links, activation_links = [], []
    for i, moments in enumerate(cross):
        moment = scales[i] * scales[i + 1] * moments.gradient.double()
        gradient_links.append(_Link(gradients[i], gradients[i + 1], moment))
        activation_links.append(_Link(activations[i], activations[i + 1], moments.activation.double()))
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
            if damping.is_zero:
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


def _damped(blocks: Sequence[KroneckerBlock], damping: FactoredTikhonov) -> tuple[list[_Factor], list[_Factor]]:
    """Return the damped gradient and activation factors of all layers, in float64 (K-FAC section 3, KFC Eq. 10 and 28)."""
    named, shifts = [], []
    for block in blocks:
        gradient, activation = block.scale.double() * block.gradient_factor.double(), block.activation_factor.double()
        means = trace(activation) / len(activation), trace(gradient) / len(gradient)
        alive = (means[0] > 0) & (means[1] > 0)
        pi = torch.sqrt(torch.where(alive, means[0], 1.0) / torch.where(alive, means[1], 1.0))
        root = torch.as_tensor(damping.damping, dtype=torch.float64, device=block.device).sqrt()
        named += [(f"the gradient factor of layer {block.name!r}", gradient)]
        named += [(f"the activation factor of layer {block.name!r}", activation)]
        shifts += [root / pi, pi * root]
    factors = _factorized(named, shifts)
    return factors[::2], factors[1::2]


def _factorized(named: Sequence[Named], shifts: Sequence[Tensor]) -> list[_Factor]:
    """Return damped factors with their Cholesky factors.

    Where rounding has made a moment so indefinite that the damping does not outweigh it, its negative eigenvalues are
    first replaced by zero.
    """
    factors, failed = _cholesky(named, shifts)
    if failed:
        parts = eigendecompose_symmetric([named[i] for i in failed])
        positive = [
            (named[i][0], (p.vectors * p.values.clamp_min(0)) @ p.vectors.T) for i, p in zip(failed, parts, strict=True)
        ]
        again, hopeless = _cholesky(positive, [shifts[i] for i in failed])
        if hopeless:
            raise ValueError(f"{positive[hopeless[0]][0]} is singular up to rounding; use a larger damping.")
        for i, factor in zip(failed, again, strict=True):
            factors[i] = factor
    return factors


def _cholesky(named: Sequence[Named], shifts: Sequence[Tensor]) -> tuple[list[_Factor], list[int]]:
    """Return damped factors, and the indices of those without a Cholesky factor, with one wait for the device."""
    factors, infos = [], []
    for (name, matrix), shift in zip(named, shifts, strict=True):
        damped = (matrix + matrix.T) / 2
        damped.diagonal().add_(shift)
        cholesky, info = torch.linalg.cholesky_ex(damped)
        factors.append(_Factor(name, damped, shift, cholesky))
        infos.append(info)
    return factors, [i for i, info in enumerate(torch.stack(infos).tolist()) if info]


def _refuse_determined(block: KroneckerBlock, after: KroneckerBlock, remainder: Tensor) -> None:
    """Refuse a singular conditional covariance.

    Raises:
        ValueError: If an entry of ``1 − s_G s_Aᵀ`` may be rounding.
    """
    if not (remainder > max(remainder.shape) * torch.finfo(block.dtype).eps).all():
        raise ValueError(
            f"the inputs and gradients of layer {after.name!r} determine those of layer {block.name!r} in some directions, "
            "so that the block-tridiagonal inverse does not exist; use a damping larger than 0."
        )
