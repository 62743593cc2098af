"""The output of a network that returns more than one tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from kronlaplace._wrappers import unwrapped

__all__ = ["output_tensor", "with_output"]


def output_tensor(outputs: Any) -> Tensor:
    """Return the tensor of outputs in what a network returned.

    It is what was returned, if that is a tensor; otherwise its entry or attribute ``logits``; otherwise its only tensor
    with at least one axis, in a tuple, list, mapping, or dataclass.

    Raises:
        TypeError: If there is none, or more than one.
    """
    if isinstance(outputs, Tensor):
        return outputs
    parts = _parts(outputs)
    if isinstance(logits := parts.get("logits", getattr(outputs, "logits", None)), Tensor):
        return logits
    tensors = {key: part for key, part in parts.items() if isinstance(part, Tensor) and part.ndim}
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    if not tensors:
        raise TypeError(
            f"the model must return a tensor of outputs, but it returned {_described(outputs)}, without a tensor among its "
            "parts or an attribute `logits`. Compute the outputs from it by a function: kl.with_output(model, lambda "
            "returned: ...)."
        )
    raise TypeError(
        f"it is not clear which tensor is the output: the model returned {_described(outputs)}. Choose one by its key or "
        f"index, kl.with_output(model, {next(iter(tensors))!r}), or by a function of what the model returns."
    )


def with_output(model: nn.Module, output: str | int | Callable[[Any], Tensor]) -> nn.Module:
    """Return a view of a network that returns only the output that is meant, of several that the network computes.

    The view shares all modules, parameters, and buffers with the network, under the same names, and can be passed wherever
    a model can, or trained. The network itself still returns everything.

        >>> posterior = kl.KronLaplace(kl.with_output(model, "scores"), "classification")  # doctest: +SKIP

    A model whose output is clear needs no view: a tensor, an entry or attribute ``logits``, or the only tensor in a tuple,
    list, mapping, or dataclass.

    Args:
        model: The network, in its final mode (`train` and `eval` switch the parts of both, and only one of the two on the
            outside).
        output: The key or attribute of the output; its index in a tuple or list; or a function that makes the output of what
            the network returns, such as ``lambda returned: returned["heads"][0]``.

    Raises:
        TypeError: If the model is not a module, or ``output`` is of another type.
        ValueError: If the model is a single layer, without modules inside.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(output, bool) or not (isinstance(output, (str, int)) or callable(output)):
        raise TypeError(f"output must be a key, an index, or a function, got {output!r}.")
    model = unwrapped(model)
    if not list(model.children()):
        raise ValueError(
            f"the model is a single layer, {type(model).__name__}, whose own output has to be seen. Choose the output of "
            "nn.Sequential(model)."
        )
    view: Any = copy.copy(model)
    for name, value in vars(view).items():
        if name.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called")) and isinstance(value, dict):
            vars(view)[name] = copy.copy(value)  # hooks on the view are not on the network
    view.register_forward_hook(_Choice(output))
    return view


@dataclass(frozen=True)
class _Choice:
    """Forward hook that replaces what a network returns by a part of it."""

    output: Any

    def __call__(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        if callable(self.output):
            return self.output(outputs)
        parts = _parts(outputs)
        if self.output in parts:
            return parts[self.output]
        if isinstance(self.output, str) and hasattr(outputs, self.output):
            return getattr(outputs, self.output)
        if isinstance(self.output, int) and -len(parts) <= self.output < len(parts):
            return list(parts.values())[self.output]
        raise TypeError(f"with_output(model, {self.output!r}): the model returned {_described(outputs)}.")


def _parts(outputs: Any) -> dict[Any, Any]:
    """Return the parts of what a network returned by key, index, or field."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, (tuple, list)):
        return dict(enumerate(outputs))
    if is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    return {}


def _described(outputs: Any) -> str:
    parts = [f"{key!r}: {_kind(part)}" for key, part in _parts(outputs).items()]
    return f"{type(outputs).__name__} with {{{', '.join(parts)}}}" if parts else _kind(outputs)


def _kind(value: Any) -> str:
    return f"Tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
