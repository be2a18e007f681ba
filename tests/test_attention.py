"""Fused attention in torch: the UNet computes what it computed; what the fused form leaves out is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_bases import FAMILIES, Family, tiny_unet
from torch import nn

from dbadapter.errors import ExportError
from dbadapter.export.attention import FusedAttnProcessor, use_fused_attention


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unet_computes_as_before(family: Family) -> None:
    torch.manual_seed(0)
    unet = tiny_unet(family).eval()
    call: dict[str, Any] = {"return_dict": False}
    if family == "sdxl":
        call["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 48), "time_ids": torch.randn(2, 6)}
    inputs = (torch.randn(2, 4, 4, 6), 500, torch.randn(2, 7, unet.config.cross_attention_dim))
    before = dict(unet.attn_processors)
    with torch.no_grad():
        expected = unet(*inputs, **call)[0]
        count = use_fused_attention(unet)
        actual = unet(*inputs, **call)[0]
    assert count == len(before) == sum(isinstance(module, Attention) for module in unet.modules())
    assert torch.allclose(actual, expected, atol=1e-6)
    assert {type(one) for one in unet.attn_processors.values()} == {FusedAttnProcessor}
    unet.set_attn_processor(before)
    assert FusedAttnProcessor not in {type(one) for one in unet.attn_processors.values()}


def test_layers_in_the_projections_places_are_called() -> None:
    attn = Attention(query_dim=8, heads=2, dim_head=4, processor=FusedAttnProcessor())
    called = []

    class Told(nn.Module):
        def __init__(self, name: str, layer: nn.Module) -> None:
            super().__init__()
            self.name, self.layer = name, layer

        def forward(self, x: torch.Tensor) -> Any:
            called.append(self.name)
            return self.layer(x)

    for name in ("to_q", "to_k", "to_v"):
        setattr(attn, name, Told(name, attn.get_submodule(name)))
    attn.to_out[0] = Told("to_out.0", attn.to_out[0])
    attn(torch.randn(1, 3, 8))
    assert called == ["to_q", "to_k", "to_v", "to_out.0"]


def test_what_the_fused_form_leaves_out_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.middle = Attention(query_dim=8, heads=2, dim_head=4, norm_num_groups=2)

    with pytest.raises(ExportError, match="middle has group_norm"):
        use_fused_attention(Model())
    attn = Attention(query_dim=8, heads=2, dim_head=4, processor=FusedAttnProcessor())
    with pytest.raises(ExportError, match="no attention mask"):
        attn(torch.randn(1, 3, 8), attention_mask=torch.zeros(1, 1, 3))
