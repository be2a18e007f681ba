"""What a UNet reads beside the latents: embeddings by one or two encoders, SDXL's sizes; one call of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbadapter.base import Base, tokenize

__all__ = [
    "Conditioning",
    "PromptIds",
    "encode",
    "encode_prompts",
    "predict",
    "tokenize_prompts",
    "unconditional",
]

PromptIds = tuple[Tensor, ...]  # one for each text encoder, int64 (prompts, length)


class Conditioning(NamedTuple):
    """The embeddings of some prompts.

    Args:
        embeddings: (prompts, length, cross_attention_dim).
        pooled: (prompts, projection_dim) of SDXL's second encoder; None for SD1.x and SD2.x.
    """

    embeddings: Tensor
    pooled: Tensor | None = None

    def of(self, indices: Tensor) -> Conditioning:
        """Return those of the prompts with these indices, int64 (batch,); gradients go through."""
        return Conditioning(self.embeddings[indices], None if self.pooled is None else self.pooled[indices])

    def expand(self, batch: int) -> Conditioning:
        """Return the only prompt's, for every sample of a batch; a view."""
        pooled = None if self.pooled is None else self.pooled.expand(batch, -1)
        return Conditioning(self.embeddings.expand(batch, -1, -1), pooled)


def tokenize_prompts(base: Base, prompts: Sequence[str]) -> PromptIds:
    """Return the token ids of the prompts by each tokenizer of the base, on its device.

    Raises:
        DataError: a prompt is too long.
    """
    return tuple(tokenize(tokenizer, prompts).to(base.device) for tokenizer in base.tokenizers)


def encode(base: Base, ids: PromptIds) -> Conditioning:
    """Return the embeddings of tokenized prompts, by the encoders as they are: adapted ones with gradients.

    SD1.x and SD2.x read the last hidden state. SDXL reads the last but one of both encoders, side by side,
    and the second's projected pooled output (Podell et al. 2023, section 2.1).
    """
    if base.family != "sdxl":
        return Conditioning(base.text_encoder(ids[0]).last_hidden_state)
    outputs = [
        encoder(of_encoder, output_hidden_states=True)
        for encoder, of_encoder in zip(base.text_encoders.values(), ids, strict=True)
    ]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return Conditioning(hidden, outputs[-1].text_embeds)


def encode_prompts(base: Base, prompts: Sequence[str]) -> Conditioning:
    """Return the embeddings of prompts, without gradients.

    Raises:
        DataError: a prompt is too long.
    """
    with torch.no_grad():
        return encode(base, tokenize_prompts(base, prompts))


def unconditional(base: Base) -> Conditioning:
    """Return the embeddings of no prompt, as diffusers' pipelines guide with: SDXL's may be zeros."""
    empty = encode_prompts(base, [""])
    if base.pipeline.config.get("force_zeros_for_empty_prompt", False):
        pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
        return Conditioning(torch.zeros_like(empty.embeddings), pooled)
    return empty


def predict(
    unet: Any, sample: Tensor, timesteps: Tensor, conditioning: Conditioning, time_ids: Tensor | None
) -> Tensor:
    """Return the UNet's prediction, shape of sample.

    Args:
        sample: noised latents, (batch, channels, height, width).
        timesteps: int64, (batch,) or a scalar.
        conditioning: of the batch.
        time_ids: SDXL's micro-conditioning, (batch, 6): original height and width, top and left of the crop,
            target height and width, in pixels; read only where the conditioning has a pooled part.
    """
    added = None
    if conditioning.pooled is not None:
        added = {"text_embeds": conditioning.pooled, "time_ids": time_ids}
    prediction: Tensor = unet(sample, timesteps, conditioning.embeddings, added_cond_kwargs=added).sample
    return prediction
