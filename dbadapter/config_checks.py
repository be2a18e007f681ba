"""What can be wrong with a training configuration: types, ranges, choices, and fields against each other."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

if typing.TYPE_CHECKING:
    from dbadapter.config import TrainConfig

__all__ = [
    "AUTO",
    "CONTROL_CHARACTERS",
    "LOGGERS",
    "LR_SCHEDULERS",
    "OPTIMIZERS",
    "PRECISIONS",
    "PREDICTION_TYPES",
    "PRIORS",
    "PRIOR_SOURCES",
    "SELECTIONS",
    "TARGETS",
    "converted",
    "faults",
    "noun_faults",
]

AUTO = "auto"
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # and ends of lines
PRIORS = ("distill", "generated", "none")
PRIOR_SOURCES = ("sampled", "instance")
TARGETS = ("attention", "feed-forward", "proj", "conv")
PRECISIONS = ("auto", "no", "bf16", "fp16")
LR_SCHEDULERS = ("constant", "linear", "cosine")
PREDICTION_TYPES = ("epsilon", "v_prediction")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
SELECTIONS = ("last", "best")
LOGGERS = ("none", "tensorboard", "wandb")

MOST_NAME = 100  # characters; file systems take 255 bytes, and endings and temporary names come on top

# Inclusive limits. Ranks beyond 1024 are wider than any layer that gets one profits from.
_LIMITS: Mapping[str, tuple[float, float]] = {
    "num_class_images": (1, 100_000),
    "rank": (1, 1024),
    "text_encoder_rank": (1, 1024),
    "max_train_steps": (1, 10_000_000),
    "train_batch_size": (1, 4096),
    "gradient_accumulation_steps": (1, 4096),
    "lr_warmup_steps": (0, 10_000_000),
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
    "optimizer": OPTIMIZERS,
    "logger": LOGGERS,
    "select": SELECTIONS,
}


def _type_faults(config: TrainConfig) -> Iterator[str]:
    """Say which fields are of another type than declared, as from Python they can be."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if value is None and type(None) in typing.get_args(hint):
            continue
        try:
            converted(list(value) if isinstance(value, tuple) else value, hint)
        except TypeError as error:
            yield f"{name} must be {error}, got {value!r}"


def faults(config: TrainConfig) -> Iterator[str]:
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
    if config.full:
        for name in ("rank", "alpha", "targets", "text_encoder_rank"):
            if getattr(config, name) is not None:
                yield f"{name} is an adapter's, and full trains the models whole: leave one of both out"
    if config.select == "best" and config.checkpointing_steps == 0:
        yield "select best chooses among checkpoints: give checkpointing_steps more than 0, or leave it out"
    if config.select != "best":
        for name in ("image_encoder", "text_image_encoder"):
            if getattr(config, name) is not None:
                yield f"{name} does nothing without select best: leave it out, or choose by it"
    if config.resume and config.overwrite:
        yield "resume and overwrite exclude each other: give one of them"


def _text_faults(config: TrainConfig) -> Iterator[str]:
    yield from noun_faults("class_noun", config.class_noun)
    yield from _classifier_faults(config)
    if config.class_noun.lower() == AUTO != config.class_noun:
        yield f"class_noun auto is written in small letters, got {config.class_noun!r}"
    for name in ("identifier", "base", "image_encoder", "text_image_encoder"):
        value = getattr(config, name)
        if value is not None and not value.strip():
            yield f"{name} must not be empty: leave it out for the default"
    stem = config.name
    if stem is not None and (stem.strip() in ("", ".", "..") or re.search(r'[\x00-\x1f/\\:*?"<>|]', stem)):
        yield f"name must be a plain file name without / or other special characters, got {stem!r}"
    elif stem is not None and len(stem) > MOST_NAME:
        yield f"name must have at most {MOST_NAME} characters, got {len(stem)}: pass a shorter name"
    for field in dataclasses.fields(config):
        if field.name in ("class_noun", "class_nouns"):  # noun_faults says so
            continue
        value = getattr(config, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str | Path) and not _is_unicode(str(text)):
                yield f"{field.name} must be valid Unicode, got {str(text)!r}: rename it"


def noun_faults(name: str, noun: str) -> Iterator[str]:
    """Say what is wrong with a word that prompts are made of, under the name that it is given by."""
    if not noun.strip():
        yield f"{name} must say what the subject is, e.g. dog, got nothing"
    elif not _is_unicode(noun):
        yield f"{name} must be valid Unicode, got {noun!r}: write it again"
    elif CONTROL_CHARACTERS.search(noun):
        yield f"{name} must be one line without control characters, got {noun!r}"
    elif "{" in noun or "}" in noun:
        yield f"{name} must be a word without braces, got {noun!r}"


def _classifier_faults(config: TrainConfig) -> Iterator[str]:
    """Say what is wrong with how `auto` is to be decided."""
    nouns, classifier = config.class_nouns, config.class_noun_classifier
    if classifier is not None and not classifier.strip():
        yield "class_noun_classifier must not be empty: leave it out for the default"
    if (classifier is not None or nouns is not None) and config.class_noun != AUTO:
        yield f"class_noun_classifier and class_nouns decide class_noun auto, got {config.class_noun!r}"
    if nouns is None:
        return
    if classifier is None:
        yield "class_nouns needs a CLIP that tells them apart: pass class_noun_classifier too"
    if len(nouns) < 2 or len(set(nouns)) < len(nouns):
        yield f"class_nouns must be two or more different nouns, got {', '.join(nouns) or 'none'}"
    for noun in nouns:
        yield from noun_faults("each of class_nouns", noun)
        if noun == AUTO:
            yield "each of class_nouns must be a noun, got 'auto'"


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
    if word.lower() == config.class_noun.lower() != AUTO:
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


def converted(value: object, hint: object) -> object:
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
