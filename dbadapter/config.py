"""The training configuration: one frozen dataclass; presets fill it, all faults at once, TOML in and out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dbadapter.errors import ConfigError
from dbadapter.presets import PRESETS, Preset

__all__ = ["PRESETS", "PRIORS", "TARGETS", "Preset", "TrainConfig", "indefinite", "read_toml"]

T = typing.TypeVar("T")

PRIORS = ("distill", "generated", "none")
PRIOR_SOURCES = ("sampled", "instance")
TARGETS = ("attention", "feed-forward", "proj", "conv")
PRECISIONS = ("auto", "no", "bf16", "fp16")
LR_SCHEDULERS = ("constant", "linear", "cosine")
PREDICTION_TYPES = ("epsilon", "v_prediction")

# How to run, not what to train: kept out of config.toml, so that repeating a run from its own file
# never overwrites or resumes anything by surprise.
RUN_FLAGS = ("resume", "overwrite")
MOST_NAME = 100  # characters; file systems take 255 bytes, and endings and temporary names come on top


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. None means: from the preset of the base's family.

    Args:
        instance_data_dir: folder of the subject's photographs.
        class_noun: what the subject is, e.g. "dog".
        output_dir: folder for the adapter and everything beside it.
        name: the adapter file's stem; None is the name of `output_dir`.
        base: "toybox" or a diffusers folder.
        prediction_type: "epsilon" or "v_prediction"; None is what the base's scheduler says.
        identifier: the word for the subject; "auto" picks a rare token of the base's tokenizer.
        instance_prompt: may hold `{identifier}` and `{class_noun}`.
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
        train_text_encoder: adapt the text encoder too.
        text_encoder_rank: None is `rank`.
        max_train_steps: optimizer steps.
        learning_rate: for the UNet's adapter.
        text_encoder_learning_rate: for the text encoder's adapter.
        lr_scheduler: how both rates go on from there: "constant", or "linear" or "cosine" down to 0.
        train_batch_size: instance pictures a forward pass; as many class pictures come with them.
        gradient_accumulation_steps: forward passes an optimizer step.
        resolution: pixels a side.
        mixed_precision: "auto" is bf16 where the device has it natively, else fp16 on CUDA, fp32 on CPU.
        gradient_checkpointing: less memory, slower steps.
        snr_gamma: min-SNR weighting's gamma (Hang et al. 2023, usually 5); None is no weighting.
        seed: of weights, noise, timesteps and sampled pictures.
        checkpointing_steps: optimizer steps between two checkpoints; 0 writes none.
        resume: go on from the newest checkpoint in `output_dir`.
        overwrite: replace what is in `output_dir`.
        validation_prompt: prompts of the sample grid, with the same placeholders as `instance_prompt`.
        validation_steps: optimizer steps between two sample grids; 0 draws one at the end only.
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
    prior_source: str = "sampled"
    prior_loss_weight: float | None = None
    class_data_dir: Path | None = None
    num_class_images: int | None = None
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    train_text_encoder: bool = True
    text_encoder_rank: int | None = None
    max_train_steps: int | None = None
    learning_rate: float | None = None
    text_encoder_learning_rate: float | None = None
    lr_scheduler: str | None = None
    train_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    resolution: int | None = None
    mixed_precision: str = "auto"
    gradient_checkpointing: bool = False
    snr_gamma: float | None = None
    seed: int = 0
    checkpointing_steps: int | None = None
    resume: bool = False
    overwrite: bool = False
    validation_prompt: tuple[str, ...] = ()
    validation_steps: int | None = None
    random_flip: bool = False

    def __post_init__(self) -> None:
        # From Python, "photos" for a path and a list for a tuple are what people write.
        for field in ("instance_data_dir", "output_dir", "class_data_dir"):
            value = getattr(self, field)
            if isinstance(value, str) and value:  # Path("") would be the current folder
                object.__setattr__(self, field, Path(value))
        for field in ("targets", "validation_prompt"):
            value = getattr(self, field)
            if isinstance(value, str):
                object.__setattr__(self, field, (value,))
            elif isinstance(value, list):
                object.__setattr__(self, field, tuple(value))

    def validate(self) -> None:
        """Check every field on its own and against the others.

        Raises:
            ConfigError: one or more faults; the message states all of them.
        """
        _raise_if_any(list(_faults(self)))

    def resolved(self, family: str, default_resolution: int, identifier: str | None = None) -> TrainConfig:
        """Return a copy with every None filled that has a default; calling it again changes nothing.

        `prediction_type`, `class_data_dir` and `snr_gamma` may stay None: the base's own, none, off.

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
        preset = PRESETS[family]
        word = identifier or (None if self.identifier == "auto" else self.identifier)
        fill = _filler({"class_noun": self.class_noun} | ({"identifier": word} if word else {}))
        resolved = dataclasses.replace(
            self,
            name=_or(self.name, self.output_dir.resolve().name),
            identifier=word or "auto",
            instance_prompt=fill(_or(self.instance_prompt, "a photo of {identifier} {class_noun}")),
            photo_tokens=_or(self.photo_tokens, preset.photo_tokens),
            class_prompt=fill(_or(self.class_prompt, f"a photo of {indefinite(self.class_noun)}")),
            prior_loss_weight=_or(self.prior_loss_weight, preset.prior_loss_weight),
            num_class_images=_or(self.num_class_images, preset.num_class_images),
            alpha=_or(self.alpha, float(self.rank)),
            targets=_or(self.targets, preset.targets),
            text_encoder_rank=_or(self.text_encoder_rank, self.rank),
            max_train_steps=_or(self.max_train_steps, preset.max_train_steps),
            learning_rate=_or(self.learning_rate, preset.learning_rate),
            text_encoder_learning_rate=_or(
                self.text_encoder_learning_rate, preset.text_encoder_learning_rate
            ),
            lr_scheduler=_or(self.lr_scheduler, preset.lr_scheduler),
            train_batch_size=_or(self.train_batch_size, preset.train_batch_size),
            resolution=_or(self.resolution, _or(preset.resolution, default_resolution)),
            checkpointing_steps=_or(self.checkpointing_steps, preset.checkpointing_steps),
            validation_prompt=tuple(fill(prompt) for prompt in self.validation_prompt),
            validation_steps=_or(self.validation_steps, 0),
        )
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
            values[key] = _converted(value, hints[key])
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


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _filler(words: Mapping[str, str]) -> Callable[[str], str]:
    """Replace `{key}` and nothing else: other braces in a prompt are the user's own."""

    def fill(prompt: str) -> str:
        for key, word in words.items():
            prompt = prompt.replace("{" + key + "}", word)
        return prompt

    return fill


