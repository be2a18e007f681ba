"""The prior: what keeps the class a class while the subject is learned.

`distill` compares the adapted model with the very same model with its adapters off, on the class prompt;
`generated` is the paper's, on class pictures that the base drew ahead of training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbadapter.base import Base
from dbadapter.buckets import nearest_bucket
from dbadapter.class_images import class_images
from dbadapter.conditioning import Conditioning, encode_prompts, predict, unconditional
from dbadapter.config import TrainConfig
from dbadapter.data import LatentCache
from dbadapter.errors import BaseError, UsageError
from dbadapter.lora import adapters_off
from dbadapter.photographs import find_photographs, load_crop

__all__ = [
    "Prior",
    "distill_prior",
    "generated_prior",
    "sample_class_latents",
    "teacher_prediction",
]

GUIDANCE_SCALE = 5.0
# 20 to 25 steps of DPM++ suffice (Lu et al. 2022, arXiv 2211.01095), and x_t is noised again anyway.
LATENT_STEPS = 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prior:
    """What the prior term trains on.

    Args:
        cache: latents of the class (or, with prior_source instance, of the photographs).
        teacher: the class prompt's conditioning by the un-adapted text encoders; None for `generated`, whose
            target is the noise (or v), not a teacher's prediction.
    """

    cache: LatentCache
    teacher: Conditioning | None


def check_sizes(config: TrainConfig, sizes: Sequence[tuple[int, int]]) -> None:
    """Pass if there will be a class picture of each shape that the photographs have.

    Raises:
        UsageError: there are more shapes than class pictures.
    """
    drawn = config.prior == "generated" or (config.prior == "distill" and config.prior_source == "sampled")
    shapes, count = list(dict.fromkeys(sizes)), int(config.num_class_images or 0)
    if drawn and config.class_data_dir is None and count < len(shapes):
        named = ", ".join(f"{width}x{height}" for width, height in shapes)
        raise UsageError(
            f"{count} class images are fewer than the photographs' {len(shapes)} shapes ({named}); pass "
            f"--num-class-images {len(shapes)} or more, or --no-aspect-ratio-buckets"
        )


def _in_turn(sizes: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Return that many of the sizes in turn, each different one before any comes again."""
    repeated = list(sizes)
    for size in (first := list(dict.fromkeys(sizes))):
        repeated.remove(size)
    order = [*first, *repeated]
    return [order[index % len(order)] for index in range(count)]


def generated_prior(
    base: Base, config: TrainConfig, sizes: Sequence[tuple[int, int]], folder: Path, progress: Progress
) -> Prior:
    """Return the paper's prior: pictures of `class_data_dir`, else pictures that the base draws now.

    Args:
        sizes: (width, height) of the instance pictures; the class pictures take the same in turn.
        folder: where the base's pictures are kept, see `class_images`.
    Raises:
        DataError: `class_data_dir` holds no readable picture, or those of another base or prompt.
    """
    if config.class_data_dir is not None:
        return Prior(_folder_cache(base, config, sizes), None)
    count = _required(config.num_class_images)
    wanted = _in_turn(sizes, count)
    pictures = class_images(base, config, wanted, folder, progress)
    crops = [load_crop(picture, size) for picture, size in zip(pictures, wanted, strict=True)]
    return Prior(LatentCache.encode(base.vae, crops), None)


def distill_prior(
    base: Base,
    config: TrainConfig,
    instance_cache: LatentCache,
    sizes: Sequence[tuple[int, int]],
    progress: Progress,
) -> Prior:
    """Return the prior that asks the model with its adapters off; call it before adapters are injected.

    x_t comes from `class_data_dir` if given, else from class latents sampled from the base now, or, with
    `prior_source = "instance"`, from the photographs' own latents.

    Args:
        sizes: (width, height) of the instance pictures; the class latents take the same in turn.
    Raises:
        DataError: `class_data_dir` holds no readable picture, or those of another base or prompt.
    """
    teacher = encode_prompts(base, [str(config.class_prompt)])
    if config.class_data_dir is not None:
        return Prior(_folder_cache(base, config, sizes), teacher)
    if config.prior_source == "instance":
        return Prior(instance_cache.without_masks(), teacher)
    count = _required(config.num_class_images)
    latents = sample_class_latents(
        base,
        str(config.class_prompt),
        _in_turn(sizes, count),
        seed=config.seed,
        progress=progress,
    )
    return Prior(LatentCache.of_latents(latents, base.vae_scale_factor), teacher)


