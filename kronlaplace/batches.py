"""The border between the user's data and ours: what a batch is, and the checks on its values.

Everything that a pass over the data needs to know about loaders is here: what a batch looks like, how it gets to
the model's device, how progress is shown, and how values are checked without waiting for an accelerator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from kronlaplace.alignment import Alignment
from kronlaplace.options import warn
from kronlaplace.precision import callers_autocast

__all__ = [
    "Batch",
    "all_finite",
    "DeferredChecks",
    "Inputs",
    "Rewind",
    "device_of",
    "is_loader",
    "iterate",
    "preserved_random_state",
    "tensors_of",
    "warn_of_share",
    "with_one_more",
]


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leave torch's global random state as found; iterating over a DataLoader alone would change it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class Inputs:
    """What the network is called with: a tensor, several, or named ones.

    A tuple or list is unpacked, ``model(*inputs)``. A mapping is given as keywords if the model's ``forward`` takes
    those, ``model(**inputs)``, and else as it is, ``model(inputs)``.

    Args:
        value: A tensor, or a tuple, list or mapping of tensors (and other values, which are handed through).
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def arguments(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call of the network."""
        if isinstance(self.value, Tensor):
            return (self.value,), {}
        if isinstance(self.value, Mapping):
            return ((), dict(self.value)) if _takes_keywords(model, self.value) else ((self.value,), {})
        return tuple(self.value), {}

    def run(self, model: nn.Module, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Call the network, with other values for some of its parameters if they are given.

        Raises:
            TypeError: If the output is not a tensor, nor an object with a tensor ``logits``.
        """
        args, kwargs = self.arguments(model)
        with callers_autocast():
            outputs = model(*args, **kwargs) if parameters is None else functional_call(model, parameters, args, kwargs)
        if isinstance(outputs, Mapping) and "logits" in outputs:
            outputs = outputs["logits"]
        outputs = getattr(outputs, "logits", outputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model must return a tensor of outputs (or an object with a tensor `logits`), it returned "
                f"{type(outputs).__name__}. Wrap it in a module that returns the tensor."
            )
        return outputs

    def count(self, axis: int) -> int:
        """Number of examples, if ``axis`` counts them."""
        return tensors_of(self)[0].shape[axis]

    def examples(self, axis: int, start: int, stop: int, shared: Collection[str] = ()) -> Inputs:
        """Some of the examples; tensors without that many entries on the axis are not cut, nor are those in ``shared``."""
        n = self.count(axis)
        index = (slice(None),) * axis + (slice(start, stop),)
        return self.map_by_path(lambda t, path: t[index] if path not in shared and _counts(t, axis, n) else t)

    def by_example(self, axis: int, shared: Collection[str] = ()) -> list[str]:
        """Paths of the tensors that `examples` cuts."""
        n = self.count(axis)
        return [path for path, t in _leaves(self.value) if path not in shared and _counts(t, axis, n)]

    def of_other_length(self, axis: int) -> list[str]:
        """Paths of the tensors whose ``axis`` is there but does not count the examples."""
        n = self.count(axis)
        return [path for path, t in _leaves(self.value) if t.ndim > axis and t.shape[axis] != n]

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        return self.map_by_path(lambda t, _: change(t))

    def map_by_path(self, change: Callable[[Tensor, str], Tensor]) -> Inputs:
        """The same with every tensor changed, by a function of the tensor and its path, such as ``"0"`` or ``"mask"``."""
        return Inputs(_mapped(self.value, change))


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """All tensors that have axes, the one that counts the examples first."""
    return [t for _, t in _leaves(inputs.value) if t.ndim]


def with_one_more(inputs: Inputs, axis: int, shared: Collection[str] = ()) -> Inputs:
    """The inputs with their first example once more at the end."""
    n = inputs.count(axis)

    def longer(t: Tensor, path: str) -> Tensor:
        if path in shared or not _counts(t, axis, n):
            return t
        return torch.cat([t, t.narrow(axis, 0, 1)], dim=axis)

    return inputs.map_by_path(longer)


def _counts(tensor: Tensor, axis: int, n: int) -> bool:
    """Whether an axis of a tensor has the length that counts the examples."""
    return tensor.ndim > axis and tensor.shape[axis] == n


def _parts(value: Any, path: str) -> list[tuple[Any, Any, str]]:
    """Key, value and path of the parts of a container; none of anything else."""
    prefix = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return [(key, part, f"{prefix}{key}") for key, part in value.items()]
    return [(i, part, f"{prefix}{i}") for i, part in enumerate(value)] if isinstance(value, (tuple, list)) else []


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested tuples, lists and mappings, with their paths."""
    if isinstance(value, Tensor):
        yield path, value
    for _, part, where in _parts(value, path):
        yield from _leaves(part, where)


def _mapped(value: Any, change: Callable[[Tensor, str], Tensor], path: str = "") -> Any:
    if isinstance(value, Tensor):
        return change(value, path)
    parts = {key: _mapped(part, change, where) for key, part, where in _parts(value, path)}
    if isinstance(value, Mapping):
        return parts
    return list(parts.values()) if isinstance(value, (tuple, list)) else value


def _takes_keywords(model: nn.Module, value: Mapping[str, Any]) -> bool:
    """Whether a mapping is given to the model as keywords.

    Raises:
        TypeError: If the model's ``forward`` takes some of them as keywords, but not all.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**value)
    except TypeError as error:
        taken = [name for name in signature.parameters if name in value]
        if taken:
            raise TypeError(
                f"the model's forward takes {list(signature.parameters)}; the batch has {list(value)}: {error}. Give "
                "batches with the keys that it takes (and the targets), by a generator over the loader."
            ) from None
        return False
    return True


class Rewind:
    """Lets a loader that shuffles give the same batches in every pass, as long as torch draws the order.

    Notes the state of torch's global generator and of the loader's own, if it has one; both are as noted after the
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
        """Back to where it began."""
        torch.set_rng_state(self._global)
        for generator, state in self._own:
            generator.set_state(state)


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device: its position in the data, the inputs, and the targets if there are any."""

    index: int
    inputs: Inputs
    targets: Tensor | None


class DeferredChecks:
    """Conditions on tensor values that are looked at without stalling an accelerator.

    On the CPU a broken condition is raised at once. On other devices the first batch that broke it is remembered
    in a tensor there, and `settle` reads it once, at the end of the pass.
    """

    def __init__(self) -> None:
        self._first_broken: dict[str, Tensor] = {}

    def require(self, holds: Tensor, batch: Batch, message: str) -> None:
        """Note that ``holds`` (a boolean 0-dim tensor) must be true for this batch.

        Raises:
            ValueError: At once on the CPU, in `settle` elsewhere: ``batch <index>: <message>``.
        """
        if holds.device.type == "cpu":
            if not holds:
                raise ValueError(f"batch {batch.index}: {message}")
            return
        first = self._first_broken.get(message)
        if first is None:
            first = torch.full((), -1, dtype=torch.int64, device=holds.device)
        self._first_broken[message] = torch.where(holds | (first >= 0), first, batch.index)

    def settle(self) -> None:
        """Raise the first condition that was broken, if one was."""
        broken = [(int(first), message) for message, first in self._first_broken.items() if int(first) >= 0]
        if broken:
            index, message = min(broken)
            raise ValueError(f"batch {index}: {message}")


def all_finite(values: Tensor) -> Tensor:
    """Whether no value is NaN or infinite, as a boolean 0-dim tensor, in one pass over them."""
    if values.dtype in (torch.float32, torch.float16, torch.bfloat16) and values.device.type in ("cpu", "cuda"):
        return torch.isfinite(values.sum(dtype=torch.float64))  # cannot overflow
    return torch.isfinite(values).all()


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's parameters.

    Raises:
        ValueError: If the model has no parameters, has them on several devices, or has them nowhere (``meta``).
    """
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or devices == {torch.device("meta")}:
        found = "no parameters" if not devices else f"parameters on {', '.join(sorted(map(str, devices)))}"
        raise ValueError(f"the model must have its parameters on one device, but it has {found}.")
    return devices.pop()


def is_loader(x: Any) -> bool:
    """Whether ``x`` yields batches, and is not itself the inputs of one: neither a tensor nor a tuple, list or mapping of
    tensors. A list of anything else holds batches.
    """
    if isinstance(x, (Tensor, Mapping, tuple, str)) or hasattr(x, "__array__") or not isinstance(x, Iterable):
        return False
    return not (isinstance(x, list) and any(isinstance(part, Tensor) for part in x))


def warn_of_share(data: Any) -> None:
    """Say so where a loader gives one process of several its share of the data only.

    Torch's `DistributedSampler` and what is made like it say how many shares there are; so do the loaders of Hugging Face's
    accelerate.
    """
    batch_sampler = getattr(data, "batch_sampler", None)
    owners = (getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    for owner in (*owners, getattr(data, "dataset", None)):
        for count, index in (("num_replicas", "rank"), ("num_processes", "process_index")):
            shares = getattr(owner, count, None)
            if isinstance(shares, int) and shares > 1:
                warn(
                    f"the data are one of {shares} shares (number {getattr(owner, index, '?')}, by a "
                    f"{type(owner).__name__}), and are taken for all there are: nothing is exchanged between processes. "
                    "Give a loader of all data to every process, or to one. Or let each process estimate and save a Fisher "
                    "of its share, and in one of them add them up: posterior.fit(fisher=..., add=True) for each."
                )
                return


_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def iterate(
    data: Iterable[Any], device: torch.device, *, alignment: Alignment | None, progress: bool, description: str
) -> Iterator[Batch]:
    """Yield the batches of ``data`` on ``device``, checked as far as shapes and types go.

    Args:
        data: An iterable of batches, such as a `torch.utils.data.DataLoader` or a list. A batch is a pair
            ``(inputs, targets)``, a tensor of inputs alone, or a mapping that may hold the targets under one of
            ``"labels"``, ``"label"``, ``"targets"``, ``"target"``, ``"y"``. Inputs are a tensor, or a tuple, list or
            mapping of tensors (see `Inputs`). Labels of tokens in a mapping are those that Hugging Face's models take,
            and are shifted for models that predict the next token (see `kronlaplace.alignment`); targets in a pair are
            taken as they are.
        device: Where the batches are needed.
        alignment: Moves labels to the outputs that they belong to; None where targets are not looked at.
        progress: Whether to show a progress bar (never where the output is not a terminal).
        description: What the bar says.

    Raises:
        TypeError: If ``data`` or a batch has another form.
        ValueError: If there is no batch, or a batch has no examples.
    """
    if isinstance(data, (Tensor, tuple, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be an iterable of (inputs, targets) batches, such as a DataLoader or a list; got "
            f"{type(data).__name__}. Wrap a single batch in a list, [(inputs, targets)], a Dataset in a DataLoader."
        )
    total = _length(data) if progress else None
    seen = 0
    # The bar is moved by hand: given the data, tqdm.auto would ask it for an iterator twice, and workers start twice.
    with tqdm(total=total, desc=description, leave=False, disable=None if progress else True) as bar:
        for index, raw in enumerate(data):
            value, targets = _split(raw, index)
            inputs = Inputs(value)
            tensors = tensors_of(inputs)
            if not tensors or tensors[0].numel() == 0:
                shape = tuple(tensors[0].shape) if tensors else ()
                raise ValueError(f"batch {index}: has no examples (inputs of shape {shape}).")
            inputs = inputs.map(lambda t: t.to(device, non_blocking=True))
            if targets is not None:
                targets = targets.to(device, non_blocking=True)
                if alignment is not None:
                    in_pair = not isinstance(raw, Mapping)
                    targets = alignment(inputs.value, targets, in_pair=in_pair, batch=index)
            yield Batch(index, inputs, targets)
            seen += 1
            bar.update()
    if not seen:
        raise ValueError("the data is empty: no batch came out of the loader. (An iterator can be read only once.)")


def _length(data: Any) -> int | None:
    """Number of batches, if it is known; a `DataLoader` has a length that raises if its dataset or sampler has none."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _split(raw: Any, index: int) -> tuple[Any, Tensor | None]:
    if isinstance(raw, Tensor):
        return raw, None
    if isinstance(raw, Mapping):
        keys = [key for key in _TARGET_KEYS if isinstance(raw.get(key), Tensor)]
        if len(keys) > 1:
            raise TypeError(
                f"batch {index}: {keys} could all be the targets; give pairs (inputs, targets), for example by a "
                "generator over the loader."
            )
        rest = {key: value for key, value in raw.items() if key not in keys}
        if _has_tensors(rest):
            return rest, raw[keys[0]] if keys else None
    elif isinstance(raw, (tuple, list)) and len(raw) in (1, 2) and _has_tensors(raw[0]):
        targets = raw[1] if len(raw) == 2 else None
        if targets is None or isinstance(targets, Tensor):
            return raw[0], targets
    got = type(raw).__name__
    if isinstance(raw, (tuple, list)):
        got += f" of {len(raw)}: {', '.join(type(part).__name__ for part in raw)}"
    raise TypeError(
        f"batch {index}: expected a pair (inputs, targets), a tensor of inputs, or a mapping; got {got}. Turn arrays into "
        "tensors with torch.from_numpy; give several inputs as ((x1, x2), targets) or ({...}, targets), by a generator: "
        "(((x1, x2), y) for x1, x2, y in loader)."
    )


def _has_tensors(value: Any) -> bool:
    return any(True for _ in _leaves(value))
