"""Accumulation of a Fisher: the state of every layer, batch by batch and pass by pass."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kronlaplace._arguments import positive_number
from kronlaplace.blocks import Block
from kronlaplace.estimators import Diagonal, Estimator, State, estimator_to_json
from kronlaplace.layers import Layer, LayerBatch, LayerGradients

__all__ = ["Accumulation"]


class Accumulation:
    """Sums of one estimator over batches, for all layers.

    By default all examples have the same weight. With ``ema_decay`` the result is a moving average: with every batch,
    everything seen before counts ``ema_decay`` times as much. This holds for every estimator, and the sum is divided by
    the total weight, so that it is not biased toward zero after the first batches.

    Args:
        estimator: The estimator. Layers without Kronecker structure get a diagonal block, unless it supports them.
        layers: The layers.
        ema_decay: Decay of the moving average, from 0 to 1, or None for a plain mean.
    """

    def __init__(self, estimator: Estimator, layers: Sequence[Layer], ema_decay: float | None = None) -> None:
        self.passes = estimator.passes
        """Number of passes over the data that are needed."""
        self._estimator = estimator
        self.start(layers)
        self._ema_decay = ema_decay
        self._pass = 1
        self._received: set[str] = set()
        self._final_weights: dict[str, float] = {}  # for layers that needed fewer passes
        self.reached: set[str] = set()
        """Layers that have received a gradient."""
        self.weight = 0.0
        """Number of examples seen in this pass, or their total weight in a moving average."""

    def __repr__(self) -> str:
        decay = "" if self._ema_decay is None else f", ema_decay={self._ema_decay}"
        seen = f"pass {self._pass} of {self.passes}, {self.weight:.6g} examples"
        return f"Accumulation({self._estimator!r}, layers={list(self._layers)}{decay}, {seen})"

    def start(self, layers: Sequence[Layer]) -> None:
        """Set the layers, before any data have been seen."""
        self._layers = {layer.name: layer for layer in layers}
        self.estimators = {
            layer.name: self._estimator if layer.has_kronecker_factors or self._estimator.for_any_layer else Diagonal()
            for layer in layers
        }
        self._states: dict[str, State] = {
            name: self.estimators[name].start(layer) for name, layer in self._layers.items()
        }

    def start_from(self, blocks: Mapping[str, Block], weight: float) -> None:
        """Start from given blocks instead of zero, before any data have been seen.

        With ``ema_decay=ξ``, batches of ``B`` examples and ``weight = B / (1 − ξ)``, after ``k`` batches each factor is
        ``ξᵏ Ω₀ + (1 − ξ) Σ_j ξ^(k−j) Ω_j`` (KFC Eq. 33), where ``Ω₀`` is the given factor.

        Args:
            blocks: A block for every layer, of the kind that the estimator makes, such as a `KroneckerFisher`.
            weight: Number of examples that the blocks stand for; positive.

        Raises:
            ValueError: If layers are missing, data have been seen, or the weight is not positive.
            NotImplementedError: If the estimator's finished blocks do not determine its sums.
            TypeError: For blocks of other kinds.
        """
        missing = [name for name in self._layers if name not in blocks]
        if missing:
            raise ValueError(f"there are no blocks to start from for the layers {missing}; got {list(blocks)}.")
        if self.weight > 0 or self._pass > 1:
            raise ValueError("the accumulation has already seen data; start a new one from the blocks.")
        weight = positive_number(weight, "weight")
        for name, layer in self._layers.items():
            self._states[name] = self.estimators[name].state_from(blocks[name], layer, weight)
        self.weight = weight

    @property
    def layers(self) -> list[Layer]:
        """The layers."""
        return list(self._layers.values())

    def decay(self, factor: float) -> None:
        """Let everything seen so far count ``factor`` times as much, from 0 to 1, the total weight included."""
        self.weight *= factor
        for name, state in self._states.items():
            if self._wants_data(name):
                self.estimators[name].decay(state, factor)

    def begin_batch(self, batches: Mapping[str, LayerBatch]) -> None:
        """Add the inputs of all layers, after the forward pass."""
        self._received.clear()
        if self._ema_decay is not None:
            self.decay(self._ema_decay)
        for name, state in self._states.items():
            if self._wants_data(name):
                self.estimators[name].add_inputs(state, batches[name])

    def add_gradients(self, gradients: LayerGradients) -> None:
        """Add the gradients of one layer along one direction."""
        name = gradients.layer.name
        self._received.add(name)
        self.reached.add(name)
        if self._wants_data(name):
            self.estimators[name].add_gradients(self._states[name], gradients)

    def only_squares(self, name: str) -> bool:
        """Return whether a layer takes `SquaredGradients` where its outputs are the network's own."""
        return self.estimators[name].only_squares(self._layers[name])

    def end_batch(self, batches: Mapping[str, LayerBatch], n_examples: int) -> None:
        """Finish a batch after its last direction; layers that received no gradient in it are left unchanged."""
        for name, state in self._states.items():
            if self._wants_data(name) and name in self._received:
                self.estimators[name].end_batch(state, batches[name])
        self.weight += n_examples

    def end_step(self) -> None:
        """Note that a step of training ends; the sums over batches do not depend on it."""
        return

    def merge(self, other: Accumulation) -> None:
        """Add what another accumulation of the same estimator, layers and pass has seen."""
        for name, estimator in self.estimators.items():
            if self._wants_data(name):
                self._states[name] = estimator.merge(self._states[name], other._states[name])
        self.weight += other.weight

    def next_pass(self) -> None:
        """Begin the next pass over the data."""
        for name, estimator in self.estimators.items():
            if self._pass < estimator.passes:
                self._states[name] = estimator.next_pass(self._states[name], self._layers[name], self.weight)
            else:
                self._final_weights.setdefault(name, self.weight)
        self._pass += 1
        self.weight = 0.0

    def leave_out(self, names: Collection[str]) -> None:
        """Remove some of the layers."""
        for name in names:
            for by_name in (self._layers, self.estimators, self._states, self._final_weights):
                by_name.pop(name, None)

    def state(self, name: str) -> State:
        """Return the accumulated state of a layer."""
        return self._states[name]

    def refresh(self) -> None:
        """Renew what the estimators renew from time to time only, such as the eigenbases of `EKFAC` in training.

        Call it after a batch, before the blocks are inverted.
        """
        for name, estimator in self.estimators.items():
            self._states[name] = estimator.refresh(self._states[name], *self._of(name))

    def so_far(self) -> dict[str, Block]:
        """Return the blocks as if the data ended here; the accumulation can continue.

        Call it in the last pass, after a batch.
        """
        return {
            name: self._marked(name, estimator.peek(self._states[name], *self._of(name)))
            for name, estimator in self.estimators.items()
        }

    def finish(self) -> dict[str, Block]:
        """Return the blocks; the accumulation cannot be used afterwards."""
        return {
            name: self._marked(name, estimator.finish(self._states.pop(name), *self._of(name)))
            for name, estimator in self.estimators.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything accumulated so far, between two batches, for a checkpoint.

        It consists of dicts, lists, tuples, numbers, strings and tensors, as ``torch.load(..., weights_only=True)`` reads
        them.
        """
        return {
            "estimator": json.dumps(estimator_to_json(self._estimator)),
            "layers": {name: tuple(layer.shape) for name, layer in self._layers.items()},
            "states": {name: self.estimators[name].to_plain(state) for name, state in self._states.items()},
            "weight": self.weight,
            "pass": self._pass,
            "final_weights": dict(self._final_weights),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from the result of `state_dict`, bit for bit; what has been accumulated here is discarded.

        Args:
            saved: The result of `state_dict`, which stays as it is. Tensors are moved to the device of their layer.

        Raises:
            ValueError: If the estimator, or the names or shapes of the layers, are different.
        """
        layers = {name: tuple(layer.shape) for name, layer in self._layers.items()}
        found = {name: tuple(shape) for name, shape in saved["layers"].items()}
        for what, own, other in (
            ("layers (with the shapes of their matrices)", layers, found),
            ("estimator", json.dumps(estimator_to_json(self._estimator)), saved["estimator"]),
        ):
            if own != other:
                raise ValueError(
                    f"the checkpoint has a different {what}: {other} instead of {own}. Load it into an accumulation with "
                    "the same settings for the same network."
                )
        self._states = {
            name: self.estimators[name].from_plain(saved["states"][name], layer) for name, layer in self._layers.items()
        }
        self.weight = saved["weight"]
        self._pass = saved["pass"]
        self._final_weights = dict(saved["final_weights"])
        self._received.clear()

    def _of(self, name: str) -> tuple[Layer, float]:
        """Return a layer and the weight of its data."""
        return self._layers[name], self._final_weights.get(name, self.weight)

    def _marked(self, name: str, block: Block) -> Block:
        block.shares_weights_over_space = self._layers[name].shares_weights_over_space
        return block

    def _wants_data(self, name: str) -> bool:
        return self._pass <= self.estimators[name].passes
