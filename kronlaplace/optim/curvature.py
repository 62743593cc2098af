"""A Fisher that follows the training: moving averages of a network's blocks, from the user's own forward passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace._precision import in_full_precision
from kronlaplace.blocks import Block
from kronlaplace.blocks.least_trace import with_least_trace
from kronlaplace.data.inputs import Inputs
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.one_batch import accumulate_batch
from kronlaplace.likelihoods import Likelihood
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.forward import find_layout
from kronlaplace.network.hooks import Hook
from kronlaplace.network.layer_checks import check_observed
from kronlaplace.network.observer import NetworkObserver
from kronlaplace.network.output_activation import unwanted_activation
from kronlaplace.network.preconditions import couples_examples
from kronlaplace.optim.checks import PassMark, finite_norms
from kronlaplace.optim.part import Part

__all__ = ["TrainingCurvature"]

_WHOLE = Part(1.0)

_NO_PASS = (
    "no forward pass of the model was observed: call the model itself, with gradients enabled, once before every call of "
    "update_curvature. A model that was compiled and called before the optimizer was made runs without its hooks: call "
    "torch.compiler.reset() once."
)


class TrainingCurvature:
    """Moving averages of the blocks of a network in training.

    Each update weighs the examples before it by a factor, at most 1, with which the total weight stays at most
    ``B / (1 − ξ)`` for batches of ``B`` examples. Without a start, the average after ``k`` updates is therefore
    ``ε_k Ω + (1 − ε_k) Ω_k`` with ``ε_k = min(1 − 1/k, ξ)`` (K-FAC section 5); after `start_from` it is
    ``ξ Ω + (1 − ξ) Ω_k`` from the first update on (KFC Eq. 33).

    Args:
        model: The network, which the user runs in training mode.
        likelihood: The likelihood.
        accumulation: Accumulation for the layers, empty.
        sampling: How directions are chosen; every update has its own draws.
        decay: The decay ``ξ``, from 0 to 1.
        part: The examples of each batch that count.
        examine: Function that checks the network in the first pass, given the observer, the accumulation and the number of
            examples.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        accumulation: Accumulation,
        sampling: DirectionSampling,
        *,
        decay: float,
        part: Part = _WHOLE,
        examine: Callable[[NetworkObserver, Accumulation, int], None] | None = None,
    ) -> None:
        self.likelihood = likelihood
        """The likelihood."""
        self.updates = 0
        """Number of passes that have been accumulated, which numbers the draws."""
        self.accumulation = accumulation
        """The accumulation."""
        self.model = model
        """The network."""
        self._sampling = sampling
        self._decay = decay
        self._part = part
        self._examine = examine
        self._checked = False
        self._of_step = 0  # examples of the step so far, with gradient accumulation
        self._of_last_step = 0
        self.observer = NetworkObserver(model, accumulation.layers)
        """The observer of the user's forward passes."""
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        """The arguments of the last forward pass with gradients, whether or not it was observed."""
        self.mark: PassMark | None = None
        """What identifies the outputs of that pass, or None before its end."""
        self._layout_known = False
        self._end_hook = model.register_forward_hook(Hook(self, "_end"))
        self._hook = model.register_forward_pre_hook(Hook(self, "_begin"), with_kwargs=True, prepend=True)

    def close(self) -> None:
        """Remove all hooks from the network."""
        self._hook.remove()
        self._end_hook.remove()
        self.forget()
        self.observer.close()

    def forget(self) -> None:
        """Forget the last pass."""
        self.arguments = self.mark = None
        self.observer.clear()

    def check_pass(self, outputs: Tensor) -> None:
        """Check that outputs carry a graph and are those of the last forward pass.

        Raises:
            RuntimeError: If they are not.
        """
        if not outputs.requires_grad:
            raise RuntimeError(
                "the outputs carry no graph: call update_curvature(outputs) with the outputs of the forward pass that is "
                "differentiated, with gradients enabled and before backward()."
            )
        if self.arguments is None or self.mark is None:
            raise RuntimeError(_NO_PASS)
        if not self.mark.made(outputs):
            raise RuntimeError(
                "the outputs are not those of the last forward pass of the model, but of an earlier one or of another "
                "model. Call update_curvature(outputs) right after outputs = model(inputs)."
            )

    def input_norms(self, n_examples: int) -> dict[str, Tensor]:
        """Return whether the inputs of each layer in the last observed pass can be squared and summed, by layer name.

        Args:
            n_examples: Number of examples in the pass; of inputs that have them first, only those that count are looked at.
        """
        found, counted = {}, self._part.count(n_examples)
        for name, calls in self.observer.inputs.items():
            inputs = [call.x for call in calls if call.x.is_floating_point()]
            if values := [x[:counted] if x.ndim and len(x) == n_examples else x for x in inputs]:
                found[name] = finite_norms(values).all()
        return found

    def start_from(self, blocks: Mapping[str, Block], batch_size: int) -> None:
        """Start from given blocks, such as the Fisher of a subset of the data, with batches of ``batch_size`` to follow.

        Raises:
            ValueError, TypeError, NotImplementedError: As `Accumulation.start_from`.
        """
        weight = batch_size / (1 - self._decay)
        self.accumulation.start_from(blocks, weight)
        self._of_last_step = batch_size

    @in_full_precision
    def update(self, outputs: Tensor) -> None:
        """Accumulate the last observed pass; several passes before the next `end_step` count as one batch.

        Raises:
            RuntimeError: If no pass was observed, or the outputs carry no graph.
            ValueError: If the outputs do not fit the likelihood, such as probabilities in place of logits.
            UnusableLayersError: If a layer cannot have a block in the network as it runs.
        """
        n = len(outputs)
        if not self._checked:
            self.observer.layer_batches(n)
            self.likelihood.check_outputs(outputs.detach())
            if (activation := unwanted_activation(outputs, self.likelihood)) is not None:
                raise ValueError(
                    f"update_curvature got the outputs of a {activation}, and {self.likelihood} takes logits: it computes "
                    f"the probabilities itself. Give it the input of the {activation}, and compute the loss from that, too."
                )
            generator = self._sampling.generator(0, outputs.device)
            check_observed(self.observer, outputs, generator, examples_independent=not couples_examples(self.model))
            if self._examine is not None:
                self._examine(self.observer, self.accumulation, n)
            self._checked = True
        counted = self._part.count(n)
        if not self._of_step and self.accumulation.weight > 0:
            self._make_room(self._of_last_step if self._accumulates else counted)
        accumulate_batch(
            self.observer,
            outputs,
            self.likelihood,
            self._sampling,
            self.accumulation,
            index=self.updates,
            retain_graph=True,
            n_examples=counted,
            moment_examples=self._part.moment_examples,
        )
        self.updates += 1
        self._passes += 1
        self._of_step += counted

    _passes = 0
    _accumulates = False

    def end_step(self) -> None:
        """Let the next `update` begin a new batch."""
        if self._of_step:
            self._of_last_step, self._accumulates = self._of_step, self._passes > 1
            self.accumulation.end_step()
        self._of_step = self._passes = 0

    def blocks(self) -> dict[str, Block]:
        """Return the blocks as they are now."""
        self.accumulation.refresh()
        return with_least_trace(self.accumulation.so_far())

    def _make_room(self, batch_size: int) -> None:
        """Reduce the weight of everything seen so far, so that the batch fits under the largest total weight."""
        if self._decay == 1:
            return
        largest = batch_size / (1 - self._decay)
        factor = (largest - batch_size) / self.accumulation.weight
        if factor < 1:
            self.accumulation.decay(factor)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the arguments of a pass with gradients; before the first one, find out where the examples are."""
        if not torch.is_grad_enabled():
            return
        self.arguments, self.mark = (args, kwargs), None
        if self._layout_known:
            return
        self._layout_known = True
        value: Any = args
        if kwargs:
            value = (
                dict(inspect.signature(self.model.forward).bind(*args, **kwargs).arguments) if args else dict(kwargs)
            )
        self.observer.layout = find_layout(self.model, Inputs(value).value, self.observer.layers)

    def _end(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        """Note the outputs of a pass with gradients."""
        if torch.is_grad_enabled():
            self.mark = PassMark(outputs)

    def state_dict(self) -> dict[str, Any]:
        """Return all that determines the future updates, as plain containers and tensors."""
        return {
            "accumulation": self.accumulation.state_dict(),
            "updates": self.updates,
            "of_last_step": self._of_last_step,
            "accumulates": self._accumulates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If it belongs to other layers or another estimator.
        """
        self.accumulation.load_state_dict(state["accumulation"])
        self.updates = state["updates"]
        self._of_last_step, self._accumulates = state["of_last_step"], state["accumulates"]
        self._of_step = self._passes = 0
