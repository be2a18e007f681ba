"""A run that is set up: the models with their adapters, the caches, the optimizer; all that a step reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbadapter.base import Base, Precision, pick_precision
from dbadapter.batches import Samples
from dbadapter.buckets import bucket_sizes, nearest_bucket
from dbadapter.conditioning import Conditioning, PromptIds, encode, tokenize_prompts
from dbadapter.config import TrainConfig
from dbadapter.data import LatentCache
from dbadapter.lean import keep_less, pays
from dbadapter.lora import inject
from dbadapter.optimizers import make_optimizer
from dbadapter.photographs import Photograph, load_crop
from dbadapter.prior import Prior, distill_prior, generated_prior
from dbadapter.processes import Processes
from dbadapter.prompts import instance_prompts
from dbadapter.speed import (
    DTYPES,
    autocast,
    enable_gradient_checkpointing,
    hand_back_freed_memory,
    keep_vae_exact,
    prepare_frozen,
    prepare_whole,
    use_fast_layers,
)

__all__ = ["Run", "picture_sizes", "prepare"]

Progress = Callable[[str, int, int], None]


@dataclass
class Run:
    """A run that is set up: the models with their adapters, and all that a step reads."""

    config: TrainConfig
    base: Base
    precision: Precision
    processes: Processes
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    alphas_cumprod: Tensor
    samples: Samples
    prior: Prior | None
    teacher: Any  # the UNet that the prior asks: the one in training, its adapters off, or an untouched copy
    prompt_ids: PromptIds  # each prompt once, the class prompt last if there is a prior
    conditioning: Conditioning | None  # of the prompts, where the text encoders are not trained
    step: int = 0

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes in the run's precision."""
        return autocast(self.base.device, self.precision)


def picture_sizes(
    config: TrainConfig, base: Base, photographs: Sequence[Photograph]
) -> list[tuple[int, int]]:
    """Return the (width, height) in pixels that each photograph is cropped to.

    Args:
        config: resolved.
    """
    resolution = int(config.resolution or base.resolution)
    if not config.aspect_ratio_buckets:
        return [(resolution, resolution)] * len(photographs)
    buckets = bucket_sizes(resolution, base.vae_scale_factor * base.latent_multiple)
    return [nearest_bucket(photograph.size, buckets) for photograph in photographs]


