"""Blocks that are one Kronecker product, or one for each group of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronlaplace.blocks.base import RotatedBlock, decompose, shown_size, two_sided
from kronlaplace.blocks.basis import Basis
from kronlaplace.blocks.eigendecomposition import Eigen, Named, trace

__all__ = ["KroneckerBlock"]


class KroneckerBlock(RotatedBlock):
    """A block ``scale · G ⊗ A``, which acts on a ``(q, p)`` matrix as ``scale · G M A``.

    For layers with ``K`` groups of rows (grouped convolutions, attention's input projections), the block is block diagonal
    over the groups, and each group has its own factors.

    Args:
        gradient_factor: The symmetric positive semidefinite ``G``, shape ``(q, q)`` or ``(K, q/K, q/K)``.
        activation_factor: The symmetric positive semidefinite ``A``, shape ``(p, p)`` or ``(K, p, p)``.
        scale: A factor in front: a number, a 0-dim tensor, or one value per group, shape ``(K,)``.
        name: The layer's name, for errors.
    """

    kind = "kronecker"

    def __init__(
        self, gradient_factor: Tensor, activation_factor: Tensor, scale: Tensor | float = 1.0, name: str = "block"
    ) -> None:
        super().__init__(name)
        self.gradient_factor = gradient_factor
        self.activation_factor = activation_factor
        self.scale = torch.as_tensor(scale, dtype=gradient_factor.dtype, device=gradient_factor.device)
        self._eigen: list[Eigen] | None = None

    def __repr__(self) -> str:
        sizes = f"G: {shown_size(self.gradient_factor)}, A: {shown_size(self.activation_factor)}"
        return f"KroneckerBlock({self.name!r}, {sizes})"

    @property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """The factors ``G`` and ``A`` with the axis of the groups."""
        if self.gradient_factor.ndim == 2:
            return self.gradient_factor.unsqueeze(0), self.activation_factor.unsqueeze(0)
        return self.gradient_factor, self.activation_factor

    @property
    def _scales(self) -> Tensor:
        """The scale of each group, shape ``(K, 1, 1)``."""
        return self.scale.expand(len(self._factors[0])).view(-1, 1, 1)

    @property
    def shape(self) -> tuple[int, int]:
        gradient, activation = self._factors
        return len(gradient) * gradient.shape[-1], activation.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.gradient_factor.dtype

    @property
    def device(self) -> torch.device:
        return self.gradient_factor.device

    def matmul(self, matrices: Tensor) -> Tensor:
        gradient, activation = self._factors
        return two_sided(self._scales * gradient, matrices, activation)

    def to_dense(self) -> Tensor:
        gradient, activation = self._factors
        parts = zip(self._scales * gradient, activation, strict=True)
        return torch.block_diag(*(torch.kron(g.contiguous(), a.contiguous()) for g, a in parts))

    def trace(self) -> Tensor:
        """Return ``scale · tr G · tr A``, summed over the groups, 0-dim."""
        return self.group_traces().sum()

    def group_traces(self) -> Tensor:
        """Return ``scale · tr G · tr A`` of each group, shape ``(K,)``."""
        gradient, activation = self._factors
        return self._scales[:, 0, 0] * trace(gradient) * trace(activation)

    def frobenius_norm(self) -> Tensor:
        """Return ``|scale| · ‖G‖ · ‖A‖``, combined over the groups, 0-dim."""
        gradient, activation = self._factors
        by_group = self._scales[:, 0, 0] * torch.linalg.matrix_norm(gradient) * torch.linalg.matrix_norm(activation)
        return torch.linalg.norm(by_group)

    def scaled(self, factor: Tensor | float) -> KroneckerBlock:
        block = KroneckerBlock(self.gradient_factor, self.activation_factor, self.scale * factor, self.name)
        block._take_layer_facts(self, factor)
        block._eigen = self._eigen
        return block

    def undecomposed(self) -> list[Named]:
        if self._eigen is not None:
            return []
        gradient, activation = self.named_factors()
        return [*gradient, *activation]

    def named_factors(self) -> tuple[list[Named], list[Named]]:
        """Return ``G`` and ``A`` of each group, with names for messages."""
        gradient, activation = self._factors
        suffixes = [f", group {k}" for k in range(len(gradient))] if len(gradient) > 1 else [""]
        named = [
            [
                (f"the {which} factor of layer {self.name!r}{suffix}", factor)
                for suffix, factor in zip(suffixes, factors, strict=True)
            ]
            for which, factors in (("gradient", gradient), ("activation", activation))
        ]
        return named[0], named[1]

    @property
    def groups(self) -> int:
        """The number ``K`` of groups of rows."""
        return 1 if self.gradient_factor.ndim == 2 else len(self.gradient_factor)

    def adopt(self, parts: Sequence[Eigen]) -> None:
        half = len(parts) // 2
        self._eigen = [
            Eigen(*(torch.stack([part for part in parts if part is not None]) for parts in zip(*some, strict=True)))
            for some in (parts[:half], parts[half:])
        ]

    def eigen(self) -> tuple[Eigen, Eigen]:
        """Return the eigendecompositions of ``G`` and ``A``, which are computed once, with a leading axis of groups.

        Raises:
            ValueError: If a factor has NaN or infinite entries.
        """
        if self._eigen is None:
            decompose([self])
        assert self._eigen is not None
        return self._eigen[0], self._eigen[1]

    def unresolved(self) -> Tensor:
        gradient, activation = self.eigen()
        assert gradient.unresolved is not None and activation.unresolved is not None
        by_gradient = gradient.unresolved * activation.values[:, -1]
        by_activation = activation.unresolved * gradient.values[:, -1]
        return (self._scales[:, 0, 0] * torch.maximum(by_gradient, by_activation)).amax().detach()

    def bases(self) -> tuple[Basis, Basis]:
        gradient, activation = self.eigen()
        return Basis(gradient.vectors), Basis(activation.vectors)

    def eigenvalues(self) -> Tensor:
        gradient, activation = self.eigen()
        # In float64: the smallest eigenvalues and the damping often differ from the largest by a factor of 1e10 or more.
        outer = gradient.values.double().unsqueeze(2) * activation.values.double().unsqueeze(1)
        return (self._scales.double() * outer).flatten(0, 1)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "gradient_factor": self.gradient_factor,
            "activation_factor": self.activation_factor,
            "scale": self.scale,
        }
