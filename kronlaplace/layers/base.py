"""Layers as estimators see them: a matrix ``W̄ = [W b]``, its inputs ``a`` and its output gradients ``g``.

A layer's parameters form one matrix ``W̄`` of shape ``(q, p)``: ``q`` outputs, ``p`` inputs with the homogeneous 1 of
the bias last. For each example, the layer uses that matrix at ``T`` positions (1 for a plain linear layer; the output
pixels of a convolution, tokens, or time steps; the positions of all calls together if the layer is called several times),
with inputs ``a`` and output gradients ``g``. The per-example weight gradient is ``X = Σ_t g_t a_tᵀ``.

The rows of ``W̄`` may fall into ``K`` groups of equal size that see different inputs (grouped convolutions; query, key
and value of attention). Then ``a`` has shape ``(K, N, T, p)``, ``g`` has shape ``(K, N, T, q/K)``, and each group has its
own factors. For all other layers, ``K = 1``.

Layers whose weights do not multiply inputs (the scale and shift of a normalization, an embedding) have no ``a`` and ``g``
in this sense, only ``X``; they get a diagonal block.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronlaplace._dense import check_size
from kronlaplace._precision import wide_dtype

__all__ = ["Layer", "LinearLayer", "Report", "Sums"]

Sums = dict[str, Tensor]
"""Named sums over examples, which add up over batches key by key."""


class Report(Protocol):
    """Callback through which a module that runs written out reports the calls of its blocks, numbered by ``block_index``."""

    def __call__(self, block_index: int, x: Tensor, output: Tensor) -> None:
        """Report one call: its input, and either its output or the `probe` that was added to it, with examples first."""

    def probe(self, block_index: int, zeros: Tensor) -> Tensor:
        """Return the zeros, ready to be added to an output; the gradient with respect to them is then the output's."""


