"""One safetensors file per object: tensors, and everything else as JSON in the header. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["load_tensors", "save_tensors"]

_FORMAT_VERSION = 1


def save_tensors(path: str | PathLike[str], kind: str, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-compatible ``values`` to ``path``.

    The file is written beside its place and moved there when it is complete.

    Args:
        path: Where to.
        kind: What the file holds, ``"fisher"`` or ``"posterior"``; `load_tensors` must ask for the same.
        tensors: Tensors by name.
        values: Everything else.

    Raises:
        FileNotFoundError: If the folder is not there.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}; make it first, {path.name} is to be written there.")
    written_by = {package: _version_of(package) for package in ("kronlaplace", "torch")}
    contents = {"format": _FORMAT_VERSION, "kind": kind, "written_by": written_by, "values": values}
    header = {"kronlaplace": json.dumps(contents)}
    # Cloned: safetensors refuses tensors that share memory.
    flat = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(flat, partial, metadata=header)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(
    path: str | PathLike[str], kind: str, device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another program, of another kind, or of a newer format.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device or a string such as 'cpu', got {type(device).__name__}.")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, not a file" if path.is_dir() else f"no such file: {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            raw = (file.metadata() or {}).get("kronlaplace")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). It was truncated or damaged, or is something "
            "else, such as a torch.save file; save the object again."
        ) from None
    if raw is None:
        raise ValueError(f"{path} is a safetensors file, but kronlaplace did not write it.")
    header = json.loads(raw)
    if header["format"] > _FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {header['format']}, written by kronlaplace {_writer(header)}; this version reads up to "
            f"{_FORMAT_VERSION}; update it."
        )
    if header["kind"] != kind:
        raise ValueError(f"{path} holds a {header['kind']}, not a {kind}.")
    return tensors, header["values"]


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree that was never installed
        return "unknown"


def _writer(header: dict[str, Any]) -> str:
    return str(header.get("written_by", {}).get("kronlaplace", "of a newer version"))
