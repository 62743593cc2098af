"""`estimate_fisher`: one pass over the data, from a trained network to its Kronecker-factored Fisher."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kronlaplace.batches import Batch, DeferredChecks, device_of, iterate, preserved_random_state
from kronlaplace.collect import check_model, recording
from kronlaplace.estimators import Estimator, State, resolve_estimator
from kronlaplace.fingerprint import fingerprint
from kronlaplace.kronecker import FisherMetadata, KroneckerFisher
from kronlaplace.layers import Layer, find_layers
from kronlaplace.likelihoods import Likelihood, Sampling, resolve_likelihood
from kronlaplace.options import choice, positive_integer, seed_number

__all__ = ["estimate_fisher"]


def estimate_fisher(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood | str,
    estimator: Estimator | str = "kfac",
    *,
    sampling: Sampling | str = Sampling.MC,
    mc_samples: int = 1,
    layers: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> KroneckerFisher:
    """Estimate the Fisher of a trained network as one Kronecker block per layer.

    The Fisher is the mean over examples of the per-example Fisher, ``F = 1/N Σ_n Σ_v vec(X_vn) vec(X_vn)ᵀ``, where
    ``X_vn`` is the gradient of example ``n``'s own negative log-likelihood along direction ``v``. Neither batch size nor
    order of the data changes the result (but for rounding, and for which labels are drawn in ``"mc"``).

    Args:
        model: The network, in the mode in which it predicts (``model.eval()``). It is left as found: parameters,
            gradients, flags, hooks, mode.
        data: Batches ``(inputs, targets)``, such as a DataLoader; targets are needed for ``sampling="empirical"`` and
            for the evidence of a Laplace posterior. They are moved to the model's device.
        likelihood: `Categorical`, `Bernoulli`, `Gaussian`, or ``"classification"``, ``"binary"``, ``"regression"``.
        estimator: How blocks are made, such as `KFAC`, or its shorthand.
        sampling: ``"exact"`` (Fisher type 2, the generalized Gauss-Newton matrix; about one backward pass per output),
            ``"mc"`` (labels drawn from the model's predictive distribution; one backward pass per sample) or
            ``"empirical"`` (the data's labels; one backward pass, and not the Fisher).
        mc_samples: Label draws per example in ``"mc"``.
        layers: Names of the modules that get a block; None means all with trainable parameters.
        seed: Seed of the draws. Batch ``i`` draws from a generator made from ``(seed, i)``, whatever the global state.
        progress: Whether to show a progress bar (only where the output is a terminal).

    Returns:
        The Fisher; ``fisher[layer_name]`` is a layer's block.

    Raises:
        ValueError: For empty data, NaN or infinite inputs, parameters or outputs, targets that do not fit, unknown
            names, batch norm or dropout in training mode.
        TypeError: For data, batches or options of the wrong type.
        NotImplementedError: For layers or outputs that are not supported, with the ways out.
    """
    likelihood = resolve_likelihood(likelihood)
    estimator = resolve_estimator(estimator)
    sampling = choice(Sampling, sampling, "sampling")
    mc_samples = positive_integer(mc_samples, "mc_samples")
    if mc_samples > 1 and sampling is not Sampling.MC:
        raise ValueError(
            f'mc_samples={mc_samples} has a meaning with sampling="mc" only; sampling is {sampling.value!r}.'
        )
    seed = seed_number(seed)
    check_model(model)
    device = device_of(model)
    chosen = find_layers(model, layers)
    if sampling is Sampling.EMPIRICAL:
        warnings.warn(
            'sampling="empirical" uses the data\'s labels: that is the empirical Fisher, not the Fisher, and it vanishes '
            'where the network fits its data. Use "mc" or "exact" unless you mean it.',
            stacklevel=2,
        )

    states: dict[str, State] = {layer.name: estimator.start(layer) for layer in chosen}
    n_examples = 0
    statistics: Tensor | None = None
    checks = DeferredChecks()

    def receive(layer: Layer, x: Tensor, grad: Tensor) -> None:
        estimator.add_gradients(states[layer.name], layer, x, grad)

    with preserved_random_state(device), recording(model, chosen, receive) as recorder:
        for batch in iterate(data, device, progress=progress, description=f"Fisher ({estimator.name})"):
            if batch.inputs.is_floating_point():
                checks.require(torch.isfinite(batch.inputs).all(), batch, "the inputs contain NaN or infinite values.")
            outputs = recorder.forward(batch.inputs)
            detached, targets = _as_matrices(likelihood, outputs.detach(), batch, checks)
            if batch.index and (targets is None) != (statistics is None):
                raise ValueError(f"batch {batch.index}: targets must come with every batch or with none.")
            if targets is None and sampling is Sampling.EMPIRICAL:
                raise ValueError(f'batch {batch.index}: sampling="empirical" needs (inputs, targets) batches.')
            if targets is not None:
                new = likelihood.statistics(detached, targets)
                statistics = new if statistics is None else statistics + new
            for layer in chosen:
                estimator.add_inputs(states[layer.name], layer, recorder.inputs[layer.name])
            n_directions = likelihood.n_directions(detached.shape[1], sampling, mc_samples)
            directions = likelihood.directions(
                detached,
                sampling,
                mc_samples=mc_samples,
                targets=targets,
                generator=_generator(seed, batch.index, device),
            )
            for v, direction in enumerate(directions, start=1):
                recorder.backward(outputs, direction, retain_graph=v < n_directions)
            n_examples += len(batch.inputs)
            del outputs
    checks.settle()

    blocks = {layer.name: estimator.finish(states[layer.name], layer, n_examples) for layer in chosen}
    metadata = FisherMetadata(
        likelihood=likelihood,
        estimator=estimator.name,
        sampling=sampling,
        mc_samples=mc_samples,
        seed=seed,
        parameters={layer.name: layer.parameter_names for layer in chosen},
        weights=fingerprint(model),
    )
    return KroneckerFisher(blocks, n_examples, metadata, statistics)


def _as_matrices(
    likelihood: Likelihood, outputs: Tensor, batch: Batch, checks: DeferredChecks
) -> tuple[Tensor, Tensor | None]:
    """Check one batch's outputs and targets; give them a column axis if the network's output is ``(N,)``."""
    targets = batch.targets
    message = "the network's outputs are NaN or infinite on finite inputs; did the training diverge?"
    checks.require(torch.isfinite(outputs).all(), batch, message)
    try:
        likelihood.check_outputs(outputs)
        allowed = None if targets is None else likelihood.check_targets(outputs, targets)
    except ValueError as error:
        raise ValueError(f"batch {batch.index}: {error}") from None
    if allowed is not None:
        checks.require(allowed[0], batch, allowed[1])
    if outputs.ndim == 1:
        return outputs.unsqueeze(1), None if targets is None else targets.unsqueeze(1)
    return outputs, targets


def _generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    """A generator of its own for each batch: the same draws whatever came before."""
    mixed = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator(device=device).manual_seed(mixed)
