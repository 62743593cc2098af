"""Batches from a loader: inputs and optional targets, moved to the network's device."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kronlaplace._arguments import warn
from kronlaplace.data.deferred_checks import Batch
from kronlaplace.data.inputs import Inputs, is_record, leaves, replaced, tensors_of

__all__ = ["Rewind", "is_loader", "iterate", "warn_of_share"]


class Rewind:
    """Context manager that lets a shuffling loader yield the same batches in every pass, if torch draws the order.

    It records the state of torch's global generator and of the loader's own generators, if any, and restores it after the
    ``with`` block.

    Args:
        data: The loader.
    """

    def __init__(self, data: Any) -> None:
        self._global = torch.get_rng_state()
        sampler = getattr(data, "sampler", None)
        owners = (data, sampler, getattr(data, "batch_sampler", None))
        found = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
        self._own = [(g, g.get_state()) for g in found.values()]

    def __enter__(self) -> Rewind:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the recorded states."""
        torch.set_rng_state(self._global)
        for generator, state in self._own:
            generator.set_state(state)


def is_loader(x: Any) -> bool:
    """Return whether ``x`` yields batches.

    It does not if it is itself the inputs of one: a tensor, or a tuple, list or mapping of tensors. A list of anything else
    holds batches.
    """
    if isinstance(x, (Tensor, Mapping, tuple, str)) or hasattr(x, "__array__") or not isinstance(x, Iterable):
        return False
    return not (isinstance(x, list) and any(isinstance(part, Tensor) for part in x))


def warn_of_share(data: Any) -> None:
    """Warn if a loader yields only one process's share of the data.

    Torch's `DistributedSampler`, similar samplers, and the loaders of Hugging Face's accelerate report the number of shares.
    """
    batch_sampler = getattr(data, "batch_sampler", None)
    owners = (getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    for owner in (*owners, getattr(data, "dataset", None)):
        for count, index in (("num_replicas", "rank"), ("num_processes", "process_index")):
            shares = getattr(owner, count, None)
            if isinstance(shares, int) and shares > 1:
                warn(
                    f"the data are one of {shares} shares (number {getattr(owner, index, '?')}, from a "
                    f"{type(owner).__name__}) but are treated as the whole data set: processes exchange nothing. Pass a "
                    "loader over all data, in every process or in one. Or let each process estimate and save a Fisher of "
                    "its share, and add them up in one process: posterior.fit(fisher=..., add=True) for each."
                )
                return


class Alignment(Protocol):
    """Callable that aligns labels with the outputs they belong to, such as `kronlaplace.network.alignment.Alignment`."""

    def __call__(self, inputs: Any, targets: Tensor, *, in_pair: bool, batch: int) -> Tensor:
        """Return the targets, aligned with the outputs."""


_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def iterate(
    data: Iterable[Any], device: torch.device, *, alignment: Alignment | None, progress: bool, description: str
) -> Iterator[Batch]:
    """Yield the batches of ``data`` on ``device``, after checking their shapes and types.

    Args:
        data: An iterable of batches, such as a `torch.utils.data.DataLoader` or a list. A batch is a pair
            ``(inputs, targets)``, a tensor of inputs alone, or a mapping or dataclass that may hold the targets under one of
            ``"labels"``, ``"label"``, ``"targets"``, ``"target"``, ``"y"``. Inputs are a tensor, or a tuple, list or
            mapping of tensors (see `Inputs`). Token labels in a mapping are treated as Hugging Face's models treat them:
            they are shifted for models that predict the next token (see `kronlaplace.network.alignment`). Targets in a pair
            are used as they are.
        device: The device on which the batches are needed.
        alignment: Function that aligns labels with the outputs they belong to; None if the targets are not used.
        progress: Whether to show a progress bar; it is never shown unless the output is a terminal.
        description: Text of the progress bar.

    Raises:
        TypeError: If ``data`` or a batch has an unsupported form.
        ValueError: If there are no batches, or a batch has no examples.
    """
    if isinstance(data, (Tensor, tuple, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be an iterable of (inputs, targets) batches, such as a DataLoader or a list; got "
            f"{type(data).__name__}. Wrap a single batch in a list, [(inputs, targets)], and a Dataset in a DataLoader."
        )
    total = _length(data) if progress else None
    seen = 0
    # The bar is advanced by hand: given the data, tqdm.auto would ask for an iterator twice, starting the workers twice.
    with tqdm(total=total, desc=description, leave=False, disable=None if progress else True) as bar:
        for index, raw in enumerate(data):
            value, targets = _split(raw, index)
            inputs = Inputs(value)
            tensors = tensors_of(inputs)
            if not tensors or tensors[0].numel() == 0:
                shape = tuple(tensors[0].shape) if tensors else ()
                raise ValueError(f"batch {index}: the batch has no examples (inputs of shape {shape}).")
            inputs = inputs.map(lambda t: t.to(device, non_blocking=True))
            if targets is not None:
                targets = targets.to(device, non_blocking=True)
                if alignment is not None:
                    in_pair = not (isinstance(raw, Mapping) or is_record(raw))
                    targets = alignment(inputs.value, targets, in_pair=in_pair, batch=index)
            yield Batch(index, inputs, targets)
            seen += 1
            bar.update()
    if not seen:
        raise ValueError("the data is empty: the loader yielded no batches. (An iterator can be read only once.)")


def _length(data: Any) -> int | None:
    """Return the number of batches if known; a `DataLoader`'s length raises if its dataset or sampler has none."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _split(raw: Any, index: int) -> tuple[Any, Tensor | None]:
    if isinstance(raw, Tensor):
        return raw, None
    if isinstance(raw, Mapping) or is_record(raw):
        entries = raw if isinstance(raw, Mapping) else {f.name: getattr(raw, f.name) for f in fields(raw)}
        keys = [key for key in _TARGET_KEYS if isinstance(entries.get(key), Tensor)]
        if len(keys) > 1:
            raise TypeError(
                f"batch {index}: any of {keys} could be the targets; pass pairs (inputs, targets), for example from a "
                "generator over the loader."
            )
        rest = _without(raw, keys)
        if _has_tensors(rest):
            return rest, entries[keys[0]] if keys else None
    elif isinstance(raw, (tuple, list)) and len(raw) in (1, 2) and _has_tensors(raw[0]):
        targets = raw[1] if len(raw) == 2 else None
        if targets is None or isinstance(targets, Tensor):
            return raw[0], targets
    got = type(raw).__name__
    if isinstance(raw, (tuple, list)):
        got += f" of {len(raw)}: {', '.join(type(part).__name__ for part in raw)}"
    raise TypeError(
        f"batch {index}: expected a pair (inputs, targets), a tensor of inputs, or a mapping; got {got}. Convert arrays to "
        "tensors with torch.from_numpy; pass several inputs as ((x1, x2), targets) or ({...}, targets), by a function of "
        "each batch: kl.ConvertedLoader(loader, lambda batch: ((batch[0], batch[1]), batch[2]))."
    )


def _without(batch: Any, keys: list[str]) -> Any:
    """Return a mapping without some of its entries, or a dataclass with None for them; its class is kept if it can be."""
    if is_record(batch):
        return replaced(batch, dict.fromkeys(keys)) if keys else batch
    rest = {key: value for key, value in batch.items() if key not in keys}
    if not isinstance(batch, UserDict):
        return rest
    changed = copy.copy(batch)
    changed.data = rest
    return changed


def _has_tensors(value: Any) -> bool:
    return any(True for _ in leaves(value))
