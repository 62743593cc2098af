"""How each layer type turns its input and its output gradient into ``a`` and ``g``.

A layer's weight and bias form one matrix ``W̄ = [W b]`` of shape ``(q, p)``: ``q`` outputs, ``p`` inputs with the
homogeneous 1 of the bias last. On one example the layer uses that matrix at ``T`` positions (1 for a plain linear
layer, the output pixels of a convolution), with inputs ``a`` of shape ``(N, T, p)`` and output gradients ``g`` of
shape ``(N, T, q)``; its per-example weight gradient is ``Σ_t g_t a_tᵀ``.

A `LayerKind` knows one family of modules; a `Layer` is one such module in the user's network. A new layer type is a
new `LayerKind` in `_KINDS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SUPPORTED_LAYERS", "Layer", "LayerKind", "find_layers"]


_SMALL = 2**16
"""Numbers that a temporary may always hold, however small the layer."""


class LayerKind(ABC):
    """What a family of modules computes, in terms of ``a``, ``g`` and ``W̄``."""

    @abstractmethod
    def refusal(self, module: Any) -> str | None:
        """Why this module cannot be handled, or None if it can."""

    @abstractmethod
    def input_shape(self, module: Any) -> str:
        """The input shape that the module must be called with, for error messages."""

    @abstractmethod
    def accepts(self, module: Any, x: Tensor, n_examples: int) -> bool:
        """Whether the input ``x`` of a call has a leading axis of ``n_examples`` and a shape that is handled."""

    @abstractmethod
    def add_activation_moment(self, module: Any, x: Tensor, bias: bool, out: Tensor) -> None:
        """Add ``Σ_n Σ_t a_nt a_ntᵀ`` of one batch to ``out``, in place and in its dtype.

        Args:
            module: The layer.
            x: Its input, as the module got it.
            bias: Whether ``a`` ends with the homogeneous 1.
            out: The sum, shape ``(p, p)``.
        """

    @abstractmethod
    def gradients(self, module: nn.Module, grad: Tensor) -> Tensor:
        """The gradient at the module's output, in its own layout, as ``g`` of shape ``(N, T, q)`` (a view)."""

    @abstractmethod
    def project(self, module: Any, x: Tensor, basis: Tensor, bias: bool) -> Tensor:
        """The layer's inputs in another basis, ``a Q`` for ``Q`` of shape ``(p, k)``: shape ``(N, T, k)``.

        Needs no patches: it is the layer itself with ``Qᵀ`` for its weights.
        """

    @abstractmethod
    def add_gradient_moment(self, module: Any, grad: Tensor, out: Tensor) -> None:
        """Add ``1/T · Σ_n Σ_t g_nt g_ntᵀ`` of one batch to ``out`` of shape ``(q, q)``, in place and in its dtype."""


class _LinearKind(LayerKind):
    """`nn.Linear`, with any number of axes between the examples and the features: those are the positions."""

    def refusal(self, module: Any) -> str | None:
        return None

    def input_shape(self, module: Any) -> str:
        return f"(examples, ..., {module.in_features})"

    def accepts(self, module: Any, x: Tensor, n_examples: int) -> bool:
        return x.ndim >= 2 and x.shape[0] == n_examples

    def add_activation_moment(self, module: Any, x: Tensor, bias: bool, out: Tensor) -> None:
        a = x.flatten(0, -2).to(out.dtype)
        p = a.shape[1]
        out[:p, :p].addmm_(a.T, a)
        if bias:
            total = a.sum(0)
            out[:p, p] += total
            out[p, :p] += total
            out[p, p] += len(a)

    def add_gradient_moment(self, module: Any, grad: Tensor, out: Tensor) -> None:
        g = grad.flatten(0, -2).to(out.dtype)
        out.addmm_(g.T, g, alpha=len(grad) / len(g))

    def gradients(self, module: nn.Module, grad: Tensor) -> Tensor:
        return grad.reshape(len(grad), -1, grad.shape[-1])

    def project(self, module: Any, x: Tensor, basis: Tensor, bias: bool) -> Tensor:
        weight, offset = _split_basis(basis, bias)
        return F.linear(x.reshape(len(x), -1, x.shape[-1]), weight.T, offset)


