"""Slow, obviously right versions, in float64, with nothing from the package but names.

Everything is derived with autograd from the network itself: patches as the derivative of a layer's output by its
weights, output metrics as the Hessian of the loss, Jacobians example by example.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


def weight_matrix(module):
    """``[W b]`` of a layer as (q, p)."""
    weight = module.weight.detach().flatten(1)
    return weight if module.bias is None else torch.cat([weight, module.bias.detach()[:, None]], dim=1)


def negative_log_likelihood(name, f, y, noise_std=1.0):
    """Of one example: f of shape (C,)."""
    if name == "classification":
        return F.cross_entropy(f[None], y[None], reduction="sum")
    if name == "binary":
        return F.binary_cross_entropy_with_logits(f, y, reduction="sum")
    return 0.5 * ((f - y) / noise_std).square().sum() + f.numel() * math.log(noise_std * math.sqrt(2 * math.pi))


def output_metric(name, f, noise_std=1.0):
    """Fisher of one example's output, (C, C): the Hessian of its loss (the same for any label, in these families).

    Outputs with more axes than the classes (pixels, tokens) are that many independent outputs, flattened.
    """
    y = torch.zeros(f.shape[1:], dtype=torch.long) if name == "classification" else torch.zeros_like(f)
    hessian = torch.autograd.functional.hessian(lambda f: negative_log_likelihood(name, f, y, noise_std), f)
    return hessian.reshape(f.numel(), f.numel())


def layer_io(model, module, x):
    """Of one example: a (T, p), the gradients of every network output (C, T, q), and the outputs (C,)."""
    seen = {}
    handle = module.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach().clone()))
    with torch.no_grad():
        f = model(x[None])[0].reshape(-1)
    handle.remove()
    return patches(module, seen["x"]), output_gradients(model, module, x), f


def patches(module, x):
    """What meets the weights of a layer's first output at each position: a (T, p) for an input of one example."""
    one = single_output(module)
    n_weights = one.weight.numel()

    def first_channel(w):
        parameters = {"weight": w[:n_weights].reshape(one.weight.shape)}
        if module.bias is not None:
            parameters["bias"] = w[n_weights:]
        return functional_call(one, parameters, (x,)).reshape(-1)

    # The output of a layer is linear in its weights: the derivative is the patch that meets them.
    p = n_weights + (module.bias is not None)
    return torch.autograd.functional.jacobian(first_channel, torch.zeros(p, dtype=torch.float64))


def single_output(module):
    """The same layer with one output channel; of a grouped convolution, that of one group."""
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, 1, bias=module.bias is not None, dtype=torch.float64)
    return type(module)(
        module.in_channels // module.groups,
        1,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        bias=module.bias is not None,
        padding_mode=module.padding_mode,
        dtype=torch.float64,
    )


def output_gradients(model, module, x):
    """Gradient of each network output by the layer's output, for one example: (C, T, q).

    The layer's output is shifted by an extra variable; the derivative by that variable at zero is what we want.
    """
    shape = {}
    probe = module.register_forward_hook(lambda m, args, out: shape.update(s=out.shape))
    with torch.no_grad():
        model(x[None])
    probe.remove()

    def shifted(epsilon):
        handle = module.register_forward_hook(lambda m, args, out: out + epsilon)
        try:
            return model(x[None])[0].reshape(-1)
        finally:
            handle.remove()

    jacobian = torch.autograd.functional.jacobian(shifted, torch.zeros(shape["s"], dtype=torch.float64))
    jacobian = jacobian[:, 0]  # (C, *layer output of one example)
    if isinstance(module, nn.Linear):
        return jacobian.reshape(len(jacobian), -1, jacobian.shape[-1])
    return jacobian.flatten(2).transpose(1, 2)


