"""Every layer type once more, slowly: what each use of a layer's weights has seen, and the gradients behind it."""

import math

import torch
from torch import nn

from tests.support.oracles.blocks import (
    CELLS,
    CONVOLUTIONS,
    BlockData,
    Group,
    blocks,
    example,
    n_examples,
    norms_written_out,
    recurrent_suffixes,
    weight_gradients,
)
from tests.support.oracles.one_layer import negative_log_likelihood, output_metric, patches

# -- every layer type ----------------------------------------------------------------------------------------


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
        state = (zeros[..., : module.proj_size or None], zeros) if long else zeros
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


RECURRENT_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def slow_cell(trace, module, arguments):
    x, state = arguments["input"], arguments.get("hx")
    long = isinstance(module, nn.LSTMCell)
    if state is None:
        zeros = x.new_zeros(len(x), module.hidden_size)
        state = (zeros, zeros) if long else zeros
    h0, c0 = state if long else (state, state)
    parameters = [getattr(module, n, None) for n in RECURRENT_PARAMETERS]
    h, c = slow_recurrence(trace, module, parameters, x[None], h0, c0)
    return (h[0], c) if long else h[0]


def slow_recurrence(trace, module, parameters, sequence, h, c):
    """One layer in one direction by the formulas of torch's documentation; sequence is (T, 1, inputs).

    Returns all hidden states (T, 1, hidden) and the last cell state. The hidden states that meet the weights are only
    known after the loop, so the shifts are made first and the inputs are noted last.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = parameters
    bias_ih, bias_hh = (0, 0) if b_ih is None else (b_ih, b_hh)
    gru = isinstance(module, (nn.GRU, nn.GRUCell))
    blank = torch.zeros(len(sequence), 0, dtype=torch.float64)
    (shift_ih,) = trace.shift(w_ih, [blank])
    (shift_hh,) = trace.shift(w_hh, [blank]) if gru else (torch.zeros_like(shift_ih),)
    (shift_hr,) = (shift_hh,) if w_hr is None else trace.shift(w_hr, [blank])
    before, after, unprojected = [], [], []
    for x, e_ih, e_hh, e_hr in zip(sequence, shift_ih, shift_hh, shift_hr, strict=True):
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
            if w_hr is not None:
                unprojected.append(h)
                h = h @ w_hr.T + e_hr
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
    if w_hr is not None:
        trace.uses[id(w_hr)][0][0][-1] = torch.cat(unprojected).detach()
    return torch.stack(after), c


def slow_attention(trace, module, arguments):
    """Scaled dot products, head by head, of batches of one; no masks on keys."""
    assert arguments.get("key_padding_mask") is None
    query = arguments.get("query", arguments.get("input"))
    key = arguments.get("key", arguments.get("hx"))
    value = arguments["value"]
    streams = [s[0] if module.batch_first else s[:, 0] for s in (query, key, value)]  # (T, E) each
    if module.in_proj_weight is not None:
        shifts = trace.shift(module.in_proj_weight, [with_one(s, module.in_proj_bias) for s in streams])
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        shifts = [trace.shift(w, [s])[0] for w, s in zip(weights, streams, strict=True)]
        if module.in_proj_bias is not None:
            ones = [s.new_ones(len(s), 1) for s in streams]
            shifts = [e + f for e, f in zip(shifts, trace.shift(module.in_proj_bias, ones), strict=True)]
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
