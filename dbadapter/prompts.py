"""The prompts of a run: resolved for a base, one for each photograph, all checked to fit the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dbadapter.base import Base, check_prompt
from dbadapter.config import TrainConfig, filler
from dbadapter.errors import DataError
from dbadapter.photographs import Photograph
from dbadapter.tokens import photo_tokens, pick_identifier

__all__ = ["caption_of", "instance_prompts", "resolve"]

PHOTO_TOKEN_PASSES = 2  # passes over the photographs with their tokens, after each plain one


def resolve(config: TrainConfig, base: Base, photographs: Sequence[Photograph]) -> TrainConfig:
    """Return the configuration with nothing left open; every prompt of it fits the base's tokenizer.

    Args:
        config: as the user gave it.
        base: whose family's preset fills what is open.
        photographs: their captions are checked too.
    Raises:
        ConfigError: a fault in the configuration.
        DataError: a prompt is too long, a caption does not name the subject, or no rare token is left.
    """
    identifier = pick_identifier(base.tokenizer, config.class_noun, config.identifier)
    resolved = config.resolved(base.family, base.resolution, identifier)
    for prompt in (str(resolved.instance_prompt), str(resolved.class_prompt), *resolved.validation_prompt):
        check_prompt(base.tokenizer, prompt)
    for photograph in photographs:
        _check_caption(photograph, resolved, base)
    with_tokens = instance_prompts(resolved, base.tokenizer, photographs)[-1]
    try:
        for prompt in with_tokens:
            check_prompt(base.tokenizer, prompt)
    except DataError as error:
        raise DataError(f"with the photograph's own token {error}, or pass --no-photo-tokens") from None
    return resolved


def instance_prompts(
    config: TrainConfig, tokenizer: Any, photographs: Sequence[Photograph]
) -> list[list[str]]:
    """Return the prompts of the photographs: rows that passes over the photographs take in turn.

    A photograph's prompt is its caption, else the instance prompt. There is one row; with `photo_tokens` rows
    follow in which a rare token of each photograph's own stands where a place would, "a photo of sks dog on
    wxv". What only that photograph shows, its background above all, then has a name of its own and is not
    learned as part of the subject; the plain row keeps the subject from hiding in those names. DisenBooth
    (Chen et al. 2023, arXiv 2305.03374) splits the two with embeddings from an image encoder. A caption
    names what else is to be seen, so it stays as it is.

    Args:
        config: resolved.
    """
    prompt = str(config.instance_prompt)
    plain = [caption_of(photograph, config) or prompt for photograph in photographs]
    if not config.photo_tokens:
        return [plain]
    names = photo_tokens(tokenizer, len(photographs), config.class_noun, f"{prompt} {config.identifier}")
    with_tokens = [
        words if photograph.caption else f"{words} on {name}"
        for words, photograph, name in zip(plain, photographs, names, strict=True)
    ]
    return [plain, *[with_tokens] * PHOTO_TOKEN_PASSES]


def caption_of(photograph: Photograph, config: TrainConfig) -> str | None:
    """Return a photograph's caption with its placeholders filled, None if it has none."""
    if photograph.caption is None:
        return None
    return filler(config.class_noun, config.identifier)(photograph.caption)


def _check_caption(photograph: Photograph, config: TrainConfig, base: Base) -> None:
    caption, file = caption_of(photograph, config), f"{photograph.path.with_suffix('')}.txt"
    if caption is None:
        return
    if re.search(rf"(?<!\w){re.escape(config.identifier)}(?!\w)", caption, re.IGNORECASE) is None:
        raise DataError(
            f"the caption {file} does not name the subject; write {{identifier}} where its name belongs, "
            f'e.g. "a photo of {{identifier}} {{class}} on a sofa"'
        )
    try:
        check_prompt(base.tokenizer, caption)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
