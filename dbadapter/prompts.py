"""The prompts of a run: resolved for a base, one for each photograph, all checked to fit the tokenizer."""

from __future__ import annotations

from typing import Any

from dbadapter.base import Base, check_prompt
from dbadapter.config import TrainConfig
from dbadapter.errors import DataError
from dbadapter.tokens import photo_tokens, pick_identifier

__all__ = ["instance_prompts", "resolve"]

PHOTO_TOKEN_PASSES = 2  # passes over the photographs with their tokens, after each plain one


def resolve(config: TrainConfig, base: Base, photographs: int) -> TrainConfig:
    """Return the configuration with nothing left open; every prompt of it fits the base's tokenizer.

    Args:
        config: as the user gave it.
        base: whose family's preset fills what is open.
        photographs: how many there are.
    Raises:
        ConfigError: a fault in the configuration.
        DataError: a prompt is too long, or no rare token is left.
    """
    identifier = pick_identifier(base.tokenizer, config.class_noun, config.identifier)
    resolved = config.resolved(base.family, base.resolution, identifier)
    for prompt in (str(resolved.instance_prompt), str(resolved.class_prompt), *resolved.validation_prompt):
        check_prompt(base.tokenizer, prompt)
    with_tokens = instance_prompts(resolved, base.tokenizer, photographs)[-1]
    try:
        for prompt in with_tokens:
            check_prompt(base.tokenizer, prompt)
    except DataError as error:
        raise DataError(f"with the photograph's own token {error}, or pass --no-photo-tokens") from None
    return resolved


def instance_prompts(config: TrainConfig, tokenizer: Any, photographs: int) -> list[list[str]]:
    """Return the prompts of the photographs: rows that passes over the photographs take in turn.

    There is one row; with `photo_tokens` rows follow in which a rare token of each photograph's own stands
    where a place would, "a photo of sks dog on wxv". What only that photograph shows, its background above
    all, then has a name of its own and is not learned as part of the subject; the plain row keeps the
    subject from hiding in those names. DisenBooth (Chen et al. 2023, arXiv 2305.03374) splits the two with
    embeddings from an image encoder.

    Args:
        config: resolved.
    """
    prompt = str(config.instance_prompt)
    if not config.photo_tokens:
        return [[prompt] * photographs]
    names = photo_tokens(tokenizer, photographs, config.class_noun, f"{prompt} {config.identifier}")
    return [[prompt] * photographs, *[[f"{prompt} on {name}" for name in names]] * PHOTO_TOKEN_PASSES]
