"""Errors of the network's forward pass, explained in terms of its inputs.

Torch's own errors refer to matrices somewhere inside. Here they are extended with what the caller can act on: the batch,
the inputs' shapes and dtypes, and the module that could not handle them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from kronlaplace.data.inputs import leaves

__all__ = ["explained_errors"]

_PACKAGE = Path(__file__).parent.parent
_TORCH = Path(torch.__file__).parent
_OF_SHAPES = re.compile(r"shape|size|channels|dimension|expected|normalized_shape", re.IGNORECASE)
_NO_KERNEL = re.compile(r"not implemented for '(Half|BFloat16)'|could not create a primitive")
_OF_DTYPES = re.compile(r"dtype|scalar type|input type", re.IGNORECASE)


@contextmanager
def explained_errors(model: nn.Module, inputs: Any, batch: int | None = None) -> Iterator[None]:
    """Add what the caller needs to know to torch errors from the model's forward pass.

    Errors that the model itself or this package raises pass unchanged; others are chained to the new one.

    Args:
        model: The model that is called.
        inputs: The model's inputs: tensors, or tuples, lists and mappings of tensors.
        batch: The index of the batch, if there are several.

    Raises:
        ValueError: If a layer cannot handle the inputs' shapes or dtypes.
        TypeError: If the model takes a different number of inputs.
        NotImplementedError: If torch has no kernel for what the model does in half precision.
        RuntimeError: For other torch errors.
    """
    try:
        yield
    except (RuntimeError, TypeError, IndexError) as error:
        known = type(error) in (RuntimeError, TypeError, IndexError) or _NO_KERNEL.search(str(error))
        better = _explained(error, model, inputs) if known else None
        if better is None:
            raise
        raise type(better)(f"batch {batch}: {better}" if batch is not None else str(better)) from error


def _explained(error: Exception, model: nn.Module, inputs: Any) -> Exception | None:
    frames = list(_frames(error))
    where = Path(frames[-1].f_code.co_filename)
    called = [frame.f_locals.get("self") for frame in frames]
    modules = [module for module in called if isinstance(module, nn.Module)]
    root = next((module for module in modules if type(module) is type(model)), model)  # the model, or a replica of it
    names = {id(module): name for name, module in root.named_modules()}
    modules = [module for module in modules if id(module) in names]
    ours = _PACKAGE in where.parents and _PACKAGE / "layers" not in where.parents  # layers run modules written out
    if not modules or ours:
        return None
    tensors = [tensor for _, tensor in leaves(inputs)]
    given = ", ".join(f"{tuple(t.shape)} ({str(t.dtype).removeprefix('torch.')})" for t in tensors)
    if isinstance(error, TypeError):
        if isinstance(inputs, (list, tuple)) and modules[-1] is root and "positional argument" in str(error):
            return TypeError(
                f"the model was called with {len(inputs)} inputs, of shape {given}: {error}. A list or tuple of tensors "
                "holds the separate inputs of one batch. Pass batches from a DataLoader or as a list of tuples, "
                "[(x1,), (x2,)]; join examples with torch.cat or torch.stack."
            )
        return None
    dtype = next((p.dtype for p in modules[-1].parameters()), next(p.dtype for p in model.parameters()))
    if _NO_KERNEL.search(str(error)):
        return NotImplementedError(
            f"torch has no kernel for what module {names[id(modules[-1])]!r} ({type(modules[-1]).__name__}) does in half "
            f"precision on this device: {error}. Use float32 there: call model.float() before the fit or "
            "posterior.to(torch.float32) after it, or run that module under torch.autocast(..., enabled=False)."
        )
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    if dtypes and dtype not in dtypes and _OF_DTYPES.search(str(error)):
        return ValueError(
            f"the model failed on inputs of dtype {dtypes.pop()}; its parameters are {dtype}. Use inputs.to({dtype})."
        )
    if not dtypes and _OF_DTYPES.search(str(error)):
        return ValueError(
            f"the model failed on inputs of dtype {tensors[0].dtype}; its parameters are {dtype}. Use inputs.to({dtype}) if "
            "they are numbers; indices need an embedding first. If they are targets, pass pairs instead: "
            "[(inputs, targets)]."
        )
    if _TORCH not in where.parents and _PACKAGE not in where.parents and not _OF_SHAPES.search(str(error)):
        return None
    module = modules[-1]
    place = f" in module {names[id(module)]!r}, {_short(module)}" if names[id(module)] else ""
    kind = ValueError if _OF_SHAPES.search(str(error)) else type(error)
    return kind(f"the model failed on inputs of shape {given}{place}: {error}")


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the error's frames, from the outermost to the one in which it was raised."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _short(module: nn.Module) -> str:
    return repr(module) if not list(module.children()) else f"a {type(module).__name__}"
