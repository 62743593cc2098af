"""The two sums of an estimator of Kronecker factors, of which a side may be so large that only a sketch of it is kept.

A side's sum is named ``"activation"`` or ``"gradient"``. Where it is large there are instead the diagonal of the sum,
``"… diagonal"``, and its product with a random matrix, ``"… product"`` (see `kronlaplace.blocks.sketch`). Where the layer's
outputs are the network's own, only the diagonal of ``G`` is kept.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kronlaplace._dense import LARGEST_DENSE
from kronlaplace.blocks import Block, KroneckerBlock, Sketch, TruncatedBlock
from kronlaplace.blocks.eigendecomposition import Eigen, eigendecompose_moments, trace
from kronlaplace.blocks.sketch import DEFAULT_SKETCH, random_columns, side_of_sketch
from kronlaplace.blocks.truncation import Truncation, leading_eigenpairs
from kronlaplace.layers import Layer

__all__ = ["CONSTANTS", "add_rows", "any_large", "block_of_sums", "check_not_sketched", "is_large", "no_start", "shown"]

_SIDES = ("gradient", "activation")

CONSTANTS = frozenset({"activation test", "gradient test"})
"""The random matrices in a state, which are the same in all of a layer's states."""


def is_large(layer: Layer, side: str, sketch: Sketch | None) -> bool:
    """Return whether a side of a layer is never formed."""
    return sketch is not None and layer.groups == 1 and _rows(layer, side) > sketch.limit


def any_large(layer: Layer, sketch: Sketch | None) -> bool:
    """Return whether one of a layer's sides is never formed."""
    return is_large(layer, "activation", sketch) or is_large(layer, "gradient", sketch)


def add_rows(
    sums: dict[str, Any],
    layer: Layer,
    side: str,
    rows: Tensor,
    sketch: Sketch | None,
    *,
    others: Tensor | None = None,
    only_squares: bool = False,
) -> None:
    """Add ``Σ x yᵀ``, a positive semidefinite matrix, to the sum of a side.

    Args:
        sums: State of the estimator, modified in place.
        layer: The layer.
        side: ``"activation"`` or ``"gradient"``.
        rows: The ``x``, shape ``(K, m, n)``.
        sketch: Which sides are large.
        others: The ``y``; None if they are the same.
        only_squares: Whether the matrix is diagonal, ``Σ diag(x ∘ y)``; only of large sides.
    """
    others = rows if others is None else others
    if not is_large(layer, side, sketch):
        layer.sum_of(sums, side).baddbmm_(rows.mT, others)
        return
    assert sketch is not None
    (x,), (y,) = rows, others
    n = _rows(layer, side)
    diagonal = _sum(sums, f"{side} diagonal", x, n)
    diagonal += torch.einsum("mn,mn->n", x, y)
    if only_squares:
        return
    if f"{side} test" not in sums:
        columns = sketch.columns(n, _rows(layer, "gradient" if side == "activation" else "activation"))
        sums[f"{side} test"] = random_columns(n, columns, sketch.seed, x)
    test = sums[f"{side} test"]
    _sum(sums, f"{side} product", x, n, test.shape[1]).addmm_(x.T, y @ test)


def block_of_sums(
    sums: dict[str, Any], layer: Layer, weight: Tensor | float, *, unit_traces: bool = False
) -> TruncatedBlock:
    """Return the block of a layer of which a side is large, and remove the sums.

    The other side is decomposed, or truncated by ``Truncation()`` if it has more than its limit of rows.

    Args:
        sums: The sums.
        layer: The layer.
        weight: What both sums are divided by.
        unit_traces: Whether the sums, which then have the same trace, are divided by it; the scale is the trace over
            ``weight``.
    """
    scale: Tensor | float = 1.0
    divisors = [weight, weight]
    if unit_traces:
        traces = [_trace(sums, side) for side in _SIDES]
        divisors = [trace.clamp_min(torch.finfo(trace.dtype).tiny) for trace in traces]
        scale = traces[1] / weight
    sides = [_side(sums, layer, side, divisor) for side, divisor in zip(_SIDES, divisors, strict=True)]
    return TruncatedBlock(sides[0], sides[1], scale, layer.name)


def check_not_sketched(*blocks: Block) -> None:
    """Check that finished blocks hold all their sums, which sketches do not.

    Raises:
        NotImplementedError: If they do not.
    """
    for block in blocks:
        assert isinstance(block, KroneckerBlock)
        q, p = block.shape
        if max(q // block.groups, p) > LARGEST_DENSE:
            raise NotImplementedError(
                f"the block of layer {block.name!r} was made from a sketch, and those of finished Fishers cannot be added. "
                "Estimate from all data at once, for example with "
                "DataLoader(torch.utils.data.ConcatDataset([first, second]), batch_size=...)."
            )


def no_start(layer: Layer) -> NotImplementedError:
    """Return the error that a layer of which a side is large cannot start from a given block."""
    return NotImplementedError(
        f"layer {layer.name!r} cannot start from a given block, because what is accumulated of it is a sketch, which "
        "the block does not determine. Use an estimator with sketch=None, or start from zero."
    )


def shown(estimator: Any) -> str:
    """Return the repr of a dataclass with a field ``sketch``, which is only shown if it is not the default."""
    values = {field.name: getattr(estimator, field.name) for field in fields(estimator)}
    if values["sketch"] == DEFAULT_SKETCH:
        del values["sketch"]
    return f"{type(estimator).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def _trace(sums: dict[str, Any], side: str) -> Tensor:
    diagonal = f"{side} diagonal"
    result: Tensor = sums[diagonal].sum() if diagonal in sums else trace(sums[side][0])
    return result


def _side(sums: dict[str, Any], layer: Layer, side: str, weight: Tensor | float) -> Eigen:
    name = f"the {side} factor of layer {layer.name!r}"
    if f"{side} diagonal" in sums:
        product = sums.pop(f"{side} product", None)
        product = None if product is None else product.div_(weight)
        return side_of_sketch(name, sums.pop(f"{side} diagonal") / weight, product, sums.pop(f"{side} test", None))
    moment = layer.activation_moment(sums) if side == "activation" else sums.pop(side)
    named = [(name, moment[0].div_(weight))]
    small = len(named[0][1]) <= Truncation().limit
    (eigen,) = eigendecompose_moments(named) if small else leading_eigenpairs(named, Truncation())
    assert eigen.unresolved is not None
    return Eigen(eigen.values.unsqueeze(0), eigen.vectors.unsqueeze(0), eigen.unresolved.unsqueeze(0))


def _sum(sums: dict[str, Any], key: str, like: Tensor, *shape: int) -> Tensor:
    """Return a sum, which is allocated when first requested."""
    if key not in sums:
        sums[key] = like.new_zeros(shape)
    result: Tensor = sums[key]
    return result


def _rows(layer: Layer, side: str) -> int:
    return layer.shape[1] if side == "activation" else layer.shape[0] // layer.groups
