"""Multi-head attention: its projections are functions, not modules, so they are written out while a pass is recorded.

The projections of query, key and value form one block, ``in_proj``: a matrix with three groups of rows that see different
inputs. The output projection is a separate block, a plain linear layer. Everything in between remains torch's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronlaplace.layers.base import Layer, LinearLayer, Report

__all__ = ["attention_forward", "attention_layers", "attention_refusal"]


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


def attention_refusal(module: Any) -> str | None:
    """Return why this module cannot have a block, or None."""
    if not module._qkv_same_embed_dim:
        return "key and value dimensions that differ from the query's (kdim=, vdim=) are not supported"
    if module.bias_k is not None:
        return "add_bias_kv=True is not supported: those parameters are not weights of a layer"
    return None


def attention_layers(name: str, module: Any, tied_modules: Sequence[nn.Module] = ()) -> list[Layer]:
    """Make the block of the input projections; the output projection is found as a module."""
    prefix = f"{name}." if name else ""
    weight = {f"{prefix}in_proj_weight": module.in_proj_weight}
    bias = {} if module.in_proj_bias is None else {f"{prefix}in_proj_bias": module.in_proj_bias}
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
    probe = report.probe(0, query.new_zeros(len(inputs[0]), longest, 3, size))
    weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (
        (F.linear(x, w, b) + probe[:, : x.shape[1], i]).transpose(0, 1)
        for i, (x, w, b) in enumerate(zip(inputs, weights, biases, strict=True))
    )
    padded = [F.pad(F.pad(x, (0, 1), value=1.0), (0, 0, 0, longest - x.shape[1])) for x in inputs]
    report(0, torch.stack(padded, dim=2), probe)
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