def _raise_if_any(faults: list[str]) -> None:
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        raise ConfigError(f"{len(faults)} faults: {'; '.join(faults)}")


# Inclusive limits. Ranks beyond 1024 are wider than any layer that gets one profits from.
_LIMITS: Mapping[str, tuple[float, float]] = {
    "num_class_images": (1, 100_000),
    "rank": (1, 1024),
    "text_encoder_rank": (1, 1024),
    "max_train_steps": (1, 10_000_000),
    "train_batch_size": (1, 4096),
    "gradient_accumulation_steps": (1, 4096),
    "resolution": (16, 4096),
    "seed": (0, 2**63 - 1),
    "checkpointing_steps": (0, 10_000_000),
    "validation_steps": (0, 10_000_000),
}
_POSITIVE = ("alpha", "learning_rate", "text_encoder_learning_rate", "snr_gamma")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "prior": PRIORS,
    "prior_source": PRIOR_SOURCES,
    "lr_scheduler": LR_SCHEDULERS,
    "mixed_precision": PRECISIONS,
    "prediction_type": PREDICTION_TYPES,
}


def _type_faults(config: TrainConfig) -> Iterator[str]:
    """Say which fields are of another type than declared, as from Python they can be."""
    for name, hint in typing.get_type_hints(TrainConfig).items():
        value = getattr(config, name)
        if value is None and type(None) in typing.get_args(hint):
            continue
        try:
            _converted(list(value) if isinstance(value, tuple) else value, hint)
        except TypeError as error:
            yield f"{name} must be {error}, got {value!r}"


