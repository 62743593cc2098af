"""The parts that classification and regression share: methods, seeds, initial weights, and the posterior after training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kronlaplace.demo.report import Table
from kronlaplace.laplace import KronLaplace

__all__ = [
    "ALL_LAYERS",
    "LAST_LAYER",
    "MAP",
    "Outcome",
    "Settings",
    "build",
    "count",
    "fit_posteriors",
    "prior_precision_of",
    "seeds_of",
]

MAP, LAST_LAYER, ALL_LAYERS = "MAP", "Laplace, last layer", "Laplace, all layers"
_FIT_BATCH = 512


@dataclass(frozen=True)
class Settings:
    """The user's choices, the same for every data set; without an estimator it is the library's default."""

    estimator: str | None
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


def fit_posteriors(
    model: nn.Module,
    likelihood: str,
    x: Tensor,
    y: Tensor,
    settings: Settings,
    *,
    progress: bool = True,
) -> dict[str, KronLaplace]:
    """Fit and tune the posteriors over the last layer and over all layers, with the defaults of the library.

    Args:
        model: Trained network, in evaluation mode.
        likelihood: `"classification"`, `"binary"` or `"regression"`.
        x: Training inputs, on the network's device.
        y: Training targets.
        settings: Names the estimator, if it is not the default.
        progress: Whether a bar may be shown.

    Returns:
        The posteriors by method.
    """
    loader = list(zip(x.split(_FIT_BATCH), y.split(_FIT_BATCH), strict=True))
    estimator = () if settings.estimator is None else (settings.estimator,)
    posteriors = {
        LAST_LAYER: KronLaplace(model, likelihood, *estimator, layers="last"),
        ALL_LAYERS: KronLaplace(model, likelihood, *estimator),
    }
    for posterior in posteriors.values():
        posterior.fit(loader, progress=progress).tune()
    return posteriors


def prior_precision_of(posterior: KronLaplace) -> float:
    """Prior precision, the geometric mean where layers or weights have precisions of their own."""
    return float(torch.as_tensor(posterior.prior_precision).log().mean().exp())


def count(model: nn.Module) -> str:
    """Number of parameters, with thousands separated."""
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"
