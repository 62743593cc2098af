"""A random sample of the examples of a data set, taken while the data pass by."""

from __future__ import annotations

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

    def joined(self, other: _Part) -> _Part:
        theirs = leaves_by_path(other)
        return replace(
            self,
            keys=torch.cat([self.keys, other.keys]),
            inputs=self.inputs.map_by_path(lambda t, path: torch.cat([t, theirs[path]], dim=self.axis)),
            targets=torch.cat([self.targets, other.targets]),
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

    def __len__(self) -> int:
        return sum(len(part.keys) for part in self._parts)

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
        self._take(other._parts)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> KeptExamples:
        """Return a copy on another device, whose inputs, where they are floating-point numbers, have another dtype."""
        moved = KeptExamples()
        moved._parts = [
            replace(
                part,
                inputs=part.inputs.map(lambda t: t.to(device, dtype if t.is_floating_point() else None)),
                targets=part.targets.to(device),
            )
            for part in self._parts
        ]
        return moved

    def at_most(self, n: int) -> KeptExamples:
        """Return a sample of ``n`` of the examples, or of all if there are fewer."""
        keys = torch.cat([part.keys for part in self._parts]) if self._parts else torch.zeros(0)
        if len(keys) <= n:
            return self
        fewer = KeptExamples()
        bound = keys.kthvalue(n).values
        fewer._parts = [part for part in (_below(part, bound) for part in self._parts) if len(part.keys)]
        return fewer

    def batches(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield the examples as few batches ``(inputs, targets)``, one for each shape of inputs."""
        groups: list[_Part] = []
        for part in self._parts:
            for i, group in enumerate(groups):
                if group.fits(part):
                    groups[i] = group.joined(part)
                    break
            else:
                groups.append(part)
        yield from ((group.inputs, group.targets) for group in groups)

    def _take(self, parts: Iterable[_Part]) -> None:
        for part in parts:
            limit = _limit(part)
            kept = torch.cat([p.keys for p in [*self._parts, part]])
            bound = (
                kept.kthvalue(limit).values if len(kept) > limit else kept.amax() if len(kept) else kept.new_zeros(())
            )
            self._parts = [p for p in (_below(p, bound) for p in [*self._parts, part]) if len(p.keys)]


def leaves_by_path(part: _Part) -> dict[str, Tensor]:
    """Return the tensors of a part's inputs by their paths."""
    return dict(leaves(part.inputs.value))


def _without(tensor: Tensor, part: _Part) -> tuple[int, ...] | None:
    """Return a tensor's shape without the axis of examples, None if it has none."""
    n = part.inputs.count(part.axis)
    if part.shared or not counts_examples(tensor, part.axis, n):
        return None
    return tuple(tensor.shape[: part.axis] + tensor.shape[part.axis + 1 :])


def _below(part: _Part, bound: Tensor) -> _Part:
    index = (part.keys <= bound).nonzero().squeeze(1)
    # A batch is copied even if all of it is kept: the caller may overwrite its tensors.
    return part.only(index)


def _limit(part: _Part) -> int:
    n = max(len(part.keys), 1)
    size = sum(t.numel() * t.element_size() for t in [part.targets, *leaves_by_path(part).values()])
    return max(_LEAST, min(_COUNT, _BYTES * n // max(size, 1)))
