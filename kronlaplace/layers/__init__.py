"""Layer types, how they turn inputs and output gradients into ``a`` and ``g``, and which modules get a block."""

from kronlaplace.layers.base import Layer, LinearLayer, Report, Sums
from kronlaplace.layers.convolution import ConvolutionLayer
from kronlaplace.layers.embedding import EmbeddingLayer
from kronlaplace.layers.families import LAYERS, SUPPORTED_LAYERS, family_of, register_layer, written_out
from kronlaplace.layers.find import LayerSearch, LeftOut, Unsupported, find_layers, search_layers
from kronlaplace.layers.layer_batch import (
    BatchGradient,
    LayerBatch,
    LayerCall,
    LayerGradients,
    MomentExamples,
    SquaredGradients,
)
from kronlaplace.layers.names import NOT_WANTED, entries_of
from kronlaplace.layers.normalization import NormalizationLayer
from kronlaplace.layers.per_example import ModuleLayer, NetworkLayer, PerExampleLayer, rules_of, with_rules
from kronlaplace.layers.unusable import UnusableLayersError

__all__ = [
    "LAYERS",
    "NOT_WANTED",
    "SUPPORTED_LAYERS",
    "BatchGradient",
    "ConvolutionLayer",
    "EmbeddingLayer",
    "Layer",
    "LayerBatch",
    "LayerCall",
    "LayerGradients",
    "MomentExamples",
    "LayerSearch",
    "LeftOut",
    "LinearLayer",
    "ModuleLayer",
    "NetworkLayer",
    "NormalizationLayer",
    "PerExampleLayer",
    "Report",
    "Sums",
    "Unsupported",
    "UnusableLayersError",
    "entries_of",
    "family_of",
    "find_layers",
    "register_layer",
    "rules_of",
    "search_layers",
    "with_rules",
    "written_out",
    "SquaredGradients",
]
