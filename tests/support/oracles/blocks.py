"""The blocks of a network by the naming rules, and the derivatives of its outputs by them."""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn


@dataclass
class Block:
    """What one block is about: parameters that are the columns of a (q, p) matrix."""

    name: str
    parameters: tuple
    q: int
    groups: int = 1
    diagonal: bool = False
    convolution: bool = False


@dataclass
class Group:
    """What one group of a block's rows has seen: a (N, T, p), g (N, V, T, q), X (N, V, q, p).

    A convolution also has its module, and if it is used once, the channels of the images that went into the group.
    """

    X: torch.Tensor
    a: torch.Tensor | None = None
    g: torch.Tensor | None = None
    convolution: nn.Module | None = None
    images: torch.Tensor | None = None


@dataclass
class BlockData:
    """All examples' gradients of one block: X (N, V, q, p), and what its groups have seen."""

    block: Block
    X: torch.Tensor
    groups: list = field(default_factory=list)


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def blocks(model):
    """The blocks of a network by the naming rules, in order; tied parameters make one block."""
    found = {}
    for name, module in model.named_modules():
        for block in blocks_of(name, module):
            key = tuple(id(model.get_parameter(parameter)) for parameter in block.parameters)
            if key in found:
                block = replace(found[key], diagonal=found[key].diagonal or block.diagonal)
            found[key] = block
    return {block.name: block for block in found.values()}


def blocks_of(name, module):
    own = dict(module.named_parameters(recurse=False))

    def block(part, columns, **options):
        present = tuple(".".join(filter(None, [name, c])) for c in columns if c in own)
        rows = own[columns[0]].numel() if isinstance(module, NORMS) else len(own[columns[0]])
        return Block(".".join(filter(None, [name, part])), present, rows, **options)

    if not own:
        return []
    if isinstance(module, NORMS):
        return [block("", ("weight", "bias"), diagonal=True)]
    if isinstance(module, nn.Embedding):
        return [block("", ("weight",), diagonal=True)]
    if isinstance(module, nn.Linear):
        return [block("", ("weight", "bias"))]
    if isinstance(module, CONVOLUTIONS):
        return [block("", ("weight", "bias"), groups=module.groups, convolution=True)]
    if isinstance(module, nn.MultiheadAttention):
        if "in_proj_weight" in own:
            return [block("in_proj", ("in_proj_weight", "in_proj_bias"), groups=3)]
        matrices = [block(part, (f"{part}_weight",)) for part in ("q_proj", "k_proj", "v_proj")]
        return matrices + ([block("in_proj", ("in_proj_bias",), groups=3)] if "in_proj_bias" in own else [])
    assert isinstance(module, (nn.RNNBase, nn.RNNCellBase)), type(module)
    suffixes = [""] if isinstance(module, nn.RNNCellBase) else [f"_{s}" for s in recurrent_suffixes(module)]
    made = []
    for s in suffixes:
        if isinstance(module, (nn.GRU, nn.GRUCell)):
            made += [block(f"{part}{s}", (f"weight_{part}{s}", f"bias_{part}{s}")) for part in ("ih", "hh")]
        else:
            part = "" if len(suffixes) == 1 else s[1:]
            made.append(block(part, (f"weight_ih{s}", f"weight_hh{s}", f"bias_ih{s}")))
            made += [block(f"hr{s}", (f"weight_hr{s}",))] if f"weight_hr{s}" in own else []
    return made


def recurrent_suffixes(module):
    ends = ["", "_reverse"] if module.bidirectional else [""]
    return [f"l{layer}{end}" for layer in range(module.num_layers) for end in ends]


def example(inputs, n):
    """Example n as a batch of one; inputs are a tensor, or a dict or tuple of tensors."""
    if isinstance(inputs, dict):
        return {key: value[n : n + 1] for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(value[n : n + 1] for value in inputs)
    return inputs[n : n + 1]


def n_examples(inputs):
    while not isinstance(inputs, torch.Tensor):
        inputs = next(iter(inputs.values() if isinstance(inputs, dict) else inputs))
    return len(inputs)


@contextmanager
def norms_written_out(model):
    """Batch, instance and group norms as arithmetic: torch differentiates them wrongly in some layouts, or crashes."""

    def by_group(norm, args, output):
        (x,) = args
        shape = (1, -1, *[1] * (x.ndim - 2))
        groups = x.reshape(len(x), norm.num_groups, -1)
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, correction=0)
        scaled = ((groups - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
        scaled = scaled * norm.weight.view(shape) + norm.bias.view(shape)
        torch.testing.assert_close(scaled, output, rtol=1e-12, atol=1e-12)
        return scaled

    def arithmetic(norm, args, output):
        (x,) = args
        shape = (1, -1, *[1] * (x.ndim - 2))
        if norm.running_mean is None:
            pixels = tuple(range(2, x.ndim))
            mean, variance = x.mean(pixels, keepdim=True), x.var(pixels, keepdim=True, correction=0)
        else:
            mean, variance = norm.running_mean.view(shape), norm.running_var.view(shape)
        scaled = (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)
        torch.testing.assert_close(scaled, output, rtol=1e-12, atol=1e-12)
        return scaled

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.weight is not None]
    handles = [norm.register_forward_hook(arithmetic) for norm in norms]
    handles += [m.register_forward_hook(by_group) for m in model.modules() if isinstance(m, nn.GroupNorm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weight_gradients(model, x):
    """Derivative of the outputs of one example (a batch of one) by every block's matrix: {name: (C, q, p)}."""
    with norms_written_out(model):
        outputs = model(x)[0].reshape(-1)
    found = {}
    for name, block in blocks(model).items():
        parameters = [model.get_parameter(parameter) for parameter in block.parameters]
        rows = [torch.autograd.grad(output, parameters, retain_graph=True) for output in outputs]
        found[name] = torch.stack([torch.cat([d.reshape(block.q, -1) for d in row], dim=1) for row in rows])
    return found
