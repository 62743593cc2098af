"""K-FOC with a running sum of Kronecker products, into which each batch is merged (K-FOC Algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.estimators.base import Estimator, State, kind_of
from kronlaplace.estimators.kfoc.kept_examples import joined, kept_examples
from kronlaplace.estimators.kfoc.options import Initialization
from kronlaplace.estimators.kfoc.power_iteration import PowerIteration, made_psd
from kronlaplace.estimators.kfoc.truncation import Examples, Terms, concatenated, factors_of, terms_of, truncated
from kronlaplace.estimators.second_moments import frobenius, squeezed
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["Running"]

_OF_THE_IDENTITY = 0.01
"""Share of the identity in a batch's starting point, because the batch may have nothing in common with earlier ones."""


@dataclass(frozen=True)
class Running(Estimator):
    """K-FOC by merging the best Kronecker product of each batch into a sum of a few.

    Args:
        iteration: Power iteration for each batch.
        rank: Number of terms of the sum. If it is above one, small batches add all of their examples instead, see `KFOC`.
    """

    name: ClassVar[str] = "kfoc"
    iteration: PowerIteration
    rank: int

    def start(self, layer: Layer) -> State:
        return {"batch": [], "waiting": []}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        sizes, gradients, activations = (t.to(layer.device) for t in terms_of(kind_of(block, KroneckerBlock, layer)))
        terms = Terms(weight * sizes, gradients.to(layer.dtype), activations.to(layer.dtype))
        return {**self.start(layer), "terms": terms}

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        state["batch"].append(kept_examples(gradients))

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        kept = joined(state["batch"], same_inputs=True)
        state["batch"] = []
        name = factors_of(batch.layer.name)
        if self.rank > 1 and (examples := kept.examples(self._most_waiting)) is not None:
            self._wait(state, examples, name)
            return
        start = None
        if "terms" in state and self.iteration.init is Initialization.IDENTITY:
            identity = kept.identity()
            start = state["terms"].activations[:, 0] + _OF_THE_IDENTITY * identity / frobenius(identity)
        size, gradient, activation = self.iteration.leading_triple(kept, name, start)
        self._append(state, Terms(size[:, None], gradient[:, None], activation[:, None]), name)

    def merge(self, state: State, other: State) -> State:
        merged = {**state, "waiting": list(state["waiting"])}
        for examples in other["waiting"]:
            self._wait(merged, examples, "a merged running sum")
        if "terms" in other:
            self._append(merged, other["terms"], "a merged running sum")
        return merged

    def decay(self, state: State, factor: float) -> None:
        state["waiting"] = [examples.scaled(factor) for examples in state["waiting"]]
        if "terms" in state:
            state["terms"] = state["terms"]._replace(sizes=state["terms"].sizes * factor)

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        name = factors_of(layer.name)
        best = truncated(state.get("terms"), state["waiting"], 1, name)
        gradient, activation = best.gradients[:, 0], best.activations[:, 0]
        gradient = best.sizes.to(gradient.dtype).unsqueeze(2) * gradient
        gradient, activation = made_psd(gradient, name), made_psd(activation, name)
        return KroneckerBlock(squeezed(gradient / weight), squeezed(activation), name=layer.name)

    def to_plain(self, state: State) -> dict[str, Any]:
        waiting = [(examples.a, examples.g) for examples in state["waiting"]]
        terms = {key: tuple(value) for key, value in state.items() if key == "terms"}
        return super().to_plain({**state, "waiting": waiting, **terms})

    def from_plain(self, saved: Mapping[str, Any], layer: Layer) -> State:
        state = super().from_plain(saved, layer)
        state["waiting"] = [Examples(a, g) for a, g in state["waiting"]]
        if "terms" in state:
            state["terms"] = Terms(*state["terms"])
        return state

    @property
    def _most_waiting(self) -> int:
        """Maximum number of examples waiting to be merged into a running sum of rank above one."""
        return 4 * self.rank

    def _wait(self, state: State, examples: Examples, name: str) -> None:
        """Add examples to the waiting ones, which are merged into the sum first if there would be too many."""
        if len(examples) + sum(map(len, state["waiting"])) > self._most_waiting:
            state["terms"] = truncated(state.get("terms"), state["waiting"], self.rank, name)
            state["waiting"] = []
        state["waiting"].append(examples)

    def _append(self, state: State, terms: Terms, name: str) -> None:
        """Add Kronecker products to the running sum and cut it to ``rank`` terms."""
        terms = concatenated([state["terms"], terms]) if "terms" in state else terms
        state["terms"] = truncated(terms, [], self.rank, name) if terms.sizes.shape[1] > self.rank else terms
