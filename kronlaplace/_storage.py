"""Storage of each object in one safetensors file: tensors, and everything else as JSON in the header; no pickle is used.

A checksum covers all of it: safetensors itself detects a truncated file, but not one with changed bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

__all__ = ["digest", "load_tensors", "save_tensors"]

_FORMAT_VERSION = 1


def save_tensors(path: str | PathLike[str], kind: str, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-compatible ``values`` to ``path``.

    The file is first written under a temporary name in the same folder, and moved into place when complete. So the path
    always holds one whole file, even with readers and several writers at once. If the path is a link, the file that it
    points to is replaced. Permissions are those of the existing file, or else those of any new file.

    Args:
        path: The path to write to.
        kind: What the file holds, ``"fisher"`` or ``"posterior"``; `load_tensors` must be called with the same kind.
        tensors: Tensors by name.
        values: Everything else.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder.
        PermissionError: If the file exists and is not writable.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}; create it before writing {path.name} to it.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; pass the name of a file, in this folder or elsewhere.")
    target = Path(os.path.realpath(path))
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(
            f"{path} exists and is not writable; save under a different name, or change its permissions."
        )
    written_by = {package: _version_of(package) for package in ("kronlaplace", "torch")}
    contents = json.dumps({"format": _FORMAT_VERSION, "kind": kind, "written_by": written_by, "values": values})
    # Cloned because safetensors refuses tensors that share memory.
    flat = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    partial = target.with_name(f".kronlaplace-{secrets.token_hex(8)}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = (target if target.exists() else partial).stat().st_mode
        save_file(flat, partial, metadata={"kronlaplace": contents, "checksum": _checksum(contents, flat)})
        partial.chmod(stat.S_IMODE(mode))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(
    path: str | PathLike[str], kind: str, device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``device`` is not a device.
        ValueError: If the file is damaged, was not written by this package, or has a different kind or a newer format.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device or a string such as 'cpu', got {type(device).__name__}.")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, not a file" if path.is_dir() else f"no such file: {path}")
    # Read all at once: `safe_open` opens the path twice, for header and tensors, and a save might happen in between.
    contents = path.read_bytes()
    try:
        tensors = load(contents)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). It was truncated or damaged, or is something "
            "else, such as a torch.save file; save the object again."
        ) from None
    metadata = _metadata(contents)
    del contents
    if "kronlaplace" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but kronlaplace did not write it.")
    if metadata.get("checksum") != _checksum(metadata["kronlaplace"], tensors):
        raise ValueError(
            f"{path} is damaged: its contents do not match the checksum with which they were written. Bits changed in "
            "storage or in transit, or another program edited the file; use another copy, or save the object again."
        )
    header = json.loads(metadata["kronlaplace"])
    if header["format"] > _FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {header['format']}, written by kronlaplace {_writer(header)}; this version reads formats up "
            f"to {_FORMAT_VERSION}. Update kronlaplace."
        )
    if header["kind"] != kind:
        raise ValueError(f"{path} holds a {header['kind']}, not a {kind}.")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, header["values"]


def digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's dtype, shape and values, independent of its device."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    header = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    digest = hashlib.blake2b(header, digest_size=16)
    digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _metadata(contents: bytes) -> dict[str, str]:
    """Return the metadata in the header of a whole safetensors file: eight bytes for its length, then JSON."""
    length = int.from_bytes(contents[:8], "little")
    metadata: dict[str, str] = json.loads(contents[8 : 8 + length]).get("__metadata__", {})
    return metadata


def _checksum(contents: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of the header's contents and of every tensor's name, dtype, shape and values."""
    parts = [contents, *(f"{name} {digest(tensors[name])}" for name in sorted(tensors))]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree that was never installed
        return "unknown"


def _writer(header: dict[str, Any]) -> str:
    return str(header.get("written_by", {}).get("kronlaplace", "of a newer version"))
