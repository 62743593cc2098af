"""What a layer is to an estimator: a matrix ``W̄ = [W b]``, its inputs ``a`` and its output gradients ``g``.

A layer's parameters form one matrix ``W̄`` of shape ``(q, p)``: ``q`` outputs, ``p`` inputs with the homogeneous 1 of
the bias last. On one example the layer uses that matrix at ``T`` positions (1 for a plain linear layer; the output pixels
of a convolution, tokens, time steps; all of them together if it is called several times), with inputs ``a`` and output
gradients ``g``; its per-example weight gradient is ``X = Σ_t g_t a_tᵀ``.

The rows of ``W̄`` may fall into ``K`` groups of equal size that see different inputs (grouped convolutions; query, key
and value of attention): then ``a`` has shape ``(K, N, T, p)``, ``g`` ``(K, N, T, q/K)``, and a group's rows have factors
of their own. ``K = 1`` for all others.

Layers whose weights do not multiply inputs (scale and shift of a normalisation, an embedding) have no ``a`` and ``g`` in
this sense, only ``X``; they get a diagonal block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronlaplace._precision import wide_dtype

__all__ = ["Layer", "LinearLayer", "Report", "Sums"]

Sums = dict[str, Tensor]
"""Named sums over examples; they add up over batches, key by key."""


class Report(Protocol):
    """How a module that runs written out tells of its blocks; ``block_index`` is the number of the block in the module."""

    def __call__(self, block_index: int, x: Tensor, output: Tensor) -> None:
        """Report one call: its input, and its output or the `probe` that was added to it, examples first."""

    def probe(self, block_index: int, zeros: Tensor) -> Tensor:
        """The zeros, ready to be added to an output whose gradient is wanted: the gradient at them is the output's."""


