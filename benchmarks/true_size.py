"""Bases of the published sizes with random weights, `write_base(folder, "sd1")`: noise at the full cost.

The configurations are those of the published folders (runwayml/stable-diffusion-v1-5, stabilityai/
stable-diffusion-2-1, stabilityai/stable-diffusion-xl-base-1.0); speed and memory depend on nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbadapter import toybox

__all__ = ["FAMILIES", "build", "write_base"]

_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_num_groups": 32,
}
_THREE_AND_ONE: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_CLIP_L = _TEXT | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
# The published folder has 23 of its 24 layers: SD2 reads the last but one.
_OPENCLIP_H = _TEXT | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPENCLIP_G = _TEXT | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}

#: Family -> pipeline class, scheduler, and each model's class and configuration.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "sd1": {
        "pipeline": "StableDiffusionPipeline",
        "scheduler": ("PNDMScheduler", _BETAS | {"set_alpha_to_one": False, "skip_prk_steps": True}),
        "tokenizers": {"tokenizer": "<|endoftext|>"},
        "models": {
            "unet": (
                "UNet2DConditionModel",
                _UNET
                | _THREE_AND_ONE
                | {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
            ),
            "vae": ("AutoencoderKL", _VAE | {"sample_size": 512, "scaling_factor": 0.18215}),
            "text_encoder": ("CLIPTextModel", _CLIP_L),
        },
    },
    "sd2": {
        "pipeline": "StableDiffusionPipeline",
        "scheduler": (
            "DDIMScheduler",
            _BETAS | {"set_alpha_to_one": False, "clip_sample": False, "prediction_type": "v_prediction"},
        ),
        "tokenizers": {"tokenizer": "!"},
        "models": {
            "unet": (
                "UNet2DConditionModel",
                _UNET
                | _THREE_AND_ONE
                | {
                    "sample_size": 96,
                    "attention_head_dim": (5, 10, 20, 20),
                    "cross_attention_dim": 1024,
                    "use_linear_projection": True,
                    "upcast_attention": True,
                },
            ),
            "vae": ("AutoencoderKL", _VAE | {"sample_size": 768, "scaling_factor": 0.18215}),
            "text_encoder": ("CLIPTextModel", _OPENCLIP_H),
        },
    },
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline",
        "scheduler": ("EulerDiscreteScheduler", _BETAS | {"timestep_spacing": "leading"}),
        "tokenizers": {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
        "models": {
            "unet": (
                "UNet2DConditionModel",
                _UNET
                | {
                    "sample_size": 128,
                    "block_out_channels": (320, 640, 1280),
                    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                    "transformer_layers_per_block": (1, 2, 10),
                    "attention_head_dim": (5, 10, 20),
                    "cross_attention_dim": 2048,
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                },
            ),
            "vae": (
                "AutoencoderKL",
                _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
            ),
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", _OPENCLIP_G),
        },
    },
}


def build(
    family: str,
    part: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    """Return one model of a family with the libraries' own random weights, in evaluation mode.

    Args:
        family: "sd1", "sd2" or "sdxl".
        part: "unet", "vae", "text_encoder" or, for sdxl, "text_encoder_2".
        device: "meta" takes no memory and gives no values.
        dtype: of every weight.
        seed: of the weights.
    Raises:
        KeyError: no such family or part.
    """
    import diffusers
    import transformers

    name, config = FAMILIES[family]["models"][part]
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not cast afterwards: SDXL's UNet in float32 is 10 GB
    try:
        with torch.device(device):
            if hasattr(diffusers, name):
                model: nn.Module = getattr(diffusers, name)(**config)
            else:
                model = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
    finally:
        torch.set_default_dtype(before)
    # nn.Module's own `to`: diffusers' prints a warning about an empty list of layers to keep in float32.
    return nn.Module.to(model, dtype).eval()


def write_base(folder: Path, family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Path:
    """Write a diffusers folder of a family's true size with random weights, unless it is there already.

    Takes the memory of its largest part: 3.4 GB for sd1 and sd2, 10 GB for sdxl; half that in bfloat16.

    Args:
        folder: replaced if it holds another family, dtype or seed.
        family: "sd1", "sd2" or "sdxl".
        dtype: of every weight.
        seed: of the weights.
    Returns:
        The folder.
    Raises:
        KeyError: no such family.
        ValueError: the folder is there and was not written by this function.
    """
    import diffusers

    about = FAMILIES[family]
    record = {"family": family, "dtype": str(dtype).removeprefix("torch."), "seed": seed}
    note = folder / "true_size.json"
    if (folder / "model_index.json").exists() and note.exists() and json.loads(note.read_text()) == record:
        return folder
    if folder.exists() and any(folder.iterdir()) and not note.exists():
        raise ValueError(f"{folder} holds something else; pass an empty folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    note.write_text(json.dumps(record) + "\n")
    index: dict[str, Any] = {"_class_name": about["pipeline"], "_diffusers_version": diffusers.__version__}
    for part, (name, _) in about["models"].items():
        build(family, part, dtype=dtype, seed=seed).save_pretrained(folder / part)
        index[part] = ["diffusers" if hasattr(diffusers, name) else "transformers", name]
    for part, pad in about["tokenizers"].items():
        _write_tokenizer(folder / part, pad)
        index[part] = ["transformers", "CLIPTokenizer"]
    scheduler, config = about["scheduler"]
    getattr(diffusers, scheduler)(**config).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", scheduler]
    if family == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    # Last: a folder with it is whole.
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _write_tokenizer(folder: Path, pad: str) -> None:
    """Write CLIP's tokenizer for 77 tokens; toybox carries the same vocabulary for 32."""
    source = toybox.folder() / "tokenizer"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, folder / name)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = json.loads((source / name).read_text(encoding="utf-8")) | {"pad_token": pad}
        if name == "tokenizer_config.json":
            config |= {"model_max_length": 77}
        (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
