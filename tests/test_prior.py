"""The prior: the teacher is the very same model without adapters, and class pictures are never mixed up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dbadapter import prior as prior_module
from dbadapter.base import Base, encode_prompt
from dbadapter.config import TrainConfig
from dbadapter.data import LatentCache
from dbadapter.errors import BaseError
from dbadapter.lora import inject
from dbadapter.prior import distill_prior, generated_prior, sample_class_latents, teacher_prediction

PROMPT = "a photo of a dog"


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def config(tmp_path: Path, tiny_base_folder: Path) -> TrainConfig:
    config = TrainConfig(tmp_path, "dog", tmp_path / "out", base=str(tiny_base_folder), num_class_images=3)
    return config.resolved("sd1", 32, "sks")


def some_latents() -> LatentCache:
    return LatentCache.of_latents(torch.randn(2, 4, 8, 8))


def disturb(parameters: list[torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_teacher_is_the_base_whatever_was_learned(tiny_base: Base) -> None:
    x_t, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    embedding = encode_prompt(tiny_base.text_encoder, tiny_base.tokenizer, [PROMPT])
    before = tiny_base.unet(x_t, timesteps, embedding.expand(2, -1, -1)).sample
    factors = inject(tiny_base.unet, tiny_base.text_encoder, rank=2)
    disturb([*factors.unet, *factors.text_encoder])
    assert torch.equal(teacher_prediction(tiny_base.unet, x_t, timesteps, embedding), before)
    adapted = tiny_base.unet(x_t, timesteps, embedding.expand(2, -1, -1)).sample
    assert not torch.allclose(adapted, before, atol=1e-3)


def test_teacher_embedding_is_of_the_unadapted_text_encoder(tiny_base: Base, config: TrainConfig) -> None:
    """kohya's fault: embeddings of the adapted encoder let the teacher drift along."""
    prior = distill_prior(tiny_base, replace(config, prior_source="instance"), some_latents(), silent)
    embedding = prior.teacher_embedding
    assert embedding is not None
    kept = embedding.clone()
    disturb(inject(tiny_base.unet, tiny_base.text_encoder, rank=2).text_encoder)
    adapted = encode_prompt(tiny_base.text_encoder, tiny_base.tokenizer, [PROMPT])
    assert torch.equal(embedding, kept)
    assert not embedding.requires_grad
    assert not torch.allclose(adapted, embedding, atol=1e-4)


def test_sources_of_distill(tiny_base: Base, config: TrainConfig, tmp_path: Path) -> None:
    instance = some_latents()
    own = distill_prior(tiny_base, replace(config, prior_source="instance"), instance, silent)
    assert own.cache is instance
    sampled = distill_prior(tiny_base, config, instance, silent)
    assert sampled.cache.mean.shape == (3, 4, 8, 8)
    pictures = tmp_path / "dogs"
    pictures.mkdir()
    Image.new("RGB", (40, 40)).save(pictures / "a.png")
    given = distill_prior(tiny_base, replace(config, class_data_dir=pictures), instance, silent)
    assert len(given.cache) == 1
    assert given.teacher_embedding is not None


def test_class_latents_are_keyed_by_seed_not_by_batch(tiny_base: Base) -> None:
    def draw(count: int, seed: int, batch_size: int) -> torch.Tensor:
        return sample_class_latents(
            tiny_base, PROMPT, count, seed=seed, resolution=32, num_inference_steps=3, batch_size=batch_size
        )

    three = draw(3, 5, 2)
    assert three.dtype == torch.float32
    assert torch.allclose(three, draw(3, 5, 3), atol=1e-4)
    assert torch.allclose(three[1:2], draw(1, 6, 1), atol=1e-4)


def test_class_latents_are_those_of_diffusers_pipeline(tiny_base: Base) -> None:
    from diffusers import DPMSolverMultistepScheduler

    ours = sample_class_latents(tiny_base, PROMPT, 1, seed=5, resolution=32, num_inference_steps=5)
    pipeline = tiny_base.pipeline
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        PROMPT,
        num_inference_steps=5,
        guidance_scale=5.0,
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)),
        output_type="latent",
    ).images
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_progress_counts_every_step(tiny_base: Base) -> None:
    seen: list[tuple[str, int, int]] = []
    sample_class_latents(
        tiny_base,
        PROMPT,
        3,
        seed=0,
        resolution=32,
        num_inference_steps=2,
        batch_size=2,
        progress=lambda *report: seen.append(report),
    )
    assert seen == [("class latents", done, 4) for done in (1, 2, 3, 4)]


def test_latents_that_are_not_finite_are_refused(tiny_base: Base) -> None:
    with torch.no_grad():
        tiny_base.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(BaseError, match="not finite"):
        sample_class_latents(tiny_base, PROMPT, 1, seed=0, resolution=32, num_inference_steps=2)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Few steps a picture, and a record of how often class pictures were drawn."""
    calls: list[dict[str, Any]] = []
    original: Callable[..., Any] = prior_module.generate_pictures

    def generate(*args: Any, **settings: Any) -> Any:
        calls.append(settings)
        return original(*args, **settings | {"num_inference_steps": 2})

    monkeypatch.setattr(prior_module, "generate_pictures", generate)
    return calls


def test_generated_pictures_are_kept_with_what_made_them(
    tiny_base: Base, config: TrainConfig, tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    folder = tmp_path / "class_images"
    prior = generated_prior(tiny_base, config, folder, silent)
    assert prior.teacher_embedding is None
    assert len(prior.cache) == 3
    record = json.loads((folder / "record.json").read_text())
    assert (record["prompt"], record["seed"], record["count"]) == (PROMPT, 0, 3)
    assert (folder / "0002.png").exists()
    again = generated_prior(tiny_base, config, folder, silent)
    assert torch.equal(again.cache.mean, prior.cache.mean)
    assert len(drawn) == 1


@pytest.mark.parametrize("change", [{"seed": 1}, {"class_prompt": "a cat"}, {"num_class_images": 2}])
def test_pictures_of_another_prompt_or_seed_are_not_reused(
    tiny_base: Base,
    config: TrainConfig,
    tmp_path: Path,
    change: dict[str, Any],
    drawn: list[dict[str, Any]],
) -> None:
    folder = tmp_path / "class_images"
    generated_prior(tiny_base, config, folder, silent)
    generated_prior(tiny_base, replace(config, **change), folder, silent)
    assert len(drawn) == 2


def test_own_class_pictures_are_taken_as_they_are(
    tiny_base: Base, config: TrainConfig, tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    prior = generated_prior(tiny_base, replace(config, class_data_dir=tmp_path), tmp_path / "none", silent)
    assert len(prior.cache) == 1
    assert drawn == []
    assert not (tmp_path / "none").exists()
