"""`estimate_fisher`: one pass over the data, from a trained network to its Kronecker-factored Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from kronlaplace._arguments import choice, warn
from kronlaplace._log import logged
from kronlaplace._precision import in_full_precision
from kronlaplace._wrappers import unwrapped
from kronlaplace.blocks import Block
from kronlaplace.data.inputs import Inputs
from kronlaplace.data.loader import warn_of_share
from kronlaplace.estimators import Diagonal, Estimator, estimator_to_json, resolve_estimator
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.coverage import Coverage, CoverageRow
from kronlaplace.fisher.curvature_pass import Watch, accumulate
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.fisher.provenance import FisherMetadata
from kronlaplace.layers import Layer, LayerSearch, PerExampleLayer, Unsupported, rules_of, search_layers
from kronlaplace.likelihoods import Likelihood, Sampling, resolve_likelihood
from kronlaplace.likelihoods.sampling import sampling_rule
from kronlaplace.network.fingerprint import difference, fingerprint
from kronlaplace.network.last_layer import LAST, check_last, find_last_layer
from kronlaplace.network.preconditions import check_model

__all__ = ["check_belongs", "estimate_fisher", "estimate_while_watched", "with_metadata"]


@in_full_precision
def estimate_fisher(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood | str,
    estimator: Estimator | str = "kfac",
    *,
    sampling: Sampling | str | None = None,
    mc_samples: int = 1,
    layers: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    unsupported: Unsupported | str = Unsupported.DIAGONAL,
    ema_decay: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> KroneckerFisher:
    """Estimate the Fisher of a trained network as one block per layer.

    The Fisher is the mean over examples of the per-example Fisher, ``F = 1/N Σ_n Σ_v vec(X_vn) vec(X_vn)ᵀ``, where
    ``X_vn`` is the gradient of example ``n``'s own negative log-likelihood along direction ``v``. Neither the batch size nor
    the order of the data changes the result (except for rounding and for which labels are drawn in ``"mc"``).

    Args:
        model: The network, in evaluation mode (``model.eval()``). It is left as it was: parameters, gradients, flags,
            hooks, mode.
        data: Batches ``(inputs, targets)``, such as a DataLoader. The inputs are a tensor, a tuple of tensors (passed as
            ``model(*inputs)``) or a dict of tensors; see `kronlaplace.data.loader.iterate`. Targets are required for
            ``sampling="empirical"`` and for the evidence of a Laplace posterior. Batches are moved to the model's device.
            Estimators that make several passes (`KFOC`, `EKFAC`) need data that can be iterated more than once. When
            several processes work together, each needs all of the data: nothing is exchanged between them.
        likelihood: `Categorical`, `Bernoulli`, `Gaussian`, `HeteroscedasticGaussian` or `Euclidean`, or a shorthand:
            ``"classification"``, ``"binary"``, ``"regression"``, ``"heteroscedastic"``, ``"euclidean"``.
        estimator: Estimator of the blocks: `KFAC`, `SUA`, `TKFAC`, `KFOC`, `EKFAC`, `Diagonal` or `ExactBlock`, or a
            shorthand: ``"kfac"``, ``"sua"``, ``"tkfac"``, ``"kfoc"``, ``"ekfac"``, ``"diagonal"``, ``"exact"``. The scale
            and shift of normalization layers, and embeddings, get a diagonal block from every estimator but the last.
        sampling: ``"exact"`` (Fisher type 2, the generalized Gauss-Newton matrix; about one backward pass per output),
            ``"mc"`` (labels drawn from the model's predictive distribution; one backward pass per sample),
            ``"empirical"`` (the labels in the data; one backward pass, but the result is not the Fisher). None is
            ``"exact"`` where an example has up to 1,024 directions, and else ``"mc"``, with a warning.
        mc_samples: Number of label draws per example, in ``"mc"``, also where None is that.
        layers: Modules that get a block, as a string or several: names, or patterns as in `fnmatch`, such as
            ``"encoder.*.query"`` (``*`` also matches dots). ``"last"`` is the linear layer or convolution whose output is
            the network's output, possibly after a reshape or a log-softmax; the first batch shows which. None means every
            module with trainable parameters.
        exclude: Names or patterns of modules that get no block.
        unsupported: What happens to trainable parameters whose use no rule describes, such as class tokens, or weights that
            a function uses. ``"diagonal"``: a diagonal block, from the gradients of each example, for which the network
            runs once more on each batch. ``"fixed"``: they stay at their trained values. ``"error"``: an error that names
            them. `KroneckerFisher.coverage` has the reasons, and lists as without a block what has no effect on the
            outputs. All of this also covers what only the first batch reveals; what a later one does is refused with
            ``"diagonal"``.
        ema_decay: None for the mean over all examples; a number from 0 to 1 for a moving average, in which everything seen
            before a batch counts ``ema_decay`` times as much.
        seed: Seed of the draws. Batch ``i`` draws from a generator seeded with ``(seed, i)``, regardless of the global
            random state.
        progress: Whether to show a progress bar (only if the output is a terminal).

    Returns:
        The Fisher; ``fisher[layer_name]`` is a layer's block.

    Raises:
        ValueError: For empty data, NaN or infinite inputs, parameters or outputs, targets that do not fit, unknown
            names, batch norm or dropout in training mode, or softmax or sigmoid outputs where the likelihood takes logits
            (a log-softmax is accepted with `Categorical`: it changes neither the probabilities nor the curvature).
        TypeError: For data, batches or options of the wrong type.
        NotImplementedError: For layers or outputs that are not supported; the message lists alternatives.

    Warns:
        UserWarning: For ``sampling="empirical"``; where None is ``"mc"``; for a loader that gives one process of
            several its share of the data.
    """
    return estimate_while_watched(
        model,
        data,
        likelihood,
        estimator,
        sampling=sampling,
        mc_samples=mc_samples,
        layers=layers,
        exclude=exclude,
        unsupported=unsupported,
        ema_decay=ema_decay,
        seed=seed,
        progress=progress,
        watch=None,
    )


@in_full_precision
@logged(lambda fisher: f"estimated the Fisher of {fisher.n_examples} examples: {fisher.coverage().summary()}")
def estimate_while_watched(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood | str,
    estimator: Estimator | str,
    *,
    sampling: Sampling | str | None,
    mc_samples: int,
    layers: Sequence[str] | str | None,
    exclude: Sequence[str] | str,
    unsupported: Unsupported | str,
    seed: int,
    progress: bool,
    watch: Watch | None,
    ema_decay: float | None = None,
) -> KroneckerFisher:
    """Estimate a Fisher as `estimate_fisher` does, and show every batch to ``watch``."""
    likelihood = resolve_likelihood(likelihood)
    estimator = resolve_estimator(estimator)
    draws = sampling_rule(sampling, mc_samples, seed)
    if ema_decay is not None and not (isinstance(ema_decay, (int, float)) and 0 <= ema_decay <= 1):
        raise ValueError(f"ema_decay must be a number from 0 to 1, or None for a plain mean; got {ema_decay!r}.")
    model = unwrapped(model)
    check_model(model)
    warn_of_share(data)
    unsupported = choice(Unsupported, unsupported, "unsupported")
    choose: Callable[[Inputs], list[Layer]] | None = None
    if layers == LAST:
        check_last(model, exclude)
        search = LayerSearch([], [])

        def choose(inputs: Inputs) -> list[Layer]:
            nonlocal search
            search = search_layers(model, [find_last_layer(model, inputs)], unsupported)
            return search.layers

    else:
        search = search_layers(model, layers, unsupported, exclude)
    if draws.kind is Sampling.EMPIRICAL:
        warn(
            'sampling="empirical" uses the labels in the data: this gives the empirical Fisher, not the Fisher, and it '
            'vanishes where the network fits its data. Use "mc" or "exact" unless this is what you want.'
        )
    with torch.inference_mode(False):  # the evidence must be differentiable through the blocks
        accumulation = Accumulation(estimator, search.layers, ema_decay)
        passed = accumulate(
            model,
            data,
            likelihood,
            accumulation,
            draws,
            progress=progress,
            description=f"Fisher ({estimator.name})",
            unsupported=unsupported,
            choose=choose,
            watch=watch,
        )
        layers_used = accumulation.layers
        blocks = accumulation.finish()
    search = LayerSearch(layers_used, search.without(passed.left_out).left_out)
    metadata = FisherMetadata(
        likelihood=passed.likelihood,
        estimator=estimator.name,
        sampling=passed.sampling.kind,
        mc_samples=passed.sampling.mc_samples,
        seed=draws.seed,
        parameters={layer.name: layer.parameter_names for layer in search.layers},
        weights=fingerprint(model),
        coverage=_coverage(model, search, blocks, {name: e.name for name, e in accumulation.estimators.items()}),
        settings=estimator_to_json(estimator),
        input_axis=passed.layout.input_axis,
        shared_inputs=passed.layout.shared_inputs,
        ema_decay=ema_decay,
        last_layer=passed.last_layer,
        rules=rules_of(search.layers),
    )
    return KroneckerFisher(blocks, passed.n_examples, metadata, passed.statistics)


def check_belongs(fisher: KroneckerFisher, layers: Sequence[Layer], model: nn.Module, what: str, made: str) -> None:
    """Check that a Fisher belongs to these layers of this network and, if it has metadata, to its current weights.

    Args:
        fisher: The Fisher.
        layers: The layers for which it should have blocks.
        model: The network.
        what: Subject of the error message, such as "the fisher".
        made: How it was obtained, "estimated" or "fitted".

    Raises:
        ValueError: Naming the first difference.
    """
    names = [layer.name for layer in layers]
    if list(fisher) != names:
        raise ValueError(f"{what} has blocks for {list(fisher)}, but the model's layers are {names}.")
    for layer in layers:
        parameters = fisher.metadata.parameters[layer.name] if fisher.has_metadata else layer.parameter_names
        if parameters != layer.parameter_names or fisher[layer.name].shape != layer.shape:
            raise ValueError(
                f"{what} belongs to a different network: its block for layer {layer.name!r} holds {parameters} as a "
                f"{fisher[layer.name].shape} matrix, whereas the model has {layer.parameter_names} as {layer.shape}."
            )
    if not fisher.has_metadata:
        return
    changed = difference(fisher.metadata.weights, fingerprint(model))
    if changed is not None:
        raise ValueError(
            f"{what} was {made} at different weights: {changed!r} differs. Load the weights that it belongs to first "
            f"(model.load_state_dict(...)), in the dtype in which it was {made}, or refit."
        )


def with_metadata(
    fisher: KroneckerFisher, model: nn.Module, likelihood: Likelihood, estimator: Estimator
) -> KroneckerFisher:
    """Describe a Fisher that was made of blocks alone, which is taken to be of this network at its present weights.

    Args:
        fisher: The Fisher.
        model: The network.
        likelihood: The likelihood that the blocks were made with.
        estimator: The estimator that made them.

    Returns:
        The Fisher with metadata; blocks are shared.

    Raises:
        ValueError: If the blocks are not for layers of the network, or have other shapes.
    """
    search = search_layers(model, list(fisher))
    check_belongs(fisher, search.layers, model, "the fisher", "estimated")
    names = {layer.name: (estimator if layer.has_kronecker_factors else Diagonal()).name for layer in search.layers}
    metadata = FisherMetadata(
        likelihood=likelihood,
        estimator=estimator.name,
        sampling=Sampling.EXACT,
        mc_samples=1,
        seed=0,
        parameters={layer.name: layer.parameter_names for layer in search.layers},
        weights=fingerprint(model),
        coverage=_coverage(model, search, dict(fisher), names),
        settings=estimator_to_json(estimator),
        rules=rules_of(search.layers),
    )
    return KroneckerFisher(dict(fisher), fisher.n_examples, metadata, fisher.statistics)


def _coverage(model: nn.Module, search: LayerSearch, blocks: dict[str, Block], estimators: dict[str, str]) -> Coverage:
    total = sum(p.numel() for p in model.parameters())
    rows = []
    for layer in search.layers:
        count = layer.n_parameters
        notes = []
        if layer.merged_parameters:
            notes.append(f"{', '.join(layer.merged_parameters)} acts only through its sum with the bias")
        if isinstance(layer, PerExampleLayer):
            notes.append(layer.note)
        if layer.tied_modules:
            notes.append(f"shared by {len(layer.modules)} modules")
        rows.append(
            CoverageRow(
                layer.name,
                type(layer.module).__name__,
                blocks[layer.name].kind,
                estimators[layer.name],
                layer.shape,
                count,
                count / total,
                "; ".join(notes),
            )
        )
    rows += [
        CoverageRow(left.name, left.module, "none", "", None, left.parameters, left.parameters / total, left.reason)
        for left in search.left_out
    ]
    return Coverage(rows)