def kfac_factors(model, module, inputs, name, noise_std=1.0):
    """A and G by their definition, one example at a time (K-FAC Eq. 1, KFC Eq. 30 and 31)."""
    A = G = 0
    for x in inputs:
        a, g, f = layer_io(model, module, x)
        A = A + a.T @ a
        G = G + torch.einsum("cti,cd,dtj->ij", g, output_metric(name, f, noise_std), g) / len(a)
    return A / len(inputs), G / len(inputs)


def layer_jacobian(model, module_name, x):
    """Derivative of the outputs of one example by a layer's ``[W b]``: (C, q·p)."""
    module = model.get_submodule(module_name)
    names = [n for n in ("weight", "bias") if getattr(module, n) is not None]
    prefix = f"{module_name}." if module_name else ""

    def run(*values):
        parameters = {prefix + n: v for n, v in zip(names, values, strict=True)}
        return functional_call(model, parameters, (x[None],))[0].reshape(-1)

    parts = torch.autograd.functional.jacobian(run, tuple(getattr(module, n).detach() for n in names))
    weight = parts[0].flatten(2)
    joined = weight if len(parts) == 1 else torch.cat([weight, parts[1][:, :, None]], dim=2)
    return joined.flatten(1)


def jacobian(model, layers, x):
    """Of one example, over all ``layers`` in their order: (C, P)."""
    return torch.cat([layer_jacobian(model, name, x) for name in layers], dim=1)


def log_likelihood(model, inputs, targets, name, noise_std=1.0):
    return -sum(
        negative_log_likelihood(
            name, model(x[None])[0].detach().reshape(-1), y.reshape(-1) if name != "classification" else y, noise_std
        )
        for x, y in zip(inputs, targets, strict=True)
    )


# -- every layer type ----------------------------------------------------------------------------------------


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
        return [block("in_proj", ("in_proj_weight", "in_proj_bias"), groups=3)]
    assert isinstance(module, (nn.RNNBase, nn.RNNCellBase)), type(module)
    suffixes = [""] if isinstance(module, nn.RNNCellBase) else [f"_{s}" for s in recurrent_suffixes(module)]
    made = []
    for s in suffixes:
        if isinstance(module, (nn.GRU, nn.GRUCell)):
            made += [block(f"{part}{s}", (f"weight_{part}{s}", f"bias_{part}{s}")) for part in ("ih", "hh")]
        else:
            part = "" if len(suffixes) == 1 else s[1:]
            made.append(block(part, (f"weight_ih{s}", f"weight_hh{s}", f"bias_ih{s}")))
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


