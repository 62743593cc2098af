"""A posterior as one safetensors file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike

from torch import Tensor, nn

from kronlaplace._storage import load_tensors, save_tensors
from kronlaplace.blocks import Truncation
from kronlaplace.data.device import device_of
from kronlaplace.fisher.estimation import check_belongs
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.laplace.output_kernel import OutputKernel
from kronlaplace.layers import PerExampleLayer, find_layers, with_rules
from kronlaplace.likelihoods import Likelihood
from kronlaplace.priors.files import prior_from_tensors
from kronlaplace.priors.prior import Prior

__all__ = ["Stored", "read", "write"]


@dataclass(frozen=True)
class Stored:
    """The contents of a posterior's file.

    Attributes:
        fisher: The Fisher.
        mean: The posterior's mean, each layer's ``W̄``.
        prior: The prior.
        likelihood: The likelihood, with the noise that predictions use.
        temperature: ``τ``.
        logit_scale: ``a``.
        kernel: The kernel of the training outputs, if there is one.
        truncation: What later fits truncate.
    """

    fisher: KroneckerFisher
    mean: Mapping[str, Tensor]
    prior: Prior
    likelihood: Likelihood
    temperature: float
    logit_scale: float
    kernel: OutputKernel | None = None
    truncation: Truncation | None = field(default_factory=Truncation)


def write(path: str | PathLike[str], stored: Stored) -> None:
    """Write the file; an existing one is replaced when the new one is complete."""
    tensors = {f"fisher/{name}": tensor for name, tensor in stored.fisher.to_tensors().items()}
    tensors |= {f"mean/{name}": tensor for name, tensor in stored.mean.items()}
    tensors |= stored.prior.to_tensors()
    if stored.kernel is not None:
        tensors["output_kernel"] = stored.kernel.matrix
    values = {
        "fisher": stored.fisher.to_json(),
        "likelihood": stored.likelihood.to_json(),
        "temperature": stored.temperature,
        "logit_scale": stored.logit_scale,
        "prior": stored.prior.to_json(),
        "truncation": None if stored.truncation is None else asdict(stored.truncation),
    }
    save_tensors(path, "posterior", tensors, values)


def read(path: str | PathLike[str], model: nn.Module) -> Stored:
    """Read a file and check that it is of this network, at these weights.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is damaged, something else, or of another network, naming the first difference.
    """
    device = device_of(model)
    tensors, values = load_tensors(path, "posterior", device)
    fisher = KroneckerFisher.from_tensors(_with_prefix(tensors, "fisher/"), values["fisher"])
    rules = fisher.metadata.rules
    found = {layer.name: layer for layer in find_layers(model)}
    known = list(found)
    for name in fisher:
        layer = found.get(name)
        if isinstance(layer, PerExampleLayer) and name not in rules:
            raise ValueError(
                f"{path} has a block for layer {name!r} by a rule for its type, {type(layer.module).__name__}, and there is "
                f"none now: {layer.reason}. If the type is your own, import the module that registers it "
                "(kl.register_layer) before loading."
            )
        if name not in known:
            raise ValueError(
                f"{path} is a posterior of another network: it has a layer {name!r}, which the model does not have; the "
                f"model's layers are {known}."
            )
    mean = _with_prefix(tensors, "mean/")
    layers = with_rules([found[name] for name in found if name in fisher], rules)
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
        prior_from_tensors(tensors, values.get("prior", {}), layers),
        Likelihood.from_json(values["likelihood"]),
        values["temperature"],
        values.get("logit_scale", 1.0),
        OutputKernel(tensors["output_kernel"].cpu()) if "output_kernel" in tensors else None,
        None if (truncation := values.get("truncation", {})) is None else Truncation(**truncation),
    )


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
