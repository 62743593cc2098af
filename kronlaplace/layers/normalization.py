"""Normalization layers, whose parameters do not mix features; they get diagonal blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronlaplace._memory_layout import with_contiguous_gradient
from kronlaplace.layers.base import Layer

__all__ = ["NormalizationLayer"]


class NormalizationLayer(Layer):
    """Scale and shift of a normalization layer: ``W̄ = [weight bias]``, with one row per feature, shape ``(features, 2)``."""

    has_kronecker_factors = False

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: Mapping[str, nn.Parameter],
        bias: Mapping[str, nn.Parameter],
        tied_modules: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(name, module, {**weight, **bias}, tied_modules)
        self._bias = bool(bias)

    @property
    def _weight(self) -> nn.Parameter:
        return next(iter(self.parameters.values()))

    @property
    def shape(self) -> tuple[int, int]:
        return self._weight.numel(), 1 + self._bias

    def assemble(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([values[name].flatten() for name in self.parameters], dim=1)

    def split_directions(self, matrices: Tensor) -> dict[str, Tensor]:
        shape = self._weight.shape
        return {name: matrices[..., i].unflatten(-1, shape) for i, name in enumerate(self.parameters)}

    @property
    def _of_batch(self) -> bool:
        """Whether the layer normalizes with the statistics of the batch."""
        module = self.module
        is_batch_norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))
        return is_batch_norm and (module.training or module.running_mean is None)

    @property
    def divisible(self) -> bool:
        return not self._of_batch

    @property
    def _trailing(self) -> int:
        """The number of trailing axes that index the features; 0 if the features are on axis 1."""
        return len(self.module.normalized_shape) if hasattr(self.module, "normalized_shape") else 0

    def example_axes(self, x: Tensor) -> tuple[int, ...]:
        return tuple(range(x.ndim - self._trailing)) if self._trailing else (0,)

    def input_shape(self) -> str:
        return f"(examples, ..., {', '.join(map(str, self._weight.shape))})"

    def is_input(self, x: Tensor) -> bool:
        return x.ndim > max(1, self._trailing)

    def positions(self, x: Tensor, grad: Tensor) -> int | Tensor:
        return grad[0].numel() // self.shape[0]

    def weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        g = self._by_feature(grad)
        columns = [(g * self._by_feature(self._normalized(x.to(self.dtype)))).sum(1)]
        if self._bias:
            columns.append(g.sum(1))
        return torch.stack(columns, dim=-1).unsqueeze(0)

    def input_norm(self, x: Tensor) -> Tensor | float:
        x = x.to(self.dtype)  # may be zero where the normalized input is not
        return torch.linalg.vector_norm(x) + torch.linalg.vector_norm(self._normalized(x))

    def _by_feature(self, values: Tensor) -> Tensor:
        """Reshape to ``(N, T, features)``."""
        values = values.to(self.dtype)
        if self._trailing:
            return values.flatten(-self._trailing).reshape(len(values), -1, self.shape[0])
        return values.flatten(2).mT if values.ndim > 2 else values.unsqueeze(1)

    def _normalized(self, x: Tensor) -> Tensor:
        """Return the normalized input, before scale and shift."""
        module = self.module
        mean, var = (
            None if statistic is None else statistic.to(x.dtype)
            for statistic in (getattr(module, name, None) for name in ("running_mean", "running_var"))
        )
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, eps=module.eps)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            use_input = module.training or not module.track_running_stats
            if use_input:  # torch would write to the running statistics, which changes their last digits
                mean = var = None
            normalized = F.instance_norm(x.contiguous(), mean, var, None, None, use_input, 0.0, module.eps)
            return with_contiguous_gradient(normalized)
        if self._of_batch:
            mean = var = None
        normalized = F.batch_norm(x.contiguous(), mean, var, None, None, self._of_batch, 0.0, module.eps)
        return with_contiguous_gradient(normalized)
