"""The Fisher of a network as one block per layer: algebra, saving and loading, coverage.

The Fisher is the **mean over examples**; multiply by ``n_examples`` to get the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, overload

import torch
from torch import Tensor

from kronlaplace._storage import load_tensors, save_tensors
from kronlaplace.blocks import Block, Truncation, block_from_tensors, decompose, truncated
from kronlaplace.blocks.least_trace import with_least_trace
from kronlaplace.blocks.truncation import checked_truncation
from kronlaplace.fisher.coverage import Coverage
from kronlaplace.fisher.provenance import FisherMetadata

__all__ = ["KroneckerFisher"]


class KroneckerFisher(Mapping[str, Block]):
    """Fisher of a network as one block per layer: a mapping from layer names to blocks.

    Args:
        blocks: One block per layer, keyed by layer name.
        n_examples: Number of examples ``N`` over which the mean was taken.
        metadata: How the Fisher was estimated. None for a Fisher built from blocks alone: it cannot be checked which
            network and weights such a Fisher belongs to, and methods that need to know raise an error.
        statistics: Sufficient statistics of the log-likelihood of those examples (see `Likelihood.statistics`), or None if
            the data had no targets.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        n_examples: int,
        metadata: FisherMetadata | None = None,
        statistics: Tensor | None = None,
    ) -> None:
        self._blocks = with_least_trace(blocks)
        self.n_examples = n_examples
        """Number of examples ``N`` over which the mean was taken."""
        self._metadata = metadata
        self.statistics = statistics
        """Sufficient statistics of the log-likelihood of those examples, or None if the data had no targets."""

    @property
    def has_metadata(self) -> bool:
        """Whether the Fisher has metadata on how it was estimated."""
        return self._metadata is not None

    @property
    def metadata(self) -> FisherMetadata:
        """Metadata on how the Fisher was estimated.

        Raises:
            ValueError: If the Fisher was built from blocks alone.
        """
        if self._metadata is None:
            raise ValueError(
                "this Fisher was built from blocks alone, so its network, likelihood and estimator are unknown. Create it "
                "with estimate_fisher, or pass metadata: KroneckerFisher(blocks, n_examples, metadata)."
            )
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: FisherMetadata | None) -> None:
        self._metadata = metadata

    def __getitem__(self, name: str) -> Block:
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
        estimator = f"{self.metadata.estimator}, " if self.has_metadata else ""
        if self.has_metadata and self.metadata.variational:
            estimator += "variational, "
        return f"KroneckerFisher({estimator}n_examples={self.n_examples})\n{lines}"

    @overload
    def matmul(self, vectors: Tensor) -> Tensor: ...
    @overload
    def matmul(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def matmul(self, vectors: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Multiply the Fisher with vectors.

        Args:
            vectors: Either ``{layer: (..., q, p)}``, or the layers' matrices, flattened in row-major order and
                concatenated in the order of the blocks, shape ``(..., P)``.

        Returns:
            The products, in the same form as ``vectors``.

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
        """Return the block-diagonal matrix, shape ``(P, P)``, in the order of the blocks. Only for small networks."""
        return torch.block_diag(*(block.to_dense() for block in self.values()))

    def trace(self) -> Tensor:
        """Return the sum of the blocks' traces, 0-dim."""
        return torch.stack([block.trace() for block in self.values()]).sum()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm of the block-diagonal matrix, 0-dim."""
        return torch.linalg.norm(torch.stack([block.frobenius_norm() for block in self.values()]))

    def restricted_to(self, layers: Sequence[str], reasons: Mapping[str, str] | None = None) -> KroneckerFisher:
        """Return the Fisher of a subset of the layers; it shares the blocks and their decompositions.

        Args:
            layers: Names of the layers.
            reasons: Why other layers are left out, keyed by layer name, for `coverage`.

        Raises:
            KeyError: If a layer has no block.
        """
        blocks = {name: self[name] for name in layers}
        if not self.has_metadata:
            return KroneckerFisher(blocks, self.n_examples, None, self.statistics)
        parameters = {name: self.metadata.parameters[name] for name in layers}
        metadata = replace(
            self.metadata,
            parameters=parameters,
            coverage=self.metadata.coverage.restricted_to(set(layers), reasons),
        )
        return KroneckerFisher(blocks, self.n_examples, metadata, self.statistics)

    def coverage(self) -> Coverage:
        """Return a table of the layers with their blocks and parameters, and of what has no block and why.

        For a Fisher built from blocks alone, only the blocks are known.
        """
        return self.metadata.coverage.with_blocks(self) if self.has_metadata else Coverage.of_blocks(self)

    def truncated(self, truncation: Truncation | None = None) -> KroneckerFisher:
        """Return the Fisher with the large factors of its Kronecker blocks truncated; it shares all other blocks.

        Such a factor keeps its leading eigenpairs and one eigenvalue for the rest, with the same trace; `KronLaplace.fit`
        does this by itself. Blocks of `EKFAC` stay as they are: their eigenvalues need a whole basis.

        Args:
            truncation: Which factors are large, and how much of them is kept; None for the default, ``Truncation()``.

        Raises:
            TypeError: If it is not a `Truncation`.
            ValueError: If a large factor has NaN or infinite entries, naming its layer.
        """
        truncation = checked_truncation(Truncation() if truncation is None else truncation)
        assert truncation is not None
        blocks = dict(zip(self, truncated(list(self.values()), truncation), strict=True))
        if all(blocks[name] is block for name, block in self.items()):
            return self
        return KroneckerFisher(blocks, self.n_examples, self._metadata, self.statistics)

    def decompose(self) -> None:
        """Compute and cache the eigendecompositions of all blocks in one go; those already cached are kept."""
        decompose(self.values())

    def to(self, device: torch.device | str, dtypes: Mapping[str, torch.dtype] | None = None) -> KroneckerFisher:
        """Return a copy on another device, optionally with other dtypes by layer; decompositions are not copied."""
        blocks = {n: block.to(device, None if dtypes is None else dtypes[n]) for n, block in self.items()}
        statistics = None if self.statistics is None else self.statistics.to(device)
        return KroneckerFisher(blocks, self.n_examples, self._metadata, statistics)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for saving."""
        tensors: dict[str, Tensor] = {}
        for name, block in self.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in block.to_tensors().items()}
        if self.statistics is not None:
            tensors["statistics"] = self.statistics
        return tensors

    def to_json(self) -> dict[str, Any]:
        """Return everything that is not a tensor, as JSON-compatible values."""
        kinds = {name: block.kind for name, block in self.items()}
        spatial = [name for name, block in self.items() if block.shares_weights_over_space]
        metadata = self.metadata.to_json() if self.has_metadata else {}
        return {"n_examples": self.n_examples, "blocks": kinds, "shares_weights_over_space": spatial, **metadata}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> KroneckerFisher:
        """Restore a Fisher from the results of `to_tensors` and `to_json`."""
        metadata = FisherMetadata.from_json(values) if "likelihood" in values else None
        types = values.get("layer_types", {})  # only in files of version 0.1.0
        spatial = values.get("shares_weights_over_space", [k for k, v in types.items() if v == "ConvolutionLayer"])
        blocks = {}
        for name, kind in values["blocks"].items():
            parts = {
                key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.rpartition(".")[:2] == (name, ".")
            }
            blocks[name] = block_from_tensors(kind, parts, name)
            blocks[name].shares_weights_over_space = name in spatial
        return cls(blocks, values["n_examples"], metadata, tensors.get("statistics"))

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file; an existing file is replaced only when the new one is complete."""
        save_tensors(path, "fisher", self.to_tensors(), self.to_json())

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> KroneckerFisher:
        """Load a file written by `save`; nothing is unpickled.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file was not written by `save`, or is damaged.
        """
        return cls.from_tensors(*load_tensors(path, "fisher", device))
