"""What is scored: an adapter on the base, or a fully tuned model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dbadapter import lora
from dbadapter.adapter import Adapter
from dbadapter.base import Base, load_base
from dbadapter.config import read_toml
from dbadapter.errors import AdapterError, BaseError, ConfigError, UsageError

__all__ = [
    "Candidate",
    "check_candidates",
    "check_model",
    "load_candidate",
    "pipeline_of",
    "told_apart",
    "trigger_of",
]

#: Of a scheduler's configuration, what the weights were trained for.
_OF_TRAINING = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True)
class Candidate:
    """What is scored: an adapter on the base, or a fully tuned model.

    Attributes:
        name: for the report.
        path: where it came from.
        subject: its words for the subject, e.g. "sks dog".
        adapter: None for a tuned model, whose folder is `path`.
        bytes: on disk.
    """

    name: str
    path: Path
    subject: str
    adapter: Adapter | None
    bytes: int


def load_candidate(path: str | Path, class_noun: str, identifier: str | None = None) -> Candidate:
    """Return an adapter's file or a tuned model's folder as a candidate.

    Raises:
        UsageError: its words for the subject are not known; the message has the cure.
        BaseError: the folder holds no model.
        AdapterError: the file is broken.
    """
    path = Path(path)
    if identifier is not None:  # "sks mug", as `inspect` shows it, is sks
        identifier = re.sub(
            rf"\s+{re.escape(class_noun.strip())}$", "", identifier.strip(), flags=re.IGNORECASE
        )
    if path.is_dir():
        check_model(path)
        told, noun = _words_of_the_run(path)
        if told and identifier and identifier != told:
            _warn_of_words(path, told, identifier)
        if noun and noun.lower() != class_noun.strip().lower():
            warnings.warn(
                f"{path} was trained with --class-noun {noun}, and is asked for {class_noun!r}",
                UserWarning,
                stacklevel=2,
            )
        identifier = identifier or told
        if identifier is None:
            raise UsageError(f"{path} does not say its word for the subject: pass --identifier, e.g. sks")
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return Candidate(path.resolve().name, path, f"{identifier} {class_noun}", None, size)
    adapter = lora.load_adapter(path)
    trigger = trigger_of(adapter)
    subject = f"{identifier} {class_noun}" if identifier else trigger
    if identifier and trigger and f" {identifier} " not in f" {trigger} ":
        _warn_of_words(path, trigger, subject)
    if subject and not re.search(rf"\b{re.escape(class_noun.strip())}\b", subject, re.IGNORECASE):
        warnings.warn(
            f"{path} says {subject!r}, which has no {class_noun} in it: was it trained with another "
            "--class-noun? Where it was taught one rare word, pass that as --identifier",
            UserWarning,
            stacklevel=2,
        )
    if not subject:
        raise UsageError(
            f"{path} does not say its words for the subject (modelspec.trigger_phrase): pass --identifier"
        )
    return Candidate(path.stem, path, subject, adapter, path.stat().st_size)


def check_model(folder: Path) -> None:
    """Pass if a folder holds a model.

    Raises:
        BaseError: it holds none; the message names what to pass instead.
    """
    if (folder / "model_index.json").is_file():
        return
    if (folder / "model" / "model_index.json").is_file():
        raise BaseError(f"{folder} is the folder of a run: pass {folder / 'model'}")
    if (folder.resolve().parent / "model_index.json").is_file():
        raise BaseError(f"{folder} is a part of a model: pass {folder.resolve().parent}")
    if files := sorted(folder.glob("*.safetensors")):
        own = folder / f"{folder.resolve().name}.safetensors"
        raise BaseError(f"{folder} holds no model: for its adapter pass {own if own in files else files[0]}")
    raise BaseError(
        f"{folder} holds neither a model (there is no model_index.json in it) nor an adapter: pass OUT/model "
        "of train --full, or an adapter's .safetensors file"
    )


def _warn_of_words(path: Path, told: str | None, asked: str | None) -> None:
    warnings.warn(
        f"{path} says {told!r} and is asked for {asked!r}: leave --identifier out if that is not meant",
        UserWarning,
        stacklevel=3,
    )


def _words_of_the_run(folder: Path) -> tuple[str | None, str | None]:
    """Return the identifier and the class noun that a tuned model was trained with, by its config.toml."""
    try:
        values = read_toml(folder.resolve().parent / "config.toml")
    except ConfigError:
        return None, None
    words = (values.get("identifier"), values.get("class_noun"))
    identifier, noun = (word.strip() if isinstance(word, str) else "" for word in words)
    return identifier or None, noun or None


def told_apart(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates with as many folders before names that are not theirs alone as tell them apart."""
    names = [each.name for each in candidates]
    parents = [each.path.resolve().parent.parts for each in candidates]
    for depth in range(1, max((len(parts) for parts in parents), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            str(Path(*parts[-depth:], each.name)) if name in twice else name
            for name, parts, each in zip(names, parents, candidates, strict=True)
        ]
    return [replace(each, name=name) for each, name in zip(candidates, names, strict=True)]


def trigger_of(adapter: Adapter) -> str:
    """Return the words for the subject that an adapter's file tells, or nothing."""
    return adapter.metadata.get("modelspec.trigger_phrase", "").strip()


def check_candidates(base: Base, candidates: Sequence[Candidate]) -> None:
    """Pass if every candidate can be scored beside the base: before hours of drawing, not after.

    Raises:
        AdapterError: an adapter does not fit the base; the message begins with its path.
        BaseError: a tuned model cannot be loaded, or is of another family.
    """
    for candidate in candidates:
        if candidate.adapter is not None:
            try:
                with pipeline_of(base, candidate) as pipeline:
                    del pipeline
            except AdapterError as error:
                raise AdapterError(f"{candidate.path}: {error}") from error
        else:
            family = _load_tuned(candidate).family
            if family != base.family:
                raise BaseError(
                    f"{candidate.path} is of the family {family}, the base of {base.family}: pass the --base "
                    "that it was tuned from"
                )


@contextmanager
def pipeline_of(base: Base, candidate: Candidate) -> Iterator[Any]:
    """Give the candidate's pipeline; the base is as it was afterwards."""
    if candidate.adapter is None:
        pipeline = _load_tuned(candidate).pipeline
        pipeline.scheduler = _sampler_for(pipeline.scheduler.config, base.pipeline.scheduler)
        yield pipeline
        return
    lora.apply(base.pipeline, {candidate.adapter: 1.0})
    try:
        yield base.pipeline
    finally:
        lora.apply(base.pipeline, {})


def _load_tuned(candidate: Candidate) -> Base:
    """Return a tuned model, which loads as a base does and is not called one where it cannot."""
    try:
        return load_base(str(candidate.path))
    except BaseError as error:
        raise BaseError(re.sub(r"^base:? ", "tuned model ", str(error))) from error


def _sampler_for(trained: Mapping[str, Any], sampler: Any) -> Any:
    """Return the base's sampler on the noise schedule that a model was trained with.

    A folder's own sampler could be another one, and the two would not compare.
    """
    kept = [*_OF_TRAINING, *(("timestep_spacing",) if trained.get("rescale_betas_zero_snr") else ())]
    schedule = {name: trained[name] for name in kept if name in trained and name in sampler.config}
    return type(sampler).from_config(sampler.config, **schedule)
