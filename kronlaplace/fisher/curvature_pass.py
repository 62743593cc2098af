"""Passes of a network over a whole data set, in which its outputs are accumulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kronlaplace._arguments import warn
from kronlaplace._precision import in_full_precision
from kronlaplace.data.deferred_checks import Batch, DeferredChecks, all_finite
from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.inputs import Inputs, tensors_of
from kronlaplace.data.loader import Rewind, iterate
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.one_batch import accumulate_batch, squared_layer
from kronlaplace.layers import (
    Layer,
    NetworkLayer,
    Unsupported,
    UnusableLayersError,
)
from kronlaplace.layers.unusable import NO_EFFECT
from kronlaplace.likelihoods import Likelihood, Sampling
from kronlaplace.likelihoods.sampling import AutomaticSampling, DirectionSampling
from kronlaplace.network.alignment import Alignment
from kronlaplace.network.example_axes import Layout
from kronlaplace.network.forward import NetworkForward
from kronlaplace.network.forward_errors import explained_errors
from kronlaplace.network.layer_checks import check_layers
from kronlaplace.network.output_activation import check_outputs_are_logits

__all__ = ["CurvaturePass", "Watch", "accumulate", "check_batch"]

Watch: TypeAlias = Callable[[Batch, Layout], None]
"""What a caller does with every batch of the first pass: it is told the batch and where its examples are."""


class CurvaturePass:
    """Passes of a network over batches that arrive one at a time, which are checked and accumulated.

    Use it as a context manager, in a ``with`` block.

    Args:
        model: The network.
        likelihood: The likelihood.
        accumulation: Accumulation of inputs and gradients. With ``unsupported="fixed"``, layers that turn out to be
            unusable are removed from it; with ``"diagonal"``, the first batch shows which of them are replaced by a
            `NetworkLayer`.
        sampling: How directions are chosen.
        unsupported: How to treat layers that cannot have a block in the network as it runs.
        choose: Function that chooses the layers from the first batch's inputs, if the accumulation has none yet.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        accumulation: Accumulation,
        sampling: DirectionSampling,
        *,
        unsupported: Unsupported = Unsupported.ERROR,
        choose: Callable[[Inputs], Sequence[Layer]] | None = None,
    ) -> None:
        self.likelihood = likelihood
        """The likelihood, with its class axis inferred from the first batch."""
        self.n_examples = 0
        """Number of examples seen in the first pass."""
        self.statistics: Tensor | None = None
        """Sufficient statistics of the log-likelihood of these examples, or None without targets."""
        self.left_out: dict[str, str] = {}
        """Layers that were left out during the passes, with the reasons."""
        self.last_layer: str | None = None
        """The layer whose output is the network's output, if it is one of the observed layers."""
        self._model = model
        self._accumulation = accumulation
        self.sampling = sampling
        """How directions are chosen; after the first batch never an `AutomaticSampling`."""
        self._unsupported = unsupported
        self._choose = choose
        self._forward = NetworkForward(model, accumulation.layers, checking=True)
        self._checks = DeferredChecks()
        self._pass = 1
        self._first_outputs: Tensor | None = None
        self._unchecked = self._rows_unchecked = True

    def __enter__(self) -> CurvaturePass:
        return self

    def __exit__(self, *error: object) -> None:
        self._forward.__exit__()

    @property
    def layout(self) -> Layout:
        """Position of the examples in the inputs and calls."""
        return self._forward.layout

    def next_pass(self) -> None:
        """Begin the next pass over the same data."""
        self._accumulation.next_pass()
        self._pass += 1

    def settle(self) -> None:
        """Raise the error of the first failed check on the values of the data, if any; waits for the device."""
        self._checks.settle()

    @in_full_precision
    def add(self, batch: Batch) -> None:
        """Run the network on a batch and accumulate it.

        Raises:
            TypeError, ValueError, NotImplementedError: As `estimate_fisher`.
        """
        for t in tensors_of(batch.inputs):
            if t.is_floating_point():
                self._checks.require(all_finite(t), batch, "the inputs contain NaN or infinite values.")
        if self._choose is not None:
            with explained_errors(self._model, batch.inputs.value, batch.index):
                self._accumulation.start(self._choose(batch.inputs))
            self._choose = None
            self._forward.observe(self._accumulation.layers)
        sampling = self.sampling.of_batch(batch)
        outputs = self._outputs(batch)
        detached = outputs.detach()
        if isinstance(sampling, AutomaticSampling):
            sampling = self.sampling = self._settled(outputs, batch.targets)
        if batch.index == 0 and self._accumulation.passes > 1 and self.sampling.kind is Sampling.MC:
            self._first_outputs = detached if self._first_outputs is None else self._first_outputs
            self._checks.require(_same(self._first_outputs, detached), batch, _OTHER_ORDER)
        if self._pass == 1:
            self._note(batch, outputs)
        try:
            accumulate_batch(
                self._forward.observer,
                outputs,
                self.likelihood,
                sampling,
                self._accumulation,
                targets=batch.targets,
                index=batch.index,
            )
        except UnusableLayersError as error:
            self._replace_or_leave_out(error)

    def _settled(self, outputs: Tensor, targets: Tensor | None) -> DirectionSampling:
        """Return the rule for these outputs where none was given, and say so where it does not take all directions."""
        detached = outputs.detach()
        rule = self.sampling.settled(self.likelihood, detached, targets)
        if rule.kind is Sampling.EXACT:
            return rule
        squared = squared_layer(self._forward.observer, outputs, self._accumulation)
        if squared is not None and len(self._forward.layers) == 1:
            return DirectionSampling(Sampling.EXACT, 1, rule.seed)
        count = self.likelihood.n_directions(detached, Sampling.EXACT, 1, targets)
        exact = "" if squared is None else f" The last layer, {squared.name!r}, needs none: its own curvature is exact."
        warn(
            f"each example's outputs have {count:,} directions, and each would take a backward pass. Drawn labels take "
            f'their place, {rule.mc_samples} for each example.{exact} Give sampling="mc" (with mc_samples) to choose this '
            'yourself, or sampling="exact" for all directions.'
        )
        return rule

    def _outputs(self, batch: Batch) -> Tensor:
        """Return the outputs of a batch, from a forward pass in which all remaining layers are usable."""
        several = batch.inputs.count(self.layout.input_axis) > 1
        inputs_unchecked = self._rows_unchecked and several
        while True:
            try:
                with explained_errors(self._model, batch.inputs.value, batch.index):
                    outputs = self._forward(batch.inputs)
                check_batch(self.likelihood, outputs.detach(), batch, self._checks, self.sampling.kind)
                if inputs_unchecked and self._forward.runs_one_by_one:  # which inputs must not be cut
                    self._forward.find_shared_inputs(batch.inputs, outputs.detach())
                    inputs_unchecked = False
                if self._unchecked or (self._rows_unchecked and several):
                    check_layers(self._forward, outputs, self.sampling.generator(0, outputs.device))
                break
            except UnusableLayersError as error:
                self._replace_or_leave_out(error)
        if inputs_unchecked:
            self._forward.find_shared_inputs(batch.inputs, outputs.detach())
        self._unchecked, self._rows_unchecked = False, self._rows_unchecked and not several
        if not self._rows_unchecked:
            self._forward.checked()
        return outputs

    def _note(self, batch: Batch, outputs: Tensor) -> None:
        """Record the number of examples, the statistics and what else a batch reveals about the data."""
        detached = outputs.detach()
        if self.n_examples == 0:
            check_outputs_are_logits(self._model, batch.inputs, outputs, self.likelihood)
            last = self._forward.observer.last_layer(outputs)
            self.last_layer = None if last is None else last.name
            self.likelihood = self.likelihood.informed_by(detached, batch.targets)
        elif (batch.targets is None) != (self.statistics is None):
            raise ValueError(f"batch {batch.index}: either every batch must have targets or none.")
        if batch.targets is not None:
            new = self.likelihood.statistics(detached, batch.targets)
            self.statistics = new if self.statistics is None else self.statistics + new
        self.n_examples += len(outputs)

    def _replace_or_leave_out(self, error: UnusableLayersError) -> None:
        if self._unsupported is Unsupported.FIXED:
            self._leave_out(error.reasons)
            return
        named = [layer for layer in self._accumulation.layers if layer.name in error.reasons]
        if (
            self._unsupported is Unsupported.ERROR
            or self._accumulation.weight
            or any(isinstance(layer, NetworkLayer) for layer in named)
        ):
            raise error
        layers = [
            NetworkLayer.like(layer, error.reasons[layer.name]) if layer in named else layer
            for layer in self._accumulation.layers
        ]
        self._accumulation.start(layers)
        self._forward.observe(layers)

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        self.left_out.update(reasons)
        if all(layer.name in self.left_out for layer in self._forward.layers):
            lines = "\n".join(f"  {name}: {reason}" for name, reason in self.left_out.items())
            raise NotImplementedError(f"no layer can have a block:\n{lines}")
        self._accumulation.leave_out(reasons)
        self._forward.leave_out(reasons)

    def leave_out_unreached(self) -> None:
        """Leave out, at the end, each `NetworkLayer` on which no output has depended."""
        without = [layer.name for layer in self._accumulation.layers if isinstance(layer, NetworkLayer)]
        reasons = {name: NO_EFFECT for name in without if name not in self._accumulation.reached}
        if reasons and self._unsupported is Unsupported.DIAGONAL:
            self._leave_out(reasons)


