"""The quadratic model of the objective along one or several candidate directions, each together with the last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kronlaplace.optim.batch_model import BatchModel
from kronlaplace.optim.penalty_in_loss import PenaltyInLoss
from kronlaplace.optim.quadratic_model import minimize, predicted_change, quotient, reduction_ratio
from kronlaplace.optim.vectors import Vector, dot

__all__ = ["StepModel"]


class StepModel:
    """Quadratic model ``M(δ)`` of the objective for steps ``δ = αΔ + μδ₀``, with the exact Fisher of part of a batch.

    If the loss is the mean negative log-likelihood up to a factor, such as a mean over tokens, the model is without it. For
    ``m`` candidates ``Δ`` there are ``m`` models of ``k`` coefficients: ``(α, μ)``, or ``α`` alone if there is no last step.

    Args:
        batch: The batch, whose loss has been propagated back.
        names: The names of the parameters.
        gradient: The gradient ``∇h`` of the objective, with weight decay.
        candidates: The candidates ``Δ``.
        last: The last step ``δ₀``; empty if there is none.
        damping: ``λ``.
        decays: The weight decay ``η`` of each parameter.
        passes: Number of passes of the step, with gradient accumulation.
        penalty: The penalty in the loss, if its curvature is known.
    """

    def __init__(
        self,
        batch: BatchModel,
        names: Mapping[nn.Parameter, str],
        gradient: Vector,
        candidates: Sequence[Vector],
        last: Vector,
        damping: float,
        decays: Mapping[nn.Parameter, float],
        passes: int = 1,
        penalty: PenaltyInLoss | None = None,
    ) -> None:
        self._batch, self._names, self._decays, self._penalty = batch, names, decays, penalty
        vectors = [*candidates]
        if last:
            vectors.append({p: last.get(p, torch.zeros_like(v)) for p, v in candidates[0].items()})
        whole = torch.stack([dot(gradient, v) for v in vectors])
        fisher, slopes = batch.products([self._by_name(v) for v in vectors], whole, passes)
        products: dict[tuple[int, int], Tensor] = {}
        for i, u in enumerate(vectors):
            for j, v in enumerate(vectors[: i + 1]):
                products[i, j] = products[j, i] = self._weighted(u, v, damping)
        added = torch.stack([torch.stack([products[i, j] for j in range(len(vectors))]) for i in range(len(vectors))])
        members = [[i, len(candidates)] if last else [i] for i in range(len(candidates))]
        of_penalty = torch.zeros_like(fisher)
        if penalty is not None:
            penalty.factor = batch.factor
            of_penalty = penalty.products(vectors)
        added = added + of_penalty
        self._of_penalty = _submatrices(of_penalty, members)
        self.curvature = _submatrices(fisher + added, members)
        """``C_ij = v_iᵀ(F + P)v_j + (λ + η) v_iᵀv_j`` of each model, ``P`` that of the penalty, shape ``(m, k, k)``."""
        self.slopes = _parts(whole / batch.factor, members)
        """``d_i = ∇hᵀv_i`` of each model with the gradient of the whole batch, shape ``(m, k)``."""
        rest = torch.stack([self._slope_of_rest(v) for v in vectors])
        self._slopes_of_likelihood = self.slopes - _parts(rest, members)
        self._part_slopes = _parts(slopes, members)
        self.factor = batch.factor
        """By which factor the loss is larger than the mean negative log-likelihood, 0-dim."""

    def minimum(self) -> tuple[Tensor, Tensor]:
        """Return the coefficients at the minimum of each model, ``(m, k)``, and the number of the lowest one, ``(1,)``."""
        coefficients = minimize(self.curvature, self.slopes)
        changes = predicted_change(self.curvature, self.slopes, coefficients)
        lowest = torch.where(torch.isnan(changes), torch.inf, changes).argmin().unsqueeze(0)
        return coefficients, lowest

    def change_of_objective(self, step: Vector, coefficients: Tensor) -> Tensor:
        """Compute by how much a step changes the objective, 0-dim: its slope is that of the whole batch.

        What the loss changes beyond its slope is that of the part of the batch. With ``∇h`` for the objective of the whole
        batch and ``ℓ`` for the loss of the part, this is
        ``∇hᵀδ + (ℓ(θ + δ) − ℓ(θ) − ∇ℓᵀδ) + ½ η ‖δ‖² + ½ δᵀPδ``, with the curvature ``P`` of the penalty.

        Args:
            step: The step ``δ``; the network still has the parameters ``θ`` from before.
            coefficients: Its coefficients in the first model, shape ``(k,)``.
        """
        beyond = self._batch.change(self._by_name(step)) - self._part_slopes[0] @ coefficients
        bent = self._weighted(step, step) + coefficients @ self._of_penalty[0] @ coefficients
        return self.slopes[0] @ coefficients + beyond + bent / 2

    def share_of_loss(self, coefficients: Tensor) -> Tensor:
        """Return the largest factor, at most 1, with which the slope of a step does not promise more than there is to gain.

        A linear model with this step lowers the negative log-likelihood of the batch by at most as much as any outputs
        could; the quadratic one has its minimum at half of that. It is 1 if the likelihood has no such bound.

        Args:
            coefficients: The coefficients of the step in the first model, shape ``(k,)``.
        """
        promised = -self._slopes_of_likelihood[0] @ coefficients
        largest = self._batch.largest_decrease()
        if largest is None:
            return torch.ones_like(promised)
        return torch.where(promised > largest, quotient(largest, promised), 1.0)

    def raise_curvature(self, least: Tensor) -> None:
        """Raise the first model's curvature along ``Δ`` to a least value, 0-dim."""
        self.curvature[0, 0, 0].clamp_(min=least)

    def ratio(self, step: Vector, coefficients: Tensor, candidate: Tensor) -> Tensor:
        """Measure the reduction ratio ``ρ`` of a step on the part of the batch whose Fisher the model has, 0-dim.

        Args:
            step: The step ``δ``; the network still has the parameters from before.
            coefficients: Its coefficients, shape ``(k,)``.
            candidate: The number of its candidate, shape ``(1,)``.
        """
        curvature, slopes = (t.index_select(0, candidate).squeeze(0) for t in (self.curvature, self._part_slopes))
        of_penalty = self._of_penalty.index_select(0, candidate).squeeze(0)
        shift = self._slope_of_rest(step)
        bent = self._weighted(step, step) + coefficients @ of_penalty @ coefficients
        change = self._batch.change(self._by_name(step)) + shift + bent / 2
        return reduction_ratio(change, predicted_change(curvature, slopes, coefficients) + shift)

    def _slope_of_rest(self, step: Vector) -> Tensor:
        """Return the slope along a step of what is not in the likelihood, weight decay and penalty, 0-dim."""
        decay = self._weighted({p: p.detach() for p in step}, step)
        return decay if self._penalty is None else decay + self._penalty.slope(step)

    def _by_name(self, vector: Vector) -> dict[str, Tensor]:
        return {self._names[p]: v for p, v in vector.items()}

    def _weighted(self, u: Vector, v: Vector, damping: float = 0.0) -> Tensor:
        """Return ``Σ (λ + η) uᵀv`` over the parameters, 0-dim, float64."""
        by_weight: dict[float, Vector] = {}
        for p, w in v.items():
            by_weight.setdefault(damping + self._decays[p], {})[p] = w
        device = next(iter(v.values())).device
        none = torch.zeros((), dtype=torch.float64, device=device)
        return sum((weight * dot(u, part) for weight, part in by_weight.items() if weight), start=none)


def _parts(vector: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([torch.stack([vector[i] for i in some]) for some in members])


def _submatrices(matrix: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([torch.stack([torch.stack([matrix[i, j] for j in some]) for i in some]) for some in members])
