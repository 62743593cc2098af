"""Kronecker products with large factors that are known by leading eigenpairs and one value for the rest, or are diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kronlaplace._dense import check_size
from kronlaplace._precision import in_full_precision
from kronlaplace.blocks.base import Block, finite_values
from kronlaplace.blocks.basis import Basis, CoordinateBasis
from kronlaplace.blocks.eigendecomposition import Eigen, Named, eigendecompose_moments
from kronlaplace.blocks.kronecker import KroneckerBlock
from kronlaplace.blocks.truncation import Truncation, kept_count, leading_eigenpairs

__all__ = ["TruncatedBlock", "truncated"]

_SIDES = ("gradient", "activation")


class TruncatedBlock(KroneckerBlock):
    """A block ``scale · G ⊗ A`` whose factors are given by eigenpairs, ``Q diag(d) Qᵀ`` or ``U diag(d) Uᵀ + α (I − U Uᵀ)``.

    A factor may also be diagonal, with few different entries. The block is exactly this matrix: all its operations agree
    with one another. `KroneckerFisher.truncated` and estimators with a `Sketch` make such blocks. The dense factors are not
    stored; `gradient_factor` and `activation_factor` make them when they are asked for.

    Args:
        gradient: Eigenpairs of ``G`` for each of ``K`` groups: vectors of shape ``(K, q/K, k)``, and ascending values of
            shape ``(K, q/K)`` if ``k = q/K``; otherwise of shape ``(K, k + 1)``, with ``α`` in front. Of a diagonal factor:
            the different entries as values, ``(K, k)``, and in place of vectors the number of the entry for each row,
            ``(q/K,)``, integers.
        activation: Those of ``A``, likewise, with ``p`` in place of ``q/K``.
        scale: A factor in front: a number, a 0-dim tensor, or one value per group, shape ``(K,)``.
        name: The layer's name, for errors.
    """

    kind = "truncated"

    def __init__(self, gradient: Eigen, activation: Eigen, scale: Tensor | float = 1.0, name: str = "block") -> None:
        Block.__init__(self, name)
        self._eigen: list[Eigen] = [_with_unresolved(gradient), _with_unresolved(activation)]
        self._bases = _basis(gradient), _basis(activation)
        self.scale = torch.as_tensor(scale, dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{side}: {_shown(basis)}" for side, basis in zip("GA", self._bases, strict=True))
        return f"TruncatedBlock({self.name!r}, {sizes})"

    @property
    def note(self) -> str:
        """What is kept of which factor, for tables."""
        notes = []
        for side, basis, eigen in zip("GA", self._bases, self._eigen, strict=True):
            if isinstance(basis, CoordinateBasis):
                notes.append(f"{side} is diagonal, with {eigen.values.shape[1]:,} different entries")
            elif basis.truncated:
                rest = eigen.values[:, 0].double() * basis.rest
                share = 1 - float(rest.sum() / (eigen.values.double() @ basis.multiplicities).sum().clamp_min(1e-300))
                notes.append(
                    f"{basis.size - basis.rest:,} of {basis.size:,} eigenpairs of {side}, {share:.4%} of its trace"
                )
        return "; ".join(notes)

    @property
    def _factors(self) -> tuple[Tensor, Tensor]:
        gradient, activation = (
            _dense(basis, eigen.values) for basis, eigen in zip(self._bases, self._eigen, strict=True)
        )
        return gradient, activation

    @property
    def gradient_factor(self) -> Tensor:  # type: ignore[override]
        """``G`` as a dense matrix, ``(q, q)`` or ``(K, q/K, q/K)``, which is computed at every access."""
        return self._squeezed(_dense(self._bases[0], self._eigen[0].values))

    @property
    def activation_factor(self) -> Tensor:  # type: ignore[override]
        """``A`` as a dense matrix, ``(p, p)`` or ``(K, p, p)``, which is computed at every access."""
        return self._squeezed(_dense(self._bases[1], self._eigen[1].values))

    @staticmethod
    def _squeezed(factors: Tensor) -> Tensor:
        return factors[0] if len(factors) == 1 else factors

    @property
    def _scales(self) -> Tensor:
        return self.scale.expand(len(self._bases[0])).view(-1, 1, 1)

    @property
    def groups(self) -> int:
        return len(self._bases[0])

    @property
    def shape(self) -> tuple[int, int]:
        gradient, activation = self._bases
        return len(gradient) * gradient.size, activation.size

    @property
    def dtype(self) -> torch.dtype:
        return self._eigen[0].values.dtype

    @property
    def device(self) -> torch.device:
        return self._eigen[0].values.device

    def matmul(self, matrices: Tensor) -> Tensor:
        values = self.expand(self.eigenvalues()).to(self.dtype)
        return self.from_eigenbasis(values * self.to_eigenbasis(matrices))

    def group_traces(self) -> Tensor:
        traces = [
            (eigen.values.double() @ basis.multiplicities).to(self.dtype)
            for basis, eigen in zip(self._bases, self._eigen, strict=True)
        ]
        return self._scales[:, 0, 0] * traces[0] * traces[1]

    def frobenius_norm(self) -> Tensor:
        return self.total(self.eigenvalues().square()).sqrt().to(self.dtype)

    def scaled(self, factor: Tensor | float) -> TruncatedBlock:
        gradient, activation = self._eigen
        block = TruncatedBlock(gradient, activation, self.scale * factor, self.name)
        block._bases = self._bases
        block._take_layer_facts(self, factor)
        return block

    def undecomposed(self) -> list[Named]:
        return []

    def eigen(self) -> tuple[Eigen, Eigen]:
        """Return the eigenpairs of ``G`` and ``A``, as they were given.

        Raises:
            ValueError: If eigenvalues are NaN or infinite.
        """
        for eigen in self._eigen:
            finite_values(eigen.values, self.name)
        return self._eigen[0], self._eigen[1]

    def bases(self) -> tuple[Basis, Basis]:
        return self._bases

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for side, eigen in zip(_SIDES, self._eigen, strict=True):
            assert eigen.unresolved is not None
            parts = {"values": eigen.values, "vectors": eigen.vectors, "unresolved": eigen.unresolved}
            tensors |= {f"{side}_{part}": tensor for part, tensor in parts.items()}
        return {**tensors, "scale": self.scale}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> TruncatedBlock:
        gradient, activation = (
            Eigen(tensors[f"{side}_values"], tensors[f"{side}_vectors"], tensors[f"{side}_unresolved"].double())
            for side in _SIDES
        )
        return cls(gradient, activation, tensors["scale"], name)


def truncated(blocks: Sequence[Block], truncation: Truncation) -> list[Block]:
    """Return the blocks with all large factors of Kronecker blocks truncated; others are returned as they are.

    Blocks that are truncated already are truncated further if a large factor has more eigenpairs than allowed. Diagonal
    factors stay as they are.

    Raises:
        ValueError: If a factor of such a block has NaN or infinite entries, naming its layer.
    """
    results = [_shortened(block, truncation) if isinstance(block, TruncatedBlock) else block for block in blocks]
    chosen = {
        i: block.named_factors()
        for i, block in enumerate(blocks)
        if isinstance(block, KroneckerBlock) and not isinstance(block, TruncatedBlock) and _is_large(block, truncation)
    }
    small = [one for sides in chosen.values() for side in sides for one in side if len(one[1]) <= truncation.limit]
    whole = iter(eigendecompose_moments(small))
    for i, sides in chosen.items():
        block = blocks[i]
        assert isinstance(block, KroneckerBlock)
        parts = []
        for side in sides:
            if len(side[0][1]) <= truncation.limit:
                parts.append(_joined([next(whole) for _ in side]))
            else:
                parts.append(_joined(leading_eigenpairs(side, truncation)))
        result = TruncatedBlock(parts[0], parts[1], block.scale, block.name)
        result._take_layer_facts(block, 1.0)
        results[i] = result
    return results


def _is_large(block: KroneckerBlock, truncation: Truncation) -> bool:
    q, p = block.shape
    return max(q // block.groups, p) > truncation.limit


def _shortened(block: TruncatedBlock, truncation: Truncation) -> TruncatedBlock:
    """Return the block with no more eigenpairs of its large factors than allowed."""
    parts = [
        _cut_further(eigen, truncation)
        if not isinstance(basis, CoordinateBasis)
        and basis.size > truncation.limit
        and basis.size - basis.rest > truncation.rank
        else eigen
        for basis, eigen in zip(block.bases(), block.eigen(), strict=True)
    ]
    if all(part is eigen for part, eigen in zip(parts, block.eigen(), strict=True)):
        return block
    result = TruncatedBlock(parts[0], parts[1], block.scale, block.name)
    result._take_layer_facts(block, 1.0)
    return result


def _cut_further(eigen: Eigen, truncation: Truncation) -> Eigen:
    """Keep the last pairs of each group, and put all others into the rest."""
    parts = []
    assert eigen.unresolved is not None
    for values, vectors, unresolved in zip(eigen.values, eigen.vectors, eigen.unresolved, strict=True):
        n, k = vectors.shape
        leading = values[values.shape[0] - k :].double()
        rest = values[0].double() if k < n else values.new_zeros((), dtype=torch.float64)
        diagonal_sum = leading.sum() + rest * (n - k)
        kept = kept_count(leading.flip(0), diagonal_sum, truncation)
        alpha = (diagonal_sum - leading[k - kept :].sum()).clamp_min(0) / (n - kept)
        new = torch.cat([alpha.unsqueeze(0), leading[k - kept :]]).to(values)
        parts.append(Eigen(new, vectors[:, k - kept :], unresolved))
    return _joined(parts)


def _joined(parts: Sequence[Eigen]) -> Eigen:
    """Stack the eigenpairs of groups, which get as many as the largest has: further ones are part of the rest."""
    k = max(part.vectors.shape[1] for part in parts)
    values, vectors, unresolved = [], [], []
    for part in parts:
        missing = k - part.vectors.shape[1]
        value, vector = part.values, part.vectors
        if missing:
            more = Basis(vector.unsqueeze(0)).some_of_rest(missing)[0]
            value, vector = torch.cat([value[:1].expand(missing), value]), torch.cat([more, vector], dim=1)
        values.append(value)
        vectors.append(vector)
        assert part.unresolved is not None
        unresolved.append(part.unresolved)
    return Eigen(torch.stack(values), torch.stack(vectors), torch.stack(unresolved))


def _basis(eigen: Eigen) -> Basis:
    if eigen.vectors.is_floating_point():
        return Basis(eigen.vectors)
    return CoordinateBasis(eigen.vectors, eigen.values.shape[1], len(eigen.values), eigen.values.dtype)


@in_full_precision
def _dense(basis: Basis, values: Tensor) -> Tensor:
    """Return ``Q diag(d) Qᵀ`` for each group, shape ``(K, n, n)``."""
    check_size(basis.size, "this operation needs a whole factor")
    if isinstance(basis, CoordinateBasis):
        return torch.diag_embed(basis.expand(values))
    U = basis.vectors
    if not basis.truncated:
        return (U * values.unsqueeze(1)) @ U.mT
    rest, leading = values[:, :1], values[:, 1:]
    matrices = (U * (leading - rest).unsqueeze(1)) @ U.mT
    matrices.diagonal(dim1=-2, dim2=-1).add_(rest)
    return matrices


def _with_unresolved(eigen: Eigen) -> Eigen:
    if eigen.unresolved is not None:
        return eigen
    return eigen._replace(unresolved=torch.zeros(len(eigen.values), dtype=torch.float64, device=eigen.values.device))


def _shown(basis: Basis) -> str:
    return f"{basis.size - basis.rest} of {basis.size} eigenpairs" if basis.truncated else f"all of {basis.size}"
