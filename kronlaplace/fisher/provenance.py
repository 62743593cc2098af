"""How a Fisher was estimated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kronlaplace.fisher.coverage import Coverage
from kronlaplace.likelihoods import Likelihood, Sampling

__all__ = ["FisherMetadata"]


@dataclass(frozen=True)
class FisherMetadata:
    """How a Fisher was estimated.

    Attributes:
        likelihood: The likelihood whose output metric was pulled back.
        estimator: The estimator's name.
        settings: The estimator's name and settings, as JSON-compatible values.
        sampling: How directions were chosen.
        mc_samples: Label draws per example (``Sampling.MC`` only).
        seed: Seed of those draws.
        parameters: The parameters in each block, by layer: weight, then bias if the block contains it.
        weights: Fingerprint of all the network's parameters and buffers, by name.
        coverage: What has a block and what has none.
        input_axis: The axis of the network's inputs that counts the examples.
        shared_inputs: Input tensors that are the same for all examples, by their paths in the inputs.
        ema_decay: Decay of the moving average, None for a plain mean.
        last_layer: The layer whose output is the network's, None if it is none of these.
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

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-compatible values."""
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
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FisherMetadata:
        """Inverse of `to_json`."""
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
        )
