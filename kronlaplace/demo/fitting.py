"""The parts that classification and regression share: seeds, initial weights, and the Laplace posterior after training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kronlaplace.demo.report import Table
from kronlaplace.laplace import KronLaplace

__all__ = ["Outcome", "Settings", "build", "count", "fit_posterior", "seeds_of"]

_FIT_BATCH = 512


@dataclass(frozen=True)
class Settings:
    """The user's choices, the same for every data set."""

    estimator: str
    device: torch.device
    seed: int
    pictures: bool


@dataclass(frozen=True)
class Outcome:
    """The results of one data set.

    Attributes:
        title: One line: the data set and the network.
        table: MAP next to Laplace.
        notes: One line each: what was tuned, and how the columns are meant.
        files: Other files that were written.
    """

    title: str
    table: Table
    notes: list[str]
    files: list[Path]


def seeds_of(seed: int, split: int = 0) -> tuple[int, int]:
    """Seeds of the initial weights and of the batch order: unrelated for every `(seed, split)`."""
    first, second = np.random.SeedSequence([seed, split]).generate_state(2)
    return int(first), int(second)


def build(network: Callable[[], nn.Sequential], seed: int, device: torch.device) -> nn.Sequential:
    """Build a network with initial weights drawn from `seed`, the same on any device; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    return model.to(device)


def fit_posterior(
    model: nn.Module,
    likelihood: str,
    x: Tensor,
    y: Tensor,
    settings: Settings,
    *,
    progress: bool = True,
) -> KronLaplace:
    """Do the main job: fit the posterior on the training data, then tune it by the evidence.

    Args:
        model: Trained network, in evaluation mode.
        likelihood: `"classification"` or `"regression"`.
        x: Training inputs, on the network's device.
        y: Training targets.
        settings: Names the estimator.
        progress: Whether a bar may be shown.
    """
    posterior = KronLaplace(model, likelihood, estimator=settings.estimator)
    posterior.fit(list(zip(x.split(_FIT_BATCH), y.split(_FIT_BATCH), strict=True)), progress=progress)
    posterior.tune()
    return posterior


def count(model: nn.Module) -> str:
    """Number of parameters, with thousands separated."""
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"