class _ConvKind(LayerKind):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with stride, padding and dilation; output pixels are the positions."""

    def refusal(self, module: Any) -> str | None:
        if module.groups != 1:
            return f"grouped convolutions are not supported yet (groups={module.groups})"
        return None

    def input_shape(self, module: Any) -> str:
        size = ", ".join(("depth", "height", "width")[-_n_dims(module) :])
        return f"(examples, {module.in_channels}, {size})"

    def accepts(self, module: Any, x: Tensor, n_examples: int) -> bool:
        return x.ndim == _n_dims(module) + 2 and x.shape[0] == n_examples

    def add_activation_moment(self, module: Any, x: Tensor, bias: bool, out: Tensor) -> None:
        for patches in self._patches(module, x, bias, out.dtype):
            out.addmm_(patches, patches.T)

    def add_gradient_moment(self, module: Any, grad: Tensor, out: Tensor) -> None:
        n, q = grad.shape[:2]
        positions = grad[0, 0].numel()
        # As (q, n·T), one matrix product for many examples; an eighth of the batch at a time keeps the copy small.
        for part in grad.flatten(2).split(max(1, n // 8)):
            g = part.transpose(0, 1).reshape(q, -1).to(out.dtype)
            out.addmm_(g, g.T, alpha=1 / positions)

    def gradients(self, module: nn.Module, grad: Tensor) -> Tensor:
        return grad.flatten(2).transpose(1, 2)

    def project(self, module: Any, x: Tensor, basis: Tensor, bias: bool) -> Tensor:
        weight, offset = _split_basis(basis, bias)
        kernels = weight.T.reshape(-1, *cast(Tensor, module.weight).shape[1:])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[_n_dims(module) - 1]
        out = convolve(_padded(module, x), kernels, offset, module.stride, 0, module.dilation)
        return out.flatten(2).transpose(1, 2)

    @staticmethod
    def _patches(module: Any, x: Tensor, bias: bool, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the patches ``a``, transposed: matrices of shape ``(p, n·T)`` for a few examples at a time.

        That layout needs one copy and makes the second moment one matrix product. The number of examples is
        chosen so that a matrix is no larger than the layer's own input and output together: unfolding all of a
        batch would take ``k_h·k_w`` times its input.
        """
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        n, channels, *size = x.shape
        padded = _padded(module, x)
        out = [
            (length - d * (k - 1) - 1) // s + 1
            for length, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
        ]
        positions = math.prod(out)
        p = channels * math.prod(kernel) + bias
        budget = max(n * (channels * math.prod(size) + module.out_channels * positions), _SMALL)
        chunk = max(1, min(n, budget // (p * positions)))
        n_stride, c_stride, *strides = padded.stride()
        for start in range(0, n, chunk):
            count = min(chunk, n - start)
            view = padded.as_strided(
                (channels, *kernel, count, *out),
                (
                    c_stride,
                    *(st * d for st, d in zip(strides, dilation, strict=True)),
                    n_stride,
                    *(st * s for st, s in zip(strides, stride, strict=True)),
                ),
                padded.storage_offset() + start * n_stride,
            )
            patches = torch.empty(p, count * positions, dtype=dtype, device=x.device)
            patches[: p - bias].view(view.shape).copy_(view)
            if bias:
                patches[-1] = 1
            yield patches


_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: _LinearKind(),
    nn.Conv1d: _ConvKind(),
    nn.Conv2d: _ConvKind(),
    nn.Conv3d: _ConvKind(),
}


SUPPORTED_LAYERS: tuple[type[nn.Module], ...] = tuple(_KINDS)
"""The layer types that get a Kronecker block, for ``isinstance``."""


@dataclass(frozen=True)
class Layer:
    """One module of the user's network that gets a block.

    Attributes:
        name: Its name in `nn.Module.named_modules`.
        module: The module itself.
        kind: What it computes.
        bias: Whether its block contains the bias.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``(q, p)`` of the matrix ``W̄ = [W b]``."""
        weight = cast(Tensor, self.module.weight)
        return weight.shape[0], weight[0].numel() + self.bias

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the block's parameters, as in `nn.Module.named_parameters`: weight, then bias."""
        prefix = f"{self.name}." if self.name else ""
        return (f"{prefix}weight", f"{prefix}bias") if self.bias else (f"{prefix}weight",)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that factors accumulate in: that of the weights, at least float32."""
        return torch.promote_types(cast(Tensor, self.module.weight).dtype, torch.float32)

    def matrix(self) -> Tensor:
        """A detached copy of ``W̄ = [W b]``, shape ``(q, p)``."""
        weight = cast(Tensor, self.module.weight).detach().flatten(1)
        if not self.bias:
            return weight.clone()
        return torch.cat([weight, cast(Tensor, self.module.bias).detach().unsqueeze(1)], dim=1)

    def split(self, matrices: Tensor) -> dict[str, Tensor]:
        """Cut ``(..., q, p)`` matrices into parameters: ``{name: (..., *shape of the parameter)}``."""
        shape = cast(Tensor, self.module.weight).shape
        if not self.bias:
            return {self.parameter_names[0]: matrices.unflatten(-1, shape[1:])}
        weight_name, bias_name = self.parameter_names
        return {weight_name: matrices[..., :-1].unflatten(-1, shape[1:]), bias_name: matrices[..., -1]}

    def add_activation_moment(self, x: Tensor, out: Tensor) -> None:
        """Add ``Σ_n Σ_t a aᵀ`` for the input ``x`` of a call to ``out`` of shape ``(p, p)``."""
        self.kind.add_activation_moment(self.module, x, self.bias, out)

    def add_gradient_moment(self, grad: Tensor, out: Tensor) -> None:
        """Add ``1/T · Σ_n Σ_t g gᵀ`` for the gradient at the output of a call to ``out`` of shape ``(q, q)``."""
        self.kind.add_gradient_moment(self.module, grad, out)

    def gradients(self, grad: Tensor) -> Tensor:
        """``g`` of shape ``(N, T, q)`` for the gradient at the output of a call."""
        return self.kind.gradients(self.module, grad)

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        """``a Q`` of shape ``(N, T, k)`` for the input ``x`` of a call and ``Q`` of shape ``(p, k)``."""
        return self.kind.project(self.module, x, basis, self.bias)


def find_layers(model: nn.Module, names: Sequence[str] | None = None) -> list[Layer]:
    """The layers of ``model`` that get a block, in the order of `nn.Module.named_modules`.

    Args:
        model: The network; its trainable parameters decide (``requires_grad``).
        names: Only these modules; None means every module with trainable parameters.

    Raises:
        ValueError: If a name is unknown, twice, or without trainable parameters, or nothing is left.
        NotImplementedError: If a module with trainable parameters cannot get a block, naming every such module.
    """
    modules = {
        name: m for name, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))
    }
    if names is not None:
        return _as_layers(_selected(model, modules, names))
    if not modules:
        raise ValueError(
            "the model has no trainable parameters (requires_grad is False everywhere), so there is nothing to "
            "estimate. Set requires_grad_(True) on the layers that are to get a block."
        )
    return _as_layers(modules)


def _as_layers(modules: dict[str, nn.Module]) -> list[Layer]:
    layers: list[Layer] = []
    refusals: list[str] = []
    for name, module in modules.items():
        layer = _as_layer(name, module)
        if isinstance(layer, Layer):
            layers.append(layer)
        else:
            refusals.append(f"  {name or '(the model itself)'} ({type(module).__name__}): {layer}")
    refusals += _tied(layers)
    if refusals:
        raise NotImplementedError(
            "no Kronecker block for\n"
            + "\n".join(refusals)
            + f"\nSupported: {', '.join(k.__name__ for k in _KINDS)}. The ways out: leave the module out with layers=[...] "
            "(names of the modules that get a block), or freeze it with module.requires_grad_(False). "
            "Its parameters then stay at their trained values."
        )
    return layers


def _selected(model: nn.Module, trainable: dict[str, nn.Module], names: Iterable[str]) -> dict[str, nn.Module]:
    if isinstance(names, str):
        raise ValueError(f"layers must be a list of module names, got the string {names!r}; use [{names!r}].")
    names = list(names)
    if not names:
        raise ValueError(f"layers is empty; name at least one of {list(trainable)}, or leave it out for all.")
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(
                f"layers: the model has no module {name!r}; with trainable parameters are {list(trainable)}."
            )
        if name not in trainable:
            raise ValueError(
                f"layers: module {name!r} ({type(known[name]).__name__}) has no trainable parameters of its own; "
                f"those that have are {list(trainable)}."
            )
    if len(set(names)) != len(names):
        raise ValueError(f"layers: a name stands there twice in {names}.")
    return {name: module for name, module in trainable.items() if name in names}


def _as_layer(name: str, module: nn.Module) -> Layer | str:
    """The layer, or why there is none."""
    family = next((family for family in _KINDS if isinstance(module, family)), None)
    trainable = {key for key, p in module.named_parameters(recurse=False) if p.requires_grad}
    if family is None:
        return f"this layer type is not supported yet; its parameters: {', '.join(sorted(trainable))}"
    if type(module).forward is not family.forward:
        return f"it overrides {family.__name__}.forward, so its gradient is unknown"
    if "weight" not in trainable or not trainable <= {"weight", "bias"}:
        return (
            f"its trainable parameters must be the weight, with or without the bias; they are {sorted(trainable)} "
            "(if that is weight_norm or the like, bake it in: torch.nn.utils.parametrize.remove_parametrizations)"
        )
    kind = _KINDS[family]
    return kind.refusal(module) or Layer(name, module, kind, bias="bias" in trainable)


def _tied(layers: Iterable[Layer]) -> list[str]:
    owners: dict[int, str] = {}
    refusals = []
    for layer in layers:
        for parameter in layer.module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), layer.name)
            if other != layer.name:
                refusals.append(f"  {layer.name}: shares a parameter with {other}; tied weights are not supported yet")
    return refusals


def _split_basis(basis: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    return (basis[:-1], basis[-1]) if bias else (basis, None)


def _n_dims(module: Any) -> int:
    return len(module.kernel_size)


def _padded(module: Any, x: Tensor) -> Tensor:
    """The convolution's input with its own padding written out, so that only "valid" positions are left."""
    if module.padding == "valid":
        widths = [(0, 0)] * _n_dims(module)
    elif module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        widths = [(total // 2, total - total // 2) for total in totals]
    else:
        widths = [(w, w) for w in module.padding]
    if not any(map(any, widths)):
        return x
    flat = [w for pair in reversed(widths) for w in pair]
    return F.pad(x, flat, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
