"""Libraries that ours is compared with, where importing them takes some care."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch


def laplace_torch() -> ModuleType:
    """Import and return the module ``laplace`` of laplace-torch.

    It imports torchmetrics, and that torchvision, of which nothing is used. Where torchvision is built for another torch
    (CUDA beside CPU) and fails, something empty stands in for it while laplace-torch is imported.

    Raises:
        ImportError: If laplace-torch is not installed.
    """
    if "laplace" in sys.modules:
        return sys.modules["laplace"]
    if find_spec("laplace") is None:
        raise ImportError("laplace-torch is not installed: pip install 'laplace-torch==0.3'.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties, about each other
        try:
            importlib.import_module("torchvision")
        except ModuleNotFoundError:
            pass  # torchmetrics can do without
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            with _stand_in("torchvision", "models", "ops", "transforms"):
                return importlib.import_module("laplace")
        return importlib.import_module("laplace")


def avalanche() -> ModuleType:
    """Import and return the module ``avalanche`` of avalanche-lib, which imports torchvision.

    Raises:
        ImportError: If Avalanche is not installed, or not complete.
    """
    if find_spec("avalanche") is None:
        raise ImportError("Avalanche is not installed: pip install 'avalanche-lib>=0.6'.")
    torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties, about each other
        return importlib.import_module("avalanche")


def torchvision() -> ModuleType:
    """Import and return torchvision.

    Where it is built for another torch (CUDA beside CPU), its Python code needs the names of two operators of its own, which
    are declared here; they are never called.

    Raises:
        ImportError: If it is not installed.
    """
    if find_spec("torchvision") is None:
        raise ImportError("torchvision is not installed: pip install torchvision.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties, about each other
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float iou) -> Tensor")
        return importlib.import_module("torchvision")


class _Empty(ModuleType):
    """A module in which every name is a class of its own that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def _stand_in(package: str, *submodules: str) -> Iterator[None]:
    """Let imports of a package find something empty; afterwards it is as before."""

    def take_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
        return {name: sys.modules.pop(name) for name in names}

    before = take_out()
    for name in (package, *(f"{package}.{submodule}" for submodule in submodules)):
        module = sys.modules[name] = _Empty(name)
        module.__spec__ = ModuleSpec(name, None, is_package=name == package)
        module.__path__ = []
    try:
        yield
    finally:
        take_out()
        sys.modules.update(before)