def prepare(
    config: TrainConfig,
    base: Base,
    photographs: Sequence[Photograph],
    *,
    class_folder: Path,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> Run:
    """Set a run up: latents cached, prior made, the base's weights cast in place, adapters injected.

    Args:
        config: resolved.
        base: used up: its weights are cast, it carries the adapters, and parts that training needs no more
            (the VAE; text encoders that are not trained) leave memory unless previews need them.
        class_folder: where prior `generated` keeps its pictures.
    """
    report: Progress = progress or (lambda stage, done, total: None)
    ours, device = processes or Processes(), base.device
    precision = pick_precision(device, str(config.mixed_precision))
    sizes = picture_sizes(config, base, photographs)
    rows = [row * (1 + config.random_flip) for row in instance_prompts(config, base.tokenizer, photographs)]
    own = list(dict.fromkeys(prompt for row in rows for prompt in row))
    prompts = own + [str(config.class_prompt)] * (config.prior != "none")
    keep_vae_exact(base.vae)
    if config.full:
        prepare_whole(base, precision)
    else:
        prepare_frozen(base, precision)
    instance = _instance_cache(config, base, photographs, sizes)  # beside weights that are cast already
    with autocast(device, precision):
        prior = _prior(config, base, instance, sizes, class_folder, ours, report)
        prompt_ids = tokenize_prompts(base, prompts)
        conditioning = None
        if not config.train_text_encoder:
            with torch.no_grad():
                conditioning = encode(base, prompt_ids)
    teacher = base.unet
    if config.full and prior is not None and prior.teacher is not None:
        teacher = nn.Module.to(copy.deepcopy(base.unet), dtype=DTYPES[precision])
    groups = _whole(config, base) if config.full else _adapters(config, base)
    use_fast_layers(base, max(width * height for width, height in sizes), precision)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(base)
    if config.compile:
        base.unet.compile()  # it chooses itself what is kept and what is computed again
    elif not config.full and pays(base.unet):
        for model in (base.unet, *base.text_encoders.values()):
            keep_less(model)
    if not config.validation_steps and config.select != "best":
        _let_go(base, text_encoders=not config.train_text_encoder)
    hand_back_freed_memory(device)
    a_process = int(config.train_batch_size or 1) * int(config.gradient_accumulation_steps or 1)
    return Run(
        config=config,
        base=base,
        precision=precision,
        processes=ours,
        parameters=[parameter for group in groups for parameter in group["params"]],
        optimizer=make_optimizer(config.optimizer, groups, device),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        alphas_cumprod=base.noise_scheduler().alphas_cumprod.to(device),
        samples=Samples(
            instance=instance,
            prior=None if prior is None else prior.cache,
            prompt_of=torch.tensor([[own.index(prompt) for prompt in row] for row in rows]),
            class_prompt=len(prompts) - 1,
            seed=config.seed,
            num_timesteps=int(base.scheduler.config.num_train_timesteps),
            train_batch_size=int(config.train_batch_size or 1),
            a_step=a_process * ours.count,
            mine=range(a_process * ours.index, a_process * (ours.index + 1)),
            device=device,
        ),
        prior=prior,
        teacher=teacher,
        prompt_ids=prompt_ids,
        conditioning=conditioning,
    )


def _instance_cache(
    config: TrainConfig, base: Base, photographs: Sequence[Photograph], sizes: Sequence[tuple[int, int]]
) -> LatentCache:
    """Return the photographs' latents, their mirror images' behind them if asked for."""
    flips = (False, True) if config.random_flip else (False,)
    crops = [
        load_crop(photograph, size, masked=config.masked_loss, flip=flip)
        for flip in flips
        for photograph, size in zip(photographs, sizes, strict=True)
    ]
    return LatentCache.encode(base.vae, crops)


def _prior(
    config: TrainConfig,
    base: Base,
    instance: LatentCache,
    sizes: Sequence[tuple[int, int]],
    class_folder: Path,
    ours: Processes,
    report: Progress,
) -> Prior | None:
    if config.prior == "distill":
        return distill_prior(base, config, instance, sizes, report)
    if config.prior == "none":
        return None
    if not ours.is_main:  # the first process draws the pictures, the others read them
        ours.wait()
    found = generated_prior(base, config, sizes, class_folder, report)
    if ours.is_main:
        ours.wait()
    return found


def _adapters(config: TrainConfig, base: Base) -> list[dict[str, Any]]:
    """Put the adapters on the models; return the optimizer's groups."""
    rank, text_encoders = int(config.rank or 0), base.text_encoders if config.train_text_encoder else {}
    alpha, text_rank = float(config.alpha or rank), int(config.text_encoder_rank or rank)
    factors = inject(
        base.unet,
        text_encoders.get("text_encoder"),
        text_encoders.get("text_encoder_2"),
        rank=rank,
        alpha=alpha,
        text_encoder_rank=text_rank,
        # alpha / rank is the scale in both, whatever the text encoder's rank.
        text_encoder_alpha=alpha / rank * text_rank,
        targets=config.targets or (),
        seed=config.seed,
    )
    return _groups(config, factors.unet, factors.text_encoder)


def _whole(config: TrainConfig, base: Base) -> list[dict[str, Any]]:
    """Make the models' own weights trainable; return the optimizer's groups."""
    text_encoders = list(base.text_encoders.values()) if config.train_text_encoder else []
    for model in (base.unet, *text_encoders):
        model.requires_grad_(True)
    texts = [parameter for model in text_encoders for parameter in model.parameters()]
    return _groups(config, list(base.unet.parameters()), texts)


def _groups(
    config: TrainConfig, unet: list[nn.Parameter], text_encoders: list[nn.Parameter]
) -> list[dict[str, Any]]:
    rates = (config.learning_rate, config.text_encoder_learning_rate)
    groups = [
        {"params": parameters, "initial_lr": rate}
        for parameters, rate in zip((unet, text_encoders), rates, strict=True)
    ]
    return [group for group in groups if group["params"]]


def _let_go(base: Base, *, text_encoders: bool) -> None:
    """Drop what training needs no more, so that its memory is free; the final samples load a new base."""
    for part in ("vae", *(base.text_encoders if text_encoders else ())):
        setattr(base.pipeline, part, None)
