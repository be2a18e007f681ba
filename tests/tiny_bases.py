"""Tiny random bases of each family as diffusers folders: 32 px pictures, latents 8 x 8 x 4, 32 tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

Family = Literal["sd1", "sd2", "sdxl"]
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")

LENGTH = 32  # tokens of a prompt, start and end included
PAD_TOKENS = {"clip_l": "<|endoftext|>", "open_clip": "!"}


def write_tiny_base(
    folder: Path,
    family: Family,
    *,
    prediction_type: str = "epsilon",
    seed: int = 0,
    clip_vocabulary: bool = True,
    shallow: bool = False,
) -> Path:
    """Write a random base of the family as a folder that diffusers loads, and return the folder.

    Args:
        folder: made where it is missing.
        family: what it is built like: sd2 with linear projections, GELU, heads per level and "!" as the
            padding; sdxl with two text encoders and tokenizers, `text_time` embeddings and LDM's two
            resnets per level.
        prediction_type: what its scheduler says.
        seed: of all weights; the same seed gives the same weights.
        clip_vocabulary: CLIP's 49,408 tokens, or, faster, the 514 that spell every text byte by byte.
        shallow: of sdxl a UNet with one resnet per level and one block per transformer, which is exported
            in about half the time; single files need the two of LDM.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    size = 49408 if clip_vocabulary else 514
    with torch.random.fork_rng(devices=[]):  # the weights are made on the CPU
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "text_encoder": _text_encoder(size, "gelu" if family == "sd2" else "quick_gelu"),
            "unet": tiny_unet(family, shallow=shallow),
            "vae": _vae(family),
            "scheduler": _scheduler(family, prediction_type),
        }
        if family == "sdxl":
            parts["text_encoder_2"] = _text_encoder(size, "gelu", projected=True)
    parts["tokenizer"] = write_tokenizer(
        folder / "tokenizer", PAD_TOKENS["open_clip" if family == "sd2" else "clip_l"], clip_vocabulary
    )
    if family == "sdxl":
        parts["tokenizer_2"] = write_tokenizer(
            folder / "tokenizer_2", PAD_TOKENS["open_clip"], clip_vocabulary
        )
        StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(folder)
    else:
        extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts, **extras).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, pad_token: str, clip_vocabulary: bool = True) -> Any:
    """Write a CLIPTokenizer's files and return it; without CLIP's vocabulary it spells byte by byte."""
    from transformers import CLIPTokenizer

    from dbadapter import toybox

    folder.mkdir(parents=True, exist_ok=True)
    source = toybox.folder() / "tokenizer"
    if clip_vocabulary:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(source / name, folder / name)
    else:
        known = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
        letters = sorted(known, key=known.__getitem__)[:512]  # 256 bytes, inside and at the end of a word
        words = [*letters, "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {word: index for index, word in enumerate(words)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=LENGTH)


def _text_encoder(vocabulary: int, activation: str, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width = 48 if projected else 32
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act=activation,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def tiny_unet(family: Family, *, shallow: bool = False) -> Any:
    """Return the UNet of `write_tiny_base`, with weights from torch's own generator."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    }
    if family == "sd2":
        config |= {"use_linear_projection": True, "attention_head_dim": (2, 4)}
    if family == "sdxl":
        config |= {
            "layers_per_block": 1 if shallow else 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32 + 48,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 1) if shallow else (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 48 + 6 * 8,  # the pooled text and six numbers
        }
    return UNet2DConditionModel(**config)


def _vae(family: Family) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.13025 if family == "sdxl" else 0.7,
        force_upcast=family == "sdxl",
    )


def _scheduler(family: Family, prediction_type: str) -> Any:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    common: dict[str, Any] = {**betas, "steps_offset": 1, "prediction_type": prediction_type}
    if family == "sdxl":
        return EulerDiscreteScheduler(**common, timestep_spacing="leading")
    return DDIMScheduler(**common, clip_sample=False)
