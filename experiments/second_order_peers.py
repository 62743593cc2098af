"""Second-order optimizers of other libraries, each with the reason if it cannot be had here.

The extra `peers` installs them. K-FAC is that of ASDL (`asdfghjkl` on the registry); kfac-pytorch is on no registry.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from itertools import product

import torch
from torch.overrides import TorchFunctionMode

from experiments.training import Optimizer, updater


def _missing(module, how):
    """Return why a module cannot be imported, or nothing."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a library raises
        return f"{how} ({type(error).__name__}: {error})"
    return ""


def soap(model, problem, **settings):
    from pytorch_optimizer import SOAP

    return updater(model, problem, SOAP(model.parameters(), weight_decay=0.0, **settings))


def shampoo(model, problem, **settings):
    from pytorch_optimizer import ScalableShampoo

    optimizer = ScalableShampoo(
        model.parameters(), start_preconditioning_step=5, preconditioning_compute_steps=10, **settings
    )
    return updater(model, problem, optimizer)


class _SinglePrecision(TorchFunctionMode):
    """Keeps what asks for bfloat16 as it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0].clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


class Muon(getattr(torch.optim, "Muon", object)):
    """Muon that iterates in single precision on the CPU, where bfloat16 can be tens of times slower."""

    def step(self, closure=None):
        is_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        with _SinglePrecision() if is_cpu else nullcontext():
            return super().step(closure)


def muon(model, problem, lr, adam_lr):
    """Train the matrices with Muon, and all else (biases, norms, convolutions' kernels) with Adam, as its authors do."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    optimizers = [Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
    optimizers += [torch.optim.Adam(others, lr=adam_lr)] if others else []
    return updater(model, problem, *optimizers)


def singd(model, problem, **settings):
    from singd.optim.optimizer import SINGD

    return updater(model, problem, SINGD(model, warn_unsupported=False, **settings))


class _NoRanges:
    """Stands in for `torch.cuda.nvtx`, whose functions raise where PyTorch is built without CUDA."""

    range_push = range_pop = staticmethod(lambda *_: None)
    range = staticmethod(lambda *_: nullcontext())


def _without_nvtx():
    if not torch.backends.cuda.is_built():
        for name, module in list(sys.modules.items()):
            if name.startswith("asdl") and hasattr(module, "nvtx"):
                module.nvtx = _NoRanges


def asdl_kfac(model, problem, lr, damping, interval=10):
    """Train with the K-FAC of ASDL, moving averages with decay 0.95, gradients with momentum 0.9.

    Its Fisher with sampled labels is for the softmax only; with another loss it takes the empirical Fisher.
    """
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig

    _without_nvtx()
    config = PreconditioningConfig(
        data_size=problem.batch_size,
        damping=damping,
        ema_decay=0.05,
        preconditioner_upd_interval=interval,
        curvature_upd_interval=min(interval, 10),
    )
    is_softmax = problem.y.dtype == torch.long
    maker = KfacGradientMaker(model, config, fisher_type="fisher_mc" if is_softmax else "fisher_emp")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def loss_of(outputs, targets, reduction="mean"):  # the option that ASDL calls losses with
        loss = problem.loss(outputs, targets)
        return loss * len(targets) if reduction == "sum" else loss

    def update(x, y):
        optimizer.zero_grad()
        outputs = maker.setup_model_call(model, x)
        maker.setup_loss_call(loss_of, outputs, y)
        _, loss = maker.forward_and_backward()
        optimizer.step()
        return loss.detach()

    return update


def grid(**values):
    return tuple(dict(zip(values, point, strict=True)) for point in product(*values.values()))


PEERS = {
    "Muon": Optimizer(
        muon,
        grid(lr=(3e-3, 1e-2, 3e-2), adam_lr=(1e-3,)),
        "" if hasattr(torch.optim, "Muon") else "this torch has no Muon",
    ),
    "SOAP": Optimizer(
        soap, grid(lr=(1e-3, 3e-3, 1e-2)), _missing("pytorch_optimizer", "pip install pytorch-optimizer")
    ),
    "Shampoo": Optimizer(
        shampoo, grid(lr=(1e-3, 1e-2, 1e-1)), _missing("pytorch_optimizer", "pip install pytorch-optimizer")
    ),
    "SINGD": Optimizer(
        singd,
        grid(lr=(1e-3, 1e-2, 1e-1), damping=(1e-3, 1e-1), lr_cov=(1e-2, 1e-1)),
        _missing("singd.optim.optimizer", "pip install singd"),
    ),
    "K-FAC of ASDL": Optimizer(
        asdl_kfac,
        grid(lr=(1e-2, 1e-1), damping=(1e-3, 1e-2, 1e-1, 1.0), interval=(1, 10)),
        _missing("asdl.precondition", "pip install asdfghjkl"),
    ),
}
