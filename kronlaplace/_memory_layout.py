"""Gradients in the layout that torch's kernels need.

The backward passes of torch's batch norm on the CPU (2.13), and of instance norm, which uses it, are silently wrong if an
axis of length 1 allows the strides of input and gradient to be read as two different memory layouts. An axis of length 1
occurs with a single example, an image of one row, and always as the first axis inside an instance norm. Networks that
permute axes after a norm have such gradients, and differentiation rules that permute axes create them in second derivatives.

The backward pass of group norm on the CPU crashes the process if its input is in channels-last format and only the gradients
of its parameters are requested.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["guard_norm", "with_contiguous_gradient"]

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_INSTANCE_NORMS = nn.modules.instancenorm._InstanceNorm


def guard_norm(module: nn.Module) -> None:
    """Make sure that a replica's norm module is differentiated correctly; other kinds of modules stay as they are.

    Only calls at risk are changed: their input and the gradient of their output are made contiguous.
    """
    if isinstance(module, (_BATCH_NORMS, _INSTANCE_NORMS)):
        module.register_forward_pre_hook(_settle_input)
        module.register_forward_hook(_settle_gradient)
    elif isinstance(module, nn.GroupNorm):
        module.register_forward_pre_hook(_settle_input)


def with_contiguous_gradient(tensor: Tensor) -> Tensor:
    """Return the same numbers in a tensor whose gradient is passed on in contiguous form."""
    if not tensor.requires_grad:
        return tensor
    view = tensor.view_as(tensor)
    view.register_hook(_contiguous)
    return view


def _in_danger(module: nn.Module, x: Tensor) -> bool:
    return x.device.type == "cpu" and (1 in x.shape or not isinstance(module, _BATCH_NORMS))


def _settle_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if args and isinstance(args[0], Tensor) and _in_danger(module, args[0]):
        return (args[0].contiguous(), *args[1:])
    return None


def _settle_gradient(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not isinstance(output, Tensor) or not output.requires_grad or not _in_danger(module, output):
        return
    # An instance norm returns a view of its result. A hook on a view is lost when the network changes it in place.
    result = output._base if output._is_view() and output._base is not None else output
    result.register_hook(_contiguous)


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()  # in second derivatives there may be none
