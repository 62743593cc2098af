"""Second moments of the gradients in a Kronecker eigenbasis, ``Σ_n (Q_Gᵀ X_n Q_A)_ij²``, which EKFAC needs."""

from __future__ import annotations

from typing import Any

from kronlaplace.layers import LayerBatch, LayerGradients

__all__ = ["add_pending_squares", "add_rotated_squares"]


def add_rotated_squares(state: dict[str, Any], gradients: LayerGradients) -> None:
    """Add the squares of one direction to ``state["values"]``, shape ``(K, q/K, p)``.

    If the weights are used once per example, part of the work is deferred to `add_pending_squares`, after all directions.

    Args:
        state: State of the estimator with the bases ``"gradient basis"``, shape ``(K, q/K, q/K)``, and
            ``"activation basis"``, shape ``(K, p, p)``; modified in place.
        gradients: Inputs of the layer and gradients at its outputs.
    """
    gradient_basis, activation_basis = state["gradient basis"], state["activation basis"]
    if gradients.once_per_example:
        squares = (gradients.gradients()[:, :, 0] @ gradient_basis).square()
        state["pending"] = squares if "pending" not in state else state["pending"] + squares
        return
    for part in gradients.parts():
        g = part.gradients()
        if g.shape[2] <= g.shape[3]:
            rotated = (g @ gradient_basis.unsqueeze(1)).mT @ part.project(activation_basis)
        else:
            x = part.weight_gradients()
            rotated = gradient_basis.mT.unsqueeze(1) @ (x @ activation_basis.unsqueeze(1))
        state["values"] += rotated.square().sum(1)


def add_pending_squares(state: dict[str, Any], batch: LayerBatch) -> None:
    """Add what `add_rotated_squares` has deferred, after all directions of a batch."""
    squares = state.pop("pending", None)
    if squares is not None:
        b = batch.activations()[:, :, 0] @ state["activation basis"]
        state["values"].baddbmm_(squares.mT, b.square())