class Layer(ABC):
    """One block of the Fisher: some parameters of the user's network, and how the network uses them.

    Args:
        name: The block's name.
        module: The module that owns the parameters.
        parameters: The parameters, keyed by their `nn.Module.named_parameters` name, in the order of the columns of ``W̄``.
        tied_modules: Other modules that share all of these parameters.
    """

    merged_parameters: Mapping[str, nn.Parameter] = MappingProxyType({})
    """Parameters outside the block that act only through their sum with one of the block's parameters."""

    has_kronecker_factors: ClassVar[bool] = True
    """Whether the layer has ``a`` and ``g``, so that it can have a Kronecker block."""

    shares_weights_over_space: ClassVar[bool] = False
    """Whether the layer is a convolution, to which the papers' rules for spatially shared weights apply."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        tied_modules: Sequence[nn.Module] = (),
    ) -> None:
        self.name = name
        self.module: Any = module
        self.parameters = dict(parameters)
        self.tied_modules = tuple(tied_modules)
        self.block_index = 0
        """The index of this block among the module's blocks."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.shape})"

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules whose calls use the parameters."""
        return (self.module, *self.tied_modules)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape ``(q, p)`` of ``W̄``."""

    @property
    def groups(self) -> int:
        """The number ``K`` of groups of rows that see their own inputs."""
        return 1

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of the block's parameters, in the order of the columns of ``W̄``."""
        return tuple(self.parameters)

    @property
    def n_parameters(self) -> int:
        """The number of network parameters that the block covers, including merged parameters."""
        return sum(p.numel() for p in (*self.parameters.values(), *self.merged_parameters.values()))

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which sums accumulate: that of the parameters, but at least float32."""
        return wide_dtype(next(iter(self.parameters.values())).dtype)

    def sum_of(self, sums: Sums, key: str) -> Tensor:
        """Return the sum ``"activation"``, shape ``(K, p, p)``, or ``"gradient"``, ``(K, q/K, q/K)``, to add to in place.

        The sum is allocated, as zeros, only when first requested, to save memory.

        Raises:
            NotImplementedError: If it would take more than 4 GiB in float32.
        """
        if key not in sums:
            size = self.shape[1] if key == "activation" else self.shape[0] // self.groups
            check_size(size, f"layer {self.name!r} needs a factor")
            sums[key] = torch.zeros(self.groups, size, size, dtype=self.dtype, device=self.device)
        return sums[key]

    @abstractmethod
    def assemble(self, values: Mapping[str, Tensor]) -> Tensor:
        """Assemble values of the parameters, such as their gradients, into a matrix ``(q, p)`` in the layout of ``W̄``."""

    def matrix(self, *, detach: bool = True) -> Tensor:
        """Return a copy of ``W̄``, shape ``(q, p)``, in the dtype of the parameters, by default detached from them.

        If a column is a sum of parameters, which needs more than half precision, the result is in `dtype` instead.
        """
        return self.assemble({name: p.detach() if detach else p for name, p in self.parameters.items()})

    @abstractmethod
    def split_directions(self, matrices: Tensor) -> dict[str, Tensor]:
        """Split directions in the space of ``W̄``, such as gradients or steps, by parameter. This map is linear.

        Args:
            matrices: Shape ``(..., q, p)``.

        Returns:
            The directions by parameter name, each of shape ``(..., *shape of the parameter)``.
        """

    def split_values(self, matrices: Tensor) -> dict[str, Tensor]:
        """Split values of ``W̄`` by parameter; the inverse of `matrix`.

        This differs from `split_directions` where merged parameters act through their sum with the block: they keep their
        values in the network, and these are subtracted.

        Args:
            matrices: Shape ``(..., q, p)``.

        Returns:
            The values by parameter name, each of shape ``(..., *shape of the parameter)``.
        """
        return self.split_directions(matrices)

    @property
    def divisible(self) -> bool:
        """Whether examples can be processed a few at a time, which fails if the layer uses statistics of the whole batch."""
        return True

    def example_axes(self, x: Tensor) -> tuple[int, ...]:
        """Return the axes of an input that may index the examples, the most usual one first."""
        return (0,)

    @abstractmethod
    def input_shape(self) -> str:
        """Return the shape that inputs must have, for error messages."""

    def is_input(self, x: Tensor) -> bool:
        """Return whether the layer supports inputs of the shape of ``x``."""
        return x.ndim >= 1

    @abstractmethod
    def positions(self, x: Tensor, grad: Tensor) -> int | Tensor:
        """Return ``T`` of one call, of shape ``(K, 1, 1)`` if it differs between groups."""

    def input_positions(self, x: Tensor) -> int:
        """Return ``T`` of one call as far as its input alone tells it, and otherwise 1."""
        return 1

    @abstractmethod
    def weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return ``X`` of one call, shape ``(K, N, q/K, p)``, in `dtype`.

        Args:
            x: The call's input, with examples first.
            grad: The gradient at its output, with examples first.
        """

    def temporaries(self, x: Tensor, grad: Tensor, activations: bool) -> int:
        """Return how many numbers ``a``, ``g`` and ``X`` of a call take; ``activations``: whether ``a`` is always formed."""
        (q, p), groups = self.shape, self.groups
        rows = grad.numel() // max(q // groups, 1)  # N·T·K
        return (rows * p if self.has_kronecker_factors else 0) + len(x) * q * p

    def input_norm(self, x: Tensor) -> Tensor | float:
        """Return the Frobenius norm of what multiplies the gradients in ``Σ_n X_n``; it bounds the rounding error."""
        return torch.linalg.vector_norm(x.to(self.dtype))

    @property
    def totals_are_products(self) -> bool:
        """Whether `total_weight_gradient` is a product of ``g`` and ``a``, or of look-ups, which never forms ``X``."""
        return False

    def total_weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return ``Σ_n X_n`` of one call, shape ``(q, p)``."""
        if self.totals_are_products:
            g, a = (part.flatten(1, 2) for part in (self.gradients(grad), self.activations(x)))
            return (g.mT @ a).flatten(0, 1)
        return self.weight_gradients(x, grad).sum(1).flatten(0, 1)

    @property
    def weight_of_inputs(self) -> Tensor | None:
        """The matrix ``W`` of which the output is ``W x`` plus what does not depend on the input ``x``, without a copy.

        None where there is no such matrix, or only as a copy.
        """
        return None

    def activations(self, x: Tensor) -> Tensor:
        """Return ``a`` of one call, shape ``(K, N, T, p)``, in `dtype`."""
        raise NotImplementedError(type(self).__name__)

    def gradients(self, grad: Tensor) -> Tensor:
        """Return ``g`` of one call, shape ``(K, N, T, q/K)``, in `dtype`."""
        raise NotImplementedError(type(self).__name__)

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        """Return the inputs in another basis, ``a Q``, shape ``(K, N, T, k)``, for ``Q`` of shape ``(K, p, k)``."""
        return self.activations(x) @ basis.unsqueeze(1)

    def add_activation_moment(self, x: Tensor, sums: Sums) -> None:
        """Add ``Σ_n Σ_t a aᵀ`` of one call to ``sums``, in the form that `activation_moment` reads."""
        a = self.activations(x).flatten(1, 2)
        self.sum_of(sums, "activation").baddbmm_(a.mT, a)

    def activation_moment(self, sums: Sums) -> Tensor:
        """Return the sum that `add_activation_moment` accumulated, shape ``(K, p, p)``, and remove it from ``sums``."""
        return sums.pop("activation")

    def add_gradient_moment(self, grad: Tensor, out: Tensor, positions: int | Tensor) -> None:
        """Add ``Σ_n Σ_t g gᵀ`` of one call, divided by ``positions``, to ``out`` of shape ``(K, q/K, q/K)`` in place."""
        g = self.gradients(grad).flatten(1, 2)
        if isinstance(positions, Tensor):
            out += g.mT @ g / positions
        else:
            out.baddbmm_(g.mT, g, alpha=1 / positions)

    def squared_weight_gradients(self, calls: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> bool:
        """Add ``Σ_n X ∘ X`` to ``out`` of shape ``(q, p)`` without forming ``X``, if that is possible.

        Args:
            calls: The input and output gradient of every call.
            out: The sum to add to.

        Returns:
            Whether the sum was added; if not, ``X`` must be formed.
        """
        return False


class LinearLayer(Layer):
    """A matrix that multiplies the last axis of its input: `nn.Linear`, or one block of a recurrent layer.

    Axes between the examples and the features are positions.

    Args:
        weights: The matrix-valued parameters, which are side by side in ``W̄``.
        bias: The bias; empty if there is none.
        merged_parameters: A second bias that the layer adds to the first and that is not part of the block (in recurrent
            layers, the two act only through their sum). The block's last column is the sum, attributed to ``bias``.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weights: Mapping[str, nn.Parameter],
        bias: Mapping[str, nn.Parameter],
        merged_parameters: Mapping[str, nn.Parameter] | None = None,
        tied_modules: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(name, module, {**weights, **bias}, tied_modules)
        self._weights = dict(weights)
        self._bias = next(iter(bias.items()), None)
        self.merged_parameters = dict(merged_parameters or {})
        self._constant = next(iter(self.merged_parameters.values()), None)

    @property
    def bias(self) -> bool:
        """Whether ``a`` ends with the homogeneous 1."""
        return self._bias is not None

    @property
    def in_features(self) -> int:
        """``p`` without the homogeneous 1."""
        return sum(w[0].numel() for w in self._weights.values())

    @property
    def weight_of_inputs(self) -> Tensor | None:
        if type(self) is not LinearLayer or len(self._weights) > 1:
            return None
        return next(iter(self._weights.values())).detach()

    @property
    def shape(self) -> tuple[int, int]:
        return len(next(iter(self._weights.values()))), self.in_features + self.bias

    def assemble(self, values: Mapping[str, Tensor]) -> Tensor:
        columns = [values[name].flatten(1) for name in self._weights]
        if self._bias is not None:
            columns.append(values[self._bias[0]].unsqueeze(1))
        return torch.cat(columns, dim=1)

    def matrix(self, *, detach: bool = True) -> Tensor:
        result = super().matrix(detach=detach)
        if self._constant is None:
            return result
        constant = self._constant.detach() if detach else self._constant
        result = result.to(self.dtype)
        return torch.cat([result[:, :-1], (result[:, -1] + constant).unsqueeze(1)], dim=1)

    def split_directions(self, matrices: Tensor) -> dict[str, Tensor]:
        widths = [w[0].numel() for w in self._weights.values()]
        *parts, rest = matrices.split([*widths, int(self.bias)], dim=-1)
        result = {
            name: part.unflatten(-1, w.shape[1:]) for (name, w), part in zip(self._weights.items(), parts, strict=True)
        }
        if self._bias is not None:
            result[self._bias[0]] = rest.squeeze(-1)
        return result

    def split_values(self, matrices: Tensor) -> dict[str, Tensor]:
        result = self.split_directions(matrices)
        if self._bias is not None and self._constant is not None:
            result[self._bias[0]] = result[self._bias[0]] - self._constant.detach()
        return result

    def example_axes(self, x: Tensor) -> tuple[int, ...]:
        return tuple(range(x.ndim - 1))

    def input_shape(self) -> str:
        return f"(examples, ..., {self.in_features})"

    def positions(self, x: Tensor, grad: Tensor) -> int | Tensor:
        return grad[0, ..., 0].numel()

    def input_positions(self, x: Tensor) -> int:
        return math.prod(x.shape[1:-1])

    def activations(self, x: Tensor) -> Tensor:
        a = x.reshape(1, len(x), -1, x.shape[-1]).to(self.dtype)
        return F.pad(a, (0, 1), value=1.0) if self.bias else a

    def gradients(self, grad: Tensor) -> Tensor:
        return grad.reshape(1, len(grad), -1, grad.shape[-1]).to(self.dtype)

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        a = x.reshape(len(x), -1, x.shape[-1]).to(self.dtype)
        weight, offset = (basis[0, :-1], basis[0, -1]) if self.bias else (basis[0], None)
        return F.linear(a, weight.T, offset).unsqueeze(0)

    @property
    def totals_are_products(self) -> bool:
        return type(self).weight_gradients is LinearLayer.weight_gradients

    def weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        return self.gradients(grad).mT @ self.activations(x)

    def add_activation_moment(self, x: Tensor, sums: Sums) -> None:
        a = x.flatten(0, -2).to(self.dtype)
        p = a.shape[1]
        out = self.sum_of(sums, "activation")[0]
        out[:p, :p].addmm_(a.T, a)  # without a copy of the input extended by the 1
        if self.bias:
            total = a.sum(0)
            out[:p, p] += total
            out[p, :p] += total
            out[p, p] += len(a)

    def squared_weight_gradients(self, calls: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> bool:
        if len(calls) > 1 or calls[0][1].ndim > 2:
            return False
        a, g = self.activations(calls[0][0])[0, :, 0], self.gradients(calls[0][1])[0, :, 0]
        out.addmm_(g.square().T, a.square())
        return True
