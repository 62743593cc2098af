"""Modules of unknown types that do what a known type does, which is found out by running them, whatever they are called.

They run on random inputs with random parameters, so that weights which happen to be zero or one tell nothing false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronlaplace._precision import without_autocast
from kronlaplace._replica import Replica
from kronlaplace.data.device import preserved_random_state

__all__ = ["agrees_with", "product_form"]

_Function = Callable[..., Tensor]

_ON_AXIS_ONE = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
_KNOWN: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()
"""What has been found out about modules."""


def agrees_with(module: nn.Module, kind: type[Any]) -> bool:
    """Return whether a module of a type derived from ``kind`` computes what ``kind.forward`` does.

    Args:
        module: A module with another forward pass.
        kind: One of the supported types of torch that are observed as they are.
    """
    known = _KNOWN.setdefault(module, {})
    if kind not in known:
        inputs = list(_inputs_of(module, kind))
        known[kind] = bool(inputs) and all(_same(module, x, kind.forward) for x in inputs)
    return bool(known[kind])


def product_form(module: nn.Module) -> tuple[str, str | None, bool] | None:
    """Return how a module multiplies its input by a matrix, or None if it does not or has other parameters.

    Returns:
        The names of the weight and of the bias, if there is one, and whether the weight has the shape ``(inputs, outputs)``.
    """
    known = _KNOWN.setdefault(module, {})
    if "product" not in known:
        known["product"] = _product_form(module)
    return known["product"]


def _product_form(module: nn.Module) -> tuple[str, str | None, bool] | None:
    own = dict(module.named_parameters(recurse=False))
    if len(list(module.parameters())) != len(own) or not 1 <= len(own) <= 2:
        return None
    matrices = [name for name, p in own.items() if p.ndim == 2]
    vectors = [name for name, p in own.items() if p.ndim == 1]
    if len(matrices) != 1 or len(matrices) + len(vectors) != len(own):
        return None
    weight, bias = matrices[0], next(iter(vectors), None)
    for transposed in (False, True):
        n_inputs, n_outputs = own[weight].shape if transposed else reversed(own[weight].shape)
        if bias is not None and len(own[bias]) != n_outputs:
            continue

        def product(module: Any, x: Tensor, transposed: bool = transposed) -> Tensor:
            matrix = getattr(module, weight)
            return F.linear(x, matrix.T if transposed else matrix, None if bias is None else getattr(module, bias))

        if all(
            _same(module, x, product) for x in (_normal(own[weight], 3, n_inputs), _normal(own[weight], 2, 2, n_inputs))
        ):
            return weight, bias, transposed
    return None


def _inputs_of(module: Any, kind: type[nn.Module]) -> Iterator[Tensor]:
    """Yield a few inputs for modules of a type; none if they cannot be compared."""
    like = next(module.parameters(recurse=False))
    if kind is nn.Linear:
        yield _normal(like, 3, module.in_features)
        yield _normal(like, 2, 2, module.in_features)
    elif kind is nn.Embedding:
        yield torch.arange(min(6, module.num_embeddings), device=like.device).view(-1, 1)
    elif issubclass(kind, nn.modules.conv._ConvNd):
        least = [d * (k - 1) + 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        for more in (1, 2, 3):
            yield _normal(like, 2, module.in_channels, *(size + more for size in least))
    elif kind in (nn.LayerNorm, nn.RMSNorm):
        yield _normal(like, 3, *module.normalized_shape)
        yield _normal(like, 2, 4, *module.normalized_shape)
    elif issubclass(kind, _ON_AXIS_ONE):
        name = kind.__name__
        for n_axes in (int(name[-2]),) if name.endswith("d") else (1, 2):
            yield _normal(like, 3, len(like), *(3, 4, 2)[:n_axes])


def _same(module: nn.Module, x: Tensor, function: _Function) -> bool:
    """Return whether a module with random parameters does to an input what the function of module and input does."""
    replica: Any = Replica(module).model.eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters(recurse=False):
        values = torch.randn(p.shape, generator=generator).to(p)
        replica._parameters[name] = nn.Parameter(values, requires_grad=False)
    with torch.inference_mode(False), torch.no_grad(), without_autocast(), preserved_random_state(x.device):
        try:
            found, expected = replica(x), function(replica, x)
        except Exception:  # a module of another kind may fail in any way
            return False
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    rounding = 64 * torch.finfo(expected.dtype).eps
    return bool(torch.linalg.vector_norm(found - expected) <= rounding * torch.linalg.vector_norm(expected))


def _normal(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(like)
