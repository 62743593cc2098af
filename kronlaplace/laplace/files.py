"""A posterior as one safetensors file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

from kronlaplace.batches import device_of
from kronlaplace.fisher import check_belongs
from kronlaplace.kronecker import KroneckerFisher
from kronlaplace.layers import Unsupported, find_layers
from kronlaplace.likelihoods import Likelihood
from kronlaplace.serialization import load_tensors, save_tensors

__all__ = ["Stored", "read", "write"]


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        fisher: The Fisher.
        mean: The posterior's mean, each layer's ``W̄``.
        prior_mean: The prior's.
        prior_precision: As in `KronLaplace.prior_precision`.
        likelihood: The likelihood, with the noise that predictions use.
        temperature: ``τ``.
    """

    fisher: KroneckerFisher
    mean: Mapping[str, Tensor]
    prior_mean: Mapping[str, Tensor]
    prior_precision: Tensor
    likelihood: Likelihood
    temperature: float


def write(path: str | PathLike[str], stored: Stored) -> None:
    """Write the file; one that is there is replaced when the new one is complete."""
    tensors = {f"fisher/{name}": tensor for name, tensor in stored.fisher.to_tensors().items()}
    tensors |= {f"mean/{name}": tensor for name, tensor in stored.mean.items()}
    tensors |= {f"prior_mean/{name}": tensor for name, tensor in stored.prior_mean.items()}
    tensors["prior_precision"] = stored.prior_precision
    values = {
        "fisher": stored.fisher.to_json(),
        "likelihood": stored.likelihood.to_metadata(),
        "temperature": stored.temperature,
    }
    save_tensors(path, "posterior", tensors, values)


def read(path: str | PathLike[str], model: nn.Module) -> Stored:
    """Read a file and check that it is of this network, at these weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else, or of another network, naming the first difference.
    """
    device = device_of(model)
    tensors, values = load_tensors(path, "posterior", device)
    fisher = KroneckerFisher.from_tensors(_with_prefix(tensors, "fisher/"), values["fisher"])
    known = [layer.name for layer in find_layers(model, unsupported=Unsupported.FIXED)]
    for name in fisher:
        if name not in known:
            raise ValueError(
                f"{path} is a posterior of another network: it has a layer {name!r}, the model has not; the model's "
                f"layers are {known}."
            )
    mean = _with_prefix(tensors, "mean/")
    layers = find_layers(model, list(fisher))
    for layer in layers:
        fitted, here = mean[layer.name], layer.matrix()
        if fitted.shape == here.shape and fitted.dtype != here.dtype:
            raise ValueError(
                f"{path} was fitted in {fitted.dtype}, and the model's layer {layer.name!r} is in {here.dtype}. Load it for "
                f"the model as it was, then posterior.to({here.dtype})."
            )
    check_belongs(fisher, layers, model, str(path), "fitted")
    return Stored(
        fisher,
        mean,
        _with_prefix(tensors, "prior_mean/") or {name: torch.zeros_like(matrix) for name, matrix in mean.items()},
        tensors["prior_precision"],
        Likelihood.from_metadata(values["likelihood"]),
        values["temperature"],
    )


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
