"""Error of an approximate Fisher on the user's own network: ``‖F̂ − F‖ / ‖F‖`` for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from kronlaplace._arguments import Choice, choice, positive_integer, seed_number
from kronlaplace._precision import in_full_precision
from kronlaplace._wrappers import unwrapped
from kronlaplace.blocks import Block
from kronlaplace.estimators import Estimator, State
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.curvature_pass import accumulate
from kronlaplace.fisher.estimation import check_belongs
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.layers import Layer, LayerGradients, find_layers, with_rules
from kronlaplace.likelihoods import Likelihood, resolve_likelihood
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.preconditions import check_model

__all__ = ["ErrorMethod", "RelativeError", "relative_error"]


class ErrorMethod(Choice):
    """Method by which the error is computed.

    ``DENSE`` forms the layer's exact block. ``PROBING`` multiplies the blocks with random vectors ``z``: for standard
    normal ``z``, ``E‖M z‖² = ‖M‖_F²``. ``AUTO`` uses ``DENSE`` on small layers and ``PROBING`` on the others.
    """

    AUTO = "auto"
    DENSE = "dense"
    PROBING = "probing"


class RelativeError(float):
    """Relative error: a float with a standard error.

    Attributes:
        standard_error: Standard error of the estimate, 0 if it is exact.
        method: ``ErrorMethod.DENSE`` or ``ErrorMethod.PROBING``.
    """

    standard_error: float
    method: ErrorMethod

    def __new__(cls, value: float, standard_error: float, method: ErrorMethod) -> RelativeError:
        self = super().__new__(cls, value)
        self.standard_error = standard_error
        self.method = method
        return self

    def __repr__(self) -> str:
        if self.method is ErrorMethod.DENSE:
            return f"{float(self):.4g}"
        return f"{float(self):.4g} ± {self.standard_error:.2g}"

    __str__ = __repr__

    def __getnewargs__(self) -> tuple[float, float, ErrorMethod]:  # type: ignore[override]
        return float(self), self.standard_error, self.method


@in_full_precision
def relative_error(
    fisher: KroneckerFisher,
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood | str | None = None,
    *,
    method: ErrorMethod | str = ErrorMethod.AUTO,
    max_dense: int = 2000,
    n_probes: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, RelativeError]:
    """Compute the relative Frobenius error ``‖F̂ − F‖_F / ‖F‖_F`` of every block, in one pass over the data.

    ``F`` is the layer's exact block with the sampling, number of label draws and seed with which the Fisher was estimated.
    On the same batches in the same order the draws are the same, so that only the approximation is measured.

    Args:
        fisher: The Fisher, from any estimator.
        model: The network of the Fisher, at the same weights.
        data: The data on which the Fisher was estimated.
        likelihood: The likelihood; None uses the Fisher's own.
        method: ``"auto"`` (dense for layers of up to ``max_dense`` parameters, probing above), ``"dense"`` or
            ``"probing"``.
        max_dense: Maximum number of parameters of a layer for the dense method; its block has the square of that number of
            entries.
        n_probes: Number of random vectors.
        seed: Seed of the random vectors.
        progress: Whether to show a progress bar.

    Returns:
        One float per layer, with its standard error and method; NaN where the layer's exact block is zero.

    Raises:
        ValueError: If the Fisher belongs to a different network or likelihood, or to different weights; and as
            `estimate_fisher`.
        TypeError, NotImplementedError: As `estimate_fisher`.
    """
    method = choice(ErrorMethod, method, "method")
    max_dense = positive_integer(max_dense, "max_dense")
    n_probes = positive_integer(n_probes, "n_probes")
    if n_probes < 2 and method is not ErrorMethod.DENSE:
        raise ValueError(f"n_probes must be at least 2 to give a standard error; got {n_probes}.")
    metadata = fisher.metadata
    likelihood = metadata.likelihood if likelihood is None else resolve_likelihood(likelihood)
    likelihood = likelihood.completed_by(metadata.likelihood)
    if likelihood != metadata.likelihood:
        raise ValueError(
            f"the fisher was estimated with {metadata.likelihood}; the likelihood passed here must match (got "
            f"{likelihood})."
        )
    model = unwrapped(model)
    check_model(model)
    layers = with_rules(find_layers(model, list(fisher)), metadata.rules)
    check_belongs(fisher, layers, model, "the fisher", "estimated")
    truth = _GroundTruth(method, max_dense, n_probes, seed_number(seed))
    accumulation = Accumulation(truth, layers, metadata.ema_decay)
    accumulate(
        model,
        data,
        likelihood,
        accumulation,
        DirectionSampling(metadata.sampling, metadata.mc_samples, metadata.seed),
        progress=progress,
        description="relative error",
    )
    errors = {}
    for layer in layers:
        state, block = accumulation.state(layer.name), fisher[layer.name]
        compare = _probed if "probes" in state else _dense
        errors[layer.name] = compare(state, block, accumulation.weight)
    return errors


@dataclass(frozen=True)
class _GroundTruth(Estimator):
    """Exact blocks of small layers, and products of random vectors with the exact blocks of all others."""

    name: ClassVar[str] = "ground truth"
    for_any_layer: ClassVar[bool] = True
    constants: ClassVar[frozenset[str]] = frozenset({"probes"})
    method: ErrorMethod
    max_dense: int
    n_probes: int
    seed: int

    def start(self, layer: Layer) -> State:
        q, p = layer.shape
        size = q * p
        options: dict[str, Any] = {"dtype": layer.dtype, "device": layer.device}
        if self.method is ErrorMethod.DENSE or (self.method is ErrorMethod.AUTO and size <= self.max_dense):
            return {"matrix": torch.zeros(size, size, **options)}
        generator = torch.Generator(device=layer.device).manual_seed(self.seed)
        return {
            "probes": torch.randn(self.n_probes, size, generator=generator, **options),
            "products": torch.zeros(self.n_probes, size, **options),
        }

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        for part in gradients.parts():
            x = part.vectors()
            if "matrix" in state:
                state["matrix"].addmm_(x.T, x)
            else:
                state["products"].addmm_(state["probes"] @ x.T, x)

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        raise AssertionError("states are compared, not turned into blocks")


def _dense(state: State, block: Block, weight: float) -> RelativeError:
    exact = state["matrix"] / weight
    norm = torch.linalg.norm(exact)
    value = torch.linalg.norm(block.to_dense().to(exact) - exact) / norm if norm else norm / norm
    return RelativeError(float(value), 0.0, ErrorMethod.DENSE)


def _probed(state: State, block: Block, weight: float) -> RelativeError:
    products = state["products"] / weight
    approximate = block.matmul(state["probes"].unflatten(1, block.shape)).flatten(1)
    squared_errors = (approximate - products).double().square().sum(1)
    squared_norms = products.double().square().sum(1)
    if not squared_norms.any():
        return RelativeError(math.nan, 0.0, ErrorMethod.PROBING)
    ratio = float(squared_errors.mean() / squared_norms.mean())
    if not ratio > 0:
        return RelativeError(math.sqrt(ratio) if ratio == 0 else math.nan, 0.0, ErrorMethod.PROBING)
    # Standard error of a ratio of means, then of its square root.
    deviation = (squared_errors - ratio * squared_norms) / squared_norms.mean()
    standard_error = float(deviation.std() / math.sqrt(len(deviation)))
    return RelativeError(math.sqrt(ratio), standard_error / (2 * math.sqrt(ratio)), ErrorMethod.PROBING)
