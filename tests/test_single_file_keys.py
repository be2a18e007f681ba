"""Names at the true sizes: the published models' keys and shapes, with a hole in place of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ldm import ldm_state, write_header
from tiny_bases import FAMILIES

from dbadapter.single_file import CONFIGS, check_single_file, inspect_single_file
from dbadapter.single_file_keys import unet_source, vae_source

PARAMETERS = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


def true_models(family: str) -> dict[str, Any]:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(part: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((CONFIGS / family / part / "config.json").read_text())
        return content

    with init_empty_weights():
        models = {
            "unet": UNet2DConditionModel.from_config(config("unet")),
            "vae": AutoencoderKL.from_config(config("vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
        }
        if family == "sdxl":
            models["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2")))
    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_true_sizes(family: str, tmp_path: Path) -> None:
    models = true_models(family)
    counts = {part: sum(each.numel() for each in model.parameters()) for part, model in models.items()}
    assert counts == PARAMETERS[family]
    path = write_header(tmp_path / "model.safetensors", ldm_state(models, sd2=family == "sd2"))
    file = inspect_single_file(path, "v_prediction" if family == "sd2" else None)
    assert (file.family, file.configs) == (family, CONFIGS / family)
    check_single_file(file)


# Keys and shapes of the published files, written down by hand: the writer is held to them too.
LANDMARKS: dict[str, dict[str, tuple[int, ...]]] = {
    "sd1": {
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.input_blocks.2.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.input_blocks.9.0.op.bias": (1280,),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    },
    "sd2": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.input_blocks.2.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.weight": (5120, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_writer_has_the_keys_of_the_published_files(family: str) -> None:
    state = ldm_state(true_models(family), sd2=family == "sd2")
    assert {key: tuple(state[key].shape) for key in LANDMARKS[family]} == LANDMARKS[family]


@pytest.mark.parametrize(
    "name",
    [
        "class_embedding.linear_1.weight",
        "down_blocks.0.motion_modules.0.proj_in.weight",
        "down_blocks.0.resnets.0.norm3.weight",
        "mid_block.resnets.2.norm1.weight",
        "encoder_hid_proj.weight",
    ],
)
def test_names_without_a_place(name: str) -> None:
    assert unet_source(name, 2, {1, 2, 3}) is None
    assert vae_source("encoder.mid_block.attentions.0.add_k_proj.weight", 4) is None
