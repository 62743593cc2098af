"""Recurrent layers: time steps are the positions, ``a_t = (x_t, h_{t−1}, 1)`` (coordinate-free K-FAC, Eq. 4.7).

Torch computes them in one fused call, inside which nothing can be observed. While a pass is recorded, the module instead
runs written out, with the same formulas step by step; the outputs are equal up to rounding.

`nn.RNN` and `nn.LSTM` have one block ``[W_ih W_hh b]`` per layer and direction. Their two biases act only through their
sum, so ``b`` is the sum. In a GRU, the contributions of the input and the hidden state are combined behind a gate, so
``[W_ih b_ih]`` and ``[W_hh b_hh]`` see different gradients and have a block each. An LSTM with projected states
(``proj_size=``) has another block for each projection ``W_hr``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronlaplace.layers.base import Layer, LinearLayer, Report

__all__ = ["recurrent_forward", "recurrent_layers"]

State = tuple[Tensor, ...]


def recurrent_layers(name: str, module: Any, tied_modules: Sequence[nn.Module] = ()) -> list[Layer]:
    """Make the blocks of a recurrent module or cell."""
    prefix = f"{name}." if name else ""
    cell = isinstance(module, nn.RNNCellBase)
    suffixes = [""] if cell else [f"_{suffix}" for suffix in _suffixes(module)]
    layers: list[Layer] = []
    for suffix in suffixes:
        named = {key: getattr(module, key + suffix) for key in ("weight_ih", "weight_hh")}
        weights = {f"{prefix}{key}{suffix}": value for key, value in named.items()}
        biases = {}
        if module.bias:
            biases = {f"{prefix}{key}{suffix}": getattr(module, key + suffix) for key in ("bias_ih", "bias_hh")}
        if isinstance(module, (nn.GRU, nn.GRUCell)):
            for i, part in enumerate(("ih", "hh")):
                layers.append(
                    LinearLayer(
                        f"{prefix}{part}{suffix}",
                        module,
                        dict([list(weights.items())[i]]),
                        dict(list(biases.items())[i : i + 1]),
                        tied_modules=tied_modules,
                    )
                )
            continue
        several = len(suffixes) > 1
        block = f"{prefix}{suffix.removeprefix('_')}" if several else name
        first, second = dict(list(biases.items())[:1]), dict(list(biases.items())[1:])
        layers.append(LinearLayer(block, module, weights, first, second, tied_modules=tied_modules))
        if _projection(module, suffix) is not None:
            projection = {f"{prefix}weight_hr{suffix}": _projection(module, suffix)}
            layers.append(LinearLayer(f"{prefix}hr{suffix}", module, projection, {}, tied_modules=tied_modules))
    return layers


def recurrent_forward(module: Any, report: Report, *args: Any, **kwargs: Any) -> Any:
    """Run the module's forward pass written out; its blocks, in the order of `recurrent_layers`, report their calls.

    Raises:
        NotImplementedError: If the inputs are packed or unbatched.
    """
    x, hx = _arguments(*args, **kwargs)
    if isinstance(module, nn.RNNCellBase):
        if x.ndim != 2:
            raise NotImplementedError("cells need inputs of shape (examples, features).")
        state = _initial(module, hx, x)
        steps, state = _run(module, "", 0, report, x.unsqueeze(1), state)
        return state if isinstance(module, nn.LSTMCell) else state[0]
    if not isinstance(x, Tensor):
        raise NotImplementedError("packed sequences are not supported: use padded ones.")
    if x.ndim != 3:
        raise NotImplementedError("recurrent layers need batched inputs, with three axes; add one with x[None].")
    x = x if module.batch_first else x.transpose(0, 1)
    directions = 2 if module.bidirectional else 1
    n_states = 2 if isinstance(module, nn.LSTM) else 1
    if hx is None:
        sizes = (module.proj_size or module.hidden_size, module.hidden_size)[:n_states]
        count, dtype = module.num_layers * directions, module.weight_ih_l0.dtype
        hx = tuple(x.new_zeros(count, len(x), size, dtype=dtype) for size in sizes)
    elif isinstance(hx, Tensor):
        hx = (hx,)
    per_step = 2 if isinstance(module, nn.GRU) or module.proj_size else 1
    finals: list[State] = []
    for i in range(module.num_layers):
        outputs = []
        for d in range(directions):
            index = i * directions + d
            suffix = f"_l{i}{'_reverse' if d else ''}"
            steps, final = _run(
                module, suffix, index * per_step, report, x.flip(1) if d else x, tuple(state[index] for state in hx)
            )
            outputs.append(steps.flip(1) if d else steps)
            finals.append(final)
        x = torch.cat(outputs, dim=2) if directions == 2 else outputs[0]
        if module.training and module.dropout and i + 1 < module.num_layers:  # drawn in torch's own order, time first
            x = F.dropout(x.transpose(0, 1).contiguous(), module.dropout).transpose(0, 1)
    last = tuple(torch.stack(states) for states in zip(*finals, strict=True))
    return x if module.batch_first else x.transpose(0, 1), last if isinstance(module, nn.LSTM) else last[0]


def _run(module: Any, suffix: str, block: int, report: Report, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Run one layer in one direction over ``x`` of shape ``(N, T, features)``; ``block`` is the index of its first block."""
    weights = [getattr(module, f"weight_{part}{suffix}") for part in ("ih", "hh")]
    biases = [getattr(module, f"bias_{part}{suffix}") if module.bias else None for part in ("ih", "hh")]
    from_input = F.linear(x, weights[0], biases[0])
    gru = isinstance(module, (nn.GRU, nn.GRUCell))
    # Zeros are added to the pre-activations of all steps: the gradient at the zeros is that of the steps, stacked.
    probe = report.probe(block + 1, torch.zeros_like(from_input)) if gru else None
    projection = _projection(module, suffix)
    if projection is not None:
        shift = report.probe(block + 1, from_input.new_zeros(*x.shape[:2], len(projection)))
    step = _gru if gru else _lstm if isinstance(module, (nn.LSTM, nn.LSTMCell)) else _ACTIVATIONS[module.nonlinearity]
    hidden, outputs, unprojected = [], [], []
    for t in range(x.shape[1]):
        hidden.append(state[0])
        from_hidden = F.linear(state[0], weights[1], biases[1])
        if probe is not None:
            from_hidden = from_hidden + probe[:, t]
        state = step(from_input[:, t], from_hidden, state)
        if projection is not None:
            unprojected.append(state[0])
            state = (F.linear(state[0], projection) + shift[:, t], *state[1:])
        outputs.append(state[0])
    before = torch.stack(hidden, dim=1)
    if probe is not None:
        report(block, x, from_input)
        report(block + 1, before, probe)
    else:
        report(block, torch.cat([x, before], dim=2), from_input)
        if projection is not None:
            report(block + 1, torch.stack(unprojected, dim=1), shift)
    return torch.stack(outputs, dim=1), state


def _projection(module: Any, suffix: str) -> Any:
    """Return the matrix that projects the states of an LSTM, shape ``(proj_size, hidden_size)``, or None."""
    return getattr(module, f"weight_hr{suffix}", None)


def _lstm(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    i, f, g, o = (from_input + from_hidden).chunk(4, dim=1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    (r_x, z_x, n_x), (r_h, z_h, n_h) = from_input.chunk(3, dim=1), from_hidden.chunk(3, dim=1)
    z = torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return ((1 - z) * n + z * state[0],)


_ACTIVATIONS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "tanh": lambda from_input, from_hidden, state: (torch.tanh(from_input + from_hidden),),
    "relu": lambda from_input, from_hidden, state: (torch.relu(from_input + from_hidden),),
}


def _arguments(input: Any, hx: Any = None) -> tuple[Any, Any]:
    return input, hx


def _initial(module: Any, hx: Any, x: Tensor) -> State:
    if hx is None:
        zero = x.new_zeros(len(x), module.hidden_size, dtype=module.weight_ih.dtype)
        return (zero, zero) if isinstance(module, nn.LSTMCell) else (zero,)
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _suffixes(module: Any) -> list[str]:
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{i}{direction}" for i in range(module.num_layers) for direction in directions]
