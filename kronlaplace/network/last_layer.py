"""The origin of a network's outputs: its last layer, and what comes after it.

Neither names nor the order of registration show which layer is the last; a forward pass does. The outputs' history is
traced back through operations that only rearrange numbers (views, indexing, copies, conversions to other dtypes) to the
operation that computed them.
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
"""Operations that return their input, or parts of it, in a different shape, order or dtype."""

LOG_SOFTMAX = "LogSoftmaxBackward"
"""The operation of a log-softmax, which changes neither the probabilities nor their derivatives if outputs are logits."""


LAST = "last"
"""The name of the last layer in ``layers=``."""


def check_last(model: nn.Module, exclude: Sequence[str] | str) -> None:
    """Check ``layers="last"`` as far as possible without data.

    Raises:
        ValueError: If ``exclude`` is not empty, or if no layer can be the last.
    """
    if entries_of(exclude, "exclude"):
        raise ValueError(f'layers="last" is a single layer, so exclude={exclude!r} does not apply; omit it.')
    found = find_layers(model, unsupported=Unsupported.FIXED)
    if not any(can_be_last(layer) for layer in found):
        raise ValueError(
            'layers="last" is the linear layer or convolution whose output is the network\'s, and the model has none with '
            f"trainable parameters. Name the layer, layers=[...]; available names are {[layer.name for layer in found]}."
        )


def operation(node: Any) -> str:
    """Return the name of an autograd node without its number."""
    return re.sub(r"\d+$", "", node.name())


def maker_of(tensor: Tensor, also: Collection[str] = ()) -> Any:
    """Return the autograd node that computed a tensor, skipping operations that only rearrange it or are in ``also``."""
    node: Any = tensor.grad_fn
    while node is not None and (operation(node) in _ARRANGEMENTS or operation(node) in also):
        before = [following for following, _ in node.next_functions if following is not None]
        if len(before) != 1:
            break
        node = before[0]
    return node


def can_be_last(layer: Layer) -> bool:
    """Return whether a layer can be the last: whether its module's output is a product with an untied weight."""
    return layer.has_kronecker_factors and not layer.tied_modules and written_out(layer.module) is None


@dataclass(frozen=True)
class _Origin:
    """Result of `module_of_outputs`.

    Attributes:
        module: Name of the module from which the outputs come, or None.
        operation: The operation from which the outputs come otherwise.
        called: The watched modules, in the order of their last calls.
    """

    module: str | None
    operation: str
    called: Sequence[str]


def module_of_outputs(model: nn.Module, inputs: Inputs, watched: Mapping[str, nn.Module]) -> _Origin:
    """Run the network and find the watched module whose output, possibly rearranged, is the network's.

    The outputs of all watched modules are detached from what came before, so that hardly any graph is kept.
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
            inputs.map(lambda t: t.detach().clone()).run(
                Replica(model).model
            )  # also fails unless the cuts are to blame
            return _Origin(None, "Derivatives inside the forward pass", _in_order(marks))
    maker = maker_of(outputs, also=(LOG_SOFTMAX,))
    origin = getattr(maker, "variable", None)  # only nodes for tensors that were not computed have one
    found = next((name for name, cut in marks if cut is origin), None)
    made_by = "nothing that can be differentiated" if maker is None else operation(maker)
    return _Origin(found, made_by, _in_order(marks))


def _in_order(marks: Sequence[tuple[str, Tensor]]) -> list[str]:
    """Return the names in the order of their last marks."""
    return list(dict.fromkeys(name for name, _ in reversed(marks)))[::-1]


def find_last_layer(model: nn.Module, inputs: Inputs) -> str:
    """Return the name of the layer whose output is the network's, in a pass over these inputs.

    Raises:
        ValueError: If there is none, naming the candidates.
    """
    candidates = [layer.name for layer in find_layers(model, unsupported=Unsupported.FIXED) if can_be_last(layer)]
    watched = {name: module for name, module in model.named_modules() if _is_a_leaf(module)}
    origin = module_of_outputs(model, inputs, watched)
    if origin.module in candidates:
        return origin.module
    if origin.module is None:
        made = origin.operation.removesuffix("Backward")
        reason = f"the outputs are computed by an operation after the last layer ({made})"
    else:
        module = watched[origin.module]
        reason = f"the outputs are those of {origin.module!r} ({type(module).__name__})"
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            reason += ", whose parameters are frozen"
        elif (found := family_of(module)) is not None and found[1].has_kronecker_factors:
            reason += ", which shares its weight, or cannot have a block"
    ran = [name for name in origin.called if name in candidates]
    raise ValueError(
        'layers="last" is the linear layer or convolution whose output is the network\'s. Here there is no such layer: '
        f"{reason}. Name the layer that you mean, layers=[...]; the last candidates that ran are {ran[-5:]}."
    )


def _is_a_leaf(module: nn.Module) -> bool:
    """Return whether a module has parameters, none of them in submodules."""
    return any(True for _ in module.parameters(recurse=False)) and not any(
        True for child in module.children() for _ in child.parameters()
    )
