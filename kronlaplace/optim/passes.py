"""The forward passes of a step: whether their losses have been propagated back, and the loss as a model of the batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kronlaplace.layers import Layer
from kronlaplace.optim.batch_model import BatchModel
from kronlaplace.optim.gradient_scale import GradientScale
from kronlaplace.optim.penalty_in_loss import PenaltyInLoss

__all__ = ["Passes"]


class Passes:
    """The forward passes of a step, of which there are several with gradient accumulation.

    Args:
        layers: Layers, whose smallest parameter shows a gradient scaler's scale by its gradient.
        penalty: The penalty in the loss, if its curvature is known.
    """

    def __init__(self, layers: Sequence[Layer], penalty: PenaltyInLoss | None) -> None:
        parameters = (p for layer in layers for p in layer.parameters.values())
        self.scale = GradientScale(min(parameters, key=nn.Parameter.numel))
        """A gradient scaler's scale in this step."""
        self._passes: list[_Pass] = []
        self._batch: BatchModel | None = None
        self.penalty = penalty
        """The penalty in the loss of these passes."""

    def __len__(self) -> int:
        return len(self._passes)

    def add(self, outputs: Tensor, batch: BatchModel | None) -> None:
        """Add a pass, before its loss is propagated back.

        Args:
            outputs: Its outputs, with their graph.
            batch: The model of its loss, for steps that need it; None keeps that of the pass before.
        """
        self._passes.append(_Pass())
        outputs.register_hook(self._passes[-1].note)
        if batch is not None:
            self._batch = batch
        if self.penalty is not None:
            self.penalty.add_pass(len(outputs))
        if batch is not None or self.penalty is not None:
            self.scale.watch()

    def clear(self) -> None:
        """Begin a new step."""
        self._passes, self._batch = [], None
        if self.penalty is not None:
            self.penalty.forget()
        self.scale.stop()

    def drop_propagated(self) -> None:
        """Leave only the passes whose loss has not been propagated back, when the gradients are cleared."""
        self.scale.forget()
        if self.penalty is not None:
            self.penalty.forget_gradient()
        self._passes = [one for one in self._passes if not one.propagated]

    def batch(self) -> BatchModel | None:
        """Return the model of the last pass's loss, if this step needs it.

        Raises:
            RuntimeError: If the loss has not been propagated back.
        """
        if self._batch is not None and self._batch.gradient is None:
            raise RuntimeError(
                "the loss was not propagated back through the outputs that update_curvature got. Call it between the "
                "forward and the backward pass, with the outputs from which the loss is computed, not with a tensor that is "
                "computed from these."
            )
        return self._batch


class _Pass:
    """Whether the loss of a pass has been propagated back."""

    def __init__(self) -> None:
        self.propagated = False

    def note(self, gradient: Tensor) -> None:
        """Note that it is being propagated back."""
        self.propagated = True
