"""What experience says about a run that is possible but unlikely to end well. Warnings, never errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dbadapter.config import TrainConfig
from dbadapter.encoders import default_prompt_judge
from dbadapter.photographs import Photograph
from dbadapter.presets import PRESETS

__all__ = ["advice"]

FEW_PHOTOGRAPHS = 3
# A fifth of the usual rate, and five times it.
FAR = 5.0
ENLARGED = 2.0  # times a side


def advice(
    config: TrainConfig, family: str, photographs: Sequence[Photograph], sizes: Sequence[tuple[int, int]]
) -> Iterator[str]:
    """Yield what to think about before the run, each in one sentence with the cure.

    Args:
        config: resolved.
        family: the base's, a key of `PRESETS`.
        sizes: (width, height) that the photographs are cropped to.
    """
    yield from _rates(config, family)
    yield from _ignored(config, family)
    yield from _unjudged(config, family)
    for name, prompt in (("instance", config.instance_prompt), ("class", config.class_prompt)):
        if prompt is not None and config.class_noun not in prompt:
            yield f"the {name} prompt {prompt!r} does not say {config.class_noun!r}: set --{name}-prompt"
    if config.lr_warmup_steps >= int(config.max_train_steps or 0):
        yield (
            f"{config.lr_warmup_steps} steps of warm-up are as many as the run's {config.max_train_steps}, "
            "so the learning rate is never reached: lower --lr-warmup-steps"
        )
    if len(photographs) < FEW_PHOTOGRAPHS:
        number = "1 photograph" if len(photographs) == 1 else f"{len(photographs)} photographs"
        yield f"{number} of the subject may be learned by heart, background included: 3 to 6 do better"
    yield from _small(photographs, sizes)
    bare = [photograph.path.name for photograph in photographs if photograph.mask is None]
    if config.masked_loss and bare:
        yield f"{len(bare)} of {len(photographs)} photographs have no mask, e.g. {bare[0]}; they count whole"


def _unjudged(config: TrainConfig, family: str) -> Iterator[str]:
    if config.select == "best" and not (config.text_image_encoder or default_prompt_judge(family)):
        yield (
            "--select best sees the subject and the class here, not whether prompts are obeyed, so nothing "
            "counts against a checkpoint that knows the photographs by heart: pass --text-image-encoder"
        )


def _rates(config: TrainConfig, family: str) -> Iterator[str]:
    if config.optimizer == "prodigy":  # its rate is a factor
        return
    preset = PRESETS[family]
    usual = preset.full_learning_rate if config.full else preset.learning_rate
    rate = float(config.learning_rate or usual)
    if not config.full and rate < usual / FAR:
        # diffusers#4331: a LoRA that does nothing, trained at full fine-tuning's rate
        yield (
            f"a learning rate of {rate:g} is one for full fine-tuning, an adapter hardly moves with it: "
            f"this base's usual is {usual:g}"
        )
    if config.full and rate > usual * FAR:
        yield (
            f"a learning rate of {rate:g} is one for an adapter, it breaks a model that is trained whole: "
            f"this base's usual is {usual:g}"
        )


def _ignored(config: TrainConfig, family: str) -> Iterator[str]:
    """Yield the settings that were changed and that another setting makes meaningless."""
    preset, own = PRESETS[family], config.class_data_dir is not None
    drawn = not own and (config.prior == "generated" or config.prior_source == "sampled")
    without_text = not config.train_text_encoder
    # (field, what it would be if it had not been set, whether it does nothing, why)
    rows: list[tuple[str, object, bool, str]] = [
        (name, getattr(preset, name), config.prior == "none", "--prior none")
        for name in ("prior_loss_weight", "prior_source", "num_class_images")
    ]
    rows += [
        ("prior_source", preset.prior_source, config.prior == "generated", "--prior generated"),
        ("prior_source", preset.prior_source, own, "--class-data-dir"),
        ("num_class_images", preset.num_class_images, own, "--class-data-dir"),
        ("num_class_images", preset.num_class_images, not drawn, "--prior-source instance"),
        ("text_encoder_rank", config.rank, without_text, "--no-train-text-encoder"),
    ]
    usual = preset.full_text_encoder_learning_rate if config.full else preset.text_encoder_learning_rate
    usual = 1.0 if config.optimizer == "prodigy" else usual
    rows.append(("text_encoder_learning_rate", usual, without_text, "--no-train-text-encoder"))
    told = set[str]()
    for name, default, idle, why in rows:
        if idle and getattr(config, name) != default and name not in told:
            told.add(name)
            yield f"--{name.replace('_', '-')} {getattr(config, name)} does nothing with {why}: leave it out"


def _small(photographs: Sequence[Photograph], sizes: Sequence[tuple[int, int]]) -> Iterator[str]:
    small = [
        (photograph, size)
        for photograph, size in zip(photographs, sizes, strict=True)
        if any(ENLARGED * have < want for have, want in zip(photograph.size, size, strict=True))
    ]
    if small:
        photograph, size = small[0]
        yield (
            f"{len(small)} of {len(photographs)} photographs are far smaller than they are trained at, e.g. "
            f"{photograph.path.name} is {photograph.size[0]}x{photograph.size[1]}, not {size[0]}x{size[1]}: "
            "the subject will come out blurred; use larger ones or a lower --resolution"
        )
