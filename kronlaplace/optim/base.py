"""What natural-gradient optimizers have in common: they observe the user's passes, keep a Fisher, and solve with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace.blocks import Block
from kronlaplace.damping import Damping
from kronlaplace.data.device import device_of
from kronlaplace.estimators import Estimator, resolve_estimator
from kronlaplace.layers import Layer, UnusableLayersError
from kronlaplace.likelihoods import Likelihood, Sampling, resolve_likelihood
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.optim.background import Background
from kronlaplace.optim.batch_model import BatchModel
from kronlaplace.optim.checks import NO_CURVATURE, REMEDIES
from kronlaplace.optim.curvature import TrainingCurvature
from kronlaplace.optim.finite import FiniteChecks
from kronlaplace.optim.parameters import PlainSGD, divide
from kronlaplace.optim.part import Part
from kronlaplace.optim.passes import Passes
from kronlaplace.optim.penalty_in_loss import PenaltyInLoss
from kronlaplace.optim.period import Period, period_of
from kronlaplace.optim.preconditioner import Amount, Inverse, InverseInProgress, Renewal, on_device
from kronlaplace.optim.structure import Structure, structure_of
from kronlaplace.optim.vectors import Vector, dot, objective_gradient, solved
from kronlaplace.priors.penalty import QuadraticPenalty

__all__ = ["CurvatureOptimizer"]


class CurvatureOptimizer(torch.optim.Optimizer):
    """Base of the natural-gradient optimizers; for the arguments, see `NaturalGradient`."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        *,
        params: Any,
        defaults: dict[str, Any],
        layers: Sequence[str] | str | None,
        others: str | PlainSGD,
        estimator: Estimator | str,
        structure: Structure | str,
        sampling: Sampling | str,
        mc_samples: int,
        curvature_every: int | Period,
        invert_every: int | Period,
        ema_decay: float,
        curvature_part: Part,
        model_part: Part,
        invert_async: bool,
        prior: QuadraticPenalty | None,
        seed: int,
    ) -> None:
        self.likelihood = resolve_likelihood(likelihood)
        """The likelihood whose mean negative log-likelihood the loss is."""
        division = divide(model, params, layers, others)
        self.estimator = resolve_estimator(estimator).online()
        """The estimator of the blocks."""
        if (draws := DirectionSampling(sampling, mc_samples, seed)).kind is Sampling.EMPIRICAL:  # type: ignore[arg-type]
            raise ValueError('sampling must be "mc" or "exact": the labels of the Fisher come from the model.')
        self._structure = structure_of(structure)
        self._structure.check_prior(prior)
        self._curvature_every = period_of(curvature_every, "curvature_every")
        self._invert_every = period_of(invert_every, "invert_every")
        self._model_part = model_part
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and less than 1, got {ema_decay!r}.")
        self._layers: dict[str, Layer] = {}
        super().__init__(division.groups, defaults)
        self._layers = {layer.name: layer for layer in division.layers}
        self._names = {p: name for name, p in model.named_parameters()}
        device_of(model)
        self._curvature = TrainingCurvature(
            model,
            self.likelihood,
            self._structure.accumulation(self.estimator, list(self._layers.values())),
            draws,
            decay=ema_decay,
            part=curvature_part,
            examine=self._structure.examine,
        )
        self._model = model
        self._renewal = Renewal(Background(device_of(model)) if invert_async else None)
        self._steps = 0
        self._last_update: int | None = None
        self._last_inversion: int | None = None
        self._penalty = None if prior is None else PenaltyInLoss(prior, model, division.layers)
        self._passes = Passes(division.layers, self._penalty)
        self._checks = FiniteChecks()
        self._closing = weakref.finalize(self, _close, self._curvature, self._renewal, self._passes)

    def __enter__(self) -> CurvatureOptimizer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take all hooks off the network, after which the optimizer cannot be used; also done when it is deleted."""
        self._closing()

    # -- The curvature ---------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> dict[str, Block]:
        """The moving average of every layer's block, by layer name, as a mean over examples."""
        return self._curvature.blocks()

    def start_from(self, fisher: Mapping[str, Block], batch_size: int) -> None:
        """Start from the Fisher of the data, or of a subset of it, before the first step (KFC Algorithm 1).

        Args:
            fisher: A block for every layer, of the kind that the estimator makes, such as the result of `estimate_fisher`.
            batch_size: Number of examples of the batches to come, by which the average weighs the start.

        Raises:
            RuntimeError: If steps have been made.
            ValueError, TypeError, NotImplementedError: If blocks are missing, of another kind, or do not determine the sums.
        """
        if self._steps or self._curvature.updates:
            raise RuntimeError("start_from must come before the first pass; make a new optimizer.")
        self._curvature.start_from(fisher, batch_size)

    def update_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """Add the forward pass to the moving averages, if it is due in this step; call it before the loss is differentiated.

        Several passes before one `step` (gradient accumulation) count as one batch.

        Args:
            outputs: The outputs of the forward pass, with their graph, which is kept; the first axis counts examples.
            targets: The targets, which only serve to check that the loss is the mean negative log-likelihood, and by which
                factor it differs from that. In classification, the gradient of the loss usually shows this by itself.

        Raises:
            RuntimeError: If the outputs are not those of the last forward pass of the model, or carry no graph.
            ValueError: If outputs or targets do not fit the likelihood, or outputs or the layers' inputs are not finite.
            UnusableLayersError: If a layer cannot have a block in the network as it runs; the message names it.
        """
        self._check_pass(outputs)
        if targets is not None:
            self._checks.require(*self.likelihood.check_targets(outputs.detach(), targets))
        if self._updates_curvature:
            try:
                self._curvature.update(outputs)
            except UnusableLayersError as error:
                raise UnusableLayersError(error.message, error.reasons, REMEDIES) from None
            except RuntimeError as error:
                if "backward through the graph a second time" not in str(error):
                    raise
                raise RuntimeError(
                    "the loss has already been propagated back, which frees the graph: call update_curvature(outputs) "
                    "before loss.backward()."
                ) from error
        arguments = self._curvature.arguments
        assert arguments is not None
        batch = None
        if self._needs_batch() or self._steps == 0:
            fraction = self._model_part.count(len(outputs)) / len(outputs)
            scale = self._passes.scale
            batch = BatchModel(self._model, self.likelihood, arguments, outputs, fraction, scale, targets=targets)
        self._passes.add(outputs, batch)
        self._curvature.forget()

    def _check_pass(self, outputs: Tensor) -> None:
        """Check that outputs are finite ones of the last forward pass, before anything depends on them.

        Raises:
            RuntimeError, ValueError: If they are not.
        """
        if not self._closing.alive:
            raise RuntimeError("the optimizer was closed, and its hooks are off the model. Make a new one.")
        self._curvature.check_pass(outputs)
        inputs = self._curvature.input_norms(len(outputs)) if self._updates_curvature else {}
        self._checks.check_pass(self._steps, outputs, inputs, self._advice())

    @property
    def _updates_curvature(self) -> bool:
        """Whether the curvature is updated in this step."""
        return self._curvature.observer.enabled

    def _needs_batch(self) -> bool:
        """Return whether the next step computes exact products on the batch."""
        raise NotImplementedError

    def _damping(self) -> Damping:
        """Return the damping of the next inverse."""
        raise NotImplementedError

    def _renew(self) -> None:
        """Compute a new inverse if it is due, and take over one that is ready."""
        self._renewal.swap()
        if self._updates_curvature:
            self._last_update = self._steps
        if self._curvature.updates == 0 and self._curvature.accumulation.weight == 0:
            raise RuntimeError(NO_CURVATURE)
        due = self._invert_every.is_due(self._steps, self._last_inversion) or self._renewal.inverse is None
        due = due or (self._penalty is not None and self._penalty.has_changed)
        if due and not self._renewal.busy:
            self._renewal.begin(self._inversion(self._damping()))
            self._last_inversion = self._steps

    def _inversion(self, damping: Damping) -> Callable[[], InverseInProgress]:
        blocks, added = self._objective_blocks(self._weight_decays())
        return self._structure.inversion(self._curvature.accumulation, blocks, damping, added)

    def _objective_blocks(self, decays: Mapping[str, float]) -> tuple[dict[str, Block], Mapping[str, Amount]]:
        """Return the blocks of the objective's curvature now, with the prior's, and what is added to the damping."""
        blocks = self._curvature.blocks()
        return (blocks, decays) if self._penalty is None else self._penalty.added_to(blocks, decays)

    def _weight_decays(self) -> dict[str, float]:
        """Return the weight decay of every layer, which is part of the objective's curvature (KFC Eq. 28)."""
        by_parameter = {p: group.get("weight_decay", 0.0) for group in self.param_groups for p in group["params"]}
        return {
            name: float(by_parameter[next(iter(layer.parameters.values()))]) for name, layer in self._layers.items()
        }

    # -- Vectors in the space of the parameters --------------------------------------------------------------------

    def _gradient(self) -> Vector:
        """Return the gradient of the objective, with weight decay, for all layers that have one."""
        return objective_gradient(self._layers.values(), self._weight_decays())

    def _solved(self, gradient: Vector, inverse: Inverse | None = None) -> Vector:
        """Return the natural gradient ``F̂⁻¹ ∇h`` in the dtype of each parameter, by default with the current inverse."""
        inverse = self._renewal.inverse if inverse is None else inverse
        assert inverse is not None
        return solved(inverse, self._layers.values(), gradient)

    def _required_batch(self) -> BatchModel:
        """Return the batch, whose loss has been propagated back.

        Raises:
            RuntimeError: If there is none, or its loss has not been propagated back.
        """
        if (batch := self._passes.batch()) is None:
            raise RuntimeError(NO_CURVATURE)
        return batch

    def _curvature_along(self, gradient: Vector) -> float:
        """Return ``gᵀFg / gᵀg`` with the exact Fisher of part of the batch; waits for the device.

        Raises:
            RuntimeError: As `_required_batch`.
        """
        named = {self._names[p]: v for p, v in gradient.items()}
        result = (batch := self._required_batch()).curvature_along(named, len(self._passes))
        if self._penalty is not None:
            self._penalty.factor = batch.factor
            result = result + self._penalty.products([gradient])[0, 0] / dot(gradient, gradient)
        return float(result)

    def _settings(self, key: str) -> dict[nn.Parameter, float]:
        """Return the value of a setting of the groups for every parameter."""
        return {p: float(group[key]) for group in self.param_groups for p in group["params"]}

    def _take(self, step: Vector) -> None:
        """Add a step to the parameters, and keep it as the last one, unless it is not finite.

        Raises:
            ValueError: If it is not finite, naming the layer; on an accelerator later, and the parameters stay as they are.
        """
        self._checks.check_step(self._steps, step, self._layers, self._advice())
        for p, v in step.items():
            kept = self._checks.kept(v)
            p.add_(kept)
            self.state[p]["last_step"] = kept

    def _advice(self) -> str:
        """Return what to change if training diverges."""
        raise NotImplementedError

    # -- Steps -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: A function that clears the gradients, runs the model, calls `update_curvature`, propagates the loss back
                and returns it.

        Returns:
            The loss that the closure returned, if there is one.

        Raises:
            RuntimeError: If there is no curvature yet.
            ValueError: If the gradient or the step is NaN or infinite, a block is singular, or the loss cannot be that of
                the likelihood; the parameters are then as before the step. On an accelerator, the error of a step that was
                not finite comes one step later, and the step is left out.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            grouped = (p for group in self.param_groups for p in group["params"])
            gradients = {self._names[p]: p.grad for p in grouped if p.grad is not None}
            self._checks.check_gradients(self._steps, gradients, self._advice())
            if not self._passes and (self._updates_curvature or self._needs_batch()):
                raise RuntimeError(NO_CURVATURE)
            if self._penalty is not None:
                self._checks.require(*self._penalty.settle(self._passes.scale))
            self._make_step()
        finally:
            self._forget_passes()
        self._steps += 1
        self._curvature.observer.enabled = self._curvature_every.is_due(self._steps, self._last_update)
        return loss

    def _make_step(self) -> None:
        raise NotImplementedError

    def _forget_passes(self) -> None:
        """Begin a new batch."""
        self._passes.clear()
        self._curvature.end_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; passes whose loss was propagated back for a step that was not made count no longer.

        `torch.amp.GradScaler` does not make steps whose gradients overflowed.
        """
        super().zero_grad(set_to_none)
        self._passes.drop_propagated()
        if not self._passes:
            self._forget_passes()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, which is possible only for the constructor.

        Raises:
            NotImplementedError: If the optimizer has been constructed: its curvature is that of its layers.
        """
        if self._layers:
            raise NotImplementedError(
                "parameter groups cannot be added later, because the curvature follows the layers from the first step. Pass "
                "all of them at once, params=[{...}, {...}], or make a new optimizer."
            )
        super().add_param_group(param_group)

    # -- Checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `torch.save`: with `load_state_dict`, training resumes to the bit on the same machine."""
        self._renewal.wait()
        inverse = self._renewal.inverse
        curvature = {
            "curvature": self._curvature.state_dict(),
            "inverse": None if inverse is None else inverse.to_tensors(),
            "steps": self._steps,
            "last_update": self._last_update,
            "last_inversion": self._last_inversion,
            "loss_factor": 1.0 if self._penalty is None else self._penalty.factor,
            **self._more_state(),
        }
        return {**super().state_dict(), "curvature": curvature}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from `state_dict`, for a model with the same layers.

        Raises:
            ValueError: If the state is not one of this kind of optimizer, or belongs to other layers or another estimator.
        """
        if "curvature" not in state_dict:
            raise ValueError(
                f"the state has no curvature; it is not from {type(self).__name__}. It has the entries {list(state_dict)}."
            )
        own = state_dict["curvature"]
        self._curvature.load_state_dict(own["curvature"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "curvature"})
        self._steps, self._last_update, self._last_inversion = map(own.get, ("steps", "last_update", "last_inversion"))
        inverse = own["inverse"] and self._structure.inverse_from(on_device(own["inverse"], device_of(self._model)))
        self._renewal.restore(inverse)
        if self._penalty is not None:
            self._penalty.restore(own["loss_factor"])
        self._load_more_state(own)
        self._passes.clear()
        self._curvature.observer.enabled = self._curvature_every.is_due(self._steps, self._last_update)

    def _more_state(self) -> dict[str, Any]:
        """Return what a subclass adds to the state."""
        return {}

    def _load_more_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `_more_state` returned."""


def _close(curvature: TrainingCurvature, renewal: Renewal, passes: Passes) -> None:
    passes.clear()
    curvature.close()
    renewal.close()
