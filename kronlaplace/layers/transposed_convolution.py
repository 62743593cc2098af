"""Transposed convolutions: convolutions of an input with zeros in between.

With stride ``s``, padding ``π``, kernel size ``k`` and dilation ``d``, a transposed convolution is the convolution with
stride 1 and the reversed kernel of an input with ``s − 1`` zeros between its pixels and ``d (k − 1) − π`` in front of them.
The patches of that input are ``a``, and KFC's factors are those of that convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kronlaplace.layers.base import Layer, Sums
from kronlaplace.layers.convolution import ConvolutionLayer
from kronlaplace.layers.unusable import UnusableLayersError

__all__ = ["TransposedConvolutionLayer"]


class TransposedConvolutionLayer(Layer):
    """`nn.ConvTranspose1d`, `nn.ConvTranspose2d` or `nn.ConvTranspose3d`, with stride, padding, dilation and groups.

    ``p = C_in/groups · k_h · k_w`` (+ 1 with a bias), with the kernel reversed along each axis.
    """

    shares_weights_over_space: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: Mapping[str, nn.Parameter],
        bias: Mapping[str, nn.Parameter],
        tied_modules: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(name, module, {**weight, **bias}, tied_modules)
        m = self.module
        kernel = torch.empty(m.out_channels, m.in_channels // m.groups, *m.kernel_size, device="meta")
        same: Any = SimpleNamespace(
            in_channels=m.in_channels,
            out_channels=m.out_channels,
            kernel_size=m.kernel_size,
            stride=(1,) * len(m.kernel_size),
            padding=(0,) * len(m.kernel_size),
            dilation=m.dilation,
            groups=m.groups,
            padding_mode="zeros",
            weight=kernel,
        )
        self._convolution = ConvolutionLayer(name, same, weight, bias)

    @property
    def shape(self) -> tuple[int, int]:
        return self._convolution.shape

    @property
    def groups(self) -> int:
        return self._convolution.groups

    def assemble(self, values: Mapping[str, Tensor]) -> Tensor:
        weight = self.parameter_names[0]
        by_group = values[weight].unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return self._convolution.assemble({**values, weight: by_group.flip(self._spatial)})

    def split_directions(self, matrices: Tensor) -> dict[str, Tensor]:
        parts = self._convolution.split_directions(matrices)
        weight, first = self.parameter_names[0], matrices.ndim - 2
        kernels = parts[weight].flip(self._spatial)
        parts[weight] = (
            kernels.unflatten(first, (self.groups, -1)).transpose(first + 1, first + 2).flatten(first, first + 1)
        )
        return parts

    @property
    def _spatial(self) -> tuple[int, ...]:
        """The axes of the kernel, from the end."""
        return tuple(range(-len(self.module.kernel_size), 0))

    def input_shape(self) -> str:
        return self._convolution.input_shape()

    def is_input(self, x: Tensor) -> bool:
        return self._convolution.is_input(x)

    def positions(self, x: Tensor, grad: Tensor) -> int | Tensor:
        return self._convolution.positions(x, grad)

    def activations(self, x: Tensor) -> Tensor:
        return self._convolution.activations(self._spread(x))

    def gradients(self, grad: Tensor) -> Tensor:
        return self._convolution.gradients(grad)

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        return self._convolution.project(self._spread(x), basis)

    def temporaries(self, x: Tensor, grad: Tensor, activations: bool) -> int:
        spread = x.numel() // max(x[0, 0].numel(), 1) * grad[0, 0].numel()
        return spread + super().temporaries(x, grad, activations)

    def weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        spread = self._spread(x)
        expected = self._convolution._output_size(spread.shape[2:])
        if list(grad.shape[2:]) != expected:
            reason = "it is called with an output_size of its own"
            raise UnusableLayersError(
                f"layer {self.name!r} cannot have Kronecker factors: {reason}.", {self.name: reason}
            )
        return self._convolution.weight_gradients(spread, grad)

    def add_activation_moment(self, x: Tensor, sums: Sums) -> None:
        self._convolution.add_activation_moment(self._spread(x), sums)

    def activation_moment(self, sums: Sums) -> Tensor:
        return self._convolution.activation_moment(sums)

    def add_gradient_moment(self, grad: Tensor, out: Tensor, positions: int | Tensor) -> None:
        self._convolution.add_gradient_moment(grad, out, positions)

    def _spread(self, x: Tensor) -> Tensor:
        """Return the input of the convolution with stride 1."""
        m = self.module
        everything = slice(None), slice(None)
        size, to, of = [], list(everything), list(everything)
        for n, s, padding, extra, d, k in zip(
            x.shape[2:], m.stride, m.padding, m.output_padding, m.dilation, m.kernel_size, strict=True
        ):
            length = (n - 1) * s - 2 * padding + 2 * d * (k - 1) + extra + 1
            first = d * (k - 1) - padding  # the place of the first pixel, which a wide padding cuts off
            skipped = max(0, -(first // s))
            last = min(n - 1, (length - 1 - first) // s)
            to.append(slice(first + skipped * s, first + last * s + 1, s))
            of.append(slice(skipped, last + 1))
            size.append(length)
        result = x.new_zeros(*x.shape[:2], *size)
        result[tuple(to)] = x[tuple(of)]
        return result
