"""K-FOC: the Kronecker product that is nearest to the Fisher in Frobenius norm.

The Fisher, rearranged, is an operator from the space of activation factors to that of gradient factors,
``A ↦ Σ_n X_n A X_nᵀ``; the best ``G ⊗ A`` is its leading singular pair (K-FOC Lemma 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kronlaplace.blocks import Block, KroneckerBlock
from kronlaplace.estimators.base import Estimator, State, kind_of
from kronlaplace.estimators.moments import (
    add_pair_sums,
    add_row_sums,
    factors_by_group,
    frobenius,
    partial_traces,
    squeezed,
)
from kronlaplace.estimators.power import Items, best_of_krylov, items_of, joined, leading_triple, made_psd
from kronlaplace.estimators.tkfac import trace_preserving_block
from kronlaplace.estimators.truncation import Examples, Terms, concatenated, truncated
from kronlaplace.layers import Layer, LayerBatch, LayerGradients
from kronlaplace.options import Choice, choice, positive_integer, positive_number, seed_number

__all__ = ["KFOC", "Aggregation", "Initialisation", "UnitFactor"]


class Aggregation(Choice):
    """How K-FOC merges batches.

    ``SWEEPS``: power iteration over the whole data set by passing over it several times; the result depends neither on
    batch size nor on order. ``RUNNING``: the best pair of each batch is merged into a running sum of ``rank`` Kronecker
    products. ``APPROX``: the factors of batches are averaged each on its own, as if they were independent. ``FULL``: all
    examples are kept, the ground truth.
    """

    SWEEPS = "sweeps"
    RUNNING = "running"
    APPROX = "approx"
    FULL = "full"


class Initialisation(Choice):
    """Where the power iteration starts: at the identity, or at a random symmetric matrix (the paper's)."""

    IDENTITY = "identity"
    NORMAL = "normal"


class UnitFactor(Choice):
    """Which factor of every batch has unit Frobenius norm where batches' factors are added.

    The other factor carries the size of the batch. ``GRADIENT``: the paper's. ``ACTIVATION``: the other way round.
    """

    GRADIENT = "gradient"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class KFOC(Estimator):
    """Kronecker-factored optimal curvature (K-FOC Algorithms 1 and 2).

    Both factors are positive semidefinite: the power iteration keeps that cone if it starts in it. On shared weights
    the terms between positions are kept (Eq. 13–15).

    Args:
        aggregation: How batches are merged, see `Aggregation`. ``"sweeps"`` (the default) came within one percent of the
            best possible after two passes over the data on all networks measured, and a third closes the gap; it needs
            no power iteration per batch and never waits for the device. ``"running"`` and ``"approx"`` are the paper's,
            for one pass over the data.
        rank: Terms of the running sum (``"running"`` only); 1 is the paper's, 8 is close to the best possible. A batch adds
            its best pair. With ``rank > 1``, small batches (at most ``4 · rank`` examples) of layers that use the weights
            once per example add all of their examples instead, which wait until there are up to ``4 · rank`` of them
            before the sum is cut to ``rank`` terms again.
        unit_factor: Which factor of a batch has unit norm before factors are averaged (``"approx"`` only), see
            `UnitFactor`. The unit factor of every batch counts the same in their average, however small its gradients;
            only batches without any gradient have none. (The paper prints the sum of the unit factors in place of their
            average; that would grow with the number of batches.)
        sweeps: Passes over the data (``"sweeps"`` only). One sweep is `TKFAC` with ``spatial="exact"``.
        max_iter: Most steps of the power iteration of a batch (of all data in ``"full"``).
        tol: Relative error of the factors at which it stops (in single precision it may stop at some 1e-4, where the
            captured norm has converged to rounding). In ``"full"``, the ground truth, it goes on until the relative
            residual of the singular pair is below ``tol²``.
        init: Where it starts.
        seed: Seed of ``init="normal"``.

    Raises:
        ValueError: For values out of range, or ``rank``, ``sweeps``, ``unit_factor`` or ``init`` where they would have no
            effect.
    """

    name: ClassVar[str] = "kfoc"
    not_combinable: ClassVar[str] = (
        "the Kronecker product nearest to the Fisher of all data depends on more of the Fishers of its parts than the "
        "Kronecker products nearest to them"
    )
    constants: ClassVar[frozenset[str]] = frozenset(
        f"{which} {key}" for which in ("older", "previous", "length") for key in ("activation", "gradient")
    )
    aggregation: Aggregation | str = Aggregation.SWEEPS
    rank: int = 1
    sweeps: int = 2
    max_iter: int = 100
    tol: float = 1e-5
    init: Initialisation | str = Initialisation.IDENTITY
    seed: int = 0
    unit_factor: UnitFactor | str = UnitFactor.GRADIENT

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregation", choice(Aggregation, self.aggregation, "aggregation"))
        object.__setattr__(self, "init", choice(Initialisation, self.init, "init"))
        for key in ("rank", "sweeps", "max_iter"):
            object.__setattr__(self, key, positive_integer(getattr(self, key), key))
        object.__setattr__(self, "tol", positive_number(self.tol, "tol"))
        object.__setattr__(self, "seed", seed_number(self.seed))
        object.__setattr__(self, "unit_factor", choice(UnitFactor, self.unit_factor, "unit_factor"))
        for key, default, where in (
            ("rank", 1, Aggregation.RUNNING),
            ("sweeps", 2, Aggregation.SWEEPS),
            ("unit_factor", UnitFactor.GRADIENT, Aggregation.APPROX),
        ):
            if getattr(self, key) != default and self.aggregation is not where:
                raise ValueError(
                    f'{key}={getattr(self, key)!r} only applies when aggregation="{where.value}" '
                    f"(got aggregation={self.aggregation!r})."
                )
        if self.aggregation is Aggregation.SWEEPS and self.init is not Initialisation.IDENTITY:
            raise ValueError('init="normal" is for the power iterations of a batch; aggregation="sweeps" has none.')

    @property
    def passes(self) -> int:
        return self.sweeps if self.aggregation is Aggregation.SWEEPS else 1

    def start(self, layer: Layer) -> State:
        if self.aggregation is Aggregation.SWEEPS:
            return {}
        if self.aggregation is Aggregation.FULL:
            return {"items": []}
        return {"batch": [], "waiting": []} if self.aggregation is Aggregation.RUNNING else {"batch": []}

    def state_from(self, block: Block, layer: Layer, weight: float) -> State:
        if self.passes > 1 or self.aggregation in (Aggregation.APPROX, Aggregation.FULL):
            return super().state_from(block, layer, weight)
        block = kind_of(block, KroneckerBlock, layer)
        if self.aggregation is Aggregation.SWEEPS:
            return dict(partial_traces(block, layer, weight))
        gradient, activation, scale = (t.to(layer.device, layer.dtype) for t in factors_by_group(block))
        norms = frobenius(gradient, torch.float64), frobenius(activation, torch.float64)
        size = weight * scale.double() * norms[0] * norms[1]
        gradient, activation = (
            (f / norm.clamp_min(torch.finfo(f.dtype).tiny)).to(f.dtype)[:, None]
            for f, norm in zip((gradient, activation), norms, strict=True)
        )
        return {**self.start(layer), "terms": Terms(size[:, :, 0], gradient, activation)}

    def add_gradients(self, state: State, gradients: LayerGradients) -> None:
        if self.aggregation is Aggregation.SWEEPS:
            add_pair_sums(state, gradients, state.get("previous activation"), state.get("previous gradient"))
        elif self.aggregation is Aggregation.FULL:
            state["items"].append(items_of(gradients).copied())  # the loader may reuse the memory of its batches
        else:
            state["batch"].append(items_of(gradients))

    def end_batch(self, state: State, batch: LayerBatch) -> None:
        if self.aggregation is Aggregation.SWEEPS:
            add_row_sums(state, batch)
        if self.aggregation not in (Aggregation.RUNNING, Aggregation.APPROX):
            return
        items = joined(state["batch"], same_inputs=True)
        state["batch"] = []
        name = _factors_of(batch.layer.name)
        if self.rank > 1 and (examples := items.examples(self._most_waiting)) is not None:
            self._wait(state, examples, name)
            return
        start = self._start(items)
        if "terms" in state and self.init is Initialisation.IDENTITY:
            # Some of the identity stays: what was seen so far may have nothing in common with this batch.
            start = state["terms"].activations[:, 0] + 0.01 * start / frobenius(start)
        size, gradient, activation = leading_triple(items, start, self.max_iter, self.tol, name)
        if self.aggregation is Aggregation.RUNNING:
            self._append(state, Terms(size[:, None], gradient[:, None], activation[:, None]), name)
            return
        present = (size > 0).to(activation.dtype).view(-1, 1, 1)
        size = size.to(activation.dtype).view(-1, 1, 1)
        if self.unit_factor is UnitFactor.GRADIENT:
            activation = size * activation
        else:
            gradient = size * gradient
        for key, value in (("activation", activation), ("gradient", gradient), ("batches", present)):
            state[key] = state[key] + value if key in state else value

    def merge(self, state: State, other: State) -> State:
        if self.aggregation is not Aggregation.RUNNING:
            return super().merge(state, other)
        merged = {**state, "waiting": list(state["waiting"])}
        for examples in other["waiting"]:
            self._wait(merged, examples, "a merged running sum")
        if "terms" in other:
            self._append(merged, other["terms"], "a merged running sum")
        return merged

    def decay(self, state: State, factor: float) -> None:
        if self.aggregation is Aggregation.RUNNING:
            state["waiting"] = [examples.scaled(factor) for examples in state["waiting"]]
            if "terms" in state:
                state["terms"] = state["terms"]._replace(sizes=state["terms"].sizes * factor)
        elif self.aggregation is Aggregation.FULL:
            state["items"] = [items.scaled(factor) for items in state["items"]]
        elif self.aggregation is Aggregation.APPROX:
            for key in ("activation", "gradient", "batches"):
                if key in state:
                    state[key] = state[key] * factor
        else:
            super().decay(state, factor)

    def next_pass(self, state: State, layer: Layer, weight: float) -> State:
        result: State = {}
        for key in ("activation", "gradient"):
            total = state.pop(key)
            # The first pass had the identity on the other side, not the identity of unit norm.
            norm = 1.0 if f"previous {key}" in state else _other_size(layer, key) ** 0.5
            result[f"older {key}"] = state.pop(f"previous {key}", None)  # None: the identity
            length = frobenius(total, torch.float64)
            result[f"length {key}"] = length / (weight * norm)
            result[f"previous {key}"] = total.div_(length.clamp_min(torch.finfo(total.dtype).tiny))
        return result

    def finish(self, state: State, layer: Layer, weight: float) -> Block:
        if self.aggregation is Aggregation.SWEEPS:
            return self._finish_sweeps(state, layer, weight)
        name = _factors_of(layer.name)
        if self.aggregation is Aggregation.FULL:
            items = joined(state["items"], same_inputs=False)
            size, gradient, activation = leading_triple(
                items, self._start(items), self.max_iter, self.tol**2, name, to_rounding=True
            )
            gradient = size.to(gradient.dtype).view(-1, 1, 1) * gradient
        elif self.aggregation is Aggregation.APPROX:
            gradient, activation = state["gradient"], state["activation"]
            count = state["batches"].clamp_min(torch.finfo(gradient.dtype).tiny)  # zero: so are the factors
            if self.unit_factor is UnitFactor.GRADIENT:
                gradient = gradient / count
            else:
                activation = activation / count
        else:
            best = truncated(state.get("terms"), state["waiting"], 1, name)
            gradient, activation = best.gradients[:, 0], best.activations[:, 0]
            gradient = best.sizes.to(gradient.dtype).unsqueeze(2) * gradient
        gradient, activation = made_psd(gradient, name), made_psd(activation, name)
        return KroneckerBlock(squeezed(gradient / weight), squeezed(activation), name=layer.name)

    def _finish_sweeps(self, state: State, layer: Layer, weight: float) -> Block:
        if "previous activation" not in state:
            return trace_preserving_block(state["gradient"], state["activation"], weight, layer.name)
        keys = "activation", "gradient"
        new_lengths = [frobenius(state[key], torch.float64) for key in keys]
        lengths = [state[f"length {key}"] for key in keys] + [length / weight for length in new_lengths]
        iterates = {}
        for key, length in zip(keys, new_lengths, strict=True):
            older, new = state.pop(f"older {key}"), state.pop(key)
            new /= length.clamp_min(torch.finfo(new.dtype).tiny)
            if older is None:
                size = new.shape[-1]
                older = torch.eye(size, dtype=new.dtype, device=new.device).expand_as(new) / size**0.5
            iterates[key] = [older, state.pop(f"previous {key}"), new]
        name = _factors_of(layer.name)
        gradient, activation = best_of_krylov(iterates["gradient"], iterates["activation"], name, *lengths)
        iterates.clear()
        gradient, activation = made_psd(gradient, name), made_psd(activation, name)
        return KroneckerBlock(squeezed(gradient), squeezed(activation), name=layer.name)

    @property
    def _most_waiting(self) -> int:
        """Most examples that wait to be merged into a running sum of rank above one."""
        return 4 * self.rank

    def _wait(self, state: State, examples: Examples, name: str) -> None:
        """Let examples wait, after those that have waited so far have been merged if they would be too many together."""
        if len(examples) + sum(map(len, state["waiting"])) > self._most_waiting:
            state["terms"] = truncated(state.get("terms"), state["waiting"], self.rank, name)
            state["waiting"] = []
        state["waiting"].append(examples)

    def _append(self, state: State, terms: Terms, name: str) -> None:
        """Add Kronecker products to the running sum and cut it to ``rank`` terms."""
        terms = concatenated([state["terms"], terms]) if "terms" in state else terms
        state["terms"] = truncated(terms, [], self.rank, name) if terms.sizes.shape[1] > self.rank else terms

    def _start(self, items: Items) -> Tensor:
        identity = items.identity()
        if self.init is Initialisation.IDENTITY:
            return identity
        generator = torch.Generator(device=identity.device).manual_seed(self.seed)
        draw = torch.randn(identity.shape, generator=generator, dtype=identity.dtype, device=identity.device)
        # The maps keep symmetric and antisymmetric matrices apart, and the leading pair is symmetric. They are evaluated
        # by formulas that hold for symmetric matrices only.
        return (draw + draw.mT) / 2


def _factors_of(name: str) -> str:
    """What errors call the factors of a layer."""
    return f"the factors of layer {name!r}"


def _other_size(layer: Layer, key: str) -> int:
    """Size of the factor that is not ``key``'s."""
    q, p = layer.shape
    return q // layer.groups if key == "activation" else p
