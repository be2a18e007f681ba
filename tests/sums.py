"""Random adapters, and their sums as whole matrices in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from dbadapter.adapter import Adapter, LoraWeights

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
TO_Q, TO_K = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k"
PROJ = "unet.down_blocks.0.attentions.0.proj_in"
CONV = "unet.down_blocks.0.resnets.0.conv1"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
# Weights' shapes, those of the base in conftest.
SHAPES = {TO_Q: (32, 32), TO_K: (32, 32), PROJ: (32, 32, 1, 1), CONV: (32, 32, 3, 3), Q_PROJ: (32, 32)}


def adapter(
    seed: int = 0,
    *,
    ranks: dict[str, int] | None = None,
    alpha: float = 3.0,
    scale: float = 0.1,
    family: str = "sd1",
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> Adapter:
    """Return an adapter with these ranks; `alpha` is the same in all layers."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, rank in (ranks or dict.fromkeys(SHAPES, 4)).items():
        out, *inner = SHAPES[name]
        a = torch.randn(rank, *inner, generator=generator) * scale
        b = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator) * scale
        modules[name] = LoraWeights(a.to(dtype), b.to(dtype), alpha)
    return Adapter(family, modules, metadata or {})


def flat(weights: LoraWeights) -> Tensor:
    """Return what a layer adds, in float64, as a matrix."""
    a, b = weights.lora_A.double().flatten(1), weights.lora_B.double().flatten(1)
    return (b @ a) * (weights.alpha / weights.rank)


def reference(adapters: dict[Adapter, float]) -> dict[str, Tensor]:
    """Return the weighted sum of whole matrices, layer by layer."""
    total: dict[str, Tensor] = {}
    for each, weight in adapters.items():
        for name, weights in each.modules.items():
            total[name] = total.get(name, torch.zeros(())) + weight * flat(weights)
    return total


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())
