"""How many floating-point operations a UNet's call and a training step take, counted without weights.

torch's FlopCounterMode counts products and convolutions (a multiplication and an addition are two) as they
are called on the meta device, where attention is the plain one: two products. Norms and activations count
nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["call_flops", "step_flops"]


def call_flops(base: Path, inputs: Mapping[str, Tensor]) -> int:
    """Return the operations of one UNet call.

    Args:
        base: folder in diffusers' layout.
        inputs: by the graph's names, of `inference_variants.unet_inputs`.
    """
    unet = _unet(base)
    values = {name: value.to("meta") for name, value in inputs.items()}
    added = {name: values[name] for name in ("text_embeds", "time_ids") if name in values}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(
            values["sample"],
            values["timestep"],
            values["encoder_hidden_states"],
            added_cond_kwargs=added or None,
        )
    return int(counter.get_total_flops())


@functools.cache
def step_flops(
    base: Path, resolution: int, batch: int, *, full: bool, rank: int, text_encoder: bool, distill: bool
) -> int:
    """Return the operations of one training step: the teacher's call, forward and backward.

    Args:
        base: folder in diffusers' layout.
        resolution: pixels a side.
        batch: photographs a step; a prior adds as many.
        full: train everything; else an adapter on the attention.
        rank: of the adapter.
        text_encoder: whether the text encoders are trained too.
        distill: whether the prior is the base itself, as a teacher.
    """
    from dbadapter.lora import inject
    from dbadapter.memory import _step

    unet, texts = _unet(base), _texts(base) if text_encoder else []
    if full:
        for model in (unet, *texts):
            model.requires_grad_(True)
    else:
        both: list[Any] = [*texts, None, None]
        inject(unet, both[0], both[1], rank=rank, text_encoder_rank=rank, targets=("attention",), seed=0)
    vae = json.loads((base / "vae/config.json").read_text(encoding="utf-8"))
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    shape = (int(unet.config.in_channels), side, side)
    length = json.loads((base / "text_encoder/config.json").read_text(encoding="utf-8"))
    samples = 2 * batch if distill else batch
    with FlopCounterMode(display=False) as counter:
        _step(
            unet,
            texts,
            nullcontext(),  # type: ignore[arg-type]
            shape,
            int(length["max_position_embeddings"]),
            samples,
            batch if distill else 0,
        )
    return int(counter.get_total_flops())


def _unet(base: Path) -> Any:
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(base / "unet")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).requires_grad_(False)


def _texts(base: Path) -> list[Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    found = []
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if (base / name).is_dir():
            with torch.device("meta"):
                found.append(kind(CLIPTextConfig.from_pretrained(base / name)).requires_grad_(False))
    return found
