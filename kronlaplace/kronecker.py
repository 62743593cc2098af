"""Kronecker-factored Fisher blocks and the Fisher made of them: algebra, saving, loading.

A layer's block is ``F ≈ scale · G ⊗ A`` with the gradient factor ``G`` of shape ``(q, q)`` and the activation factor
``A`` of shape ``(p, p)``. ``vec`` is row-major, so the block acts on a ``(q, p)`` matrix ``M`` as ``scale · G M A``.
The Fisher is the **mean over examples**; whoever needs the sum multiplies by ``n_examples``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, overload

import torch
from torch import Tensor

from kronlaplace.likelihoods import Likelihood, Sampling
from kronlaplace.linalg import Eigen, eigendecompose
from kronlaplace.serialization import load_tensors, save_tensors

__all__ = ["FisherMetadata", "KroneckerBlock", "KroneckerFisher"]


class KroneckerBlock:
    """One layer's Fisher block ``scale · G ⊗ A``, mean over examples.

    Args:
        gradient_factor: ``G``, symmetric positive semidefinite, shape ``(q, q)``.
        activation_factor: ``A``, symmetric positive semidefinite, shape ``(p, p)``.
        scale: A factor in front, 0-dim tensor or number.
        name: The layer's name, for errors.
    """

    def __init__(
        self, gradient_factor: Tensor, activation_factor: Tensor, scale: Tensor | float = 1.0, name: str = "block"
    ) -> None:
        self.gradient_factor = gradient_factor
        self.activation_factor = activation_factor
        self.scale = torch.as_tensor(scale, dtype=gradient_factor.dtype, device=gradient_factor.device)
        self.name = name
        self._eigen: tuple[Eigen, Eigen] | None = None

    def __repr__(self) -> str:
        q, p = self.shape
        return f"KroneckerBlock({self.name!r}, G: {q}x{q}, A: {p}x{p})"

    @property
    def shape(self) -> tuple[int, int]:
        """``(q, p)``, the shape of the matrices that the block acts on."""
        return len(self.gradient_factor), len(self.activation_factor)

    def matmul(self, matrices: Tensor) -> Tensor:
        """The block times ``vec(M)``: ``scale · G M A``, for ``M`` of shape ``(..., q, p)``; same shape."""
        return self.scale * (self.gradient_factor @ matrices @ self.activation_factor)

    def to_dense(self) -> Tensor:
        """The block as one matrix of shape ``(q·p, q·p)``."""
        return self.scale * torch.kron(self.gradient_factor.contiguous(), self.activation_factor.contiguous())

    def trace(self) -> Tensor:
        """``scale · tr G · tr A``, 0-dim."""
        return self.scale * self.gradient_factor.trace() * self.activation_factor.trace()

    def frobenius_norm(self) -> Tensor:
        """``scale · ‖G‖_F ‖A‖_F``, 0-dim."""
        return self.scale.abs() * torch.linalg.norm(self.gradient_factor) * torch.linalg.norm(self.activation_factor)

    def scaled(self, factor: Tensor | float) -> KroneckerBlock:
        """The block times a number; factors and their decompositions are shared, not copied."""
        block = KroneckerBlock(self.gradient_factor, self.activation_factor, self.scale * factor, self.name)
        block._eigen = self._eigen
        return block

    def eigen(self) -> tuple[Eigen, Eigen]:
        """Eigendecompositions of ``G`` and of ``A``, computed once.

        Raises:
            ValueError: If a factor has NaN or infinite entries.
        """
        if self._eigen is None:
            decompose([self])
        assert self._eigen is not None
        return self._eigen


def decompose(blocks: list[KroneckerBlock]) -> None:
    """Decompose the factors of all blocks that are not decomposed yet, equal sizes in one batched call."""
    todo = {f"{i}": block for i, block in enumerate(blocks) if block._eigen is None}
    factors = {}
    for block in todo.values():
        factors[f"the gradient factor of layer {block.name!r}"] = block.gradient_factor
        factors[f"the activation factor of layer {block.name!r}"] = block.activation_factor
    pairs = iter(eigendecompose(factors).values())
    for block in todo.values():
        block._eigen = next(pairs), next(pairs)


@dataclass(frozen=True)
class FisherMetadata:
    """How a Fisher was estimated.

    Attributes:
        likelihood: The likelihood whose output metric was pulled back.
        estimator: The estimator's name.
        sampling: How directions were chosen.
        mc_samples: Label draws per example (``Sampling.MC`` only).
        seed: Seed of those draws.
        parameters: The parameters in each block, by layer: weight, then bias if the block contains it.
        weights: Fingerprint of all the network's parameters and buffers, by name.
    """

    likelihood: Likelihood
    estimator: str
    sampling: Sampling
    mc_samples: int
    seed: int
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-compatible values."""
        return {
            "likelihood": self.likelihood.to_metadata(),
            "estimator": self.estimator,
            "sampling": self.sampling.value,
            "mc_samples": self.mc_samples,
            "seed": self.seed,
            "parameters": {name: list(names) for name, names in self.parameters.items()},
            "weights": self.weights,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FisherMetadata:
        """Inverse of `to_json`."""
        return cls(
            likelihood=Likelihood.from_metadata(values["likelihood"]),
            estimator=values["estimator"],
            sampling=Sampling(values["sampling"]),
            mc_samples=values["mc_samples"],
            seed=values["seed"],
            parameters={name: tuple(names) for name, names in values["parameters"].items()},
            weights=values["weights"],
        )


class KroneckerFisher(Mapping[str, KroneckerBlock]):
    """A network's Fisher as one Kronecker block per layer: a mapping from layer names to blocks.

    Attributes:
        n_examples: Number of examples ``N`` that the mean was taken over.
        metadata: How it was estimated.
        statistics: Sufficient statistics of the log-likelihood of those examples (see
            `Likelihood.statistics`), or None if the data came without targets.
    """

    def __init__(
        self,
        blocks: Mapping[str, KroneckerBlock],
        n_examples: int,
        metadata: FisherMetadata,
        statistics: Tensor | None = None,
    ) -> None:
        self._blocks = dict(blocks)
        self.n_examples = n_examples
        self.metadata = metadata
        self.statistics = statistics

    def __getitem__(self, name: str) -> KroneckerBlock:
        try:
            return self._blocks[name]
        except KeyError:
            raise KeyError(f"no block for layer {name!r}; there are blocks for {list(self._blocks)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        lines = "\n".join(f"  {block!r}" for block in self.values())
        return f"KroneckerFisher({self.metadata.estimator}, n_examples={self.n_examples})\n{lines}"

    @overload
    def matmul(self, vectors: Tensor) -> Tensor: ...
    @overload
    def matmul(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def matmul(self, vectors: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """The Fisher times vectors.

        Args:
            vectors: Either ``{layer: (..., q, p)}``, or the layers' row-major flattened matrices joined in the order
                of the blocks, shape ``(..., P)``.

        Returns:
            The same form as was given.

        Raises:
            ValueError: If names or sizes do not fit the blocks.
        """
        if isinstance(vectors, Tensor):
            sizes = [math.prod(block.shape) for block in self.values()]
            if vectors.ndim == 0 or vectors.shape[-1] != sum(sizes):
                raise ValueError(f"vectors must have shape (..., {sum(sizes)}), got {tuple(vectors.shape)}.")
            parts = zip(self.values(), vectors.split(sizes, dim=-1), strict=True)
            return torch.cat(
                [block.matmul(v.reshape(*v.shape[:-1], *block.shape)).flatten(-2) for block, v in parts], dim=-1
            )
        if vectors.keys() != self.keys():
            raise ValueError(f"vectors must have one entry per layer, {list(self)}; got {list(vectors)}.")
        return {name: block.matmul(vectors[name]) for name, block in self.items()}

    def to_dense(self) -> Tensor:
        """The block-diagonal matrix of shape ``(P, P)``, in the order of the blocks. For small networks."""
        return torch.block_diag(*(block.to_dense() for block in self.values()))

    def trace(self) -> Tensor:
        """Sum of the blocks' traces, 0-dim."""
        return torch.stack([block.trace() for block in self.values()]).sum()

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm of the block-diagonal matrix, 0-dim."""
        return torch.linalg.norm(torch.stack([block.frobenius_norm() for block in self.values()]))

    def restricted_to(self, layers: Sequence[str]) -> KroneckerFisher:
        """The Fisher of some of the layers; blocks and their decompositions are shared.

        Raises:
            KeyError: If a layer has no block.
        """
        blocks = {name: self[name] for name in layers}
        parameters = {name: self.metadata.parameters[name] for name in layers}
        return KroneckerFisher(blocks, self.n_examples, replace(self.metadata, parameters=parameters), self.statistics)

    def decompose(self) -> None:
        """Compute the eigendecompositions of all blocks, together, and keep them; those that are there already stay."""
        decompose(list(self.values()))

    def to_tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for saving."""
        tensors = {}
        for name, block in self.items():
            tensors[f"{name}.gradient_factor"] = block.gradient_factor
            tensors[f"{name}.activation_factor"] = block.activation_factor
            tensors[f"{name}.scale"] = block.scale
        if self.statistics is not None:
            tensors["statistics"] = self.statistics
        return tensors

    def to_json(self) -> dict[str, Any]:
        """All that is not a tensor, as JSON-compatible values."""
        return {"n_examples": self.n_examples, **self.metadata.to_json()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> KroneckerFisher:
        """Inverse of `to_tensors` and `to_json`."""
        metadata = FisherMetadata.from_json(values)
        blocks = {
            name: KroneckerBlock(
                tensors[f"{name}.gradient_factor"], tensors[f"{name}.activation_factor"], tensors[f"{name}.scale"], name
            )
            for name in metadata.parameters
        }
        return cls(blocks, values["n_examples"], metadata, tensors.get("statistics"))

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file; an existing file is replaced only when the new one is complete."""
        save_tensors(path, "fisher", self.to_tensors(), self.to_json())

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> KroneckerFisher:
        """Read a file that `save` wrote; nothing is unpickled.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not such a file, or is damaged.
        """
        return cls.from_tensors(*load_tensors(path, "fisher", device))
