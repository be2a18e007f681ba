"""Files that are no checkpoint of Stable Diffusion are refused by their kind, in one line with the cure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dbadapter.errors import BaseError
from dbadapter.file_kinds import FIRST_LAYER as FIRST
from dbadapter.single_file import inspect_single_file


def refusal(path: Path) -> str:
    with pytest.raises(BaseError) as caught:
        inspect_single_file(path)
    message = str(caught.value)
    assert message.startswith(f"base {path}: ")
    assert "\n" not in message
    assert ";" in message  # the cure
    return message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04" + bytes(100), "a pickle, which can run code; convert it to safetensors"),
        (b"\x80\x02}q\x00" + bytes(100), "a pickle"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of git LFS"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"not safetensors at all", "cannot be read as safetensors"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "no key of a Stable Diffusion checkpoint"),
    ],
)
def test_bytes_of_something_else(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "pass it with --adapter"),
        (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "an adapter"),
        (["lora_unet_x.hada_w1_a"], "an adapter"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "an adapter"),
        (["control_model.time_embed.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight", "conv_in.weight"], "a ControlNet"),
        (["emb_params"], "a textual inversion"),
        (["clip_g", "clip_l"], "a textual inversion"),
        (["<my-toy>"], "a textual inversion"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "SD3"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["transformer_blocks.0.attn.to_q.weight", "pos_embed.proj.weight"], "DiT"),
        (["model.diffusion_model.blocks.0.attn.qkv.weight"], "DiT"),
        (["adaln_single.linear.weight"], "DiT"),
        (["model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.bias"], "a video model"),
        (["down_blocks.0.1.channelwise.0.weight"], "Stable Cascade"),
        (["edm_mean", FIRST], "EDM"),
        (["model.diffusion_model.out.2.scale_weight", FIRST], "quantised"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a diffusers UNet"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight"], "a diffusers VAE"),
        (["text_model.embeddings.token_embedding.weight"], "a text encoder alone"),
        (["encoder.down.0.block.0.conv1.weight"], "a VAE alone"),
        (["first_stage_model.encoder.down.0.block.0.conv1.weight"], "a VAE alone"),
        (["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"], "a text encoder"),
        (["input_blocks.0.0.weight"], "a UNet alone"),
        ([FIRST], "a UNet without a text encoder"),
        ([FIRST, "cond_stage_model.transformer.token_emb.weight"], "not CLIP's"),
        ([FIRST, "conditioner.embedders.0.model.token_embedding.weight"], "the SDXL refiner"),
        ([FIRST, "conditioner.embedders.1.model.token_embedding.weight"], "first text encoder is missing"),
        (
            [
                FIRST,
                "cond_stage_model.model.token_embedding.weight",
                "model.diffusion_model.label_emb.0.0.bias",
            ],
            "unCLIP",
        ),
        ([FIRST, "cond_stage_model.model.token_embedding.weight"], "has no VAE"),
        (["some.other.weight"], "first key: some.other.weight"),
    ],
)
def test_other_files_are_refused_by_name(keys: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(4, 4, 1, 1) for key in keys}, path)
    assert message in refusal(path)
