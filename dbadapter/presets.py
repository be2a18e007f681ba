"""What each base family gives to the fields of a training configuration that are left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """The values that a base family gives to the fields left at None.

    Args:
        sources: field -> where its value comes from.
        targets: layers of the UNet that get an adapter, by the names in `config.TARGETS`.
        max_train_steps: optimizer steps.
        learning_rate: AdamW's, for the UNet's adapter.
        text_encoder_learning_rate: AdamW's, for the adapters of the text encoders.
        full_learning_rate, full_text_encoder_learning_rate: AdamW's, where the models are trained whole.
        lr_scheduler: how the rates go on from there, of `config.LR_SCHEDULERS`.
        rank: of the adapter in the UNet and in the text encoders.
        train_text_encoder: whether the text encoders are adapted too.
        photo_tokens: whether in two of three passes each photograph's prompt ends in a rare token of its own.
        train_batch_size: instance pictures a forward pass; as many class pictures come with them.
        gradient_accumulation_steps: forward passes an optimizer step.
        prior_source: latents that prior `distill` compares on, of `config.PRIOR_SOURCES`.
        prior_loss_weight: weight of the prior term (lambda in Ruiz et al. 2022, equation 2).
        num_class_images: class pictures (or class latents, with prior `distill`) sampled from the base.
        checkpointing_steps: optimizer steps between two checkpoints; 0 writes none.
        resolution: pixels a side; None is the base's own.
        aspect_ratio_buckets: whether photographs keep about their own shape, at the resolution's area.
        mixed_precision: of `config.PRECISIONS`.
        guidance_scale: of classifier-free guidance, when pictures are generated.
    """

    sources: Mapping[str, str]
    targets: tuple[str, ...]
    max_train_steps: int
    learning_rate: float
    text_encoder_learning_rate: float
    full_learning_rate: float
    full_text_encoder_learning_rate: float
    lr_scheduler: str
    rank: int
    train_text_encoder: bool
    photo_tokens: bool
    train_batch_size: int
    gradient_accumulation_steps: int
    prior_source: str
    prior_loss_weight: float
    num_class_images: int
    checkpointing_steps: int
    resolution: int | None
    aspect_ratio_buckets: bool
    mixed_precision: str
    guidance_scale: float


_NOT_MEASURED = "not measured here"
_LORA_EXAMPLE = f"diffusers, examples/dreambooth/README.md, the LoRA example; {_NOT_MEASURED}"
_SDXL_EXAMPLE = f"diffusers, examples/dreambooth/README_sdxl.md; {_NOT_MEASURED}"
_FULL_EXAMPLE = f"diffusers, examples/dreambooth/README.md, full fine-tuning; {_NOT_MEASURED}"
_OURS = "dbadapter's own choice"

_SD = Preset(
    sources={
        "targets": "Hu et al. 2021, section 4.2, and diffusers' LoRA examples: attention only",
        "max_train_steps": _LORA_EXAMPLE,
        "learning_rate": _LORA_EXAMPLE,
        "text_encoder_learning_rate": f"sd-scripts, docs on train_network.py; {_NOT_MEASURED}",
        "full_learning_rate": _FULL_EXAMPLE,
        "full_text_encoder_learning_rate": f"{_FULL_EXAMPLE} (2e-6 with the text encoder)",
        "lr_scheduler": _LORA_EXAMPLE,
        "rank": f"{_OURS}: twice the default of diffusers' scripts; {_NOT_MEASURED}",
        "train_text_encoder": "diffusers, README.md: faces need it; sd-scripts' default",
        "photo_tokens": f"off: measured on toybox only (docs/decisions/0007); {_NOT_MEASURED}",
        "train_batch_size": _LORA_EXAMPLE,
        "gradient_accumulation_steps": _LORA_EXAMPLE,
        "prior_source": "needs no sampling; on toybox .92 of the places are right, not .96 (benchmarks)",
        "prior_loss_weight": "Ruiz et al. 2022, section 3.3: lambda = 1",
        "num_class_images": f"diffusers, README.md, prior preservation; {_NOT_MEASURED}",
        "checkpointing_steps": f"{_OURS}: a few minutes of work at most are lost",
        "resolution": "the base's own",
        "aspect_ratio_buckets": f"NovelAI's buckets, as in sd-scripts; {_NOT_MEASURED}",
        "mixed_precision": "bf16 where the device has it natively, else fp16 on CUDA and float32 on a CPU",
        "guidance_scale": "default of diffusers' StableDiffusionPipeline",
    },
    targets=("attention",),
    max_train_steps=500,
    learning_rate=1e-4,
    text_encoder_learning_rate=5e-5,
    full_learning_rate=2e-6,
    full_text_encoder_learning_rate=2e-6,
    lr_scheduler="constant",
    rank=8,
    train_text_encoder=True,
    photo_tokens=False,
    train_batch_size=1,
    gradient_accumulation_steps=1,
    prior_source="instance",
    prior_loss_weight=1.0,
    num_class_images=200,
    checkpointing_steps=100,
    resolution=None,
    aspect_ratio_buckets=True,
    mixed_precision="auto",
    guidance_scale=7.5,
)

_SEARCHED = "the best of five rates on two toybox subjects (benchmarks.quality)"
_ON_TOYBOX = "trials on toybox: docs/decisions/0007-photo-tokens.md and 0008-guidance-by-family.md"

PRESETS: Mapping[str, Preset] = {
    "toybox": replace(
        _SD,
        sources={
            **dict.fromkeys(_SD.sources, _ON_TOYBOX),
            **{
                name: _SD.sources[name]
                for name in ("prior_loss_weight", "mixed_precision", "rank", "checkpointing_steps")
            },
            "full_learning_rate": _SEARCHED,
            "full_text_encoder_learning_rate": _SEARCHED,
            "aspect_ratio_buckets": "off: toybox was trained on squares only",
        },
        targets=("attention", "feed-forward"),
        max_train_steps=300,
        learning_rate=2e-3,
        text_encoder_learning_rate=2e-3,
        full_learning_rate=2e-4,
        full_text_encoder_learning_rate=2e-4,
        lr_scheduler="linear",
        photo_tokens=True,
        train_batch_size=4,
        prior_source="sampled",
        num_class_images=40,
        resolution=64,
        aspect_ratio_buckets=False,
        guidance_scale=3.0,
    ),
    "sd1": _SD,
    "sd2": _SD,
    "sdxl": replace(
        _SD,
        sources={
            **_SD.sources,
            **dict.fromkeys(
                (
                    "max_train_steps",
                    "learning_rate",
                    "lr_scheduler",
                    "train_batch_size",
                    "gradient_accumulation_steps",
                ),
                _SDXL_EXAMPLE,
            ),
            "train_text_encoder": f"sd-scripts, README: two encoders make it unpredictable; {_NOT_MEASURED}",
            "guidance_scale": "default of diffusers' StableDiffusionXLPipeline",
        },
        train_text_encoder=False,
        gradient_accumulation_steps=4,
        guidance_scale=5.0,
    ),
}