def accumulate(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood,
    accumulation: Accumulation,
    sampling: DirectionSampling,
    *,
    progress: bool,
    description: str,
    unsupported: Unsupported = Unsupported.ERROR,
    choose: Callable[[Inputs], Sequence[Layer]] | None = None,
    watch: Watch | None = None,
) -> CurvaturePass:
    """Run the passes over the data that an accumulation's estimator needs.

    Args:
        model: The network.
        data: Batches, as in `estimate_fisher`.
        likelihood: The likelihood.
        accumulation: Accumulation of inputs and gradients.
        sampling: How directions are chosen.
        progress: Whether to show a progress bar.
        description: Label of the progress bar.
        unsupported: How to treat layers that cannot have a block in the network as it runs.
        choose: Function that chooses the layers from the first batch's inputs, as in `CurvaturePass`.
        watch: Called after every batch of the first pass.

    Returns:
        The finished passes, with their results as attributes.

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
    alignment = Alignment(model, likelihood)
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state(device))
        rewind = stack.enter_context(Rewind(data))
        result = stack.enter_context(
            CurvaturePass(model, likelihood, accumulation, sampling, unsupported=unsupported, choose=choose)
        )
        for i in range(passes):
            if i:
                result.next_pass()
                rewind.restore()
            which = f", pass {i + 1} of {passes}" if passes > 1 else ""
            for batch in iterate(data, device, alignment=alignment, progress=progress, description=description + which):
                result.add(batch)
                if watch is not None and i == 0:
                    watch(batch, result.layout)
        result.leave_out_unreached()
    result.settle()
    return result


_OTHER_ORDER = (
    "the data came in a different order than in the first pass. Labels are drawn batch by batch, so every pass must see "
    'the same batches: use a loader that does not shuffle, or sampling="exact".'
)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Return whether two batches of outputs are equal up to rounding, as a boolean 0-dim tensor."""
    if a.shape != b.shape:
        return torch.zeros((), dtype=torch.bool, device=a.device)
    return torch.linalg.vector_norm(a - b) <= 1e-2 * torch.linalg.vector_norm(a)


def check_batch(
    likelihood: Likelihood, outputs: Tensor, batch: Batch, checks: DeferredChecks, sampling: Sampling
) -> None:
    """Check one batch's outputs and targets.

    Raises:
        ValueError: If they do not fit the likelihood, naming the batch.
    """
    message = "the network's outputs are NaN or infinite on finite inputs; did the training diverge?"
    checks.require(all_finite(outputs), batch, message)
    if batch.targets is None and sampling is Sampling.EMPIRICAL:
        raise ValueError(f'batch {batch.index}: sampling="empirical" needs (inputs, targets) batches.')
    try:
        likelihood.check_outputs(outputs)
        allowed, complaint = (None, "") if batch.targets is None else likelihood.check_targets(outputs, batch.targets)
    except ValueError as error:
        raise ValueError(f"batch {batch.index}: {error}") from None
    if allowed is not None:
        checks.require(allowed, batch, complaint)
