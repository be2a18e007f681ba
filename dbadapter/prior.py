"""The prior: what keeps the class a class while the subject is learned.

`distill` compares the adapted model with the very same model with its adapters off, on the class prompt;
`generated` is the paper's, on class pictures that the base drew ahead of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbadapter.base import Base, encode_prompt
from dbadapter.config import TrainConfig
from dbadapter.data import LatentCache, find_photographs, load_photograph
from dbadapter.errors import BaseError
from dbadapter.lora import adapters_off
from dbadapter.run_folder import write_text
from dbadapter.sampling import generate_pictures, save_pictures

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
PICTURE_STEPS = 25
RECORD = "record.json"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prior:
    """What the prior term trains on.

    Args:
        cache: latents of the class (or, with prior_source instance, of the photographs).
        teacher_embedding: of the class prompt by the un-adapted text encoder, (1, length, hidden_size);
            None for `generated`, whose target is the noise (or v), not a teacher's prediction.
    """

    cache: LatentCache
    teacher_embedding: Tensor | None


def generated_prior(base: Base, config: TrainConfig, folder: Path, progress: Progress) -> Prior:
    """Return the paper's prior: pictures of `class_data_dir`, else pictures that the base draws now.

    They are kept in `folder` with a record of what made them; only pictures with the same record are used
    again, never silently those of another prompt, model or seed.

    Raises:
        DataError: `class_data_dir` holds no readable picture.
    """
    if config.class_data_dir is not None:
        return Prior(_folder_cache(base, config), None)
    count, resolution = _required(config.num_class_images), _required(config.resolution)
    record = {
        "base": config.base,
        "base_fingerprint": base.fingerprint,
        "prediction_type": base.prediction_type,
        "prompt": config.class_prompt,
        "count": count,
        "seed": config.seed,
        "resolution": resolution,
        "num_inference_steps": PICTURE_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
    }
    if _read_record(folder) != record:
        (folder / RECORD).unlink(missing_ok=True)
        pictures = generate_pictures(
            base.pipeline,
            [str(config.class_prompt)],
            num_images_per_prompt=count,
            num_inference_steps=PICTURE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            seed=config.seed,
            height=resolution,
            width=resolution,
            model_name=base.name,
            progress=lambda done, total: progress("class pictures", done, total),
        )
        save_pictures(pictures, folder, overwrite=True)
        write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
    tensors = [load_photograph(folder / f"{index:04d}.png", resolution) for index in range(count)]
    return Prior(LatentCache.encode(base.vae, tensors), None)


def distill_prior(base: Base, config: TrainConfig, instance_cache: LatentCache, progress: Progress) -> Prior:
    """Return the prior that asks the model with its adapters off; call it before adapters are injected.

    x_t comes from `class_data_dir` if given, else from class latents sampled from the base now, or, with
    `prior_source = "instance"`, from the photographs' own latents.

    Raises:
        DataError: `class_data_dir` holds no readable picture.
    """
    with torch.no_grad():
        embedding = encode_prompt(base.text_encoder, base.tokenizer, [str(config.class_prompt)])
    if config.class_data_dir is not None:
        return Prior(_folder_cache(base, config), embedding)
    if config.prior_source == "instance":
        return Prior(instance_cache, embedding)
    latents = sample_class_latents(
        base,
        str(config.class_prompt),
        _required(config.num_class_images),
        seed=config.seed,
        resolution=_required(config.resolution),
        progress=progress,
    )
    return Prior(LatentCache.of_latents(latents), embedding)


def teacher_prediction(unet: Any, x_t: Tensor, timesteps: Tensor, embedding: Tensor) -> Tensor:
    """Return the original model's prediction: the same UNet with its adapters off, without a gradient.

    Args:
        x_t: noised latents, (batch, channels, height, width).
        timesteps: int64, (batch,).
        embedding: of the class prompt by the un-adapted text encoder, (1, length, hidden_size): with that
            of the adapted one the teacher would drift along (a fault of other tools).
    """
    with torch.no_grad(), adapters_off(unet):
        prediction: Tensor = unet(x_t, timesteps, embedding.expand(len(x_t), -1, -1)).sample
    return prediction


@torch.no_grad()
def sample_class_latents(
    base: Base,
    prompt: str,
    count: int,
    *,
    seed: int,
    resolution: int,
    num_inference_steps: int = LATENT_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Tensor:
    """Return latents of class pictures that the base draws, undecoded.

    Latent i starts from noise of seed + i. The sampler's arithmetic is float32 whatever the UNet computes
    in: diffusers' pipeline would round the latents to bfloat16 at every step.

    Returns:
        Shape (count, channels, resolution / vae_scale_factor, the same), float32, in the UNet's scale.
    Raises:
        BaseError: the model gave values that are not finite.
    """
    from diffusers import DPMSolverMultistepScheduler

    side = resolution // base.vae_scale_factor
    shape = (int(base.unet.config.in_channels), side, side)
    embeddings = encode_prompt(base.text_encoder, base.tokenizer, ["", prompt])
    finished = []
    batches = range(0, count, batch_size)
    for number, start in enumerate(batches):
        seeds = range(seed + start, seed + min(start + batch_size, count))
        noise = [torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        # A fresh sampler for every batch: it keeps the previous step's prediction.
        scheduler = DPMSolverMultistepScheduler.from_config(base.scheduler.config)
        scheduler.set_timesteps(num_inference_steps, device=base.device)
        latents = torch.stack(noise).to(base.device) * scheduler.init_noise_sigma
        pair = embeddings.repeat_interleave(len(noise), dim=0)
        for step, timestep in enumerate(scheduler.timesteps):
            model_input = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            without, with_prompt = base.unet(model_input, timestep, pair).sample.float().chunk(2)
            guided = without + guidance_scale * (with_prompt - without)
            latents = scheduler.step(guided, timestep, latents).prev_sample
            if progress is not None:
                done = number * num_inference_steps + step + 1
                progress("class latents", done, len(batches) * num_inference_steps)
        finished.append(latents)
    result = torch.cat(finished)
    if not torch.isfinite(result).all():
        raise BaseError(
            f"base {base.name} gave class latents that are not finite; its weights are broken, or it needs "
            "--mixed-precision no"
        )
    return result


def _folder_cache(base: Base, config: TrainConfig) -> LatentCache:
    """Return the latents of the user's own class pictures."""
    if config.class_data_dir is None:
        raise ValueError("class_data_dir must be set")
    paths = find_photographs(config.class_data_dir)
    pictures = [load_photograph(path, _required(config.resolution)) for path in paths]
    return LatentCache.encode(base.vae, pictures)


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _required(value: int | None) -> int:
    if value is None:
        raise ValueError("the configuration must be resolved first (TrainConfig.resolved)")
    return value
