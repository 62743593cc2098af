"""`ContinualLaplace` as a plugin of Avalanche's training strategies.

    memory = kl.ContinualLaplace(model, "classification", merge="kfoc")
    strategy = Naive(model=model, optimizer=optimizer, plugins=[ContinualLaplacePlugin(memory)], ...)
    for experience in benchmark.train_stream:
        strategy.train(experience)

| Avalanche | kronlaplace |
| --- | --- |
| experience | task: a Fisher of its data, a sum over its ``N`` examples |
| the strategy's loss, a mean over a mini-batch | the penalty belongs to the sum over the data: ``memory.penalty() / N`` |
| mini-batch ``(x, y, ..., task label)`` | ``(x, y)``; ``((x, task label), y)`` for networks that take task labels |
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from kronlaplace._arguments import choice, positive_integer
from kronlaplace.continual.memory import ContinualLaplace
from kronlaplace.likelihoods import Sampling

try:
    from avalanche.models import MultiTaskModule
    from avalanche.training.plugins import SupervisedPlugin
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "avalanche":
        raise  # Avalanche is installed but lacks one of its own dependencies
    raise ImportError(
        "kronlaplace.integrations.avalanche needs Avalanche: pip install 'kronlaplace[avalanche]', or pip install "
        "'avalanche-lib>=0.6'."
    ) from error

__all__ = ["ContinualLaplacePlugin"]


class ContinualLaplacePlugin(SupervisedPlugin):  # type: ignore[misc]  # Avalanche may be absent
    """Plugin that adds a memory's penalty to the loss, and each experience to the memory when its training is over.

    The loss of every mini-batch gets ``memory.penalty() / N``, where ``N`` is the number of examples of the experience
    (without those that a replay plugin adds), also in the first experience: there it is the prior's. After the training of
    an experience, the memory consolidates its data in mini-batches of ``strategy.train_mb_size``, with the transforms that
    Avalanche uses for evaluation (no augmentation) and with the network in evaluation mode; then every module's mode is as
    before. Each experience that is trained on is a task of its own, also one that comes twice.

    Multi-task networks (`MultiTaskModule`) get the task labels, one for each experience. A `MultiHeadClassifier` adds a
    head as a layer of its own for each task; an `IncrementalClassifier` that gets more outputs changes the shape of a
    layer of the memory, which is an error: give it all outputs from the start, or leave it out of the memory.

    In Avalanche's checkpoints the memory is as in its files (see `ContinualLaplace.save`). The plugin and the memory of a
    strategy that was restored are ``strategy.plugins[i]`` and its ``memory``, no longer the objects that you made before.

    Args:
        memory: The memory, of the network that the strategy trains.
        sampling: As in `ContinualLaplace.consolidate`; with many classes ``"mc"`` is cheaper.
        mc_samples: As in `ContinualLaplace.consolidate`.

    Attributes:
        memory: The memory; for example ``plugin.memory.posterior()`` and ``plugin.memory.strength``.

    Raises:
        TypeError: If ``memory`` is not a `ContinualLaplace`.
        ValueError: For an unknown sampling, or a number of draws below 1.
    """

    def __init__(
        self, memory: ContinualLaplace, *, sampling: Sampling | str | None = None, mc_samples: int = 1
    ) -> None:
        super().__init__()
        if not isinstance(memory, ContinualLaplace):
            raise TypeError(
                f"memory must be a kronlaplace.ContinualLaplace of the strategy's model, got a {type(memory).__name__}."
            )
        self.memory = memory
        self.sampling = None if sampling is None else choice(Sampling, sampling, "sampling")
        self.mc_samples = positive_integer(mc_samples, "mc_samples")

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Check, before any step, that the memory and the strategy belong together.

        Raises:
            ValueError: If the memory is of another model, if the strategy's criterion is not a mean, if the experience
                has no data, or several task labels for a multi-task network; or if a layer of the memory has changed
                its shape, such as an `IncrementalClassifier` that grew.
        """
        if strategy.model is not self.memory.model:
            raise ValueError(
                "the memory is of another model than the strategy's. Make it of the model that you give to the strategy: "
                "ContinualLaplace(model, ...), and Naive(model=model, ...)."
            )
        reduction = getattr(strategy._criterion, "reduction", "mean")
        if reduction != "mean":
            raise ValueError(
                f"the strategy's criterion has reduction={reduction!r}, and the plugin adds penalty / N, which belongs to a "
                'mean over examples. Use reduction="mean".'
            )
        experience = strategy.experience
        if not len(experience.dataset):
            raise ValueError("the experience has no examples. Leave it out of the stream.")
        labels = set(experience.task_labels) if isinstance(strategy.model, MultiTaskModule) else set()
        if len(labels) > 1:
            raise ValueError(
                f"the experience has several task labels, {sorted(labels)}, so that each head would see a part of a "
                "mini-batch. Give a multi-task network experiences with one task label each."
            )
        try:
            with torch.no_grad():
                self.memory.penalty()
        except ValueError as error:
            raise ValueError(
                f"{error} In Avalanche: an IncrementalClassifier keeps its shape if it has the outputs of all experiences "
                "from the start (initial_out_features=...); a MultiHeadClassifier has a layer of its own for each task; "
                "ContinualLaplace(..., exclude=[...]) leaves a layer out of the memory."
            ) from error

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty, as a part of the mean over the experience's examples, to the loss."""
        strategy.loss = strategy.loss + self.memory.penalty() / len(strategy.experience.dataset)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Add the experience to the memory.

        Args:
            strategy: The strategy.
            **kwargs: What was given to ``strategy.train``; of these, ``num_workers`` counts here, too.

        Raises:
            ValueError, TypeError, NotImplementedError: As `ContinualLaplace.consolidate`; the memory is unchanged then.
        """
        model = strategy.model
        batches = _Batches(
            strategy.experience.dataset.eval(),
            strategy.train_mb_size,
            kwargs.get("num_workers", 0),
            with_task_labels=isinstance(model, MultiTaskModule),
        )
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            self.memory.consolidate(batches, sampling=self.sampling, mc_samples=self.mc_samples)
        finally:
            for module, training in modes.items():
                module.training = training

    def __getstate__(self) -> dict[str, Any]:
        """Return what checkpoints and copies have: the memory as its file, which no version of this package misreads."""
        state = self.__dict__.copy()
        memory = state.pop("memory")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "memory.safetensors"
            memory.save(path)
            return {**state, "model": memory.model, "file": path.read_bytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        model: nn.Module = rest.pop("model")
        contents: bytes = rest.pop("file")
        self.__dict__.update(rest)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "memory.safetensors"
            path.write_bytes(contents)
            self.memory = ContinualLaplace.load(path, model)


class _Batches:
    """The mini-batches of a data set of Avalanche as ``(inputs, targets)``, the same in every pass.

    Args:
        dataset: The data set, of ``(x, y, ..., task label)``.
        batch_size: Examples in a mini-batch.
        n_workers: Number of processes that load data.
        with_task_labels: Whether the task labels are inputs of the network.
    """

    def __init__(self, dataset: Any, batch_size: int, n_workers: int, *, with_task_labels: bool) -> None:
        self._loader: Iterable[Any] = DataLoader(
            dataset, batch_size, num_workers=n_workers, collate_fn=getattr(dataset, "collate_fn", None)
        )
        self._with_task_labels = with_task_labels

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self._loader:
            x, y = batch[0], batch[1]
            yield ((x, batch[-1]) if self._with_task_labels else x), y
