"""Attention as one ONNX node: com.microsoft.MultiHeadAttention, written while tracing, not matched after.

ONNX Runtime's own fusions find no attention in the graphs of torch's dynamo exporter, and a pattern over
transposes and softmaxes breaks with every exporter. The module knows its heads, so it writes the node.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbadapter.errors import ExportError

__all__ = ["FusedAttnProcessor", "structure_copy", "use_fused_attention"]


class FusedAttnProcessor:
    """Multi-head attention: one MultiHeadAttention node in an ONNX export, torch's own function elsewhere.

        softmax(q k^T / sqrt(head_dim)) v     per head (Vaswani et al. 2017, section 3.2)

    Projections are called as modules (`to_q`, `to_k`, `to_v`, `to_out[0]`), so that layers which carry an
    adapter may stand in their places. Without a mask; `use_fused_attention` refuses what needs more.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the attended states, shaped like `hidden_states`.

        Args:
            attn: diffusers' Attention module.
            hidden_states: (batch, length, width).
            encoder_hidden_states: (batch, text length, text width); None means self-attention.
            attention_mask: must be None.
            temb: unused, part of diffusers' call.
        Raises:
            ExportError: there is a mask.
        """
        if attention_mask is not None:
            raise ExportError("fused attention takes no attention mask, got one; leave the mask out")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        attended = multi_head_attention(query, key, value, int(attn.heads))
        out: Tensor = attn.to_out[1](attn.to_out[0](attended))  # projection and dropout
        if attn.residual_connection:
            out = out + hidden_states
        factor = float(attn.rescale_output_factor)
        return out if factor == 1 else out / factor


def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Return the attention's output (batch, length, width of value).

    Args:
        query: (batch, length, width), width divisible by `heads`.
        key: (batch, text length, width).
        value: (batch, text length, width of value).
        heads: how many.
    """
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (query, key, value),
            {"num_heads": heads, "scale": (query.shape[-1] // heads) ** -0.5},
            dtype=query.dtype,
            shape=(*query.shape[:-1], value.shape[-1]),
            version=1,
        )
    query, key, value = (
        states.unflatten(-1, (heads, states.shape[-1] // heads)).transpose(1, 2)
        for states in (query, key, value)
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)


def structure_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose parts may be replaced; the weights are the very same tensors."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied: nn.Module = copy.deepcopy(model, shared)
    return copied


def use_fused_attention(unet: nn.Module) -> int:
    """Let every attention of a UNet2DConditionModel export as one node, and return how many there are.

    The UNet computes as before in torch. To take it back, keep `unet.attn_processors` from before and give
    it to `unet.set_attn_processor`.

    Raises:
        ExportError: a layer has parts that the fused form leaves out; the message names it. SD1, SD2 and
            SDXL have none.
    """
    model: Any = unet
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "set_processor")}
    for name, layer in layers.items():
        parts = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
        present = [part for part in parts if getattr(layer, part, None) is not None]
        if present:
            raise ExportError(
                f"{name} has {', '.join(present)}, which fused attention leaves out; "
                "export with --target portable"
            )
    model.set_attn_processor(FusedAttnProcessor())
    return len(layers)
