"""Multi-head attention: its projections are functions, not modules, so they are written out while a pass is recorded.

The projections of query, key and value form one block, ``in_proj``: a matrix with three groups of rows that see different
inputs. If key and value have sizes of their own (``kdim=``, ``vdim=``), the three matrices are blocks ``q_proj``, ``k_proj``
and ``v_proj``, and their biases, which are one parameter, form the block ``in_proj``, whose only input is the 1. The output
projection is a separate block, a plain linear layer. Everything in between remains torch's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronlaplace.layers.base import Layer, LinearLayer, Report

__all__ = ["attention_forward", "attention_layers", "attention_refusal"]


_PARTS = ("q_proj", "k_proj", "v_proj")
"""The projections that are separate parameters if key and value have sizes of their own."""


class InProjectionLayer(LinearLayer):
    """Query, key and value projections: ``[in_proj_weight in_proj_bias]``, with three groups of rows.

    Inputs have shape ``(N, T, 3, E + 1)`` and end with a 1. If key and value differ in length from the query, the shorter
    ones are padded with zeros, including the final 1, so that sums over positions are right and positions can be counted.
    """

    @property
    def groups(self) -> int:
        return 3

    def positions(self, x: Tensor, grad: Tensor) -> Tensor:
        return x[0, ..., -1].sum(0).to(self.dtype).view(3, 1, 1)

    def activations(self, x: Tensor) -> Tensor:
        return x[..., : self.shape[1]].permute(2, 0, 1, 3).to(self.dtype)

    def gradients(self, grad: Tensor) -> Tensor:
        return grad.permute(2, 0, 1, 3).to(self.dtype)

    add_activation_moment = Layer.add_activation_moment
    project = Layer.project

    def squared_weight_gradients(self, calls: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> bool:
        return False


class InProjectionBias(InProjectionLayer):
    """Biases of query, key and value whose weights are separate blocks: ``[in_proj_bias]``, and the 1 is the only input."""

    @property
    def shape(self) -> tuple[int, int]:
        return next(iter(self.parameters.values())).numel(), 1


def attention_refusal(module: Any) -> str | None:
    """Return why this module cannot have a block, or None."""
    if module.bias_k is not None:
        return "add_bias_kv=True is not supported: those parameters are not weights of a layer"
    return None


def attention_layers(name: str, module: Any, tied_modules: Sequence[nn.Module] = ()) -> list[Layer]:
    """Make the blocks of the input projections; the output projection is found as a module."""
    prefix = f"{name}." if name else ""
    bias = {} if module.in_proj_bias is None else {f"{prefix}in_proj_bias": module.in_proj_bias}
    if not module._qkv_same_embed_dim:
        layers: list[Layer] = []
        for part in _PARTS:
            weight = {f"{prefix}{part}_weight": getattr(module, f"{part}_weight")}
            layers.append(LinearLayer(f"{prefix}{part}", module, weight, {}, tied_modules=tied_modules))
        if bias:
            layers.append(InProjectionBias(f"{prefix}in_proj", module, {}, bias, tied_modules=tied_modules))
        return layers
    weight = {f"{prefix}in_proj_weight": module.in_proj_weight}
    return [InProjectionLayer(f"{prefix}in_proj", module, weight, bias, tied_modules=tied_modules)]


def attention_forward(
    module: Any,
    report: Report,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the module's forward pass with its projections written out, so that they can be observed.

    Raises:
        NotImplementedError: If the inputs are unbatched.
    """
    if query.ndim != 3:
        raise NotImplementedError("attention needs batched inputs, with three axes; add one with x[None].")
    inputs = [x if module.batch_first else x.transpose(0, 1) for x in (query, key, value)]
    size = module.embed_dim
    longest = max(x.shape[1] for x in inputs)
    # Zeros are added to the projections: the gradient at the zeros is that of the projections, padded to one length.
    joint = module._qkv_same_embed_dim
    block = 0 if joint else len(_PARTS)
    probe = report.probe(block, query.new_zeros(len(inputs[0]), longest, 3, size))
    weights = module.in_proj_weight.chunk(3) if joint else [getattr(module, f"{part}_weight") for part in _PARTS]
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    projected = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    if not joint:
        for i, (x, output) in enumerate(zip(inputs, projected, strict=True)):
            report(i, x, output)
    q, k, v = ((y + probe[:, : y.shape[1], i]).transpose(0, 1) for i, y in enumerate(projected))
    if joint or module.in_proj_bias is not None:
        seen = inputs if joint else [x[..., :0] for x in inputs]
        padded = [F.pad(F.pad(x, (0, 1), value=1.0), (0, 0, 0, longest - x.shape[1])) for x in seen]
        report(block, torch.stack(padded, dim=2), probe)
    # Torch's own attention runs between identity projections: multiplying by the identity is exact.
    identity = torch.eye(size, dtype=query.dtype, device=query.device)
    attended, attention = F.multi_head_attention_forward(
        q,
        k,
        v,
        size,
        module.num_heads,
        torch.cat([identity] * 3),
        None,
        None,
        None,
        module.add_zero_attn,
        module.dropout,
        identity,
        None,
        training=module.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    output = module.out_proj(attended)
    return output.transpose(0, 1) if module.batch_first else output, attention