def _faults(config: TrainConfig) -> Iterator[str]:
    if wrong := list(_type_faults(config)):  # nothing else can be asked of such values
        yield from wrong
        return
    yield from _text_faults(config)
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value is not None and value not in choices:
            yield f"{name} must be one of {', '.join(choices)}, got {value!r}"
    yield from _number_faults(config)
    yield from _target_faults(config.targets)
    yield from _prompt_faults(config)
    if config.prior == "none" and config.class_data_dir is not None:
        yield "class_data_dir needs a prior: drop it, or use prior distill or generated"
    if config.resume and config.overwrite:
        yield "resume and overwrite exclude each other: give one of them"


def _text_faults(config: TrainConfig) -> Iterator[str]:
    if not config.class_noun.strip():
        yield "class_noun must say what the subject is, e.g. dog, got nothing"
    elif re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", config.class_noun):
        yield f"class_noun must be one line without control characters, got {config.class_noun!r}"
    elif config.class_noun == "auto":
        yield "class_noun auto is not supported yet: say what the subject is, e.g. dog"
    for name in ("identifier", "base"):
        if not getattr(config, name).strip():
            yield f"{name} must not be empty: leave it out for the default"
    stem = config.name
    if stem is not None and (stem.strip() in ("", ".", "..") or re.search(r'[\x00-\x1f/\\:*?"<>|]', stem)):
        yield f"name must be a plain file name without / or other special characters, got {stem!r}"
    elif stem is not None and len(stem) > MOST_NAME:
        yield f"name must have at most {MOST_NAME} characters, got {len(stem)}: pass a shorter name"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str | Path) and not _is_unicode(str(text)):
                yield f"{field.name} must be valid Unicode, got {str(text)!r}: rename it"


def _number_faults(config: TrainConfig) -> Iterator[str]:
    for name, (low, high) in _LIMITS.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            yield f"{name} must be from {low} to {high}, got {value}"
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            yield f"{name} must be greater than 0, got {value}"
    weight = config.prior_loss_weight
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
        yield f"prior_loss_weight must be 0 or more, got {weight}"
    if config.resolution is not None and config.resolution % 8:
        yield f"resolution must be a multiple of 8, got {config.resolution}"


def _target_faults(targets: tuple[str, ...] | None) -> Iterator[str]:
    if targets is None:
        return
    if not targets:
        yield f"targets must name at least one of {', '.join(TARGETS)}, got none"
    for target in targets:
        if target not in TARGETS:
            yield f"targets must be among {', '.join(TARGETS)}, got {target!r}"
    if len(set(targets)) < len(targets):
        yield f"targets must not repeat, got {', '.join(targets)}"


def _prompt_faults(config: TrainConfig) -> Iterator[str]:
    word = config.identifier
    if word.lower() == config.class_noun.lower():
        yield f"identifier must differ from the class noun, got {word!r} for both"
    prompt = config.instance_prompt
    named = prompt is None or "{identifier}" in prompt or (word != "auto" and _has_word(prompt, word))
    if not named:  # nothing would tell the subject from its class, and the file would state a wrong trigger
        yield f"instance_prompt must hold {{identifier}} or the given identifier, got {prompt!r}"
    prompt = config.class_prompt
    if prompt is not None and ("{identifier}" in prompt or (word != "auto" and _has_word(prompt, word))):
        yield f"class_prompt must not hold the identifier, got {prompt!r}"


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # A JSON string is a TOML string, except that TOML wants DEL escaped too.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _converted(value: object, hint: object) -> object:
    """Return a TOML value as the field's type; TypeError's message names the type that was expected."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if typing.get_origin(hint) is tuple or typing.get_origin(kinds[0]) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise TypeError("a list of strings")
    kind = kinds[0]
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # an int of hundreds of digits
            raise TypeError("a number that is finite") from None
    # bool is an int in Python, but `rank = true` is a fault.
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    names = {Path: "a path", float: "a number", int: "a whole number", str: "a string", bool: "true or false"}
    raise TypeError(names[kind] if isinstance(kind, type) else str(kind))
