"""What each base family gives to the fields of a training configuration that are left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """The values that a base family gives to the fields left at None.

    Args:
        source: where the values come from.
        targets: layers of the UNet that get an adapter, by the names in `config.TARGETS`.
        max_train_steps: optimizer steps.
        learning_rate: AdamW's, for the UNet's adapter.
        text_encoder_learning_rate: AdamW's, for the text encoder's adapter.
        lr_scheduler: how the rates go on from there, of `config.LR_SCHEDULERS`.
        photo_tokens: whether in two of three passes each photograph's prompt ends in a rare token of its own.
        train_batch_size: instance pictures a step; as many class pictures come with them.
        prior_loss_weight: weight of the prior term (lambda in Ruiz et al. 2022, equation 2).
        num_class_images: class pictures (or class latents, with prior `distill`) sampled from the base.
        checkpointing_steps: optimizer steps between two checkpoints; 0 writes none.
        resolution: pixels a side; None is the base's own.
        guidance_scale: of classifier-free guidance, when pictures are generated.
    """

    source: str
    targets: tuple[str, ...]
    max_train_steps: int
    learning_rate: float
    text_encoder_learning_rate: float
    train_batch_size: int
    lr_scheduler: str = "constant"  # as diffusers' LoRA example of DreamBooth
    photo_tokens: bool = False
    prior_loss_weight: float = 1.0  # Ruiz et al. 2022, section 3.3: lambda = 1
    num_class_images: int = 200
    checkpointing_steps: int = 200
    resolution: int | None = None
    guidance_scale: float = 7.5  # the default of diffusers' StableDiffusionPipeline


_PUBLISHED = Preset(
    # Steps, rate and batch: the LoRA example of diffusers' examples/dreambooth/README.md; 200 class pictures:
    # its prior-preservation example; the text encoder's lower rate: sd-scripts' docs on train_network.
    source="from published practice (diffusers' DreamBooth examples, sd-scripts), not measured here",
    targets=("attention",),
    max_train_steps=500,
    learning_rate=1e-4,
    text_encoder_learning_rate=5e-5,
    train_batch_size=1,
)

PRESETS: Mapping[str, Preset] = {
    "toybox": Preset(
        source="trials on toybox: docs/decisions/0007-photo-tokens.md and 0008-guidance-by-family.md",
        targets=("attention", "feed-forward"),
        max_train_steps=300,
        learning_rate=2e-3,
        text_encoder_learning_rate=2e-3,
        lr_scheduler="linear",
        photo_tokens=True,
        train_batch_size=4,
        num_class_images=40,
        resolution=64,
        guidance_scale=3.0,
    ),
    "sd1": _PUBLISHED,
    "sd2": _PUBLISHED,
    "sdxl": _PUBLISHED,
}
