"""Choice of the directions that are propagated back, with the source of their randomness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kronlaplace._arguments import choice, positive_integer, seed_number
from kronlaplace.data.deferred_checks import Batch
from kronlaplace.likelihoods.base import Likelihood, Sampling

__all__ = ["MOST_EXACT", "AutomaticSampling", "DirectionSampling", "sampling_rule"]

MOST_EXACT = 1024
"""Directions of an example up to which all of them are taken where no rule is given."""


@dataclass(frozen=True)
class DirectionSampling:
    """Rule that picks the directions of a batch, with validated settings.

    Args:
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``, see `Sampling`.
        mc_samples: Number of label draws per example, for ``"mc"`` only.
        seed: Seed of the draws. Batch ``index`` draws from a generator seeded with ``(seed, index)``, regardless of the
            global random state.

    Raises:
        ValueError: For unknown rules, numbers that are not positive, or ``mc_samples`` with a rule other than ``"mc"``.
        TypeError: For numbers of the wrong type.
    """

    kind: Sampling = Sampling.MC
    mc_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", choice(Sampling, self.kind, "sampling"))
        object.__setattr__(self, "mc_samples", positive_integer(self.mc_samples, "mc_samples"))
        object.__setattr__(self, "seed", seed_number(self.seed))
        if self.mc_samples > 1 and self.kind is not Sampling.MC:
            raise ValueError(
                f'mc_samples={self.mc_samples} only applies when sampling="mc" (got sampling={self.kind.value!r}).'
            )

    def of_batch(self, batch: Batch) -> DirectionSampling:
        """Return the rule for one batch; a pass over data calls it before the network runs on the batch."""
        return self

    def settled(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor | None) -> DirectionSampling:
        """Return the rule for outputs of this shape."""
        return self

    def squares(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        """Return the expected sum of the squares of the `directions`, of the shape of the outputs, without making them.

        None where that is not the diagonal of the likelihood's metric.
        """
        return None if self.kind is Sampling.EMPIRICAL else likelihood.metric_diagonal(outputs, targets)

    def count(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor | None) -> int:
        """Return the number ``V`` of `directions` for the same arguments."""
        return likelihood.n_directions(outputs, self.kind, self.mc_samples, targets)

    def directions(
        self, likelihood: Likelihood, outputs: Tensor, targets: Tensor | None, index: int
    ) -> Iterator[Tensor]:
        """Yield the directions of a batch, as `Likelihood.directions`.

        Args:
            likelihood: The likelihood.
            outputs: The network's outputs, without a graph.
            targets: Targets of these outputs, if there are any.
            index: Number of the batch in a pass over the data, or of the training step.
        """
        return likelihood.directions(
            outputs,
            self.kind,
            mc_samples=self.mc_samples,
            targets=targets,
            generator=self.generator(index, outputs.device),
        )

    def generator(self, index: int, device: torch.device) -> torch.Generator:
        """Return a generator for one batch, whose draws do not depend on earlier batches."""
        mixed = int(np.random.SeedSequence([self.seed, index]).generate_state(1, np.uint64)[0]) >> 1
        return torch.Generator(device=device).manual_seed(mixed)


@dataclass(frozen=True)
class AutomaticSampling(DirectionSampling):
    """All directions of an example where there are up to `MOST_EXACT`, and drawn labels where there are more."""

    def settled(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor | None) -> DirectionSampling:
        if likelihood.n_directions(outputs, Sampling.EXACT, 1, targets) <= MOST_EXACT:
            return DirectionSampling(Sampling.EXACT, 1, self.seed)
        return DirectionSampling(Sampling.MC, self.mc_samples, self.seed)

    def count(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor | None) -> int:
        return self.settled(likelihood, outputs, targets).count(likelihood, outputs, targets)

    def directions(
        self, likelihood: Likelihood, outputs: Tensor, targets: Tensor | None, index: int
    ) -> Iterator[Tensor]:
        return self.settled(likelihood, outputs, targets).directions(likelihood, outputs, targets, index)


def sampling_rule(sampling: Sampling | str | None, mc_samples: int, seed: int) -> DirectionSampling:
    """Return the rule for these options, which is an `AutomaticSampling` for None; raises as `DirectionSampling`."""
    if sampling is None:
        return AutomaticSampling(Sampling.MC, mc_samples, seed)
    return DirectionSampling(choice(Sampling, sampling, "sampling"), mc_samples, seed)
