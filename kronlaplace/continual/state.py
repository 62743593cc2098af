"""The state of a memory: what is kept of the tasks so far. It is never changed, only replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kronlaplace.blocks import Block, block_from_tensors
from kronlaplace.continual.merging import with_block
from kronlaplace.continual.options import Merge, PenaltyMode
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.layers import Layer

__all__ = ["LayerMemory", "MemoryState", "Task", "Term", "name_of_new_task"]


@dataclass(frozen=True)
class Task:
    """A task that has been consolidated.

    Attributes:
        name: Its name.
        n_examples: Number of its examples.
        layers: Layers that it uses.
    """

    name: str
    n_examples: int
    layers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the task as JSON-compatible values."""
        return {"name": self.name, "n_examples": self.n_examples, "layers": list(self.layers)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Task:
        """Restore a task from the result of `to_json`."""
        return cls(values["name"], values["n_examples"], tuple(values["layers"]))


def name_of_new_task(task: str | None, known: Sequence[Task]) -> str:
    """Return the name of a task that is added to others, by default by its number.

    Raises:
        TypeError: If it is not a string.
        ValueError: If there is a task of that name already.
    """
    names = [one.name for one in known]
    name = f"task {len(names) + 1}" if task is None else task
    if not isinstance(name, str):
        raise TypeError(f"task must be a string, the task's name; got {name!r}.")
    if name in names:
        raise ValueError(
            f"the memory has a task {name!r} already; its tasks are {names}. Adding it again would count its data twice."
        )
    return name


@dataclass(frozen=True, eq=False)
class Term:
    """Part of the curvature of a layer.

    Attributes:
        block: The curvature, a sum over data.
        center: The weights that it is around, ``(q, p)``; None for those of the layer at the end of the latest task.
    """

    block: Block
    center: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Term:
        """Return a copy on another device and in another dtype."""
        return Term(self.block.to(device, dtype), None if self.center is None else self.center.to(device, dtype))


@dataclass(frozen=True, eq=False)
class LayerMemory:
    """What is kept of a layer that at least one task has used.

    Attributes:
        parameters: Names of the layer's parameters.
        center: The weights at the end of the latest task, ``(q, p)``.
        terms: The curvature of all tasks is the sum of these.
    """

    parameters: tuple[str, ...]
    center: Tensor
    terms: tuple[Term, ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerMemory:
        """Return a copy on another device and in another dtype; the memory itself if it is there."""
        if self.center.device == device and self.center.dtype == dtype:
            return self
        terms = tuple(term.to(device, dtype) for term in self.terms)
        return LayerMemory(self.parameters, self.center.to(device, dtype), terms)

    def with_block(self, block: Block, merge: Merge, rank: int, mode: PenaltyMode) -> LayerMemory:
        """Return the memory with another task's curvature, a sum over data, around the layer's ``center``.

        Raises:
            NotImplementedError: If blocks of this kind cannot be merged.
        """
        if mode is PenaltyMode.PER_TASK:
            return replace(self, terms=(*self.terms, Term(block, self.center)))
        kept = with_block([term.block for term in self.terms], block, merge, rank)
        return replace(self, terms=tuple(Term(block) for block in kept))


@dataclass(frozen=True, eq=False)
class MemoryState:
    """What is kept of all tasks so far.

    Attributes:
        tasks: The tasks, in their order.
        layers: Memory of every layer that a task has used, by name.
        weights: Fingerprints of the network's parameters and buffers at the end of the latest task.
        statistics: Sufficient statistics of the log-likelihood, as long as there is only one task.
    """

    tasks: tuple[Task, ...] = ()
    layers: Mapping[str, LayerMemory] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    statistics: Tensor | None = None

    @property
    def n_examples(self) -> int:
        """Number of examples of all tasks."""
        return sum(task.n_examples for task in self.tasks)

    def with_task(
        self,
        task: Task,
        fisher: KroneckerFisher,
        centers: Mapping[str, Tensor],
        layers: Sequence[Layer],
        weights: Mapping[str, str],
        *,
        merge: Merge,
        rank: int,
        mode: PenaltyMode,
    ) -> MemoryState:
        """Return the state after another task.

        Args:
            task: The task.
            fisher: Its Fisher.
            centers: The weights now, ``{layer: (q, p)}``, of all layers of the network that are trainable.
            layers: Layers of the network.
            weights: Fingerprints of the weights now.
            merge: What becomes of Kronecker products.
            rank: Number of products to keep with ``"kfoc"``.
            mode: The weights around which curvature is.

        Raises:
            NotImplementedError: If blocks cannot be merged.
        """
        memories = {
            name: replace(memory, center=centers.get(name, memory.center)) for name, memory in self.layers.items()
        }
        for layer in layers:
            if layer.name not in fisher:
                continue
            before = memories.get(layer.name, LayerMemory(layer.parameter_names, centers[layer.name]))
            before = before.to(layer.device, layer.dtype)
            block = fisher[layer.name].to(layer.device, layer.dtype).scaled(task.n_examples)
            block.least_trace = None  # of one task's network
            memories[layer.name] = before.with_block(block, merge, rank, mode)
        statistics = fisher.statistics if not self.tasks else None
        return MemoryState((*self.tasks, task), memories, weights, statistics)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for saving."""
        tensors = {} if self.statistics is None else {"statistics": self.statistics}
        for name, memory in self.layers.items():
            tensors[f"center/{name}"] = memory.center
            for i, term in enumerate(memory.terms):
                tensors |= {f"term/{i}/{key}/{name}": tensor for key, tensor in term.block.to_tensors().items()}
                if term.center is not None:
                    tensors[f"around/{i}/{name}"] = term.center
        return tensors

    def to_json(self) -> dict[str, Any]:
        """Return everything that is not a tensor, as JSON-compatible values."""
        return {
            "tasks": [task.to_json() for task in self.tasks],
            "weights": dict(self.weights),
            "layers": {
                name: {
                    "parameters": list(memory.parameters),
                    "terms": [
                        {"kind": term.block.kind, "shares_weights_over_space": term.block.shares_weights_over_space}
                        for term in memory.terms
                    ],
                }
                for name, memory in self.layers.items()
            },
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> MemoryState:
        """Restore a state from the results of `to_tensors` and `to_json`."""
        parts: dict[tuple[str, int], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("term/"):
                _, index, what, name = key.split("/", 3)
                parts.setdefault((name, int(index)), {})[what] = tensor
        layers = {}
        for name, saved in values["layers"].items():
            terms = []
            for i, term in enumerate(saved["terms"]):
                block = block_from_tensors(term["kind"], parts[name, i], name)
                block.shares_weights_over_space = term["shares_weights_over_space"]
                terms.append(Term(block, tensors.get(f"around/{i}/{name}")))
            layers[name] = LayerMemory(tuple(saved["parameters"]), tensors[f"center/{name}"], tuple(terms))
        tasks = tuple(Task.from_json(task) for task in values["tasks"])
        return cls(tasks, layers, values["weights"], tensors.get("statistics"))
