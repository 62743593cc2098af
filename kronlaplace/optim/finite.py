"""Checks that the numbers of a step are finite, which wait for no device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kronlaplace.data.arriving import Arriving
from kronlaplace.layers import Layer
from kronlaplace.optim.checks import finite_norms
from kronlaplace.optim.vectors import Vector

__all__ = ["FiniteChecks"]


class FiniteChecks:
    """Conditions on the values of tensors, and the checks of a training step.

    On the CPU, the error of a condition that fails comes at once, before anything depends on the values. Elsewhere it comes
    as soon as the condition has arrived at the host, and until then `kept` makes steps zero that are not finite. In the
    messages, ``advice`` tells what to change if training has diverged.
    """

    def __init__(self) -> None:
        self.finite = torch.ones((), dtype=torch.bool)
        """Whether all numbers of the step are finite, as far as they have been checked, boolean, 0-dim."""
        self._awaited: list[tuple[Arriving, str]] = []

    def require(self, holds: Tensor, message: str) -> None:
        """Require that a condition, boolean and 0-dim, be true.

        Raises:
            ValueError: If it is false on the CPU, or an earlier one has arrived from a device and is false.
        """
        self._settle()
        if holds.device.type == "cpu":
            if not holds:
                raise ValueError(message)
            return
        self._awaited.append((Arriving(holds), message))

    def _settle(self) -> None:
        """Raise the error of a condition whose value has arrived and is false."""
        while self._awaited and (value := self._awaited[0][0].value()) is not None:
            _, message = self._awaited.pop(0)
            if not value:
                raise ValueError(message)

    def check_pass(self, step: int, outputs: Tensor, inputs: Mapping[str, Tensor], advice: str) -> None:
        """Check the outputs of a forward pass, and whether the inputs of each layer are finite, by layer name.

        Raises:
            ValueError: As `require`.
        """
        after = "so the curvature was not updated" if outputs.device.type == "cpu" else "and so are the factors"
        self.require(
            finite_norms([outputs.detach()]).all(),
            f"step {step}: the network's outputs are NaN or infinite, {after}. Either the inputs are, or training "
            f"has diverged. {advice}",
        )
        for name, finite in inputs.items():
            self.require(
                finite,
                f"step {step}: the inputs of layer {name!r} are NaN, infinite, or so large that their squares "
                f"overflow, {after}. Look at the inputs of the network. {advice}",
            )

    def check_gradients(self, step: int, gradients: Mapping[str, Tensor], advice: str) -> None:
        """Check the gradients, by the name of their parameter, before anything depends on them.

        Raises:
            ValueError: As `require`; on the CPU the message names a parameter.
        """
        if not gradients:
            return
        finite = finite_norms([*gradients.values()])
        self.finite = finite.all()
        which = ""
        if self.finite.device.type == "cpu" and not self.finite:
            which = f" of {list(gradients)[finite.tolist().index(False)]!r}"
        self.require(
            self.finite,
            f"step {step} was not made, because the gradient{which} is NaN or infinite. Look at the loss of this "
            f"batch: its targets may be NaN, or infinite, or the loss itself. {advice}",
        )

    def check_step(self, step: int, vector: Vector, layers: Mapping[str, Layer], advice: str) -> None:
        """Check a step ``vector`` in the space of the parameters before it is made.

        Raises:
            ValueError: As `require`; on the CPU the message names a layer.
        """
        norms = torch.stack([torch.linalg.vector_norm(v) for v in vector.values()])
        finite = norms.isfinite().all() & self.finite
        where = ""
        if finite.device.type != "cpu":
            self.finite = finite
        elif not finite:
            for name, layer in layers.items():
                if any(p in vector and not vector[p].isfinite().all() for p in layer.parameters.values()):
                    where = f" That of layer {name!r} is, and its gradient is finite."
                    break
        self.require(finite, f"step {step} is NaN or infinite, and was not made.{where} {advice}")

    def kept(self, values: Tensor) -> Tensor:
        """Return values of a step, as zero if the step is not finite and its error is still on its way from the device."""
        return values if self.finite.device.type == "cpu" else torch.where(self.finite, values, 0.0)
