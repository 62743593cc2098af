"""Which types of modules become layers, and how: the table of torch's own types, open to others (`register_layer`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from kronlaplace._registry import Registry
from kronlaplace.layers.attention import attention_forward, attention_layers, attention_refusal
from kronlaplace.layers.base import Layer, LinearLayer
from kronlaplace.layers.convolution import ConvolutionLayer
from kronlaplace.layers.embedding import EmbeddingLayer, embedding_refusal
from kronlaplace.layers.normalization import NormalizationLayer
from kronlaplace.layers.recurrent import recurrent_forward, recurrent_layers, recurrent_refusal
from kronlaplace.layers.scale import ScaleLayer
from kronlaplace.layers.transposed import TransposedLinearLayer

__all__ = ["LAYERS", "SUPPORTED_LAYERS", "Family", "family_of", "register_layer", "written_out"]


@dataclass(frozen=True)
class Family:
    """How modules of one type become layers.

    Attributes:
        kind: What it is called.
        make: Makes the layers of a module, given its name, the module, and others that share all of its parameters.
        refusal: Tells why a module cannot have a block, or None.
        forward: Takes the place of the modules' own forward pass while a pass is recorded; None if they can be observed.
        weight: The name of the parameter that must be trainable; None if all parameters must be, or none.
        bias: The name of the parameter that may be trainable too, or None.
        has_kronecker_factors: Whether the layers have Kronecker factors.
    """

    kind: str
    make: Callable[[str, Any, Sequence[nn.Module]], list[Layer]]
    refusal: Callable[[Any], str | None] = lambda module: None
    forward: Callable[..., Any] | None = None
    weight: str | None = "weight"
    bias: str | None = "bias"
    has_kronecker_factors: bool = True

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is one matrix ``(q, p)`` that only multiplies or is looked up in, so that such can be tied."""
        return self.kind in ("linear", "embedding")


def _full_name(module_name: str, parameter: str) -> str:
    return f"{module_name}.{parameter}" if module_name else parameter


def _weight_and_bias(kind: Any, weight: str = "weight", bias: str = "bias") -> Callable[..., list[Layer]]:
    def make(name: str, module: Any, tied_modules: Sequence[nn.Module]) -> list[Layer]:
        offset = getattr(module, bias, None)
        offsets = {_full_name(name, bias): offset} if offset is not None and offset.requires_grad else {}
        return [
            kind(name, module, {_full_name(name, weight): getattr(module, weight)}, offsets, tied_modules=tied_modules)
        ]

    return make


def _all_parameters(kind: Any) -> Callable[..., list[Layer]]:
    def make(name: str, module: nn.Module, tied_modules: Sequence[nn.Module]) -> list[Layer]:
        parameters = {_full_name(name, key): p for key, p in module.named_parameters(recurse=False)}
        return [kind(name, module, parameters, tied_modules)]

    return make


def _embedding(weight: str, name: str, module: Any, tied_modules: Sequence[nn.Module]) -> list[Layer]:
    return [EmbeddingLayer(name, module, {_full_name(name, weight): getattr(module, weight)}, tied_modules)]


_LINEAR = Family("linear", _weight_and_bias(LinearLayer))
_CONVOLUTION = Family("convolution", _weight_and_bias(ConvolutionLayer))
_NORMALIZATION = Family("normalization", _weight_and_bias(NormalizationLayer), has_kronecker_factors=False)
_RECURRENT = Family("recurrent", recurrent_layers, recurrent_refusal, recurrent_forward, weight=None)
_ATTENTION = Family("attention", attention_layers, attention_refusal, attention_forward, weight=None)
_EMBEDDING = Family(
    "embedding", partial(_embedding, "weight"), embedding_refusal, bias=None, has_kronecker_factors=False
)

LAYERS: Registry[type[nn.Module], Family] = Registry()
"""The types of modules that get a block."""

for _family, _types in {
    _LINEAR: (nn.Linear,),
    _CONVOLUTION: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    _RECURRENT: (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell),
    _ATTENTION: (nn.MultiheadAttention,),
    _NORMALIZATION: (
        *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    ),
    _EMBEDDING: (nn.Embedding,),
}.items():
    for _type in _types:
        LAYERS.add(_type, _family)

SUPPORTED_LAYERS: tuple[type[nn.Module], ...] = tuple(LAYERS)
"""The torch layer types that get a block, for ``isinstance``; `register_layer` adds others to what is supported."""

_ON_AXIS_ONE = tuple(kind for kind in SUPPORTED_LAYERS if LAYERS[kind] is _NORMALIZATION)[2:]


def family_of(module: nn.Module) -> tuple[type[nn.Module], Family] | None:
    """The registered type that a module is of, the nearest among its classes, and how such modules become layers."""
    table = LAYERS
    return next(((kind, table[kind]) for kind in type(module).__mro__ if kind in table), None)


def written_out(module: nn.Module) -> Callable[..., Any] | None:
    """The forward pass that replaces the module's own while a pass is recorded, or None if the module can be observed."""
    found = family_of(module)
    return None if found is None else found[1].forward


