"""Blocks of the Fisher, one per layer: the kinds of blocks, their algebra, and their eigendecompositions."""

from kronlaplace.blocks.base import Block, RotatedBlock, decompose
from kronlaplace.blocks.dense import DenseBlock
from kronlaplace.blocks.diagonal import DiagonalBlock
from kronlaplace.blocks.eigen import EigenBlock
from kronlaplace.blocks.kronecker import KroneckerBlock
from kronlaplace.blocks.registry import BLOCKS, block_from_tensors
from kronlaplace.blocks.sketch import Sketch
from kronlaplace.blocks.truncated import TruncatedBlock, truncated
from kronlaplace.blocks.truncation import Truncation

__all__ = [
    "BLOCKS",
    "Block",
    "DenseBlock",
    "DiagonalBlock",
    "EigenBlock",
    "KroneckerBlock",
    "RotatedBlock",
    "Sketch",
    "TruncatedBlock",
    "Truncation",
    "block_from_tensors",
    "decompose",
    "truncated",
]
