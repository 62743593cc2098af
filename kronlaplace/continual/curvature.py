"""The curvature of a task: estimated from its data, or brought along as a Fisher, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kronlaplace.continual.layers import LayerWish, UnusedLayers
from kronlaplace.estimators import Estimator
from kronlaplace.fisher.estimation import check_belongs, estimate_while_watched, with_metadata
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.layers import NOT_WANTED, Layer, Unsupported, UnusableLayersError
from kronlaplace.layers.unusable import NO_EFFECT, NOT_CALLED
from kronlaplace.likelihoods import Likelihood

__all__ = ["TaskCurvature"]


_NOT_IN_ALL = (
    "the outputs depend on layers that cannot have a block, or that only some batches use (give the data of one task at a "
    "time):\n{lines}\n"
)


@dataclass(frozen=True)
class TaskCurvature:
    """What the curvature of a task is computed with.

    Attributes:
        model: The network at the end of the task.
        layers: Layers that should have curvature, unless the task does not use them.
        wish: What the user asked for.
        likelihood: The likelihood.
        estimator: The estimator.
    """

    model: nn.Module
    layers: Sequence[Layer]
    wish: LayerWish
    likelihood: Likelihood
    estimator: Estimator

    def of(self, data: Iterable[Any] | None, fisher: KroneckerFisher | None, **options: Any) -> KroneckerFisher:
        """Return the Fisher of the task, from its data or ready-made.

        Raises:
            TypeError: If not exactly one of both is given.
            ValueError, NotImplementedError: As `estimate` and `check_ready_made`.
        """
        if (data is None) == (fisher is None):
            raise TypeError("give either data or fisher=, exactly one of them.")
        if isinstance(data, KroneckerFisher):
            raise TypeError("a ready-made Fisher is given by name, fisher=..., not as data.")
        if fisher is not None:
            return self.check_ready_made(fisher)
        assert data is not None
        return self.estimate(data, **options)

    def estimate(self, data: Iterable[Any], **options: Any) -> KroneckerFisher:
        """Estimate the Fisher of the layers that the task uses; the others' is zero.

        Raises:
            UnusableLayersError: If a layer that the task uses cannot have a block.
            TypeError, ValueError, NotImplementedError: As `estimate_fisher`.
        """
        unused = UnusedLayers(self.model, self.layers)
        diagonal = self.wish.unsupported is Unsupported.DIAGONAL
        try:
            fisher = estimate_while_watched(
                self.model,
                data,
                self.likelihood,
                self.estimator,
                layers=self.wish.wanted,
                exclude=self.wish.exclude,
                unsupported=Unsupported.DIAGONAL if diagonal else Unsupported.FIXED,
                watch=unused,
                **options,
            )
        except UnusableLayersError as error:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in error.reasons.items())
            raise UnusableLayersError(_NOT_IN_ALL.format(lines=lines), error.reasons) from error
        notes = fisher.coverage().reasons()
        unusable = {
            layer.name: notes.get(layer.name, "")
            for layer in self.layers
            if layer.name not in fisher and layer.name not in unused.names
        }
        if unusable and self.wish.unsupported is not Unsupported.FIXED:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in unusable.items())
            raise UnusableLayersError(_NOT_IN_ALL.format(lines=lines), unusable)
        return fisher

    def check_ready_made(self, fisher: KroneckerFisher) -> KroneckerFisher:
        """Check that a Fisher is of this network, at its weights now, and return it for the memory's layers.

        Raises:
            TypeError: If it is not a Fisher.
            ValueError: If it is of other weights, layers, or another likelihood, or is a moving average.
        """
        if not isinstance(fisher, KroneckerFisher):
            raise TypeError(f"fisher must be what estimate_fisher returns, got a {type(fisher).__name__}.")
        if not fisher.has_metadata:
            fisher = with_metadata(fisher, self.model, self.likelihood, self.estimator)
        metadata = fisher.metadata
        if type(metadata.likelihood) is not type(self.likelihood):
            raise ValueError(
                f"the fisher was estimated with {metadata.likelihood}, and the memory has {self.likelihood}."
            )
        if metadata.ema_decay is not None:
            raise ValueError(
                f"the fisher is a moving average (ema_decay={metadata.ema_decay}), which is not a mean over the examples "
                "of a task. Estimate it with ema_decay=None."
            )
        notes = fisher.coverage().reasons()
        missing = {la.name: notes.get(la.name, NOT_WANTED[0]) for la in self.layers if la.name not in fisher}
        unexplained = {
            name: note
            for name, note in missing.items()
            if note in NOT_WANTED
            or (note not in (NOT_CALLED, NO_EFFECT) and self.wish.unsupported is not Unsupported.FIXED)
        }
        if unexplained:
            lines = "\n".join(f"  {name}: {note}" for name, note in unexplained.items())
            raise ValueError(
                f"the fisher has no blocks for some of the memory's layers:\n{lines}\nEstimate it for all of them, with "
                'unsupported="fixed" if the task does not use some, or give the memory other layers=.'
            )
        used = [layer for layer in self.layers if layer.name in fisher]
        names = [layer.name for layer in used]
        if not names:
            raise ValueError(f"the fisher has no blocks for any of the memory's layers, only for {list(fisher)}.")
        if list(fisher) != names:
            fisher = fisher.restricted_to(names)
        check_belongs(fisher, used, self.model, "the fisher", "estimated")
        return fisher
