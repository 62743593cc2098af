"""Where a network's outputs come from: its last layer, and what stands behind that.

Neither the order of registration nor names tell which layer is the last; a forward pass does. The outputs' history is
followed back through what only arranges numbers anew (views, indexing, copies, other dtypes) to the operation that made
them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace._replica import Replica
from kronlaplace.data.inputs import Inputs
from kronlaplace.layers import Layer, Unsupported, entries_of, family_of, find_layers, written_out

__all__ = [
    "LAST",
    "LOG_SOFTMAX",
    "can_be_last",
    "check_last",
    "find_last_layer",
    "maker_of",
    "module_of_outputs",
    "operation",
]

_ARRANGEMENTS = frozenset(
    f"{name}Backward"
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Squeeze", "Unsqueeze", "Expand"),
        *(
            "Transpose",
            "Permute",
            "T",
            "Select",
            "Slice",
            "Index",
            "Unbind",
            "Split",
            "SplitWithSizes",
            "Clone",
            "ToCopy",
        ),
    )
)
"""Operations that give the numbers that they get, or some of them, in another shape, order or dtype."""

LOG_SOFTMAX = "LogSoftmaxBackward"
"""It changes neither the probabilities nor their derivatives, wherever the outputs are the logits of classes."""


LAST = "last"
"""What ``layers=`` calls the last layer."""


def check_last(model: nn.Module, exclude: Sequence[str] | str) -> None:
    """Check what can be checked of ``layers="last"`` without data.

    Raises:
        ValueError: If something is excluded too, or if no layer can be the last.
    """
    if entries_of(exclude, "exclude"):
        raise ValueError(f'layers="last" is one layer, and exclude={exclude!r} has no meaning with it.')
    found = find_layers(model, unsupported=Unsupported.FIXED)
    if not any(can_be_last(layer) for layer in found):
        raise ValueError(
            'layers="last" is the linear layer or convolution whose output is the network\'s, and the model has none with '
            f"trainable parameters. Name the layer, layers=[...]; there are {[layer.name for layer in found]}."
        )


def operation(node: Any) -> str:
    """The name of an autograd node without its number."""
    return re.sub(r"\d+$", "", node.name())


def maker_of(tensor: Tensor, also: Collection[str] = ()) -> Any:
    """The autograd node that made a tensor's numbers, past what only arranges them, or operations in ``also``."""
    node: Any = tensor.grad_fn
    while node is not None and (operation(node) in _ARRANGEMENTS or operation(node) in also):
        before = [following for following, _ in node.next_functions if following is not None]
        if len(before) != 1:
            break
        node = before[0]
    return node


def can_be_last(layer: Layer) -> bool:
    """Whether a layer can be the last: its output is that of its module, as a product with a weight of its own."""
    return layer.has_kronecker_factors and not layer.tied_modules and written_out(layer.module) is None


@dataclass(frozen=True)
class _Origin:
    """What `module_of_outputs` has found.

    Attributes:
        module: Name of the module that the outputs come from, or None.
        operation: What they come from otherwise.
        called: The modules that were watched, in the order of their last calls.
    """

    module: str | None
    operation: str
    called: Sequence[str]


def module_of_outputs(model: nn.Module, inputs: Inputs, watched: Mapping[str, nn.Module]) -> _Origin:
    """Run the network and find the module whose output is the network's, as it is or arranged anew.

    The outputs of all watched modules are cut off from what was before, so that hardly any graph is kept.
    """
    replica = Replica(model)
    marks: list[tuple[str, Tensor]] = []

    def mark(name: str, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        cut = output.detach().requires_grad_()
        marks.append((name, cut))
        return cut.clone()  # may be changed in place

    for name, module in watched.items():
        replica(module).register_forward_hook(lambda _, __, output, name=name: mark(name, output))
    copies = inputs.map(lambda t: t.detach().clone())
    with torch.inference_mode(False), torch.enable_grad():
        try:
            outputs = copies.run(replica.model)
        except RuntimeError:
            inputs.map(lambda t: t.detach().clone()).run(Replica(model).model)  # fails as well if it is not the cuts
            return _Origin(None, "Derivatives inside the forward pass", _in_order(marks))
    maker = maker_of(outputs, also=(LOG_SOFTMAX,))
    origin = getattr(maker, "variable", None)  # of a node that stands for a tensor that was not computed
    found = next((name for name, cut in marks if cut is origin), None)
    made_by = "nothing that can be differentiated" if maker is None else operation(maker)
    return _Origin(found, made_by, _in_order(marks))


def _in_order(marks: Sequence[tuple[str, Tensor]]) -> list[str]:
    """The names in the order of their last marks."""
    return list(dict.fromkeys(name for name, _ in reversed(marks)))[::-1]


def find_last_layer(model: nn.Module, inputs: Inputs) -> str:
    """The name of the layer whose output is the network's, in a pass over these inputs.

    Raises:
        ValueError: If there is none, with the candidates.
    """
    candidates = [layer.name for layer in find_layers(model, unsupported=Unsupported.FIXED) if can_be_last(layer)]
    watched = {name: module for name, module in model.named_modules() if _is_a_leaf(module)}
    origin = module_of_outputs(model, inputs, watched)
    if origin.module in candidates:
        return origin.module
    if origin.module is None:
        made = origin.operation.removesuffix("Backward")
        reason = f"its outputs are made by an operation behind its layers ({made})"
    else:
        module = watched[origin.module]
        reason = f"its outputs are those of {origin.module!r} ({type(module).__name__})"
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            reason += ", whose parameters are frozen"
        elif (found := family_of(module)) is not None and found[1].has_kronecker_factors:
            reason += ", which shares its weight, or cannot have a block"
    ran = [name for name in origin.called if name in candidates]
    raise ValueError(
        'layers="last" is the linear layer or convolution whose output is the network\'s. Here no such layer is: '
        f"{reason}. Name the layer that you mean, layers=[...]; the last candidates that ran are {ran[-5:]}."
    )


def _is_a_leaf(module: nn.Module) -> bool:
    """Whether a module has parameters, and none of them in a module inside."""
    return any(True for _ in module.parameters(recurse=False)) and not any(
        True for child in module.children() for _ in child.parameters()
    )
