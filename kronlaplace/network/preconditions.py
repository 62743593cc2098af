"""Requirements on a network: finite parameters on one device, and deterministic outputs for each example on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kronlaplace.data.deferred_checks import all_finite
from kronlaplace.data.device import device_of

__all__ = ["check_mode", "check_model", "couples_examples"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def check_model(model: nn.Module) -> None:
    """Check that a model can have a Fisher as it is: that its parameters are finite, and that it passes `check_mode`.

    Raises:
        TypeError: If it is not a module.
        ValueError: If a check fails, saying what to do; or if its parameters are not on one device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    device_of(model)
    inference = [name for name, p in model.named_parameters() if p.is_inference()]
    if inference:
        raise ValueError(
            f"these parameters were created under torch.inference_mode() and cannot be differentiated: {inference}. Create "
            "and load the model outside it (copy.deepcopy(model) outside it also works)."
        )
    check_mode(model)
    finite = torch.stack([all_finite(p) for p in model.parameters()])
    if not finite.all():
        bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
        raise ValueError(
            f"these parameters have NaN or infinite values: {bad}. Training diverged, or a file is corrupted."
        )


def check_mode(model: nn.Module) -> None:
    """Refuse a model whose outputs are random or depend on the rest of the batch, without looking at any tensor.

    Raises:
        ValueError: If the model is not ready, naming the module and what to do.
    """
    for name, module in model.named_modules():
        where = f"module {name!r} ({type(module).__name__})"
        if isinstance(module, _BATCH_NORMS) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{where} normalizes with the statistics of the batch, so one example's output depends on the others and "
                "there is no per-example Fisher. Call model.eval() first"
                + (" and give the module running statistics." if module.running_mean is None else ".")
            )
        if module.training and _dropout_probability(module) > 0:
            raise ValueError(f"{where} is in training mode, so the outputs are random. Call model.eval() first.")


def couples_examples(model: nn.Module) -> bool:
    """Return whether a module of the network normalizes with the statistics of the batch."""
    return any(isinstance(m, _BATCH_NORMS) and (m.training or m.running_mean is None) for m in model.modules())


def _dropout_probability(module: Any) -> float:
    if isinstance(module, _DROPOUTS):
        return float(module.p)
    return float(module.dropout) if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) else 0.0
