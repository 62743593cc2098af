"""A random sample of the examples of a data set, taken while the data pass by."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronlaplace.data.inputs import Inputs, counts_examples, leaves

__all__ = ["KeptExamples"]

_COUNT = 1024
_BYTES = 2**26
_LEAST = 64


@dataclass(frozen=True)
class _Part:
    """Examples of one batch, or of several of the same shape."""

    keys: Tensor
    inputs: Inputs
    targets: Tensor
    axis: int
    shared: frozenset[str]

    def only(self, index: Tensor) -> _Part:
        n = self.inputs.count(self.axis)
        here = index.to(self.targets.device)

        def chosen(t: Tensor, path: str) -> Tensor:
            if path in self.shared or not counts_examples(t, self.axis, n):
                return t
            return t.index_select(self.axis, here)

        return replace(
            self,
            keys=self.keys[index],
            inputs=self.inputs.map_by_path(chosen),
            targets=self.targets.index_select(0, here),
        )

    def fits(self, other: _Part) -> bool:
        """Tell whether both can be joined: every tensor counts examples, and the other axes agree."""
        mine, theirs = leaves_by_path(self), leaves_by_path(other)
        if self.axis != other.axis or mine.keys() != theirs.keys() or self.targets.shape[1:] != other.targets.shape[1:]:
            return False
        return all(_without(mine[path], self) == _without(theirs[path], other) is not None for path in mine)


def _joined(parts: list[_Part]) -> _Part:
    """Join parts that fit."""
    if len(parts) == 1:
        return parts[0]
    tensors = [leaves_by_path(part) for part in parts]
    first = parts[0]
    return replace(
        first,
        keys=torch.cat([part.keys for part in parts]),
        inputs=first.inputs.map_by_path(lambda _, path: torch.cat([t[path] for t in tensors], dim=first.axis)),
        targets=torch.cat([part.targets for part in parts]),
    )


class KeptExamples:
    """A uniform sample, without replacement, of the examples that were added.

    Every example draws a number, and those with the smallest are kept: 1,024 of them, or as many as fit into 64 MiB (but 64
    in any case). They are copies, on the device of the batches.

    Args:
        seed: Seed of the draws; the global random state is neither used nor changed.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[_Part] = []
        self._count = 0
        self._limit = _COUNT
        self._bound = math.inf
        """Numbers above it have been left out already."""

    def __len__(self) -> int:
        self._leave_out()
        return self._count

    def add(self, inputs: Inputs, targets: Tensor, axis: int = 0, shared: Collection[str] = ()) -> None:
        """Consider a batch.

        Args:
            inputs: Its inputs.
            targets: Its targets, first axis examples.
            axis: The axis of the inputs that counts examples.
            shared: Paths of tensors in the inputs that all examples share.
        """
        keys = torch.rand(len(targets), generator=self._generator, dtype=torch.float64)
        self._take([_Part(keys, inputs, targets, axis, frozenset(shared))])

    def merge(self, other: KeptExamples) -> None:
        """Consider the examples that another sample was taken from."""
        self._limit = min(self._limit, other._limit)
        self._take(other._parts)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> KeptExamples:
        """Return a copy on another device, whose inputs, where they are floating-point numbers, have another dtype."""
        return self._of(
            replace(
                part,
                inputs=part.inputs.map(lambda t: t.to(device, dtype if t.is_floating_point() else None)),
                targets=part.targets.to(device),
            )
            for part in self._parts
        )

    def at_most(self, n: int) -> KeptExamples:
        """Return a sample of ``n`` of the examples, or of all if there are fewer."""
        fewer = self._of(self._parts)
        fewer._limit = min(n, self._limit)
        return fewer

    def batches(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield the examples as few batches ``(inputs, targets)``, one for each shape of inputs."""
        self._leave_out()
        groups: list[list[_Part]] = []
        for part in self._parts:
            group = next((group for group in groups if group[0].fits(part)), None)
            if group is None:
                groups.append([part])
            else:
                group.append(part)
        for group in groups:
            joined = _joined(group)
            yield joined.inputs, joined.targets

    def _of(self, parts: Iterable[_Part]) -> KeptExamples:
        """Return a sample of the same examples in other parts."""
        result = KeptExamples()
        result._parts = list(parts)
        result._count, result._limit, result._bound = self._count, self._limit, self._bound
        return result

    def _take(self, parts: Iterable[_Part]) -> None:
        """Copy what may be kept; once in a while leave out what is too many, so that a batch costs only its own copies."""
        for part in parts:
            self._limit = min(self._limit, _limit(part))
            new = part.only((part.keys <= self._bound).nonzero().squeeze(1))
            if len(new.keys):
                self._parts.append(new)
                self._count += len(new.keys)
            if self._count > 2 * self._limit:
                self._leave_out()

    def _leave_out(self) -> None:
        """Leave out the examples with the largest numbers, above the limit."""
        if self._count <= self._limit:
            return
        keys = torch.cat([part.keys for part in self._parts])
        self._bound = float(keys.kthvalue(self._limit).values)
        kept = [(part, (part.keys <= self._bound).nonzero().squeeze(1)) for part in self._parts]
        self._parts = [part if len(index) == len(part.keys) else part.only(index) for part, index in kept if len(index)]
        self._count = sum(len(part.keys) for part in self._parts)


def leaves_by_path(part: _Part) -> dict[str, Tensor]:
    """Return the tensors of a part's inputs by their paths."""
    return dict(leaves(part.inputs.value))


def _without(tensor: Tensor, part: _Part) -> tuple[int, ...] | None:
    """Return a tensor's shape without the axis of examples, None if it has none."""
    n = part.inputs.count(part.axis)
    if part.shared or not counts_examples(tensor, part.axis, n):
        return None
    return tuple(tensor.shape[: part.axis] + tensor.shape[part.axis + 1 :])


def _limit(part: _Part) -> int:
    n = max(len(part.keys), 1)
    size = sum(t.numel() * t.element_size() for t in [part.targets, *leaves_by_path(part).values()])
    return max(_LEAST, min(_COUNT, _BYTES * n // max(size, 1)))
