"""The module types that become layers, and how: a table of torch's own types, which `register_layer` extends."""

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
from kronlaplace.layers.recurrent import recurrent_forward, recurrent_layers
from kronlaplace.layers.scale import ScaleLayer
from kronlaplace.layers.transposed import TransposedLinearLayer
from kronlaplace.layers.transposed_convolution import TransposedConvolutionLayer

__all__ = ["LAYERS", "SUPPORTED_LAYERS", "Family", "family_of", "linear_family", "register_layer", "written_out"]


@dataclass(frozen=True)
class Family:
    """How modules of one type become layers.

    Attributes:
        kind: The family's name.
        make: Function that makes the layers of a module, given its name, the module, and the other modules that share all of
            its parameters.
        refusal: Function that returns why the family does not describe a module, or None if it does.
        forbidden: Function that returns why the outputs of a module have no derivative with respect to its parameters, or
            None if they have.
        forward: Function that replaces the modules' own forward pass while a pass is recorded; None if the modules can be
            observed as they are.
        weight: The name of the parameter that must be trainable; None if either all or none of the parameters must be.
        bias: The name of the parameter that may also be trainable, or None.
        has_kronecker_factors: Whether the layers have Kronecker factors.
    """

    kind: str
    make: Callable[[str, Any, Sequence[nn.Module]], list[Layer]]
    refusal: Callable[[Any], str | None] = lambda module: None
    forbidden: Callable[[Any], str | None] = lambda module: None
    forward: Callable[..., Any] | None = None
    weight: str | None = "weight"
    bias: str | None = "bias"
    has_kronecker_factors: bool = True

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is one matrix ``(q, p)``, used only for products or look-ups, so that modules can be tied."""
        return self.kind in ("linear", "embedding")


def _full_name(module_name: str, parameter: str) -> str:
    return f"{module_name}.{parameter}" if module_name else parameter


def _weight_and_bias(kind: Any, weight: str = "weight", bias: str | None = "bias") -> Callable[..., list[Layer]]:
    def make(name: str, module: Any, tied_modules: Sequence[nn.Module]) -> list[Layer]:
        offset = None if bias is None else getattr(module, bias, None)
        offsets = {_full_name(name, str(bias)): offset} if offset is not None and offset.requires_grad else {}
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
_TRANSPOSED = Family("transposed convolution", _weight_and_bias(TransposedConvolutionLayer))
_NORMALIZATION = Family("normalization", _weight_and_bias(NormalizationLayer), has_kronecker_factors=False)
_RECURRENT = Family("recurrent", recurrent_layers, forward=recurrent_forward, weight=None)
_ATTENTION = Family("attention", attention_layers, attention_refusal, forward=attention_forward, weight=None)
_EMBEDDING = Family(
    "embedding", partial(_embedding, "weight"), forbidden=embedding_refusal, bias=None, has_kronecker_factors=False
)

LAYERS: Registry[type[nn.Module], Family] = Registry()
"""The module types that get a block, with their families."""

for _family, _types in {
    _LINEAR: (nn.Linear,),
    _CONVOLUTION: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    _TRANSPOSED: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
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
"""The torch layer types that get a block, for ``isinstance``; `register_layer` adds support for other types."""

_ON_AXIS_ONE = tuple(kind for kind in SUPPORTED_LAYERS if LAYERS[kind] is _NORMALIZATION)[2:]


def family_of(module: nn.Module) -> tuple[type[nn.Module], Family] | None:
    """Return the first registered class in a module's method resolution order and its family, or None if there is none."""
    table = LAYERS
    return next(((kind, table[kind]) for kind in type(module).__mro__ if kind in table), None)