def teacher_prediction(
    unet: Any, x_t: Tensor, timesteps: Tensor, teacher: Conditioning, time_ids: Tensor
) -> Tensor:
    """Return the original model's prediction, without a gradient.

    Args:
        unet: the UNet that learns, whose adapters are off meanwhile, or an untouched copy.
        x_t: noised latents, (batch, channels, height, width).
        timesteps: int64, (batch,).
        teacher: the class prompt's conditioning by the un-adapted text encoders: with that of the adapted
            ones the teacher would drift along (a fault of other tools).
        time_ids: (batch, 6).
    """
    with torch.no_grad(), adapters_off(unet):
        return predict(unet, x_t, timesteps, teacher.expand(len(x_t)), time_ids)


@torch.no_grad()
def sample_class_latents(
    base: Base,
    prompt: str,
    sizes: Sequence[tuple[int, int]],
    *,
    seed: int,
    num_inference_steps: int = LATENT_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Return latents of class pictures that the base draws, undecoded.

    Latent i starts from noise of seed + i. The sampler's arithmetic is float32 whatever the UNet computes
    in: diffusers' pipeline would round the latents to bfloat16 at every step.

    Args:
        sizes: (width, height) of each picture in pixels.
    Returns:
        Each of shape (channels, height / vae_scale_factor, width / vae_scale_factor), float32, in the UNet's
        scale.
    Raises:
        BaseError: the model gave values that are not finite.
    """
    without, with_prompt = unconditional(base), encode_prompts(base, [prompt])
    of_size: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        of_size.setdefault(size, []).append(index)
    batches = [
        indices[start : start + batch_size]
        for indices in of_size.values()
        for start in range(0, len(indices), batch_size)
    ]
    total, found = len(batches) * num_inference_steps, dict[int, Tensor]()
    for number, indices in enumerate(batches):

        def report(step: int, done: int = number * num_inference_steps) -> None:
            if progress is not None:
                progress("class latents", done + step, total)

        pair = functools.partial(_pair, batch=len(indices))
        pooled = None
        if without.pooled is not None and with_prompt.pooled is not None:
            pooled = pair(without.pooled, with_prompt.pooled)
        both = Conditioning(pair(without.embeddings, with_prompt.embeddings), pooled)
        seeds = [seed + index for index in indices]
        latents = _sampled(base, both, sizes[indices[0]], seeds, num_inference_steps, guidance_scale, report)
        found |= zip(indices, latents, strict=True)
    result = [found[index] for index in range(len(sizes))]
    if not all(torch.isfinite(latents).all() for latents in result):
        raise BaseError(
            f"base {base.name} gave class latents that are not finite; its weights are broken, or it needs "
            "--mixed-precision no"
        )
    return result


def _sampled(
    base: Base,
    both: Conditioning,
    size: tuple[int, int],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    report: Callable[[int], None],
) -> Tensor:
    """Return one batch of latents by DPM++ with classifier-free guidance, all of one size."""
    from diffusers import DPMSolverMultistepScheduler

    width, height = size
    factor, channels = base.vae_scale_factor, int(base.unet.config.in_channels)
    shape = (channels, height // factor, width // factor)
    noise = torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    time_ids = torch.tensor([[height, width, 0, 0, height, width]] * (2 * len(seeds)), device=base.device)
    # A fresh sampler for every batch: it keeps the previous step's prediction.
    scheduler = DPMSolverMultistepScheduler.from_config(base.scheduler.config)
    scheduler.set_timesteps(num_inference_steps, device=base.device)
    latents: Tensor = noise.to(base.device) * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        prediction = predict(base.unet, model_input, timestep, both, time_ids.float())
        without, with_prompt = prediction.float().chunk(2)
        guided = without + guidance_scale * (with_prompt - without)
        latents = scheduler.step(guided, timestep, latents).prev_sample
        report(step + 1)
    return latents


def _pair(without: Tensor, with_prompt: Tensor, batch: int) -> Tensor:
    return torch.cat([without, with_prompt]).repeat_interleave(batch, dim=0)


def _folder_cache(base: Base, config: TrainConfig, sizes: Sequence[tuple[int, int]]) -> LatentCache:
    """Return the latents of the user's own class pictures, each cropped to the nearest instance size."""
    if config.class_data_dir is None:
        raise ValueError("class_data_dir must be set")
    pictures = find_photographs(config.class_data_dir)
    crops, used = [], list(dict.fromkeys(sizes))
    for size in used:
        nearest = [picture for picture in pictures if nearest_bucket(picture.size, used) == size]
        # Every instance size needs some: a step's prior samples have the shape of its instance samples.
        crops += [load_crop(picture, size) for picture in nearest or pictures]
    return LatentCache.encode(base.vae, crops)


def _required(value: int | None) -> int:
    if value is None:
        raise ValueError("the configuration must be resolved first (TrainConfig.resolved)")
    return value
