"""Adapters of a few layers and small numbers, and files of them, that several tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dbadapter.adapter_file import Adapter, LoraWeights

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
CONV = "unet.down_blocks.0.resnets.1.conv1"
KOHYA_TO_K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


def example(family: str = "sd1", width: int = 12) -> Adapter:
    """Return an adapter of three layers, one of them a convolution; alpha is not the rank."""
    generator = torch.Generator().manual_seed(0)

    def weights(a: tuple[int, ...], b: tuple[int, ...], alpha: float) -> LoraWeights:
        return LoraWeights(torch.randn(a, generator=generator), torch.randn(b, generator=generator), alpha)

    return Adapter(
        family,
        {
            TO_K: weights((4, width), (8, 4), 2.0),
            Q_PROJ: weights((3, 6), (6, 3), 9.5),
            CONV: weights((2, 5, 3, 3), (7, 2, 1, 1), 2.0),
        },
    )


SMALL = Adapter("sd1", {TO_K: LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 2.0)})


def peft_file(path: Path, metadata: dict[str, Any] | str | None) -> Path:
    tensors = {f"{TO_K}.lora_A.weight": torch.ones(2, 3), f"{TO_K}.lora_B.weight": torch.ones(4, 2)}
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(tensors, path, None if metadata is None else {"lora_adapter_metadata": text})
    return path
