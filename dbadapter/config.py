"""The training configuration: one frozen dataclass; presets fill it, all faults at once, TOML in and out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dbadapter.config_checks import (
    AUTO,
    LOGGERS,
    LR_SCHEDULERS,
    OPTIMIZERS,
    PRECISIONS,
    PREDICTION_TYPES,
    PRIOR_SOURCES,
    PRIORS,
    SELECTIONS,
    TARGETS,
    converted,
    faults,
)
from dbadapter.errors import ConfigError
from dbadapter.presets import PRESETS, Preset

__all__ = [
    "AUTO",
    "LOGGERS",
    "LR_SCHEDULERS",
    "OPTIMIZERS",
    "PRECISIONS",
    "PREDICTION_TYPES",
    "PRESETS",
    "PRIORS",
    "PRIOR_SOURCES",
    "SELECTIONS",
    "TARGETS",
    "Preset",
    "TrainConfig",
    "filler",
    "indefinite",
    "read_toml",
]

T = typing.TypeVar("T")

SCORES = 10  # checkpoints of a run that chooses among them

# How to run, not what to train: kept out of config.toml, so that repeating a run from its own file
# never overwrites or resumes anything by surprise.
RUN_FLAGS = ("resume", "overwrite")

# What a preset fills as it is.
PRESET_FIELDS = (
    "photo_tokens",
    "prior_source",
    "prior_loss_weight",
    "num_class_images",
    "rank",
    "targets",
    "train_text_encoder",
    "max_train_steps",
    "learning_rate",
    "text_encoder_learning_rate",
    "lr_scheduler",
    "train_batch_size",
    "gradient_accumulation_steps",
    "resolution",
    "aspect_ratio_buckets",
    "mixed_precision",
    "checkpointing_steps",
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. None means: from the preset of the base's family.

    Args:
        instance_data_dir: folder of the subject's photographs.
        class_noun: what the subject is, e.g. "dog"; "auto" is decided by the photographs, see `class_noun`.
        class_noun_classifier: what decides it: folder or hub id of a CLIP; None is the default for the base.
        class_nouns: what that CLIP chooses among; None is the nouns of ImageNet's classes.
        class_noun_vote: how it was decided; a record, not a setting.
        output_dir: folder for the adapter and everything beside it.
        name: the adapter file's stem; None is the name of `output_dir`.
        base: "toybox", a diffusers folder, a single-file .safetensors checkpoint, or a hub id.
        prediction_type: "epsilon" or "v_prediction"; None is what the base itself says.
        identifier: the word for the subject; "auto" picks a rare token of the base's tokenizer.
        instance_prompt: may hold `{identifier}` and `{class_noun}`; a photograph's own NAME.txt wins.
        photo_tokens: in two of three passes each photograph's prompt ends in a rare token of its own.
        class_prompt: the same prompt without the identifier; may hold `{class_noun}`.
        prior: "distill" (the base itself is the teacher), "generated" (pictures made ahead) or "none".
        prior_source: latents that `distill` compares on: "sampled" from the base, or "instance".
        prior_loss_weight: weight of the prior term, 0 or more.
        class_data_dir: folder of class pictures to use instead of sampled ones.
        num_class_images: how many to sample where there is no such folder.
        rank: of the UNet's adapter.
        alpha: the adapter's scale is alpha / rank, in the UNet and in the text encoder; None is the rank.
        targets: layers of the UNet, by the names in `TARGETS`.
        train_text_encoder: adapt the text encoder too, SDXL's both.
        text_encoder_rank: None is `rank`.
        full: train the models whole, without an adapter: the baseline.
        max_train_steps: optimizer steps.
        learning_rate: for the UNet's adapter, or for the UNet with `full`.
        text_encoder_learning_rate: for the text encoder's adapter, or for the encoder with `full`.
        lr_scheduler: how both rates go on from there: "constant", or "linear" or "cosine" down to 0.
        lr_warmup_steps: optimizer steps over which both rates rise from 0 first.
        optimizer: "adamw", "adamw8bit" (bitsandbytes) or "prodigy" (prodigyopt, which sets the rate itself).
        train_batch_size: instance pictures a forward pass; as many class pictures come with them.
        gradient_accumulation_steps: forward passes an optimizer step.
        resolution: pixels a side; with buckets the root of the area.
        aspect_ratio_buckets: crop each photograph to the shape next to its own, not to the square.
        masked_loss: weigh the loss by NAME.mask.png or by the photograph's alpha channel.
        mixed_precision: "auto" is bf16 where the device has it natively, else fp16 on CUDA, fp32 on CPU.
        gradient_checkpointing: less memory, slower steps.
        compile: let torch.compile make the UNet faster; the first steps take minutes then.
        snr_gamma: min-SNR weighting's gamma (Hang et al. 2023, usually 5); None is no weighting.
        seed: of weights, noise, timesteps and sampled pictures.
        checkpointing_steps: optimizer steps between two checkpoints; 0 writes none.
        resume: go on from the newest checkpoint in `output_dir`; from step 0 where there is none.
        overwrite: replace what is in `output_dir`.
        validation_prompt: prompts of the sample grid, with the same placeholders as `instance_prompt`.
        validation_steps: optimizer steps between two sample grids; 0 draws one at the end only.
        select: which checkpoint becomes the file: the "last" step, or the "best" by a score of pictures.
        image_encoder, text_image_encoder: for select "best", as in `evaluate`; None is what is at hand.
        logger: "tensorboard" or "wandb" besides metrics.jsonl, or "none".
        random_flip: mirror half of the photographs; wrong for subjects with a left and a right.
    """

    instance_data_dir: Path
    class_noun: str
    output_dir: Path
    name: str | None = None
    base: str = "toybox"
    prediction_type: str | None = None
    identifier: str = "auto"
    instance_prompt: str | None = None
    photo_tokens: bool | None = None
    class_prompt: str | None = None
    prior: str = "distill"
    prior_source: str | None = None
    prior_loss_weight: float | None = None
    class_data_dir: Path | None = None
    num_class_images: int | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    train_text_encoder: bool | None = None
    text_encoder_rank: int | None = None
    full: bool = False
    max_train_steps: int | None = None
    learning_rate: float | None = None
    text_encoder_learning_rate: float | None = None
    lr_scheduler: str | None = None
    lr_warmup_steps: int = 0
    optimizer: str = "adamw"
    train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    resolution: int | None = None
    aspect_ratio_buckets: bool | None = None
    masked_loss: bool = False
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    snr_gamma: float | None = None
    seed: int = 0
    checkpointing_steps: int | None = None
    resume: bool = False
    overwrite: bool = False
    validation_prompt: tuple[str, ...] = ()
    validation_steps: int | None = None
    select: str = "last"
    image_encoder: str | None = None
    text_image_encoder: str | None = None
    logger: str = "none"
    random_flip: bool = False
    class_noun_classifier: str | None = None
    class_nouns: tuple[str, ...] | None = None
    class_noun_vote: str | None = None

    def __post_init__(self) -> None:
        # From Python, "photos" for a path and a list for a tuple are what people write.
        for field in ("instance_data_dir", "output_dir", "class_data_dir"):
            value = getattr(self, field)
            if isinstance(value, str) and value:  # Path("") would be the current folder
                object.__setattr__(self, field, Path(value))
        for field in ("targets", "validation_prompt", "class_nouns"):
            value = getattr(self, field)
            if isinstance(value, str):
                object.__setattr__(self, field, (value,))
            elif isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        for field in ("class_noun", "identifier"):
            value = getattr(self, field)
            if isinstance(value, str):
                object.__setattr__(self, field, value.strip())
        if isinstance(self.class_nouns, tuple) and all(isinstance(noun, str) for noun in self.class_nouns):
            object.__setattr__(self, "class_nouns", tuple(noun.strip() for noun in self.class_nouns))

    def validate(self) -> None:
        """Check every field on its own and against the others.

        Raises:
            ConfigError: one or more faults; the message states all of them.
        """
        _raise_if_any(list(faults(self)))

    def resolved(self, family: str, default_resolution: int, identifier: str | None = None) -> TrainConfig:
        """Return a copy with every None filled that has a default; calling it again changes nothing.

        `prediction_type`, `class_data_dir` and `snr_gamma` may stay None: the base's own, none, off. So do,
        with `full`, what only an adapter has.

        Args:
            family: a key of `PRESETS`.
            default_resolution: the base's own, in pixels, for presets that name none.
            identifier: the token that was picked for "auto"; without it prompts keep `{identifier}`.
        Raises:
            ConfigError: an unknown family, or a configuration with faults.
        """
        if family not in PRESETS:
            raise ConfigError(f"base family must be one of {', '.join(PRESETS)}, got {family!r}")
        self.validate()
        if self.class_noun == AUTO:
            raise ConfigError("class_noun auto is not decided yet: call dbadapter.class_noun.decided first")
        preset = PRESETS[family]
        word = identifier or (None if self.identifier == "auto" else self.identifier)
        fill = filler(self.class_noun, word)
        values: dict[str, typing.Any] = {
            name: _or(getattr(self, name), getattr(preset, name)) for name in PRESET_FIELDS
        }
        for name in ("learning_rate", "text_encoder_learning_rate"):
            if getattr(self, name) is None and self.optimizer == "prodigy":
                values[name] = 1.0  # it estimates the rate itself; this is the factor on its estimate
            elif getattr(self, name) is None and self.full:
                values[name] = getattr(preset, f"full_{name}")
        values |= {
            "name": _or(self.name, self.output_dir.resolve().name),
            "identifier": word or "auto",
            "instance_prompt": fill(_or(self.instance_prompt, "a photo of {identifier} {class_noun}")),
            "class_prompt": fill(_or(self.class_prompt, f"a photo of {indefinite(self.class_noun)}")),
            "alpha": _or(self.alpha, float(values["rank"])),
            "text_encoder_rank": _or(self.text_encoder_rank, values["rank"]),
            "resolution": _or(values["resolution"], default_resolution),
            "validation_prompt": tuple(fill(prompt) for prompt in self.validation_prompt),
            "validation_steps": _or(self.validation_steps, 0),
        }
        if self.select == "best" and self.checkpointing_steps is None:
            values["checkpointing_steps"] = max(1, int(values["max_train_steps"]) // SCORES)
        if self.full:
            values |= dict.fromkeys(("rank", "alpha", "targets", "text_encoder_rank"))
        resolved = dataclasses.replace(self, **values)
        resolved.validate()
        return resolved

    def to_toml(self) -> str:
        """Return the configuration as TOML, one key a line; None and `RUN_FLAGS` are left out."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and field.name not in RUN_FLAGS:
                lines.append(f"{field.name} = {_toml_value(value)}\n")
        return "".join(lines)

    @classmethod
    def from_toml(cls, path: str | Path) -> TrainConfig:
        """Read a configuration that `to_toml` or a person wrote.

        Raises:
            ConfigError: as `read_toml`, or a required key is missing.
        """
        return cls.from_values(read_toml(path), where=str(path))

    @classmethod
    def from_values(cls, values: Mapping[str, typing.Any], where: str = "the configuration") -> TrainConfig:
        """Build a configuration from checked values; all missing keys are reported at once."""
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        _raise_if_any([f"{where} lacks {name}" for name in required if values.get(name) is None])
        return cls(**values)


def read_toml(path: str | Path) -> dict[str, typing.Any]:
    """Return the fields that a TOML file sets, checked for name and type, not for range.

    Raises:
        ConfigError: the file is missing or no TOML, or has unknown keys or wrong types (all are listed).
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, thousands of digits or brackets
        raise ConfigError(f"{path} is no TOML: {' '.join(str(error).split())}") from None
    hints = typing.get_type_hints(TrainConfig)
    values: dict[str, typing.Any] = {}
    faults = []
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            faults.append(f"{path} has an unknown key {key!r}{hint}")
            continue
        try:
            values[key] = converted(value, hints[key])
        except TypeError as error:
            faults.append(f"{path}: {key} must be {error}, got {value!r}")
    _raise_if_any(faults)
    return values


def indefinite(noun: str) -> str:
    """Return the noun with its article: "a dog", "an owl", "a unicorn", "an hourglass"."""
    word = noun.lower()
    # Sound decides, not spelling: a leading "you" or "won" sound takes "a", a silent h takes "an".
    if re.match(r"(uni(?!n|m)|us[aeiu]|ut[ei]|uk|ur[ai]n|eu|ewe|one\b|once)", word):
        return f"a {noun}"
    return f"an {noun}" if re.match(r"([aeiou]|hour|heir|honest|honou?r)", word) else f"a {noun}"


def filler(class_noun: str, identifier: str | None) -> Callable[[str], str]:
    """Return what replaces `{class_noun}`, `{class}` and `{identifier}` in a prompt, and nothing else.

    Other braces in a prompt are the user's own. Without an identifier its placeholder stays.
    """
    words = {"class_noun": class_noun, "class": class_noun}
    if identifier is not None:
        words["identifier"] = identifier

    def fill(prompt: str) -> str:
        for key, word in words.items():
            prompt = prompt.replace("{" + key + "}", word)
        return prompt

    return fill


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _raise_if_any(faults: list[str]) -> None:
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        raise ConfigError(f"{len(faults)} faults: {'; '.join(faults)}")


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # A JSON string is a TOML string, except that TOML wants DEL escaped too.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