def register_layer(
    module_type: type[nn.Module],
    family: str | type[Layer],
    *,
    weight: str = "weight",
    bias: str = "bias",
    transposed: bool = False,
) -> None:
    """Let modules of a type of your own have a block, by telling what their parameters do.

        >>> kl.register_layer(transformers.pytorch_utils.Conv1D, "linear", transposed=True)  # doctest: +SKIP
        >>> kl.register_layer(LlamaRMSNorm, "normalization")                                 # doctest: +SKIP

    It holds for the type and for subclasses of it that do not override its ``forward``; such a subclass needs a
    registration of its own. A subclass of a supported torch type whose own forward pass does the same as its parent's is
    registered with its parent's family. Whether the registration is right is checked on the first batch of every fit: the
    layer's inputs and output gradients must explain the gradient that autograd has for its parameters, or there is an
    error. `kronlaplace.testing.check_layer` checks more.

    Args:
        module_type: The type.
        family: What its modules do with their parameters:

            - ``"linear"``: the last axis of the input is multiplied by the weight, and the bias is added;
            - ``"convolution"``: as `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, with their attributes and parameter names;
            - ``"normalization"``: the input is normalized somehow, and multiplied by the weight (or by one plus the weight),
              feature by feature on the last axes (in subclasses of torch's batch, group and instance norms on axis 1);
            - ``"embedding"``: integer inputs look up rows of the weight;
            - or a class derived from `Layer` that says itself what ``a``, ``g`` and ``X`` are. It is made as the class
              that it is derived from: with ``(name, module, weights, bias, tied_modules=...)`` for `LinearLayer`,
              `ConvolutionLayer` and `NormalizationLayer`, else with ``(name, module, parameters, tied_modules)`` and all
              parameters of the module itself, which must be trainable together.
        weight: The name of the parameter that is the weight.
        bias: The name of the parameter that is the bias, if the module has one.
        transposed: Whether a linear layer's weight has the shape ``(inputs, outputs)``.

    Raises:
        TypeError: If the type is not a class of modules, or the family not a class of layers that can be made.
        ValueError: If the family is unknown, the type is torch's own, or an option does not apply to the family.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)) or module_type is nn.Module:
        raise TypeError(f"register_layer takes a class derived from torch.nn.Module, got {module_type!r}.")
    if module_type in SUPPORTED_LAYERS:
        raise ValueError(f"torch.nn.{module_type.__name__} is supported as it is; register a class of your own.")
    if isinstance(family, type):
        found = _own_family(family, weight, bias)
    elif family in _BY_NAME:
        found = _BY_NAME[family](module_type, weight, bias, transposed)
    else:
        raise ValueError(
            f"unknown family {family!r}; known are {', '.join(map(repr, _BY_NAME))}, or give a class derived from kl.Layer."
        )
    if transposed and not found.kind.startswith("linear"):
        raise ValueError(f'transposed=True only applies to the family "linear"; got {family!r}.')
    LAYERS.add(module_type, found)


def _linear_family(module_type: type[nn.Module], weight: str, bias: str, transposed: bool) -> Family:
    kind = TransposedLinearLayer if transposed else LinearLayer
    name = "linear, transposed" if transposed else "linear"
    return Family(name, _weight_and_bias(kind, weight, bias), weight=weight, bias=bias)


def _convolution_family(module_type: type[nn.Module], weight: str, bias: str, transposed: bool) -> Family:
    if (weight, bias) != ("weight", "bias"):
        raise ValueError(
            f"the parameters of a convolution must be called weight and bias; got {weight!r} and {bias!r}."
        )
    return Family("convolution", _weight_and_bias(ConvolutionLayer), _convolution_refusal)


def _convolution_refusal(module: Any) -> str | None:
    needed = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    missing = [name for name in needed if not hasattr(module, name)]
    return (
        f"it is registered as a convolution and lacks the attributes {missing} of torch.nn.Conv2d" if missing else None
    )


def _normalization_family(module_type: type[nn.Module], weight: str, bias: str, transposed: bool) -> Family:
    kind = NormalizationLayer if issubclass(module_type, _ON_AXIS_ONE) else ScaleLayer
    return Family(
        "normalization", _weight_and_bias(kind, weight, bias), weight=weight, bias=bias, has_kronecker_factors=False
    )


def _embedding_family(module_type: type[nn.Module], weight: str, bias: str, transposed: bool) -> Family:
    if bias != "bias":
        raise ValueError(f"bias={bias!r} does not apply to an embedding, which has a table only.")
    return Family(
        "embedding",
        partial(_embedding, weight),
        embedding_refusal,
        weight=weight,
        bias=None,
        has_kronecker_factors=False,
    )


_BY_NAME: dict[str, Callable[[type[nn.Module], str, str, bool], Family]] = {
    "linear": _linear_family,
    "convolution": _convolution_family,
    "normalization": _normalization_family,
    "embedding": _embedding_family,
}


def _own_family(kind: type[Layer], weight: str, bias: str) -> Family:
    if not issubclass(kind, Layer):
        raise TypeError(f"a family must be a string or a class derived from kl.Layer, got {kind!r}.")
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise TypeError(f"{kind.__name__} cannot be made: it does not define {missing}.")
    if issubclass(kind, (LinearLayer, ConvolutionLayer, NormalizationLayer)):
        return Family(
            kind.__name__,
            _weight_and_bias(kind, weight, bias),
            weight=weight,
            bias=bias,
            has_kronecker_factors=kind.has_kronecker_factors,
        )
    if (weight, bias) != ("weight", "bias"):
        raise ValueError(
            f"{kind.__name__} takes all parameters of a module by their own names; leave out weight and bias."
        )
    return Family(
        kind.__name__, _all_parameters(kind), weight=None, bias=None, has_kronecker_factors=kind.has_kronecker_factors
    )
