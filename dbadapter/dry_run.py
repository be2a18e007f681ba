"""What a run would do, as TOML with comments: configuration, prompts and tokens, layers, memory, size."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch

from dbadapter.base import pick_precision
from dbadapter.config import PRESETS, TrainConfig
from dbadapter.lora import inject
from dbadapter.memory import estimate
from dbadapter.plan import Plan, plan
from dbadapter.prompts import instance_prompts

__all__ = ["dry_run"]


def dry_run(config: TrainConfig) -> str:
    """Return all that `train` would do with a configuration, without doing it: TOML that --config reads.

    Raises:
        DbadapterError: as `plan`.
    """
    found = plan(config)
    parts = (_about(found), _models(found), [""], _configuration(found, config))
    return "".join(f"{line}\n" for part in parts for line in part)


def _about(found: Plan) -> Iterator[str]:
    base, config = found.base, found.config
    line = f"# {_count(len(found.photographs), 'photograph')}, base family {base.family}"
    if found.finished:
        line += ", finished already"
    elif found.snapshot is not None:
        line += f", goes on from step {found.snapshot.step}"
    yield line
    for photograph, size in zip(found.photographs, found.sizes, strict=True):
        told = ["caption"] * (photograph.caption is not None)
        told += ["mask"] * (config.masked_loss and photograph.mask is not None)
        also = f", {' and '.join(told)}" if told else ""
        yield (
            f"#   {photograph.path.name}: {photograph.size[0]}x{photograph.size[1]}, "
            f"trained at {size[0]}x{size[1]}{also}"
        )
    if config.class_noun_vote is not None:
        yield f"# Class noun: {config.class_noun} ({config.class_noun_vote})"
    yield "# Prompts, and the tokens that the base reads:"
    rows = instance_prompts(config, base.tokenizer, found.photographs)
    prompts = list(dict.fromkeys(prompt for row in rows for prompt in row))
    prompts += [str(config.class_prompt)] * (config.prior != "none")
    for prompt in dict.fromkeys([*prompts, *config.validation_prompt]):
        ids = base.tokenizer(prompt, add_special_tokens=False).input_ids
        tokens = base.tokenizer.convert_ids_to_tokens(ids)
        named = " ".join(
            f"{token.removesuffix('</w>')}:{index}" for token, index in zip(tokens, ids, strict=True)
        )
        yield f"#   {prompt}  ->  {named}"


def _models(found: Plan) -> Iterator[str]:
    """Yield the trained layers and what a run takes, asked of the same models without weights."""
    base, config = found.base, found.config
    unet, vae = _without_weights(base.unet), _without_weights(base.vae)
    texts = {name: _without_weights(model) for name, model in base.text_encoders.items()}
    trained = texts if config.train_text_encoder else {}
    if config.full:
        for name, model in {"unet": unet, **trained}.items():
            model.requires_grad_(True)
            number = sum(parameter.numel() for parameter in model.parameters())
            yield f"# Trains the whole {name}: {number:,} parameters"
        size = sum(p.numel() for model in (unet, vae, *texts.values()) for p in model.parameters()) * 4
    else:
        size = yield from _adapters(config, unet, trained)
    width, height = max(found.sizes, key=lambda each: each[0] * each[1])
    precision = pick_precision(base.device, str(config.mixed_precision))
    needed = estimate(
        unet,
        list(texts.values()),
        vae,
        latent_shape=(
            int(unet.config.in_channels),
            height // base.vae_scale_factor,
            width // base.vae_scale_factor,
        ),
        text_length=base.tokenizer.model_max_length,
        batch_samples=int(config.train_batch_size or 1),
        precision=precision,
        device_type=base.device.type,
        prior=config.prior,
        train_text_encoder=bool(config.train_text_encoder),
        gradient_checkpointing=config.gradient_checkpointing,
        lean=not config.full and not config.compile,
        previews=bool(config.validation_steps) or config.select == "best",
        optimizer=config.optimizer,
    )
    yield (
        f"# Estimated memory on this {base.device.type} in {'float32' if precision == 'no' else precision}: "
        f"{needed.peak_mb:,.0f} MB at the peak (a step: frozen weights {needed.frozen_mb:,.0f}, trained "
        f"{needed.trainable_mb:,.0f}, activations {needed.activations_mb:,.0f})"
    )
    kind = "Model's folder" if config.full else "Adapter's file"
    yield f"# {kind}: about {size / 2**20:,.1f} MB"


def _adapters(config: TrainConfig, unet: Any, texts: Mapping[str, Any]) -> Generator[str, None, int]:
    """Put adapters on the models, say how many; return the bytes of their file, without its header."""
    rank, text_rank = int(config.rank or 1), int(config.text_encoder_rank or config.rank or 1)
    first, second = texts.get("text_encoder"), texts.get("text_encoder_2")
    factors = inject(
        unet,
        first,
        second,
        rank=rank,
        text_encoder_rank=text_rank,
        targets=config.targets or (),
        seed=config.seed,
    )
    for name, parameters, r in (
        ("UNet", factors.unet, rank),
        ("text encoders", factors.text_encoder, text_rank),
    ):
        if parameters:
            number = sum(parameter.numel() for parameter in parameters)
            yield f"# Trains {len(parameters) // 2} layers of the {name} at rank {r}: {number:,} parameters"
    return 2 * sum(parameter.numel() for part in factors for parameter in part)  # float16


def _without_weights(model: Any) -> Any:
    """Return a model of the same configuration on the meta device, where nothing has data."""
    with torch.device("meta"):
        if hasattr(type(model), "from_config") and not hasattr(type(model), "config_class"):
            return type(model).from_config(model.config)
        return type(model)(model.config)


def _configuration(found: Plan, given: TrainConfig) -> Iterator[str]:
    """Yield config.toml, with the source of each value that a preset gave."""
    sources = PRESETS[found.base.family].sources
    for line in found.config.to_toml().splitlines():
        name = line.partition(" = ")[0]
        source = sources.get(name) if getattr(given, name) is None else None
        yield f"{line}  # {source}" if source else line


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