class Trace:
    """Notes every use of every Kronecker layer in a forward pass, and shifts its pre-activations by zeros."""

    def __init__(self):
        self.uses = {}  # by the identity of the first parameter: for each group (list of a, list of shifts)
        self.images = {}

    def shift(self, weight, groups):
        """Note inputs, a list of (T, p) by group; returns the zeros to be added to the pre-activations, (T, q)."""
        rows = len(weight) // len(groups)
        shifts = [torch.zeros(len(a), rows, dtype=torch.float64, requires_grad=True) for a in groups]
        noted = self.uses.setdefault(id(weight), [([], []) for _ in groups])
        for (inputs, zeros), a, zero in zip(noted, groups, shifts, strict=True):
            inputs.append(a.detach().clone())
            zeros.append(zero)
        return shifts

    def __call__(self, module, args, kwargs, output):
        """Forward hook: compute the layer once more, slowly, with the shifts."""
        arguments = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        rule = next((rule for family, rule in SLOW_LAYERS.items() if isinstance(module, family)), None)
        if rule is None:
            return output
        slow = rule(self, module, arguments)
        for ours, theirs in zip(tensors(slow), tensors(output), strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        return slow


ARGUMENTS = ("input", "hx", "value")


def tensors(output):
    return (
        [output]
        if isinstance(output, torch.Tensor)
        else [t for part in output for t in ([part] if part is None else tensors(part))]
    )


def with_one(a, bias):
    """Append the homogeneous 1."""
    return torch.cat([a, torch.ones(*a.shape[:-1], 1, dtype=a.dtype)], dim=-1) if bias is not None else a


def slow_linear(trace, module, arguments):
    x = arguments["input"]
    (shift,) = trace.shift(module.weight, [with_one(x.reshape(-1, x.shape[-1]), module.bias)])
    out = x @ module.weight.T
    out = out if module.bias is None else out + module.bias
    return out + shift.reshape(out.shape)


def slow_convolution(trace, module, arguments):
    x = arguments["input"]
    channels = x.chunk(module.groups, dim=1)
    trace.images.setdefault(id(module.weight), []).append((module, x.detach()))
    inputs = [patches(module, c.detach()) for c in channels]
    shifts = trace.shift(module.weight, inputs)
    out = module.forward(x)
    return out + torch.cat(shifts, dim=1).T.reshape(out.shape)


def slow_recurrent(trace, module, arguments):
    x, state = arguments["input"], arguments.get("hx")
    if module.batch_first:
        x = x.transpose(0, 1)
    long = isinstance(module, nn.LSTM)
    if state is None:
        count = module.num_layers * (1 + module.bidirectional)
        zeros = x.new_zeros(count, x.shape[1], module.hidden_size)
        state = (zeros, zeros) if long else zeros
    h0, c0 = state if long else (state, state)
    suffixes, sequence, last = recurrent_suffixes(module), x, []
    directions = 1 + module.bidirectional
    for layer in range(module.num_layers):
        outputs = []
        for d in range(directions):
            k = layer * directions + d
            parameters = [getattr(module, f"{n}_{suffixes[k]}", None) for n in RECURRENT_PARAMETERS]
            steps = sequence.flip(0) if d else sequence
            h, c = slow_recurrence(trace, module, parameters, steps, h0[k], c0[k])
            outputs.append(h.flip(0) if d else h)
            last.append((h[-1], c))
        sequence = torch.cat(outputs, dim=-1)
    h, c = (torch.stack(parts) for parts in zip(*last, strict=True))
    return sequence.transpose(0, 1) if module.batch_first else sequence, ((h, c) if long else h)


RECURRENT_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def slow_cell(trace, module, arguments):
    x, state = arguments["input"], arguments.get("hx")
    long = isinstance(module, nn.LSTMCell)
    if state is None:
        zeros = x.new_zeros(len(x), module.hidden_size)
        state = (zeros, zeros) if long else zeros
    h0, c0 = state if long else (state, state)
    parameters = [getattr(module, n) for n in RECURRENT_PARAMETERS]
    h, c = slow_recurrence(trace, module, parameters, x[None], h0, c0)
    return (h[0], c) if long else h[0]


def slow_recurrence(trace, module, parameters, sequence, h, c):
    """One layer in one direction by the formulas of torch's documentation; sequence is (T, 1, inputs).

    Returns all hidden states (T, 1, hidden) and the last cell state. The hidden states that meet the weights are only
    known after the loop, so the shifts are made first and the inputs are noted last.
    """
    w_ih, w_hh, b_ih, b_hh = parameters
    bias_ih, bias_hh = (0, 0) if b_ih is None else (b_ih, b_hh)
    gru = isinstance(module, (nn.GRU, nn.GRUCell))
    blank = torch.zeros(len(sequence), 0, dtype=torch.float64)
    (shift_ih,) = trace.shift(w_ih, [blank])
    (shift_hh,) = trace.shift(w_hh, [blank]) if gru else (torch.zeros_like(shift_ih),)
    before, after = [], []
    for x, e_ih, e_hh in zip(sequence, shift_ih, shift_hh, strict=True):
        before.append(h)
        from_input = x @ w_ih.T + bias_ih + e_ih
        from_hidden = h @ w_hh.T + bias_hh + e_hh
        if gru:
            (r_i, z_i, n_i), (r_h, z_h, n_h) = from_input.chunk(3, dim=1), from_hidden.chunk(3, dim=1)
            r, z = torch.sigmoid(r_i + r_h), torch.sigmoid(z_i + z_h)
            h = (1 - z) * torch.tanh(n_i + r * n_h) + z * h
        elif isinstance(module, (nn.LSTM, nn.LSTMCell)):
            i, f, g, o = (from_input + from_hidden).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            h = {"tanh": torch.tanh, "relu": torch.relu}[getattr(module, "nonlinearity", "tanh")](
                from_input + from_hidden
            )
        after.append(h)
    x, h_before = sequence.detach()[:, 0], torch.cat(before).detach()
    if gru:
        trace.uses[id(w_ih)][0][0][-1] = with_one(x, b_ih)
        trace.uses[id(w_hh)][0][0][-1] = with_one(h_before, b_hh)
    else:
        trace.uses[id(w_ih)][0][0][-1] = with_one(torch.cat([x, h_before], dim=1), b_ih)
    return torch.stack(after), c


def slow_attention(trace, module, arguments):
    """Scaled dot products, head by head, of batches of one; no masks on keys."""
    assert arguments.get("key_padding_mask") is None
    query = arguments.get("query", arguments.get("input"))
    key = arguments.get("key", arguments.get("hx"))
    value = arguments["value"]
    streams = [s[0] if module.batch_first else s[:, 0] for s in (query, key, value)]  # (T, E) each
    shifts = trace.shift(module.in_proj_weight, [with_one(s, module.in_proj_bias) for s in streams])
    weights = module.in_proj_weight.chunk(3)
    offsets = (0, 0, 0) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (s @ w.T + b + e for s, w, b, e in zip(streams, weights, offsets, shifts, strict=True))
    mask = arguments.get("attn_mask")
    heads, attention = [], []
    for q_h, k_h, v_h in zip(*(t.chunk(module.num_heads, dim=1) for t in (q, k, v)), strict=True):
        scores = q_h @ k_h.T / math.sqrt(q_h.shape[1])
        if mask is not None:
            scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        attention.append(scores.softmax(1))
        heads.append(attention[-1] @ v_h)
    out = slow_linear(trace, module.out_proj, {"input": torch.cat(heads, dim=1)})
    weights = torch.stack(attention).mean(0)[None] if arguments.get("need_weights", True) else None
    return out.unsqueeze(0 if module.batch_first else 1), weights


SLOW_LAYERS = {
    nn.Linear: slow_linear,
    CONVOLUTIONS: slow_convolution,
    nn.RNNBase: slow_recurrent,
    CELLS: slow_cell,
    nn.MultiheadAttention: slow_attention,
}


def layer_uses(model, x):
    """Of one example (a batch of one): {block name: by group (a (T, p), gradients of each output (C, T, q))}."""
    trace = Trace()
    handles = [m.register_forward_hook(trace, with_kwargs=True) for m in unique_modules(model)]
    try:
        with norms_written_out(model):
            outputs = model(x)[0].reshape(-1)
    finally:
        for handle in handles:
            handle.remove()
    found, images = {}, {}
    for name, block in blocks(model).items():
        weight = id(model.get_parameter(block.parameters[0]))
        if block.diagonal:
            continue
        found[name] = []
        for inputs, shifts in trace.uses[weight]:
            rows = [torch.autograd.grad(output, shifts, retain_graph=True) for output in outputs]
            found[name].append((torch.cat(inputs), torch.stack([torch.cat(row) for row in rows])))
        images[name] = trace.images.get(weight)
    return found, images


def unique_modules(model):
    """Modules whose calls a hook sees; the projections of attention are not called as modules."""
    inside = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return [m for m in model.modules() if m not in inside]


def gradients(model, inputs, likelihood, targets=None, noise_std=1.0):
    """Everything the estimators are defined by, for all blocks: {name: BlockData}.

    The directions are the columns of a square root of the output metric; with targets they are the one gradient of the
    negative log-likelihood (the empirical Fisher).
    """
    seen = {name: [] for name in blocks(model)}
    used = {name: [] for name in seen}
    pictures = {}
    for n in range(n_examples(inputs)):
        x = example(inputs, n)
        f = model(x)[0].detach()
        if targets is None:
            values, vectors = torch.linalg.eigh(output_metric(likelihood, f, noise_std))
            directions = vectors * values.clamp(min=0).sqrt()  # (C, V)
        else:
            f.requires_grad_()
            (gradient,) = torch.autograd.grad(negative_log_likelihood(likelihood, f, targets[n], noise_std), f)
            directions = gradient.reshape(-1, 1)
        for name, derivative in weight_gradients(model, x).items():
            seen[name].append(torch.einsum("cv,cij->vij", directions, derivative))
        uses, images = layer_uses(model, x)
        for name, groups in uses.items():
            used[name].append([(a, torch.einsum("cv,cti->vti", directions, g)) for a, g in groups])
            pictures.setdefault(name, []).append(images[name])
    found = {}
    for name, block in blocks(model).items():
        data = BlockData(block, torch.stack(seen[name]))
        rows = block.q // block.groups
        for k in range(0 if block.diagonal else block.groups):
            group = Group(
                X=data.X[:, :, k * rows : (k + 1) * rows],
                a=torch.stack([groups[k][0] for groups in used[name]]),
                g=torch.stack([groups[k][1] for groups in used[name]]),
            )
            if block.convolution:
                group.convolution = pictures[name][0][0][0]
            if block.convolution and all(len(uses) == 1 for uses in pictures[name]):
                group.images = torch.cat([uses[0][1].chunk(block.groups, dim=1)[k] for uses in pictures[name]])
            data.groups.append(group)
        found[name] = data
    return found


# -- every estimator -----------------------------------------------------------------------------------------
#
# Kronecker rules give (scale, G, A) for one group; `dense` and `block_dense` make matrices of them.


def dense(scale, G, A):
    return scale * torch.kron(G.contiguous(), A.contiguous())


def block_dense(rule, data):
    """The block (q·p, q·p) by a rule for one group: block diagonal over the groups."""
    return torch.block_diag(*(dense(*rule(group)) for group in data.groups))


def exact_block(X):
    """F = 1/N Σ vec(X) vec(X)ᵀ."""
    flat = X.flatten(2)
    return torch.einsum("nvi,nvj->ij", flat, flat) / len(X)


def diagonal(X):
    return torch.diag(X.square().sum((0, 1)).reshape(-1) / len(X))


def kfac_expand(group):
    n, t = group.a.shape[:2]
    A = torch.einsum("nti,ntj->ij", group.a, group.a) / n
    G = torch.einsum("nvti,nvtj->ij", group.g, group.g) / (n * t)
    return 1.0, G, A


def kfac_reduce(group):
    """First average the inputs and sum the gradients over the shared axis; convolutions stay with KFC's rule."""
    if group.convolution is not None:
        return kfac_expand(group)
    a, g = group.a.mean(1), group.g.sum(2)
    return 1.0, torch.einsum("nvi,nvj->ij", g, g) / len(a), a.T @ a / len(a)


def sua(group):
    """Spatially uncorrelated activations and white derivatives (KFC Theorem 4); zero padding only."""
    n, _, t, q = group.g.shape
    scale = group.g.square().sum() / (n * q * t)
    A = kfac_expand(group)[2] if group.convolution is None else sua_activations(group.convolution, group.images)
    return scale, torch.eye(q, dtype=torch.float64), A


def sua_activations(module, images):
    """Entry by entry; images is (N, channels, *size), of one group."""
    assert module.padding_mode == "zeros"
    channels = images.shape[1]
    pixels = images.flatten(2)
    mean = pixels.mean((0, 2))
    moment = torch.einsum("njs,nks->jk", pixels, pixels) / (pixels.shape[0] * pixels.shape[2])
    # The patches of an image of ones tell which taps fall inside at which position.
    inside = patches(module, torch.ones_like(images[:1]))
    positions, bias = len(inside), module.bias is not None
    taps = (inside.shape[1] - bias) // channels
    inside = inside[:, :taps]
    A = torch.zeros(channels * taps + bias, channels * taps + bias, dtype=torch.float64)
    for j in range(channels):
        for k in range(channels):
            for d in range(taps):
                for e in range(taps):
                    both = (inside[:, d] * inside[:, e]).sum()
                    A[j * taps + d, k * taps + e] = both * (moment[j, k] if d == e else mean[j] * mean[k])
        if bias:
            A[j * taps : (j + 1) * taps, -1] = A[-1, j * taps : (j + 1) * taps] = inside.sum(0) * mean[j]
    if bias:
        A[-1, -1] = positions
    return A


def unit_trace(matrix):
    """Zeros stay zeros."""
    return matrix / matrix.trace() if matrix.trace() > 0 else matrix


def tkfac_exact(group):
    A = torch.einsum("nvij,nvik->jk", group.X, group.X)
    G = torch.einsum("nvij,nvkj->ik", group.X, group.X)
    return group.X.square().sum() / len(group.X), unit_trace(G), unit_trace(A)


def tkfac_uncorrelated(group):
    """Position by position, as if the positions' gradients did not correlate (TKFAC Eq. 4.13)."""
    a2, g2 = group.a.square().sum(2), group.g.square().sum(3)
    A = torch.einsum("nvt,nti,ntj->ij", g2, group.a, group.a)
    G = torch.einsum("nt,nvti,nvtj->ij", a2, group.g, group.g)
    scale = torch.einsum("nvt,nt->", g2, a2) / len(group.a)
    return scale, unit_trace(G), unit_trace(A)


def rearranged(F_dense, q, p):
    """Van Loan: a Kronecker product G ⊗ A becomes vec(G) vec(A)ᵀ."""
    return F_dense.reshape(q, p, q, p).permute(0, 2, 1, 3).reshape(q * q, p * p)


def best_rank_one(F_dense, q, p):
    """(scale, G, A) with unit norms and traces not negative: the nearest Kronecker product."""
    U, S, V = torch.linalg.svd(rearranged(F_dense, q, p), full_matrices=False)
    G, A = U[:, 0].reshape(q, q), V[0].reshape(p, p)
    sign = -1.0 if A.trace() < 0 else 1.0
    return S[0], sign * G, sign * A


def kfoc_full(group):
    return best_rank_one(exact_block(group.X), *group.X.shape[2:])


def kfoc_running(group, batches):
    """Batches are index lists: the best rank one of (what there is + the best rank one of the batch), in order."""
    q, p = group.X.shape[2:]
    total = torch.zeros(q * p, q * p, dtype=torch.float64)
    for batch in batches:
        X = group.X[batch]
        total = total + dense(*best_rank_one(len(X) * exact_block(X), q, p))
        total = dense(*best_rank_one(total, q, p))
    scale, G, A = best_rank_one(total, q, p)
    return scale / len(group.X), G, A


def kfoc_approx(group, batches, unit_factor="gradient", weights=None):
    """K-FOC_approx: L (of unit norm, of the gradients) and R (with the size) are averaged each on its own.

    Batches without a gradient have no direction L. With ``unit_factor="activation"`` L is of the activations.
    """
    weights = [1.0] * len(batches) if weights is None else weights
    L, R, count = 0, 0, 0.0
    for batch, weight in zip(batches, weights, strict=True):
        X = group.X[batch]
        if X.any():
            scale, G, A = best_rank_one(len(batch) * exact_block(X), *X.shape[2:])
            unit, sized = (G, scale * A) if unit_factor == "gradient" else (A, scale * G)
            L, R, count = L + weight * unit, R + weight * sized, count + weight
    total = sum(weight * len(batch) for batch, weight in zip(batches, weights, strict=True))
    q, p = group.X.shape[2:]
    if count == 0:
        return 0.0, torch.zeros(q, q, dtype=torch.float64), torch.zeros(p, p, dtype=torch.float64)
    return (1 / total, L / count, R) if unit_factor == "gradient" else (1 / total, R, L / count)


def kfoc_running_sum(group, batches, rank, decay=1.0):
    """A running sum of more than one term, for weights used once, as a dense operator that is cut by its SVD.

    Up to ``4 · rank`` examples wait before they are merged; of a larger batch the best rank one is merged at once.
    """
    q, p = group.X.shape[2:]

    def cut(R, rank):
        U, S, V = torch.linalg.svd(R, full_matrices=False)
        return (U[:, :rank] * S[:rank]) @ V[:rank]

    total, waiting, weight = torch.zeros(q * q, p * p, dtype=torch.float64), [], 0.0
    for batch in batches:
        total, waiting, weight = decay * total, [decay * one for one in waiting], decay * weight + len(batch)
        ones = [rearranged(exact_block(X[None]), q, p) for X in group.X[batch]]
        if len(batch) > 4 * rank:
            total = cut(total + cut(sum(ones), 1), rank)
            continue
        if len(waiting) + len(batch) > 4 * rank:
            total, waiting = cut(total + sum(waiting), rank), []
        waiting += ones
    last = cut(total + sum(waiting), 1) / weight
    return last.view(q, q, p, p).permute(0, 2, 1, 3).reshape(q * p, q * p)


def kfoc_published(group, batches, max_iter=1000, tol=1e-14):
    """K-FOC_running to the letter: Algorithm 2 for each batch, Algorithm 1 for the running average.

    For batches of one size, because the published average weighs all batches the same.
    """
    q = group.X.shape[2]

    if not group.X.any():
        return kfoc_running(group, batches)

    def power_method(backward, forward):
        L = torch.randn(q, q, dtype=torch.float64)
        L = L / torch.linalg.norm(L)
        for _ in range(max_iter):
            R = backward(L)
            new = forward(R / torch.linalg.norm(R))
            new = new / torch.linalg.norm(new)
            change, L = torch.linalg.norm(new - L), new
            if change < tol:
                break
        return L, backward(L)

    running = None
    for count, batch in enumerate(batches, start=1):
        Xs = group.X[batch].flatten(0, 1)
        of_batch = power_method(
            lambda L, Xs=Xs: sum(X.T @ L @ X for X in Xs) / len(batch),  # noqa: B023
            lambda R, Xs=Xs: sum(X @ R @ X.T for X in Xs) / len(batch),  # noqa: B023
        )
        if running is None:
            running = of_batch
            continue
        pairs = [(running[0], (count - 1) / count * running[1]), (of_batch[0], of_batch[1] / count)]
        running = power_method(
            lambda L, pairs=pairs: sum((left * L).sum() * right for left, right in pairs),
            lambda R, pairs=pairs: sum((right * R).sum() * left for left, right in pairs),
        )
    return 1.0, *running


def ekfac(group, G, A):
    """The dense block with the exact second moments in the eigenbasis of two factors."""
    Q = torch.kron(torch.linalg.eigh(G)[1].contiguous(), torch.linalg.eigh(A)[1].contiguous())
    rotated = group.X.flatten(2) @ Q
    return Q @ torch.diag(rotated.square().sum((0, 1)) / len(rotated)) @ Q.T


def error(approximation, exact):
    """‖F̂ − F‖_F / ‖F‖_F."""
    return float(torch.linalg.norm(approximation - exact) / torch.linalg.norm(exact))
