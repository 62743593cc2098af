"""`estimate_fisher`: one pass over the data, from a trained network to its Kronecker-factored Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kronlaplace.accumulation import Accumulation
from kronlaplace.alignment import Alignment
from kronlaplace.batches import (
    Batch,
    DeferredChecks,
    Inputs,
    Rewind,
    all_finite,
    device_of,
    iterate,
    preserved_random_state,
    tensors_of,
    warn_of_share,
)
from kronlaplace.blocks import Block
from kronlaplace.collect import check_model, recording
from kronlaplace.coverage import Coverage, CoverageRow
from kronlaplace.estimators import Estimator, estimator_to_metadata, resolve_estimator
from kronlaplace.example_axes import Layout
from kronlaplace.fingerprint import difference, fingerprint
from kronlaplace.forward_errors import explained_errors
from kronlaplace.kronecker import FisherMetadata, KroneckerFisher
from kronlaplace.last_layer import LAST, check_last, find_last_layer
from kronlaplace.layer_checks import check_layers
from kronlaplace.layers import Layer, LayerSearch, Unsupported, UnusableLayersError, search_layers
from kronlaplace.likelihoods import Likelihood, Sampling, resolve_likelihood
from kronlaplace.options import choice, positive_integer, seed_number, warn
from kronlaplace.output_activation import check_outputs_are_logits
from kronlaplace.precision import in_full_precision

__all__ = ["accumulate", "check_batch", "check_belongs", "estimate_fisher"]


@in_full_precision
def estimate_fisher(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood | str,
    estimator: Estimator | str = "kfac",
    *,
    sampling: Sampling | str = Sampling.MC,
    mc_samples: int = 1,
    layers: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    unsupported: Unsupported | str = Unsupported.ERROR,
    ema_decay: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> KroneckerFisher:
    """Estimate the Fisher of a trained network as one block per layer.

    The Fisher is the mean over examples of the per-example Fisher, ``F = 1/N Σ_n Σ_v vec(X_vn) vec(X_vn)ᵀ``, where
    ``X_vn`` is the gradient of example ``n``'s own negative log-likelihood along direction ``v``. Neither batch size nor
    order of the data changes the result (but for rounding, and for which labels are drawn in ``"mc"``).

    Args:
        model: The network, in the mode in which it predicts (``model.eval()``). It is left as found: parameters,
            gradients, flags, hooks, mode.
        data: Batches ``(inputs, targets)``, such as a DataLoader, with inputs that are a tensor, or a tuple (given as
            ``model(*inputs)``) or a dict of tensors; see `kronlaplace.batches.iterate`. Targets are needed for
            ``sampling="empirical"`` and for the evidence of a Laplace posterior. They are moved to the model's device.
            Estimators that make several passes (`KFOC`, `EKFAC`) need data that can be read again. Where several processes
            work together each needs all of the data: nothing is exchanged between them.
        likelihood: `Categorical`, `Bernoulli`, `Gaussian`, `HeteroscedasticGaussian`, `Euclidean`, or a shorthand:
            ``"classification"``, ``"binary"``, ``"regression"``, ``"heteroscedastic"``, ``"euclidean"``.
        estimator: How blocks are made: `KFAC`, `SUA`, `TKFAC`, `KFOC`, `EKFAC`, `Diagonal`, `ExactBlock`, or a shorthand:
            ``"kfac"``, ``"sua"``, ``"tkfac"``, ``"kfoc"``, ``"ekfac"``, ``"diagonal"``, ``"exact"``. Scale and shift of
            normalisation layers and embeddings get a diagonal block from all but the last.
        sampling: ``"exact"`` (Fisher type 2, the generalized Gauss-Newton matrix; about one backward pass per output),
            ``"mc"`` (labels drawn from the model's predictive distribution; one backward pass per sample) or
            ``"empirical"`` (the data's labels; one backward pass, and not the Fisher).
        mc_samples: Label draws per example in ``"mc"``.
        layers: Which modules get a block: their names, or patterns that match these as in `fnmatch`, such as
            ``"encoder.*.query"`` (``*`` is for dots, too); a string or several. ``"last"`` is the linear layer or
            convolution whose output is the network's, perhaps in another shape or behind a log-softmax; the first batch
            shows which. None means all with trainable parameters.
        exclude: Names or patterns of modules that get none.
        unsupported: ``"error"``, or ``"fixed"``: trainable parameters that cannot have a block stay at their trained
            values, and `KroneckerFisher.coverage` lists them with the reasons. That is also for what only the data show:
            modules that are not called, do not matter to the outputs, or whose parameters a function uses, too.
        ema_decay: None for the mean over all examples; from 0 to 1 for a moving average, in which everything seen before a
            batch counts ``ema_decay`` times as much.
        seed: Seed of the draws. Batch ``i`` draws from a generator made from ``(seed, i)``, whatever the global state.
        progress: Whether to show a progress bar (only where the output is a terminal).

    Returns:
        The Fisher; ``fisher[layer_name]`` is a layer's block.

    Raises:
        ValueError: For empty data, NaN or infinite inputs, parameters or outputs, targets that do not fit, unknown
            names, batch norm or dropout in training mode, outputs of a softmax or sigmoid where the likelihood takes
            logits (a log-softmax is accepted with `Categorical`: it changes neither probabilities nor curvature).
        TypeError: For data, batches or options of the wrong type.
        NotImplementedError: For layers or outputs that are not supported, with the ways out.

    Warns:
        UserWarning: For ``sampling="empirical"``; for a loader that gives one process of several its share of the data.
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
    if ema_decay is not None and not (isinstance(ema_decay, (int, float)) and 0 <= ema_decay <= 1):
        raise ValueError(f"ema_decay must be a number from 0 to 1, or None for a plain mean; got {ema_decay!r}.")
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
    if sampling is Sampling.EMPIRICAL:
        warn(
            'sampling="empirical" uses the data\'s labels: that is the empirical Fisher, not the Fisher, and it vanishes '
            'where the network fits its data. Use "mc" or "exact" unless you mean it.'
        )
    with torch.inference_mode(False):  # blocks that the evidence can be differentiated through, wherever the caller is
        accumulation = Accumulation(estimator, search.layers, ema_decay)
        passed = accumulate(
            model,
            data,
            likelihood,
            accumulation,
            sampling=sampling,
            mc_samples=mc_samples,
            seed=seed,
            progress=progress,
            description=f"Fisher ({estimator.name})",
            unsupported=unsupported,
            choose=choose,
        )
        blocks = accumulation.finish()
    search = search.without(passed.left_out)
    metadata = FisherMetadata(
        likelihood=passed.likelihood,
        estimator=estimator.name,
        sampling=sampling,
        mc_samples=mc_samples,
        seed=seed,
        parameters={layer.name: layer.parameter_names for layer in search.layers},
        weights=fingerprint(model),
        coverage=_coverage(model, search, blocks, {name: e.name for name, e in accumulation.estimators.items()}),
        settings=estimator_to_metadata(estimator),
        input_axis=passed.layout.input_axis,
        shared_inputs=passed.layout.shared_inputs,
        ema_decay=ema_decay,
        layer_types={layer.name: type(layer).__name__ for layer in search.layers},
        last_layer=passed.last_layer,
    )
    return KroneckerFisher(blocks, passed.n_examples, metadata, passed.statistics)


@dataclass(frozen=True)
class PassResult:
    """What the passes over the data have found out, beside what was accumulated.

    Attributes:
        likelihood: The likelihood with what the first batch taught (`Likelihood.informed_by`).
        n_examples: Number of examples.
        statistics: Sufficient statistics of their log-likelihood, None without targets.
        layout: Where the examples are in the inputs.
        left_out: Layers that were left out on the way, with the reasons.
        last_layer: The layer whose output is the network's, if it is one of those observed.
    """

    likelihood: Likelihood
    n_examples: int
    statistics: Tensor | None
    layout: Layout
    left_out: dict[str, str]
    last_layer: str | None


@in_full_precision
def accumulate(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood,
    accumulation: Accumulation,
    *,
    sampling: Sampling,
    mc_samples: int,
    seed: int,
    progress: bool,
    description: str,
    unsupported: Unsupported = Unsupported.ERROR,
    check_network: bool = True,
    choose: Callable[[Inputs], Sequence[Layer]] | None = None,
) -> PassResult:
    """Show an accumulation the data, as often as its estimator needs.

    Args:
        model: The network.
        data: As in `estimate_fisher`, like the options that are not explained here.
        likelihood: The likelihood.
        accumulation: What takes inputs and gradients; with ``unsupported="fixed"`` it loses the layers that turn out not to
            be usable.
        sampling: How directions are chosen.
        mc_samples: Label draws per example.
        seed: Seed of the draws.
        progress: Whether to show a progress bar.
        description: What the bar says.
        unsupported: What happens to layers that cannot have a block in the network as it runs.
        check_network: Whether the first batch must show that the layers' calls are all there is to them, which takes two
            backward passes.
        choose: Tells the layers by the first batch's inputs, if the accumulation has none yet.

    Raises:
        TypeError, ValueError, NotImplementedError: As `estimate_fisher`.
    """
    passes = accumulation.passes
    if passes > 1 and isinstance(data, Iterator):
        raise TypeError(
            f"this estimator makes {passes} passes over the data, but an iterator can be read only once. Give a "
            "DataLoader or a list."
        )
    device = device_of(model)
    n_examples = 0
    statistics: Tensor | None = None
    checks = DeferredChecks()
    alignment = Alignment(model, likelihood)
    beginning: Tensor | None = None
    left_out: dict[str, str] = {}
    last_layer: Layer | None = None

    with (
        preserved_random_state(device),
        Rewind(data) as rewind,
        recording(model, accumulation.layers, accumulation.add_gradients) as recorder,
    ):

        def leave_out(error: UnusableLayersError) -> None:
            if unsupported is Unsupported.ERROR:
                raise error
            left_out.update(error.reasons)
            if all(layer.name in left_out for layer in recorder.layers):
                reasons = "\n".join(f"  {name}: {reason}" for name, reason in left_out.items())
                raise NotImplementedError(f"no layer can have a block:\n{reasons}") from error
            accumulation.leave_out(error.reasons)
            recorder.leave_out(error.reasons)

        def observed(batch: Batch, check: bool) -> Tensor:
            """The outputs of a batch, from a pass in which all layers that are left are usable."""
            while True:
                try:
                    with explained_errors(model, batch.inputs.value, batch.index):
                        outputs = recorder.forward(batch.inputs)
                    check_batch(likelihood, outputs.detach(), batch, checks, sampling)
                    if check:
                        check_layers(recorder, outputs, _generator(seed, 0, device))
                    return outputs
                except UnusableLayersError as error:
                    leave_out(error)

        unchecked, rows_unchecked = check_network, check_network
        for i in range(passes):
            if i:
                accumulation.next_pass()
                rewind.restore()
            which = f", pass {i + 1} of {passes}" if passes > 1 else ""
            for batch in iterate(data, device, alignment=alignment, progress=progress, description=description + which):
                for t in tensors_of(batch.inputs):
                    if t.is_floating_point():
                        checks.require(all_finite(t), batch, "the inputs contain NaN or infinite values.")
                if choose is not None and i == 0 and batch.index == 0:
                    with explained_errors(model, batch.inputs.value, batch.index):
                        accumulation.start(choose(batch.inputs))
                    recorder.observe(accumulation.layers)
                several = batch.inputs.count(recorder.layout.input_axis) > 1
                outputs = observed(batch, unchecked or (rows_unchecked and several))
                detached = outputs.detach()
                if rows_unchecked and several:
                    recorder.find_shared_inputs(batch.inputs, detached)
                unchecked, rows_unchecked = False, rows_unchecked and not several
                if batch.index == 0 and passes > 1 and sampling is Sampling.MC:
                    beginning = detached if beginning is None else beginning
                    checks.require(_same(beginning, detached), batch, _OTHER_ORDER)
                if i == 0:
                    if batch.index == 0:
                        check_outputs_are_logits(model, batch.inputs, outputs, likelihood)
                        last_layer = recorder.last_layer(outputs)
                        likelihood = likelihood.informed_by(detached, batch.targets)
                    elif (batch.targets is None) != (statistics is None):
                        raise ValueError(f"batch {batch.index}: targets must come with every batch or with none.")
                    if batch.targets is not None:
                        new = likelihood.statistics(detached, batch.targets)
                        statistics = new if statistics is None else statistics + new
                    n_examples += len(outputs)
                calls = recorder.calls
                accumulation.begin_batch(calls)
                n_directions = likelihood.n_directions(detached, sampling, mc_samples, batch.targets)
                directions = likelihood.directions(
                    detached,
                    sampling,
                    mc_samples=mc_samples,
                    targets=batch.targets,
                    generator=_generator(seed, batch.index, device),
                )
                unused: UnusableLayersError | None = None
                for v, direction in enumerate(directions, start=1):
                    try:
                        recorder.backward(outputs, direction, retain_graph=v < n_directions)
                    except UnusableLayersError as error:  # of layers that receive nothing; all others have
                        unused = error
                        if unsupported is Unsupported.ERROR:
                            raise
                if unused is not None:
                    leave_out(unused)
                accumulation.end_batch(calls, len(outputs))
                del outputs, calls
        layout = recorder.layout
    checks.settle()
    name = None if last_layer is None else last_layer.name
    return PassResult(likelihood, n_examples, statistics, layout, left_out, name)


_OTHER_ORDER = (
    "the data came in another order than in the first pass. Labels are drawn batch by batch, so that every pass must see "
    'the same batches: give a loader that does not shuffle, or use sampling="exact".'
)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Whether two batches of outputs are the same up to rounding, as a boolean 0-dim tensor."""
    if a.shape != b.shape:
        return torch.zeros((), dtype=torch.bool, device=a.device)
    return torch.linalg.vector_norm(a - b) <= 1e-2 * torch.linalg.vector_norm(a)


def check_batch(
    likelihood: Likelihood, outputs: Tensor, batch: Batch, checks: DeferredChecks, sampling: Sampling
) -> None:
    """Check one batch's outputs and targets."""
    message = "the network's outputs are NaN or infinite on finite inputs; did the training diverge?"
    checks.require(all_finite(outputs), batch, message)
    if batch.targets is None and sampling is Sampling.EMPIRICAL:
        raise ValueError(f'batch {batch.index}: sampling="empirical" needs (inputs, targets) batches.')
    try:
        likelihood.check_outputs(outputs)
        if batch.targets is not None:
            allowed, complaint = likelihood.check_targets(outputs, batch.targets)
            checks.require(allowed, batch, complaint)
    except ValueError as error:
        if str(error).startswith(f"batch {batch.index}:"):
            raise
        raise ValueError(f"batch {batch.index}: {error}") from None


def check_belongs(fisher: KroneckerFisher, layers: Sequence[Layer], model: nn.Module, what: str, made: str) -> None:
    """Check that a Fisher is of these layers of this network, at the network's present weights.

    Args:
        fisher: The Fisher.
        layers: The layers that it should have.
        model: The network.
        what: What the Fisher is of, to begin the error with.
        made: How it came about, "estimated" or "fitted".

    Raises:
        ValueError: Naming the first difference.
    """
    names = [layer.name for layer in layers]
    if list(fisher) != names:
        raise ValueError(f"{what} has blocks for {list(fisher)}, the model's layers are {names}.")
    for layer in layers:
        if fisher.metadata.parameters[layer.name] != layer.parameter_names or fisher[layer.name].shape != layer.shape:
            raise ValueError(
                f"{what} is of another network: layer {layer.name!r} has {fisher.metadata.parameters[layer.name]} as a "
                f"{fisher[layer.name].shape} matrix there, {layer.parameter_names} as {layer.shape} in the model."
            )
    changed = difference(fisher.metadata.weights, fingerprint(model))
    if changed is not None:
        raise ValueError(
            f"{what} was {made} at other weights: {changed!r} differs. Load the network that it belongs to first "
            f"(model.load_state_dict(...)), in the dtype that it was {made} in, or make it anew."
        )


def _coverage(model: nn.Module, search: LayerSearch, blocks: dict[str, Block], estimators: dict[str, str]) -> Coverage:
    total = sum(p.numel() for p in model.parameters())
    rows = []
    for layer in search.layers:
        count = layer.n_parameters
        notes = []
        if layer.redundant:
            notes.append(f"{', '.join(layer.redundant)} acts through its sum with the bias")
        if layer.also:
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


def _generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    """A generator of its own for each batch: the same draws whatever came before."""
    mixed = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator(device=device).manual_seed(mixed)
