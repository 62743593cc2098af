"""The kinds of blocks, by their names in files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kronlaplace._registry import Registry
from kronlaplace.blocks.base import Block
from kronlaplace.blocks.dense import DenseBlock
from kronlaplace.blocks.diagonal import DiagonalBlock
from kronlaplace.blocks.eigen import EigenBlock
from kronlaplace.blocks.kronecker import KroneckerBlock
from kronlaplace.blocks.truncated import TruncatedBlock

__all__ = ["BLOCKS", "block_from_tensors"]


BLOCKS: Registry[str, type[Block]] = Registry()
"""The kinds of blocks that files can name."""

for _kind in (KroneckerBlock, TruncatedBlock, EigenBlock, DiagonalBlock, DenseBlock):
    BLOCKS.add(_kind.kind, _kind)


def block_from_tensors(kind: str, tensors: Mapping[str, Tensor], name: str) -> Block:
    """Make a block from its tensors, as the inverse of `Block.to_tensors`.

    Raises:
        ValueError: If the kind of block is unknown.
    """
    if kind not in BLOCKS:
        raise ValueError(
            f"the block of layer {name!r} is of unknown kind {kind!r}; the known kinds are {list(BLOCKS)}."
        )
    parts = dict(tensors)
    least_trace = parts.pop("least_trace", None)
    block = BLOCKS[kind]._from_tensors(parts, name)
    block.least_trace = least_trace
    return block
