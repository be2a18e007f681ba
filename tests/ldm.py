"""Write a model as a single file in LDM's layout, numbering blocks one after another, as LDM builds them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


def write_ldm(
    folder: Path,
    file: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    change: Callable[[State], object] | None = None,
    configs: bool = True,
) -> Path:
    """Write a diffusers folder's weights as an LDM file, its configs beside it, and return the file.

    Args:
        folder: as `write_tiny_base` writes it.
        file: ends in .safetensors.
        metadata: of the header.
        change: alters the tensors before they are written.
        configs: copy the JSON files to the folder of the file's own name.
    """
    state = ldm_state(load_models(folder), sd2=is_sd2(folder))
    if change is not None:
        change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, file, dict(metadata or {}))
    if configs:
        for path in [*folder.rglob("*.json"), *folder.rglob("merges.txt")]:
            target = file.with_suffix("") / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return file


def write_header(file: Path, state: Mapping[str, Tensor], dtype: str = "F16") -> Path:
    """Write a file with these keys and shapes whose data is a hole: true sizes without the disk space."""
    sizes = {"F16": 2, "F32": 4}
    header: dict[str, Any] = {}
    end = 0
    for key, value in state.items():
        start, end = end, end + value.numel() * sizes[dtype]
        header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
    return file


def is_sd2(folder: Path) -> bool:
    """Tell SD2 from SD1, whose text encoders differ in nothing but width and activation."""
    return bool(json.loads((folder / "text_encoder/config.json").read_text())["hidden_act"] == "gelu")


def load_models(folder: Path) -> dict[str, Any]:
    """Return the folder's models by their part."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    return {
        part: kind.from_pretrained(folder / part).eval()
        for part, kind in kinds.items()
        if (folder / part).is_dir()
    }


def ldm_state(models: Mapping[str, Any], *, sd2: bool = False) -> State:
    """Return the models' weights under LDM's keys, with what published files hold beside them."""
    state = {f"model.diffusion_model.{key}": value for key, value in unet_state(models["unet"])}
    state |= {f"first_stage_model.{key}": value for key, value in vae_state(models["vae"])}
    first = text_state(models["text_encoder"])
    if "text_encoder_2" in models:
        state |= {f"conditioner.embedders.0.transformer.text_model.{k}": v for k, v in first.items()}
        second = open_clip_state(text_state(models["text_encoder_2"]))
        projection = models["text_encoder_2"].text_projection.weight
        second |= {"text_projection": projection.detach().T, "logit_scale": torch.tensor(1.0)}
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    elif sd2:
        count = models["text_encoder"].config.num_hidden_layers
        layer = {key: value for key, value in first.items() if key.startswith("encoder.layers.0.")}
        last = {key.replace("layers.0.", f"layers.{count}."): value + 1 for key, value in layer.items()}
        second = open_clip_state({**first, **last})
        width = first["final_layer_norm.weight"].shape[0]
        second |= {"text_projection": torch.zeros(width, width), "logit_scale": torch.tensor(1.0)}
        state |= {f"cond_stage_model.model.{key}": value for key, value in second.items()}
    else:
        state |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in first.items()}
        positions = torch.arange(first["embeddings.position_embedding.weight"].shape[0])[None]
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    state |= {key: torch.zeros(1000) for key in ("betas", "alphas_cumprod")}
    state |= {key: torch.zeros(1) for key in ("model_ema.decay", "model_ema.diffusion_modelout2weight")}
    return state


