"""Batches that grow exponentially from iteration to iteration (K-FAC section 13)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from kronlaplace._arguments import positive_integer, seed_number

__all__ = ["GrowingBatches"]


class GrowingBatches(Sampler[list[int]]):
    """Sampler of batches of growing size, for ``DataLoader(batch_sampler=...)``.

    The first batches make progress at the price of few examples, the last ones need the precision of many. Batch ``k`` (from
    1) has ``m_k = min(first · e^((k−1)/b), |S|)`` examples, where ``b`` is such that ``m_full_at`` is the whole data set
    (K-FAC, the long version, section 13: ``first=1000``, ``full_at=500``). The data are shuffled, and examples come without
    replacement until the rest is smaller than the next batch; then a new pass in a new order begins.

    Batches are counted over all iterations of the sampler: each iteration continues where the last one stopped. A batch
    depends on the seed and its number only, so that a run can be resumed from the number of batches that it has seen.

        >>> batches = kl.GrowingBatches(dataset, n_batches=2000)       # doctest: +SKIP
        >>> loader = DataLoader(dataset, batch_sampler=batches)        # doctest: +SKIP

    Args:
        dataset: The data set, or anything else that has its length.
        n_batches: The number of batches in total, ``len(sampler)`` when nothing has been drawn yet.
        first: The size of the first batch.
        full_at: The batch that is the first to be the whole data set, at least 2.
        seed: Seed of the order.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dataset: Sized, n_batches: int, *, first: int = 1000, full_at: int = 500, seed: int = 0) -> None:
        self._n = len(dataset)
        if full_at < 2:
            raise ValueError(f"full_at must be at least 2, behind the first batch, got {full_at}.")
        if not self._n:
            raise ValueError("the data set is empty: there is nothing to draw batches from.")
        self.n_batches = positive_integer(n_batches, "n_batches")
        self.first, self.full_at, self.seed = positive_integer(first, "first"), full_at, seed_number(seed)
        self.drawn = 0
        """The number of batches drawn so far."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._n} examples, batch {self.drawn} of {self.n_batches}, "
            f"first={self.first}, full_at={self.full_at})"
        )

    def __len__(self) -> int:
        """Return the number of batches that are left."""
        return self.n_batches - self.drawn

    def __iter__(self) -> Iterator[list[int]]:
        passes, used = 0, 0
        order: Tensor | None = None
        for k in range(1, self.n_batches + 1):
            size = self.size(k)
            if used + size > self._n:
                passes, used, order = passes + 1, 0, None
            if k > self.drawn:
                if order is None:
                    order = torch.randperm(self._n, generator=self._generator(passes))
                self.drawn = k
                yield order[used : used + size].tolist()
            used += size

    def size(self, k: int) -> int:
        """Return the number ``m_k`` of examples in batch ``k``, counted from 1."""
        if self.first >= self._n or k >= self.full_at:
            return self._n
        growth = (k - 1) / (self.full_at - 1)
        return min(self._n, round(self.first * math.exp(growth * math.log(self._n / self.first))))

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the next batch. Set `drawn` yourself where the loader's workers draw batches ahead."""
        return {"drawn": self.drawn, "seed": self.seed, "first": self.first, "full_at": self.full_at, "n": self._n}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the last batch of a saved state.

        Raises:
            ValueError: If the state belongs to other data or another schedule.
        """
        own = self.state_dict()
        different = [key for key in own if key != "drawn" and own[key] != state.get(key)]
        if different:
            raise ValueError(
                f"the state belongs to other batches: {', '.join(f'{key} is {state.get(key)}' for key in different)}, here "
                f"{', '.join(f'{key} is {own[key]}' for key in different)}. Construct the sampler as it was."
            )
        self.drawn = state["drawn"]

    def _generator(self, passes: int) -> torch.Generator:
        mixed = int(np.random.SeedSequence([self.seed, passes]).generate_state(1, np.uint64)[0]) >> 1
        return torch.Generator().manual_seed(mixed)
