"""Modules that wrap a network without changing what it computes: compiled, parallel, and averaged ones."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside a wrapper, such as that of `torch.compile`, or the model itself if it is none.

    A wrapper's parameters are those of the network, and so are their names everywhere in this package: ``fc.weight``, not
    ``_orig_mod.fc.weight`` or ``module.fc.weight``. Several wrappers around each other are all taken off; those inside a
    network stay.

    Args:
        model: A network, or the result of `torch.compile`, `torch.nn.DataParallel`,
            `torch.nn.parallel.DistributedDataParallel` or `torch.optim.swa_utils.AveragedModel`. Anything else is returned
            unchanged, also if it is not a module.
    """
    while True:
        if type(model).__name__ == "OptimizedModule":  # of torch.compile; importing its package takes seconds
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            model = model.module
        else:
            return model
