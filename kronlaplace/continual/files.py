"""A memory as one safetensors file, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from kronlaplace._storage import load_tensors, save_tensors
from kronlaplace.continual.state import MemoryState, Task
from kronlaplace.priors.given import GivenPrior
from kronlaplace.priors.kronecker import KroneckerPrior
from kronlaplace.priors.prior import DIAGONAL_KINDS, IsotropicPrior, Prior, prior_from_multiples

__all__ = ["check_tasks", "numbers_of", "read", "write"]


def numbers_of(prior: GivenPrior | Prior) -> tuple[float, float] | None:
    """Return a prior's precision and mean if both are single numbers, so that it holds for layers of any network."""
    if isinstance(prior, GivenPrior):
        precision, mean = prior.number, prior.precision.mean if isinstance(prior.precision, Prior) else prior.mean
    else:
        precision, mean = prior.multiples if isinstance(prior, IsotropicPrior) else None, prior.mean
    if precision is None or isinstance(mean, Mapping) or (isinstance(mean, Tensor) and mean.ndim):
        return None
    return float(precision), float(mean)


def write(
    path: str | PathLike[str], state: MemoryState, prior: GivenPrior | Prior, settings: Mapping[str, Any]
) -> None:
    """Write the file; an existing one is replaced when the new one is complete.

    Args:
        path: The path.
        state: The state.
        prior: Two numbers, or a prior that is tied to layers.
        settings: Everything else, as JSON-compatible values.
    """
    tensors = state.to_tensors()
    values: dict[str, Any] = {"state": state.to_json(), "settings": dict(settings), "prior": numbers_of(prior)}
    if values["prior"] is None:
        assert isinstance(prior, Prior)
        tensors |= prior.to_tensors()
        values["prior"] = {**prior.to_json(), "layers": list(prior.means)}
    save_tensors(path, "memory", tensors, values)


def read(path: str | PathLike[str], device: torch.device) -> tuple[MemoryState, GivenPrior | Prior, dict[str, Any]]:
    """Read a file.

    Returns:
        The state, the prior, and the settings.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is damaged or something else, or has a prior of a kind that this version does not know.
    """
    tensors, values = load_tensors(path, "memory", device)
    return MemoryState.from_tensors(tensors, values["state"]), _prior(tensors, values["prior"]), values["settings"]


def _prior(tensors: Mapping[str, Tensor], values: Any) -> GivenPrior | Prior:
    if not isinstance(values, Mapping):
        precision, mean = values
        return GivenPrior(precision, mean)
    names = values["layers"]
    means = {name: tensors[f"prior_mean/{name}"] for name in names}
    if values["kind"] == KroneckerPrior.kind:
        parts = {key.removeprefix("prior/"): tensor for key, tensor in tensors.items() if key.startswith("prior/")}
        prior = KroneckerPrior.from_tensors(parts, dict(values), means)
        factor = parts["factor"]
        return replace(prior, factor=dict(zip(names, factor, strict=True)) if factor.ndim else factor)
    if values["kind"] not in DIAGONAL_KINDS:
        raise ValueError(
            f"the file has a prior of the kind {values['kind']!r}, which this version does not know; update it."
        )
    return prior_from_multiples(tensors["prior_precision"], means)


def check_tasks(path: str | PathLike[str], tasks: Sequence[Task], expected: Sequence[str]) -> None:
    """Check that a memory is of certain tasks in a certain order.

    Raises:
        ValueError: If it is not, with both lists.
    """
    found = [task.name for task in tasks]
    if found != list(expected):
        what = "the same tasks in another order" if sorted(found) == sorted(expected) else "other tasks"
        raise ValueError(
            f"{path} is a memory of {what}: it has {found}, and tasks={list(expected)} was expected. Load the file that "
            "was saved after these, or continue after the tasks that it has."
        )
