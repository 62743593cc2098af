"""Which layers a posterior is over: what the user asked for, and what a fit can use of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kronlaplace._arguments import choice
from kronlaplace.estimators import Estimator
from kronlaplace.fisher.curvature_pass import Watch
from kronlaplace.fisher.estimation import check_belongs, estimate_while_watched
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.fisher.merging import merge_fishers
from kronlaplace.laplace.state import State
from kronlaplace.layers import NOT_WANTED, Layer, Unsupported, entries_of, find_layers, search_layers, with_rules
from kronlaplace.layers.unusable import NO_EFFECT
from kronlaplace.likelihoods import Likelihood
from kronlaplace.network.last_layer import LAST, check_last
from kronlaplace.network.preconditions import check_model

__all__ = ["LayerChoice"]


@dataclass(frozen=True)
class LayerChoice:
    """The layers that the user asked for.

    Attributes:
        model: The network.
        wanted: Names or patterns, None for all layers, ``"last"`` for the one whose output is the network's.
        exclude: Names or patterns of those to leave out.
        unsupported: What to do about layers that cannot have a block.
    """

    model: nn.Module
    wanted: Sequence[str] | str | None
    exclude: Sequence[str]
    unsupported: Unsupported

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Sequence[str] | str | None,
        exclude: Sequence[str] | str,
        unsupported: Unsupported | str,
    ) -> LayerChoice:
        """Check the arguments of `KronLaplace` and return the choice.

        Raises:
            TypeError, ValueError: If they are not names or patterns, or an unknown option.
        """
        handling = choice(Unsupported, unsupported, "unsupported")
        wanted = layers if layers is None or layers == LAST else entries_of(layers, "layers")
        return cls(model, wanted, entries_of(exclude, "exclude"), handling)

    def find(self) -> list[Layer]:
        """Return the layers that are known without data: none if the last one is wanted."""
        if self.wanted == LAST:
            check_last(self.model, self.exclude)
            return []
        return find_layers(self.model, self.wanted, self.unsupported, self.exclude)

    def estimate(
        self, data: Iterable[Any], likelihood: Likelihood, estimator: Estimator, watch: Watch | None, **options: Any
    ) -> KroneckerFisher:
        """Estimate the Fisher of these layers, in passes that ``watch`` may follow."""
        return estimate_while_watched(
            self.model,
            data,
            likelihood,
            estimator,
            layers=self.wanted,
            exclude=self.exclude,
            unsupported=self.unsupported,
            watch=watch,
            **options,
        )

    def check_ready_made(self, fisher: KroneckerFisher, state: State, likelihood: Likelihood) -> list[str]:
        """Return the names of the posterior's layers that a ready-made Fisher is for.

        Raises:
            ValueError: If there is no block for a layer that could have one, or the likelihood is of another class.
        """
        check_model(self.model)
        layers = state.layers or find_layers(self.model, [_last_layer_of(fisher)])
        names = self._usable(fisher, layers)
        if type(fisher.metadata.likelihood) is not type(likelihood):
            raise ValueError(
                f"the fisher was estimated with {fisher.metadata.likelihood}, the posterior has {likelihood}."
            )
        return names

    def settle(
        self,
        state: State,
        fisher: KroneckerFisher,
        names: Sequence[str],
        ready_made: bool,
        before: KroneckerFisher | None,
    ) -> tuple[State, KroneckerFisher]:
        """Bring state and Fisher to the layers that both have.

        Args:
            state: The posterior's state before the fit.
            fisher: The new Fisher.
            names: Layers that it can be used for.
            ready_made: Whether the user brought it, so that it may be of another network.
            before: The Fisher that it is added to, if any.

        Raises:
            ValueError: If no layer is left, or a ready-made Fisher does not belong to the network.
            NotImplementedError: If the Fishers cannot be added.
        """
        remaining = state.only(names) if state.layers else state.over(find_layers(self.model, names))
        layers = with_rules(remaining.layers, fisher.metadata.rules)
        if any(new is not old for new, old in zip(layers, remaining.layers, strict=True)):
            remaining = replace(remaining, layers=layers)
        names = [layer.name for layer in remaining.layers]
        if set(names) < set(fisher):  # estimated once for all layers, used here for some
            earlier = {} if state.fit is None else state.fit.fisher.coverage().reasons()
            fisher = fisher.restricted_to(names, self._reasons(names) | earlier)
        if ready_made:
            check_belongs(fisher, remaining.layers, self.model, "the fisher", "estimated")
        if before is not None:
            if set(names) < set(before):
                before = before.restricted_to(names, fisher.coverage().reasons())
            fisher = merge_fishers(before, fisher)
        return remaining, fisher

    def _reasons(self, names: list[str]) -> dict[str, str]:
        """Return why the posterior has no block for some modules, as far as that shows without data."""
        wanted = names if self.wanted == LAST else self.wanted
        search = search_layers(self.model, wanted, self.unsupported, self.exclude)
        return {left.name: left.reason for left in search.left_out}

    def _usable(self, fisher: KroneckerFisher, layers: Sequence[Layer]) -> list[str]:
        names = [layer.name for layer in layers]
        missing = [name for name in names if name not in fisher]
        reasons = fisher.coverage().reasons()
        chosen = [name for name in missing if reasons.get(name, NOT_WANTED[0]) in NOT_WANTED]
        if chosen:
            raise ValueError(
                f"the fisher has no blocks for the layers {chosen} of the posterior, only for {list(fisher)}. Give "
                "KronLaplace the same layers=, or estimate the Fisher for all of its layers."
            )
        allowed = [name for name in missing if self.unsupported is Unsupported.DIAGONAL and reasons[name] == NO_EFFECT]
        if set(missing) > set(allowed) and self.unsupported is not Unsupported.FIXED:
            lines = "\n".join(f"  {name}: {reasons[name]}" for name in missing)
            raise ValueError(
                f"the fisher has no blocks for some of the posterior's layers:\n{lines}\nGive KronLaplace "
                f'layers={list(fisher)}, or unsupported="fixed" as in the estimate: they stay at their trained values.'
            )
        return [name for name in names if name in fisher]


def _last_layer_of(fisher: KroneckerFisher) -> str:
    name = fisher.metadata.last_layer
    if name is None:
        raise ValueError(
            "the fisher does not tell which layer's output is the network's: it is none of those with a block, or the "
            f'Fisher was made of blocks alone. Instead of layers="last" name one of {list(fisher)}.'
        )
    return name
