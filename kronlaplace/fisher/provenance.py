"""Metadata on how a Fisher was estimated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kronlaplace.fisher.coverage import Coverage
from kronlaplace.likelihoods import Likelihood, Sampling
from kronlaplace.network.example_axes import Layout

__all__ = ["FisherMetadata"]


@dataclass(frozen=True)
class FisherMetadata:
    """Record of how a Fisher was estimated.

    Attributes:
        likelihood: Likelihood whose output metric was pulled back.
        estimator: Name of the estimator.
        settings: Name and settings of the estimator, as JSON-compatible values.
        sampling: Rule by which directions were chosen.
        mc_samples: Number of label draws per example (``Sampling.MC`` only).
        seed: Seed of the label draws.
        parameters: Parameters in each block, by layer: weight, then bias if the block contains it.
        weights: Fingerprints of the network's parameters and buffers, by name.
        coverage: Table of what has a block and what does not.
        input_axis: Axis of the network's inputs that counts the examples.
        shared_inputs: Paths of the input tensors that are the same for all examples.
        ema_decay: Decay of the moving average, or None for a plain mean.
        last_layer: Layer whose output is the network's output, or None if it has no block.
        variational: Whether the output metric was averaged over a posterior of the outputs, as `KronLaplace.fit_variational`
            does, rather than taken at the trained weights.
        rules: The layers whose gradients are those of one example at a time, and how they are found, as
            `kronlaplace.layers.with_rules` takes them.
    """

    likelihood: Likelihood
    estimator: str
    sampling: Sampling
    mc_samples: int
    seed: int
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=Coverage)
    settings: dict[str, Any] = field(default_factory=dict)
    input_axis: int = 0
    shared_inputs: tuple[str, ...] = ()
    ema_decay: float | None = None
    last_layer: str | None = None
    variational: bool = False
    rules: dict[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """Position of the examples in the inputs."""
        return Layout(self.input_axis, self.shared_inputs)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-compatible values."""
        return {
            "likelihood": self.likelihood.to_json(),
            "estimator": self.estimator,
            "sampling": self.sampling.value,
            "mc_samples": self.mc_samples,
            "seed": self.seed,
            "parameters": {name: list(names) for name, names in self.parameters.items()},
            "weights": self.weights,
            "coverage": self.coverage.to_json(),
            "settings": self.settings,
            "input_axis": self.input_axis,
            "shared_inputs": list(self.shared_inputs),
            "ema_decay": self.ema_decay,
            "last_layer": self.last_layer,
            "variational": self.variational,
            "rules": self.rules,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FisherMetadata:
        """Restore a record from the result of `to_json`."""
        return cls(
            likelihood=Likelihood.from_json(values["likelihood"]),
            estimator=values["estimator"],
            sampling=Sampling(values["sampling"]),
            mc_samples=values["mc_samples"],
            seed=values["seed"],
            parameters={name: tuple(names) for name, names in values["parameters"].items()},
            weights=values["weights"],
            coverage=Coverage.from_json(values["coverage"]),
            settings=values["settings"],
            input_axis=values["input_axis"],
            shared_inputs=tuple(values["shared_inputs"]),
            ema_decay=values["ema_decay"],
            last_layer=values["last_layer"],
            variational=values.get("variational", False),
            rules=values.get("rules", {}),
        )