def _all(prefix: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.state_dict().items():
        yield f"{prefix}.{name}", value


def _resnet(prefix: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in RESNET:
        if getattr(module, ours, None) is not None:
            yield from _all(f"{prefix}.{theirs}", getattr(module, ours))


def unet_state(unet: Any) -> Iterator[tuple[str, Tensor]]:
    yield from _all("time_embed.0", unet.time_embedding.linear_1)
    yield from _all("time_embed.2", unet.time_embedding.linear_2)
    if getattr(unet, "add_embedding", None) is not None:
        yield from _all("label_emb.0.0", unet.add_embedding.linear_1)
        yield from _all("label_emb.0.2", unet.add_embedding.linear_2)
    yield from _all("input_blocks.0.0", unet.conv_in)
    number = 1
    for block in unet.down_blocks:
        attentions = list(getattr(block, "attentions", []))
        for index, resnet in enumerate(block.resnets):
            yield from _resnet(f"input_blocks.{number}.0", resnet)
            if attentions:
                yield from _all(f"input_blocks.{number}.1", attentions[index])
            number += 1
        for sampler in block.downsamplers or []:
            yield from _all(f"input_blocks.{number}.0.op", sampler.conv)
            number += 1
    yield from _resnet("middle_block.0", unet.mid_block.resnets[0])
    yield from _all("middle_block.1", unet.mid_block.attentions[0])
    yield from _resnet("middle_block.2", unet.mid_block.resnets[1])
    number = 0
    for block in unet.up_blocks:
        attentions = list(getattr(block, "attentions", []))
        for index, resnet in enumerate(block.resnets):
            place = 1
            yield from _resnet(f"output_blocks.{number}.0", resnet)
            if attentions:
                yield from _all(f"output_blocks.{number}.1", attentions[index])
                place = 2
            if block.upsamplers and index == len(block.resnets) - 1:
                yield from _all(f"output_blocks.{number}.{place}.conv", block.upsamplers[0].conv)
            number += 1
    yield from _all("out.0", unet.conv_norm_out)
    yield from _all("out.2", unet.conv_out)


def vae_state(vae: Any) -> Iterator[tuple[str, Tensor]]:
    for coder, name in ((vae.encoder, "encoder"), (vae.decoder, "decoder")):
        yield from _all(f"{name}.conv_in", coder.conv_in)
        yield from _all(f"{name}.norm_out", coder.conv_norm_out)
        yield from _all(f"{name}.conv_out", coder.conv_out)
        yield from _vae_resnet(f"{name}.mid.block_1", coder.mid_block.resnets[0])
        yield from _vae_resnet(f"{name}.mid.block_2", coder.mid_block.resnets[1])
        attention = coder.mid_block.attentions[0]
        yield from _all(f"{name}.mid.attn_1.norm", attention.group_norm)
        linears = (("q", attention.to_q), ("k", attention.to_k), ("v", attention.to_v))
        for letter, linear in (*linears, ("proj_out", attention.to_out[0])):
            yield f"{name}.mid.attn_1.{letter}.weight", linear.weight.detach()[:, :, None, None]
            yield f"{name}.mid.attn_1.{letter}.bias", linear.bias.detach()
        down = name == "encoder"
        # LDM numbers the decoder's levels by their size too, so its first block has the highest number.
        blocks = list(coder.down_blocks) if down else list(coder.up_blocks)[::-1]
        for level, block in enumerate(blocks):
            stem = f"{name}.{'down' if down else 'up'}.{level}"
            for index, resnet in enumerate(block.resnets):
                yield from _vae_resnet(f"{stem}.block.{index}", resnet)
            for sampler in (block.downsamplers if down else block.upsamplers) or []:
                yield from _all(f"{stem}.{'down' if down else 'up'}sample.conv", sampler.conv)
    yield from _all("quant_conv", vae.quant_conv)
    yield from _all("post_quant_conv", vae.post_quant_conv)


def _vae_resnet(prefix: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.state_dict().items():
        yield f"{prefix}.{name}".replace("conv_shortcut", "nin_shortcut"), value


def text_state(encoder: Any) -> State:
    """Return a text encoder's weights without `text_model.` and without a projection."""
    named = ((name.removeprefix("text_model."), value) for name, value in encoder.state_dict().items())
    return {name: value for name, value in named if not name.startswith("text_projection")}


def open_clip_state(state: State) -> State:
    """Return a text encoder's weights as OpenCLIP holds them: q, k and v in one tensor."""
    result: State = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    for number in sorted({int(name.split(".")[2]) for name in state if name.startswith("encoder.layers.")}):
        ours, theirs = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for end in ("weight", "bias"):
            parts = [state[f"{ours}.self_attn.{letter}_proj.{end}"] for letter in "qkv"]
            result[f"{theirs}.attn.in_proj_{end}"] = torch.cat(parts)
            result[f"{theirs}.attn.out_proj.{end}"] = state[f"{ours}.self_attn.out_proj.{end}"]
            result[f"{theirs}.ln_1.{end}"] = state[f"{ours}.layer_norm1.{end}"]
            result[f"{theirs}.ln_2.{end}"] = state[f"{ours}.layer_norm2.{end}"]
            result[f"{theirs}.mlp.c_fc.{end}"] = state[f"{ours}.mlp.fc1.{end}"]
            result[f"{theirs}.mlp.c_proj.{end}"] = state[f"{ours}.mlp.fc2.{end}"]
    return result
