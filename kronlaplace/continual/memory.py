"""`ContinualLaplace`: what a network has learned in earlier tasks, as a penalty for the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kronlaplace._arguments import choice, positive_integer, positive_number, seed_number
from kronlaplace._precision import in_full_precision
from kronlaplace._wrappers import unwrapped
from kronlaplace.continual.curvature import TaskCurvature
from kronlaplace.continual.files import check_tasks, numbers_of, read, write
from kronlaplace.continual.layers import LayerWish, check_still_there
from kronlaplace.continual.options import Merge, PenaltyMode
from kronlaplace.continual.penalty import SeenNetwork
from kronlaplace.continual.posterior import posterior_of
from kronlaplace.continual.state import MemoryState, Task, name_of_new_task
from kronlaplace.continual.strength import best_strength, check_has_best_strength
from kronlaplace.data.device import device_of
from kronlaplace.estimators import Estimator, estimator_from_json, estimator_to_json, resolve_estimator
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.layers import Unsupported
from kronlaplace.likelihoods import Likelihood, Sampling, resolve_likelihood
from kronlaplace.network.fingerprint import difference, fingerprint
from kronlaplace.priors.given import GivenPrior
from kronlaplace.priors.mean import PriorMean
from kronlaplace.priors.penalty import LayerPrecision, QuadraticPenalty
from kronlaplace.priors.precision import Precision
from kronlaplace.priors.prior import Prior

if TYPE_CHECKING:
    from kronlaplace.laplace.posterior import KronLaplace

__all__ = ["ContinualLaplace"]


class ContinualLaplace(QuadraticPenalty):
    """A memory of the tasks that a network has learned one after another, as a Gaussian over its weights.

    After each task, the posterior becomes the prior of the next (online structured Laplace, Ritter et al. 2018): the
    precision ``Λ_t = Λ_{t-1} + N_t F_t(θ_t)`` grows by the task's Fisher as a sum over its data, and the penalty of the next
    task is ``λ/2 (θ − θ*)ᵀ Λ_t (θ − θ*)`` around the weights ``θ*`` at the end of the latest. ``Λ_0`` is the precision of
    the prior, which is kept apart and never merged.

    For each task train with ``loss + memory.penalty()`` and then call `consolidate`. The penalty belongs to the **sum** of
    the negative log-likelihood over the task's ``N`` examples; to a mean over them belongs ``memory.penalty() / N``.

    The network may have layers that only some tasks use (heads), and may grow: new layers have the prior only, until a task
    that uses them is consolidated; layers that a task does not use keep their curvature. Frozen layers have no penalty as
    long as they are frozen. The network is held by reference and never changed.

    Args:
        model: The network.
        likelihood: As in `KronLaplace`.
        estimator: How the Fisher's blocks are computed, such as `KFAC`, or its shorthand; ``"diagonal"`` with
            ``mode="per-task"`` is elastic weight consolidation.
        prior_precision: As in `KronLaplace`: ``δ``, or a `Prior`, such as that of a pretrained network
            (`KronLaplace.as_prior`). A network that grows needs one number for all weights.
        prior_mean: Mean of the prior, as in `KronLaplace`.
        merge: What becomes of the Kronecker products of several tasks: ``"sum"`` keeps all; ``"kfoc"`` keeps the nearest
            product, ``"factors"`` averages the factors, both in the memory of one task. See `Merge`.
        rank: With ``"kfoc"``, how many products are kept. As long as there are more, the two are merged for which that
            loses the least, so the sum stays positive semidefinite, which the truncated singular value decomposition of
            `nearest_kronecker` does not guarantee.
        mode: ``"latest"`` or ``"per-task"``; see `PenaltyMode`. ``"per-task"`` needs ``merge="sum"``.
        strength: ``λ``, which multiplies the penalty around the weights of the tasks. A prior around its own mean is not
            multiplied: before the first task, of layers that no task has used yet, and with ``mode="per-task"``.
        layers: Names or patterns of the modules with a memory, as in `estimate_fisher`; None means all with trainable
            parameters.
        exclude: Names or patterns of modules without a memory.
        unsupported: What happens to parameters whose use no rule describes: ``"diagonal"`` (a diagonal block, as in
            `estimate_fisher`), ``"fixed"`` (no penalty) or ``"error"``.
        seed: Seed of the draws in `consolidate`, as in `estimate_fisher`.

    Raises:
        ValueError, TypeError, NotImplementedError: As `KronLaplace`; or for options that do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        estimator: Estimator | str = "kfac",
        *,
        prior_precision: Prior | Precision = 1.0,
        prior_mean: PriorMean = 0.0,
        merge: Merge | str = Merge.SUM,
        rank: int = 1,
        mode: PenaltyMode | str = PenaltyMode.LATEST,
        strength: float = 1.0,
        layers: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str = (),
        unsupported: Unsupported | str = Unsupported.DIAGONAL,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self.model = model = unwrapped(model)
        device_of(model)
        self.likelihood = resolve_likelihood(likelihood)
        self.estimator = resolve_estimator(estimator)
        self.merge = choice(Merge, merge, "merge")
        self.rank = positive_integer(rank, "rank")
        self.mode = choice(PenaltyMode, mode, "mode")
        self.seed = seed_number(seed)
        self.strength = strength
        if self.rank > 1 and self.merge is not Merge.KFOC:
            raise ValueError(f'rank={rank} is for merge="kfoc", and merge is {self.merge.value!r}.')
        if self.mode is PenaltyMode.PER_TASK and self.merge is not Merge.SUM:
            raise ValueError(
                f'mode="per-task" needs merge="sum", since curvature around different weights cannot be merged; got '
                f"merge={self.merge.value!r}."
            )
        self._wish = LayerWish.of(layers, exclude, choice(Unsupported, unsupported, "unsupported"))
        self._state = MemoryState()
        self._network: SeenNetwork | None = None
        given = GivenPrior(prior_precision, prior_mean)
        found = self._wish.find(model)
        tied = given.over(found)
        self._prior: GivenPrior | Prior = tied if numbers_of(given) is None else given

    @property
    def strength(self) -> float:
        """``λ``; may be set at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if value == 0:
            raise ValueError(
                "strength must be a positive finite number, got 0; for no penalty leave it out of the loss."
            )
        self._strength = positive_number(value, "strength")

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that have been consolidated, in their order."""
        return self._state.tasks

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have the curvature of at least one task."""
        return list(self._state.layers)

    @property
    def n_bytes(self) -> int:
        """Size of the weights and the curvature that are kept, in bytes."""
        tensors = replace(self._state, statistics=None).to_tensors().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __repr__(self) -> str:
        merge = f"merge={self.merge!r}" + (f", rank={self.rank}" if self.rank > 1 else "")
        names = [task.name for task in self.tasks]
        return (
            f"{type(self).__name__}({self.likelihood}, {self.estimator}, {merge}, mode={self.mode!r}, "
            f"strength={self.strength:g}, tasks={names})"
        )

    @in_full_precision
    def penalty(self) -> Tensor:
        """Return the penalty of the network's weights, 0-dim, differentiable in its trainable parameters.

        With the precision ``Λ`` of all tasks and the prior it is ``λ/2 (θ − θ*)ᵀ Λ (θ − θ*)``, in nats of the sum of the
        negative log-likelihood over the data. Costs one product ``G Δ A`` of a layer's matrix with each Kronecker product
        that is kept; the backward pass costs none. Before the first task it is the prior's, ``1/2 (θ − m)ᵀ D (θ − m)``,
        and so it is for layers that no task has used yet.

        Raises:
            ValueError: If the network has lost a layer of the memory, or has changed its shape.
        """
        return self._shown(self._seen().penalty(self.mode, self.strength))

    def precision(self) -> dict[str, LayerPrecision]:
        """Return the penalty's second derivatives, for an optimizer (``kl.NaturalGradient(..., prior=memory)``).

        They are ``λ Λ``, as blocks and a multiple of the identity, by the names of the layers that are trainable now.

        Raises:
            ValueError: As `penalty`.
        """
        return self._seen().precision(self.mode, self.strength)

    @property
    def version(self) -> object:
        """What compares unequal after the penalty's second derivatives have changed."""
        return self._state, self.strength

    @in_full_precision
    def consolidate(
        self,
        data: Iterable[Any] | None = None,
        *,
        fisher: KroneckerFisher | None = None,
        task: str | None = None,
        sampling: Sampling | str | None = None,
        mc_samples: int = 1,
        progress: bool = False,
    ) -> ContinualLaplace:
        """Add a task that the network has learned, by its Fisher at the weights now.

        Layers on which the outputs do not depend for any of the data, such as other tasks' heads, keep their curvature. The
        memory changes only if everything succeeds.

        Args:
            data: Batches ``(inputs, targets)`` of the task's training data, such as a DataLoader, as in `estimate_fisher`.
            fisher: Instead of data: what `estimate_fisher` returned for this network, at the weights now (also with
                variational curvature, see `KronLaplace.fit_variational`). A Fisher that was made of blocks alone is taken
                to be of these weights.
            task: A name for the task, by default ``"task 1"``, ``"task 2"``, ...
            sampling: As in `estimate_fisher`, with ``data`` only.
            mc_samples: As in `estimate_fisher`.
            progress: Whether to show a progress bar.

        Returns:
            The memory itself.

        Raises:
            TypeError: If not exactly one of ``data`` and ``fisher`` is given.
            ValueError: As `estimate_fisher`, such as for a task without data or a network in training mode; if ``fisher``
                is of other weights, layers, or another likelihood; if the memory has a task of that name already; or as
                `penalty`.
            NotImplementedError: As `estimate_fisher`; if the outputs depend on a layer that cannot have a block; or if
                the blocks cannot be merged as ``merge`` says.
        """
        name = name_of_new_task(task, self.tasks)
        layers = self._seen().layers
        fisher = self._fisher_of(data, fisher, sampling=sampling, mc_samples=mc_samples, progress=progress)
        with torch.inference_mode(False):
            self._state = self._state.with_task(
                Task(name, fisher.n_examples, tuple(fisher)),
                fisher,
                {layer.name: layer.matrix().to(layer.dtype) for layer in layers},
                layers,
                fingerprint(self.model),
                merge=self.merge,
                rank=self.rank,
                mode=self.mode,
            )
        self.likelihood = self.likelihood.completed_by(fisher.metadata.likelihood)
        return self

    @in_full_precision
    def tune_strength(
        self,
        data: Iterable[Any] | None = None,
        *,
        fisher: KroneckerFisher | None = None,
        sampling: Sampling | str | None = None,
        mc_samples: int = 1,
        progress: bool = False,
    ) -> ContinualLaplace:
        """Set the strength by the evidence of a new task, given the posterior of the earlier ones as its prior.

        Call it while the network learns the task, such as after every epoch, and before `consolidate`: the evidence is that
        at the weights now, see `kronlaplace.continual.strength`. It costs one pass over the data, as `consolidate` does.

        Args:
            data: As in `consolidate`, of the new task.
            fisher: As in `consolidate`, instead of data; its estimation must have seen the targets.
            sampling: As in `consolidate`.
            mc_samples: As in `consolidate`.
            progress: As in `consolidate`.

        Returns:
            The memory itself, with another `strength`.

        Raises:
            RuntimeError, NotImplementedError: Before the first task, or with ``mode="per-task"``.
            TypeError, ValueError: As `consolidate`, or if the evidence has no maximum, as at the weights of the last task.
        """
        check_has_best_strength(self._state, self.mode)
        fisher = self._fisher_of(data, fisher, sampling=sampling, mc_samples=mc_samples, progress=progress)
        with torch.inference_mode(False):
            self.strength = best_strength(self._seen(), fisher)
        return self

    def _fisher_of(self, data: Iterable[Any] | None, fisher: KroneckerFisher | None, **options: Any) -> KroneckerFisher:
        wish = self._wish.without_frozen(self.model)
        task = TaskCurvature(self.model, self._seen().layers, wish, self.likelihood, self.estimator)
        return task.of(data, fisher, seed=self.seed, **options)

    @in_full_precision
    def posterior(self) -> KronLaplace:
        """Return the Laplace posterior given all tasks so far, with the precision ``Λ_t`` (without the strength).

        The network must have the weights at the end of the latest task, which are the posterior's mean. Layers that no task
        has used, and frozen ones, stay at their values.

        Where a layer's curvature is a sum of three or more Kronecker products (``merge="sum"`` with as many tasks,
        ``"kfoc"`` with such a rank), no eigenbasis has all of them, and the posterior has the nearest single product; for
        up to 2,048 weights, and for diagonal and dense blocks, it is exact. Two products are the Fisher and a
        `KroneckerPrior`.

        After the first task, the evidence of the posterior is that of the task's data. After others there is none, since
        the likelihood of the earlier data at the weights now is not known: `KronLaplace.tune` needs
        ``method="validation"``.

        Raises:
            RuntimeError: Before the first task, or if the weights changed after the latest.
            NotImplementedError: If a large layer's curvature is a sum of blocks of different kinds.

        Warns:
            UserWarning: If the precision of a layer is an approximation.
        """
        if not self.tasks:
            raise RuntimeError("the memory has no task yet: call consolidate(loader) first.")
        changed = difference(dict(self._state.weights), fingerprint(self.model))
        if changed is not None:
            raise RuntimeError(
                f"the model's {changed!r} changed after task {self.tasks[-1].name!r} was consolidated, and the posterior "
                "is around the weights there. Ask for it before training goes on, or restore these weights first."
            )
        network = self._seen()
        used = [layer for layer in network.layers if layer.name in network.memories]
        state = replace(self._state, layers=network.memories)
        with torch.inference_mode(False):
            return posterior_of(state, self.model, self.likelihood, self.estimator, network.prior.over(used))

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file with everything but the network, from which a sequence of tasks can be resumed.

        Raises:
            FileNotFoundError: If the folder is not there.
        """
        settings = {
            "likelihood": self.likelihood.to_json(),
            "estimator": estimator_to_json(self.estimator),
            "merge": self.merge.value,
            "rank": self.rank,
            "mode": self.mode.value,
            "strength": self.strength,
            "layers": self._wish.wanted,
            "exclude": self._wish.exclude,
            "unsupported": self._wish.unsupported.value,
            "seed": self.seed,
        }
        write(path, self._state, self._prior, settings)

    @classmethod
    def load(
        cls, path: str | PathLike[str], model: nn.Module, *, tasks: Sequence[str] | None = None
    ) -> ContinualLaplace:
        """Read a file that `save` wrote; nothing is unpickled.

        Args:
            path: The file.
            model: The network, with the weights at which training shall go on, on any device.
            tasks: Names of the tasks that the memory must be of, in their order; None accepts any.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or something else; if it is of other tasks, or in another order; or if the
                network does not have the memory's layers, in their shapes.
        """
        model = unwrapped(model)
        device = device_of(model)
        state, prior, settings = read(path, device)
        if tasks is not None:
            check_tasks(path, state.tasks, tasks)
        memory = cls.__new__(cls)
        memory.model = model
        memory.likelihood = Likelihood.from_json(settings["likelihood"])
        memory.estimator = estimator_from_json(settings["estimator"])
        memory.merge, memory.mode = Merge(settings["merge"]), PenaltyMode(settings["mode"])
        memory.rank, memory.strength, memory.seed = (settings[name] for name in ("rank", "strength", "seed"))
        memory._wish = LayerWish.of(settings["layers"], settings["exclude"], Unsupported(settings["unsupported"]))
        memory._state, memory._network, memory._prior = state, None, prior
        memory._seen()
        return memory

    def _seen(self) -> SeenNetwork:
        """Look at the network, which may have grown, moved, or have other layers frozen."""
        state = self._state
        parameters = [(id(p), p.requires_grad, p.device, p.dtype) for p in self.model.parameters()]
        known = self._network
        if known is not None and known.state is state and known.parameters == parameters:
            return known
        layers = self._wish.without_frozen(self.model).find(self.model)
        check_still_there(self.model, layers, state.layers)
        prior = self._prior.over(layers)
        memories = {
            layer.name: state.layers[layer.name].to(layer.device, layer.dtype)
            for layer in layers
            if layer.name in state.layers
        }
        self._network = SeenNetwork(state, parameters, layers, prior, memories)
        return self._network