def written_out(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward pass that replaces the module's own while a pass is recorded; None if it is observed as it is."""
    found = family_of(module)
    return None if found is None or found[1].refusal(module) is not None else found[1].forward


def register_layer(
    module_type: type[nn.Module],
    family: str | type[Layer],
    *,
    weight: str = "weight",
    bias: str = "bias",
    transposed: bool = False,
) -> None:
    """Let modules of your own type have a block, by declaring what their parameters do.

        >>> kl.register_layer(transformers.pytorch_utils.Conv1D, "linear", transposed=True)  # doctest: +SKIP
        >>> kl.register_layer(LlamaRMSNorm, "normalization")                                 # doctest: +SKIP

    The registration applies to the type and to its subclasses that do not override ``forward``; subclasses that do need
    their own registration. The registration is checked on the first batch of every fit: the layer's inputs and output
    gradients must account for the gradient that autograd computes for its parameters; otherwise the layer is treated as one
    that no rule describes (see ``unsupported`` of `estimate_fisher`). `kronlaplace.testing.check_layer` checks more.

    Args:
        module_type: The module type.
        family: What its modules do with their parameters:

            - ``"linear"``: multiply the last axis of the input by the weight, and add the bias;
            - ``"convolution"``: the same as `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, with their attributes and parameter
              names;
            - ``"normalization"``: normalize the input in some way, then multiply it by the weight (or one plus the weight)
              feature by feature, on the last axes (on axis 1 in subclasses of torch's batch, group and instance norms);
            - ``"embedding"``: look up rows of the weight with integer inputs;
            - or a class derived from `Layer` that defines ``a``, ``g`` and ``X`` itself. Classes derived from `LinearLayer`,
              `ConvolutionLayer` or `NormalizationLayer` are constructed with
              ``(name, module, weights, bias, tied_modules=...)``, all others with
              ``(name, module, parameters, tied_modules)`` and all of the module's own parameters, of which either all or
              none must be trainable.
        weight: The name of the weight parameter.
        bias: The name of the bias parameter, if the module has one.
        transposed: Whether a linear layer's weight has the shape ``(inputs, outputs)``.

    Raises:
        TypeError: If the type is not a module class, or the family is not a layer class that can be instantiated.
        ValueError: If the family is unknown, the type is torch's own, or an option does not apply to the family.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)) or module_type is nn.Module:
        raise TypeError(f"register_layer takes a class derived from torch.nn.Module, got {module_type!r}.")
    if module_type in SUPPORTED_LAYERS:
        raise ValueError(f"torch.nn.{module_type.__name__} is already supported; register your own class instead.")
    if isinstance(family, type):
        found = _own_family(family, weight, bias)
    elif family in _BY_NAME:
        found = _BY_NAME[family](module_type, weight, bias, transposed)
    else:
        raise ValueError(
            f"unknown family {family!r}; use one of {', '.join(map(repr, _BY_NAME))}, or a class derived from kl.Layer."
        )
    if transposed and not found.kind.startswith("linear"):
        raise ValueError(f'transposed=True only applies to the family "linear"; got {family!r}.')
    LAYERS.add(module_type, found)


def linear_family(weight: str, bias: str | None, transposed: bool) -> Family:
    """Return the family of modules that multiply the last axis of their input by the weight, and add the bias.

    Args:
        weight: The name of the weight.
        bias: The name of the bias, or None.
        transposed: Whether the weight has the shape ``(inputs, outputs)``.
    """
    kind = TransposedLinearLayer if transposed else LinearLayer
    name = "linear, transposed" if transposed else "linear"
    return Family(name, _weight_and_bias(kind, weight, bias), weight=weight, bias=bias)


def _linear_family(module_type: type[nn.Module], weight: str, bias: str, transposed: bool) -> Family:
    return linear_family(weight, bias, transposed)


def _convolution_family(module_type: type[nn.Module], weight: str, bias: str, transposed: bool) -> Family:
    if (weight, bias) != ("weight", "bias"):
        raise ValueError(f"the parameters of a convolution must be named weight and bias; got {weight!r} and {bias!r}.")
    return Family("convolution", _weight_and_bias(ConvolutionLayer), _convolution_refusal)


def _convolution_refusal(module: Any) -> str | None:
    needed = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    missing = [name for name in needed if not hasattr(module, name)]
    return (
        f"it is registered as a convolution but lacks the attributes {missing} of torch.nn.Conv2d" if missing else None
    )


def _normalization_family(module_type: type[nn.Module], weight: str, bias: str, transposed: bool) -> Family:
    kind = NormalizationLayer if issubclass(module_type, _ON_AXIS_ONE) else ScaleLayer
    return Family(
        "normalization", _weight_and_bias(kind, weight, bias), weight=weight, bias=bias, has_kronecker_factors=False
    )


def _embedding_family(module_type: type[nn.Module], weight: str, bias: str, transposed: bool) -> Family:
    if bias != "bias":
        raise ValueError(f"bias={bias!r} does not apply to an embedding, which has only a table.")
    return Family(
        "embedding",
        partial(_embedding, weight),
        forbidden=embedding_refusal,
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
        raise TypeError(f"{kind.__name__} cannot be instantiated: it does not define {missing}.")
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
            f"{kind.__name__} takes all parameters of a module by their own names; omit weight= and bias=."
        )
    return Family(
        kind.__name__, _all_parameters(kind), weight=None, bias=None, has_kronecker_factors=kind.has_kronecker_factors
    )
