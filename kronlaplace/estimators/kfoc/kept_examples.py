"""Examples that are kept so that a power iteration can multiply by them repeatedly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kronlaplace.estimators.kfoc.truncation import Examples, batched_eigen, leading_eigenvector
from kronlaplace.estimators.second_moments import activation_sum, frobenius, gradient_sum
from kronlaplace.layers import LayerGradients

__all__ = ["KeptExamples", "from_tensors", "joined", "kept_examples"]


class KeptExamples(Protocol):
    """Examples that are kept so that ``A ↦ Σ X A Xᵀ`` and ``G ↦ Σ Xᵀ G X`` can be evaluated repeatedly.

    `FactoredExamples` keeps ``a`` and ``g``, `GradientMatrices` keeps ``X = Σ_t g_t a_tᵀ``; `kept_examples` chooses.
    """

    def scaled(self, factor: float) -> KeptExamples:
        """Return a copy that counts ``factor`` times as much."""

    def copied(self) -> KeptExamples:
        """Return a copy that shares no memory."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that `from_tensors` turns into these examples again."""

    def normalized(self) -> tuple[KeptExamples, Tensor]:
        """Return a copy whose largest entry is one, and its weight, shape ``(K,)``, float64.

        The power iteration takes fourth powers, which would underflow for small gradients.
        """

    def identity(self) -> Tensor:
        """Return the identity as ``A``, shape ``(K, p, p)``, in the dtype and on the device of the sums."""

    def matrices(self) -> Tensor:
        """Return ``X``, shape ``(K, M, q/K, p)``."""

    def examples(self, most: int) -> Examples | None:
        """Return copies if each example is a single Kronecker product and there are at most ``most``, otherwise None."""

    def direct(self, max_iter: int, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the leading ``(G, A)``, with the size split arbitrarily, or None if `leading_triple` is cheaper."""

    def to_gradient(self, activation: Tensor) -> Tensor:
        """Compute ``Σ X A Xᵀ``, shape ``(K, q/K, q/K)``."""

    def to_activation(self, gradient: Tensor) -> Tensor:
        """Compute ``Σ Xᵀ G X``, shape ``(K, p, p)``."""


class FactoredExamples:
    """Examples stored as ``a`` and ``g``, for few positions.

    Args:
        a: Activations, shape ``(K, N, T, p)``.
        g: Gradients, shape ``(K, M, T, q/K)``, direction by direction; ``M`` is ``N`` times the number of directions with
            the same inputs.
    """

    def __init__(self, a: Tensor, g: Tensor) -> None:
        self.a, self.g = a, g

    @property
    def positions(self) -> int:
        """Number of positions ``T``."""
        return self.a.shape[2]

    @property
    def directions(self) -> int:
        """Number of directions with the same inputs."""
        return self.g.shape[1] // self.a.shape[1]

    def inputs(self) -> Tensor:
        """Return ``a`` repeated for every direction, shape ``(K, M, T, p)``."""
        return _repeated(self.a, self.directions)

    def scaled(self, factor: float) -> FactoredExamples:
        return FactoredExamples(self.a, self.g * factor**0.5)

    def copied(self) -> FactoredExamples:
        return FactoredExamples(self.a.clone(), self.g.clone())

    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a, "g": self.g}

    def normalized(self) -> tuple[FactoredExamples, Tensor]:
        a, input_size = _normalized(self.a)
        g, gradient_size = _normalized(self.g)
        return FactoredExamples(a, g), (input_size * gradient_size).square()

    def identity(self) -> Tensor:
        return _identity_for(self.a)

    def matrices(self) -> Tensor:
        return self.g.mT @ self.inputs()

    def examples(self, most: int) -> Examples | None:
        n = self.a.shape[1]
        if self.positions > 1 or n > most:
            return None
        return Examples(self.a.clone(), self.g[:, :, 0].unflatten(1, (-1, n)).transpose(1, 2).clone())

    def direct(self, max_iter: int, name: str) -> tuple[Tensor, Tensor] | None:
        if self.positions == 1:
            return self._of_one_input() if self.a.shape[1] == 1 else self._by_weights(max_iter)
        return _pair_of_one(self.matrices(), name) if self.g.shape[1] == 1 else None

    def _of_one_input(self) -> tuple[Tensor, Tensor]:
        """Return the exact pair for a single example that uses the weights once, ``Σ_v g gᵀ ⊗ a aᵀ``."""
        a, g = self.a[:, 0], self.g[:, :, 0]
        return g.mT @ g, a.mT @ a

    def _by_weights(self, max_iter: int) -> tuple[Tensor, Tensor] | None:
        """Find the pair by power iteration on the weights of the examples, or return None if that is not cheaper.

        If the weights are used once, all iterates have the form ``Σ_n α_n a_n a_nᵀ`` and ``Σ_n β_n g_n g_nᵀ``, and the maps
        are ``α = K_g β``, ``β = K_a α`` with the squared inner products of the examples, two small matrices. The iteration
        continues up to rounding, which costs next to nothing.
        """
        a, g, directions = self.a[:, :, 0], self.g[:, :, 0], self.directions
        (groups, n, p), q = a.shape, g.shape[2]
        if n**2 * (p + directions**2 * q) > 6 * n * (p**2 + directions * q**2):
            return None
        by_input = (a @ a.mT).square_()
        by_gradient = (g @ g.mT).square_().view(groups, directions, n, directions, n).sum((1, 3))
        beta = torch.diagonal(by_input, dim1=1, dim2=2).sqrt().unsqueeze(2)  # from A = I
        tolerance = 8 * torch.finfo(a.dtype).eps
        alpha = beta
        for _ in range(max_iter):
            alpha = by_gradient @ beta
            alpha = alpha / torch.linalg.vector_norm(alpha, dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
            new = by_input @ alpha
            change = torch.linalg.vector_norm(new - beta, dim=1) - tolerance * torch.linalg.vector_norm(new, dim=1)
            beta = new
            if bool((change <= 0).all()):
                break
        activation = (a * alpha).mT @ a
        square = frobenius(activation).square().clamp_min(torch.finfo(a.dtype).tiny)
        return (g * beta.repeat(1, directions, 1)).mT @ g / square, activation

    def to_gradient(self, activation: Tensor) -> Tensor:
        kernel = _repeated(self.a @ activation.unsqueeze(1) @ self.a.mT, self.directions)  # (K, M, T, T)
        mixed = kernel * self.g if self.positions == 1 else kernel @ self.g
        return self.g.flatten(1, 2).mT @ mixed.flatten(1, 2)

    def to_activation(self, gradient: Tensor) -> Tensor:
        kernel = self.g @ gradient.unsqueeze(1)
        kernel = (kernel * self.g).sum(3, keepdim=True) if self.positions == 1 else kernel @ self.g.mT  # (K, M, T, T)
        kernel = kernel.unflatten(1, (self.directions, -1)).sum(1)
        mixed = kernel * self.a if self.positions == 1 else kernel @ self.a
        return self.a.flatten(1, 2).mT @ mixed.flatten(1, 2)


class GradientMatrices:
    """Examples stored as ``X``, for many positions.

    Args:
        x: Gradients with respect to the weights, shape ``(K, M, q/K, p)``.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def scaled(self, factor: float) -> GradientMatrices:
        return GradientMatrices(self._x * factor**0.5)

    def copied(self) -> GradientMatrices:
        return self  # X is a product, not a view of anything

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self._x}

    def normalized(self) -> tuple[GradientMatrices, Tensor]:
        x, size = _normalized(self._x)
        return GradientMatrices(x), size.square()

    def identity(self) -> Tensor:
        return _identity_for(self._x)

    def matrices(self) -> Tensor:
        return self._x

    def examples(self, most: int) -> Examples | None:
        return None  # an example is a sum of as many Kronecker products as the square of the number of singular values of X

    def direct(self, max_iter: int, name: str) -> tuple[Tensor, Tensor] | None:
        return _pair_of_one(self._x, name) if self._x.shape[1] == 1 else self._by_block(name)

    def _by_block(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Find the pair from the full rearranged block if the layer has so few outputs that this beats a few steps."""
        groups, _, q, p = self._x.shape
        if q > min(p, 8) or groups * (q * p) ** 2 > 2**22:
            return None
        flat = self._x.flatten(2)
        block = (flat.mT @ flat).view(groups, q, p, q, p)
        rearranged = block.transpose(2, 3).flatten(3).flatten(1, 2).double()  # (K, q², p²)
        start = rearranged @ torch.eye(p, dtype=torch.float64, device=flat.device).flatten()
        gradient = leading_eigenvector(*batched_eigen(rearranged @ rearranged.mT, name), start).unsqueeze(2)
        activation = rearranged.mT @ gradient
        return gradient.view(groups, q, q).to(flat.dtype), activation.view(groups, p, p).to(flat.dtype)

    def to_gradient(self, activation: Tensor) -> Tensor:
        return gradient_sum(self._x, activation)

    def to_activation(self, gradient: Tensor) -> Tensor:
        return activation_sum(self._x, gradient)


def kept_examples(gradients: LayerGradients) -> KeptExamples:
    """Keep all examples of one direction, in the form that takes the least memory."""
    p = gradients.layer.shape[1]
    g = gradients.gradients()
    if gradients.once_per_example or g.shape[2] * (p + g.shape[3]) < g.shape[3] * p:
        return FactoredExamples(gradients.activations(), g)
    return GradientMatrices(torch.cat([part.weight_gradients() for part in gradients.parts()], dim=1))


def from_tensors(tensors: Mapping[str, Tensor]) -> KeptExamples:
    """Return the examples of which `KeptExamples.tensors` returned the tensors."""
    return GradientMatrices(**tensors) if "x" in tensors else FactoredExamples(**tensors)


def joined(parts: Sequence[KeptExamples], *, same_inputs: bool) -> KeptExamples:
    """Join the examples of all parts; with ``same_inputs=True`` the parts are directions of one batch."""
    if len(parts) == 1:
        return parts[0]
    pairs = [part for part in parts if isinstance(part, FactoredExamples)]
    if len(pairs) < len(parts) or len({part.positions for part in pairs}) > 1:  # sequences of different lengths
        return GradientMatrices(torch.cat([part.matrices() for part in parts], dim=1))
    g = torch.cat([part.g for part in pairs], dim=1)
    return FactoredExamples(pairs[0].a if same_inputs else torch.cat([part.inputs() for part in pairs], dim=1), g)


def _repeated(tensor: Tensor, times: int) -> Tensor:
    """Repeat ``(K, N, ·, ·)`` along the axis of examples."""
    return tensor if times == 1 else tensor.repeat(1, times, 1, 1)


def _identity_for(tensor: Tensor) -> Tensor:
    """Return the identity, shape ``(K, p, p)``, for a tensor of shape ``(K, ..., p)``."""
    groups, p = tensor.shape[0], tensor.shape[-1]
    return torch.eye(p, dtype=tensor.dtype, device=tensor.device).expand(groups, p, p)


def _normalized(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Divide ``(K, ·, ·, ·)`` by its largest absolute entry (zeros stay zeros), and return that too, ``(K,)``, float64."""
    size = torch.linalg.vector_norm(tensor, ord=torch.inf, dim=(1, 2, 3), keepdim=True)
    return tensor / size.clamp_min(torch.finfo(tensor.dtype).tiny), size.double().flatten()


def _pair_of_one(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the leading pair of a single ``X = Σ s_i u_i v_iᵀ``, shape ``(K, 1, q/K, p)``: ``s_1² u_1 u_1ᵀ ⊗ v_1 v_1ᵀ``."""
    x = x[:, 0]
    wide = x.shape[1] < x.shape[2]
    one = x.mT if wide else x  # (K, m, n) with n ≤ m
    right = batched_eigen((one.mT @ one).double(), name)[1][:, :, -1:].to(x.dtype)
    left = one @ right
    left, right = left @ left.mT, right @ right.mT
    return (right, left) if wide else (left, right)