class Layer(ABC):
    """One block of the Fisher: parameters of the user's network, and how they are used.

    Args:
        name: The block's name.
        module: The module that has the parameters.
        parameters: They, by their names in `nn.Module.named_parameters`, in the order of the columns of ``W̄``.
        tied_modules: Other modules that share all of these parameters.
    """

    merged_parameters: Mapping[str, nn.Parameter] = MappingProxyType({})
    """Parameters that act only through their sum with one of the block's."""

    has_kronecker_factors: ClassVar[bool] = True
    """Whether it has ``a`` and ``g``, so that a Kronecker block is possible."""

    shares_weights_over_space: ClassVar[bool] = False
    """Whether it is a convolution, to which rules of the papers for spatially shared weights apply."""

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
        """Which of the module's blocks it is."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.shape})"

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules whose calls are uses of the parameters."""
        return (self.module, *self.tied_modules)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(q, p)`` of ``W̄``."""

    @property
    def groups(self) -> int:
        """``K``, the number of groups of rows with inputs of their own."""
        return 1

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the block's parameters, in the order of the columns of ``W̄``."""
        return tuple(self.parameters)

    @property
    def n_parameters(self) -> int:
        """Number of the network's parameters that the block stands for, merged parameters included."""
        return sum(p.numel() for p in (*self.parameters.values(), *self.merged_parameters.values()))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that sums accumulate in: that of the parameters, at least float32."""
        return wide_dtype(next(iter(self.parameters.values())).dtype)

    def sum_of(self, sums: Sums, key: str) -> Tensor:
        """The sum ``"activation"``, shape ``(K, p, p)``, or ``"gradient"``, ``(K, q/K, q/K)``, to be added to in place.

        Made of zeros when it is first asked for, and not before, when it would only take memory.
        """
        if key not in sums:
            size = self.shape[1] if key == "activation" else self.shape[0] // self.groups
            sums[key] = torch.zeros(self.groups, size, size, dtype=self.dtype, device=self.device)
        return sums[key]

    @abstractmethod
    def assemble(self, values: Mapping[str, Tensor]) -> Tensor:
        """The matrix ``(q, p)`` that is made of values of the parameters, such as their gradients, as ``W̄`` is of them."""

    def matrix(self, *, detach: bool = True) -> Tensor:
        """A copy of ``W̄``, shape ``(q, p)``, detached from the parameters or not, in their dtype.

        A column that is a sum of parameters needs more than half precision: then it is in `dtype`.
        """
        return self.assemble({name: p.detach() if detach else p for name, p in self.parameters.items()})

    @abstractmethod
    def split_directions(self, matrices: Tensor) -> dict[str, Tensor]:
        """Cut directions in the space of ``W̄``, such as gradients or steps, into those of the parameters; linear.

        Args:
            matrices: Shape ``(..., q, p)``.

        Returns:
            By parameter name, each of shape ``(..., *shape of the parameter)``.
        """

    def split_values(self, matrices: Tensor) -> dict[str, Tensor]:
        """Cut values of ``W̄`` into those of the parameters; inverse of `matrix`.

        Differs from `split_directions` where parameters outside the block act through their sum with it: they stay as they
        are in the network, and are subtracted.

        Args:
            matrices: Shape ``(..., q, p)``.

        Returns:
            By parameter name, each of shape ``(..., *shape of the parameter)``.
        """
        return self.split_directions(matrices)

    @property
    def divisible(self) -> bool:
        """Whether examples can be taken a few at a time: not where a layer's statistics are those of the whole batch."""
        return True

    def example_axes(self, x: Tensor) -> tuple[int, ...]:
        """The axes of an input on which the examples may be; the first is where they usually are."""
        return (0,)

    @abstractmethod
    def input_shape(self) -> str:
        """The shape that inputs must have, for error messages."""

    def is_input(self, x: Tensor) -> bool:
        """Whether ``x`` has a shape that is handled."""
        return x.ndim >= 1

    @abstractmethod
    def positions(self, x: Tensor, grad: Tensor) -> int | Tensor:
        """``T`` of one call; shape ``(K, 1, 1)`` if it differs between the groups."""

    @abstractmethod
    def weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        """``X`` of one call, shape ``(K, N, q/K, p)``, in `dtype`.

        Args:
            x: The call's input, examples first.
            grad: The gradient at its output, examples first.
        """

    def temporaries(self, x: Tensor, grad: Tensor, activations: bool) -> int:
        """How many numbers it takes to work with ``a``, ``g`` and ``X`` of a call, with ``a`` in any case or not."""
        (q, p), groups = self.shape, self.groups
        rows = grad.numel() // max(q // groups, 1)  # N·T·K
        return (rows * p if self.has_kronecker_factors else 0) + len(x) * q * p

    def input_norm(self, x: Tensor) -> Tensor | float:
        """Frobenius norm of what the gradients are multiplied with in ``Σ_n X_n``, which bounds its rounding error."""
        return torch.linalg.vector_norm(x.to(self.dtype))

    def total_weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """``Σ_n X_n`` of one call, shape ``(q, p)``."""
        return self.weight_gradients(x, grad).sum(1).flatten(0, 1)

    def activations(self, x: Tensor) -> Tensor:
        """``a`` of one call, shape ``(K, N, T, p)``, in `dtype`."""
        raise NotImplementedError(type(self).__name__)

    def gradients(self, grad: Tensor) -> Tensor:
        """``g`` of one call, shape ``(K, N, T, q/K)``, in `dtype`."""
        raise NotImplementedError(type(self).__name__)

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        """The inputs in another basis, ``a Q`` for ``Q`` of shape ``(K, p, k)``: shape ``(K, N, T, k)``."""
        return self.activations(x) @ basis.unsqueeze(1)

    def add_activation_moment(self, x: Tensor, sums: Sums) -> None:
        """Add ``Σ_n Σ_t a aᵀ`` of one call to ``sums``, in a form that `activation_moment` understands."""
        a = self.activations(x).flatten(1, 2)
        self.sum_of(sums, "activation").baddbmm_(a.mT, a)

    def activation_moment(self, sums: Sums) -> Tensor:
        """The sum that `add_activation_moment` made, shape ``(K, p, p)``; ``sums`` is used up."""
        return sums.pop("activation")

    def add_gradient_moment(self, grad: Tensor, out: Tensor, positions: int | Tensor) -> None:
        """Add ``Σ_n Σ_t g gᵀ`` of one call, over ``positions``, to ``out`` of shape ``(K, q/K, q/K)``, in place."""
        g = self.gradients(grad).flatten(1, 2)
        if isinstance(positions, Tensor):
            out += g.mT @ g / positions
        else:
            out.baddbmm_(g.mT, g, alpha=1 / positions)

    def squared_weight_gradients(self, calls: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> bool:
        """Add ``Σ_n X ∘ X`` to ``out`` of shape ``(q, p)`` without forming ``X``, where there is such a way.

        Args:
            calls: Input and output gradient of every call.
            out: The sum.

        Returns:
            Whether it was done; otherwise ``X`` must be formed.
        """
        return False


class LinearLayer(Layer):
    """A matrix that multiplies the last axis of its input: `nn.Linear`, and one block of a recurrent layer.

    Axes between the examples and the features are positions.

    Args:
        weights: The parameters that are matrices, side by side in ``W̄``.
        bias: The bias, or None.
        merged_parameters: A second bias that the layer adds to the first, and not part of the block (recurrent layers: both
            act through their sum only). The block's last column is the sum, which is attributed to ``bias``.
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

    def activations(self, x: Tensor) -> Tensor:
        a = x.reshape(1, len(x), -1, x.shape[-1]).to(self.dtype)
        return F.pad(a, (0, 1), value=1.0) if self.bias else a

    def gradients(self, grad: Tensor) -> Tensor:
        return grad.reshape(1, len(grad), -1, grad.shape[-1]).to(self.dtype)

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        a = x.reshape(len(x), -1, x.shape[-1]).to(self.dtype)
        weight, offset = (basis[0, :-1], basis[0, -1]) if self.bias else (basis[0], None)
        return F.linear(a, weight.T, offset).unsqueeze(0)

    def weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        return self.gradients(grad).mT @ self.activations(x)

    def add_activation_moment(self, x: Tensor, sums: Sums) -> None:
        a = x.flatten(0, -2).to(self.dtype)
        p = a.shape[1]
        out = self.sum_of(sums, "activation")[0]
        out[:p, :p].addmm_(a.T, a)  # without a copy of the input that has the 1
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
