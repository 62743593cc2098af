"""How each layer type turns its input and its output gradient into ``a`` and ``g``; which modules get a block."""

from kronlaplace.layers.base import Layer, LinearLayer, Sums
from kronlaplace.layers.convolution import ConvolutionLayer
from kronlaplace.layers.find import (
    SUPPORTED_LAYERS,
    LayerSearch,
    LeftOut,
    Unsupported,
    find_layers,
    search_layers,
    written_out,
)
from kronlaplace.layers.layer_batch import LayerBatch, LayerCall, LayerGradients
from kronlaplace.layers.names import NOT_WANTED, entries_of
from kronlaplace.layers.unusable import UnusableLayersError

__all__ = [
    "NOT_WANTED",
    "SUPPORTED_LAYERS",
    "ConvolutionLayer",
    "Layer",
    "LayerBatch",
    "LayerCall",
    "LayerGradients",
    "LayerSearch",
    "LeftOut",
    "LinearLayer",
    "Sums",
    "Unsupported",
    "UnusableLayersError",
    "entries_of",
    "find_layers",
    "search_layers",
    "written_out",
]
