"""The prior: the teacher is the very same model without adapters; latents of the class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dbadapter.base import Base
from dbadapter.conditioning import Conditioning, encode_prompts
from dbadapter.config import TrainConfig
from dbadapter.data import LatentCache
from dbadapter.errors import BaseError
from dbadapter.lora import inject
from dbadapter.prior import distill_prior, sample_class_latents, teacher_prediction

PROMPT = "a photo of a dog"
SIZES = [(32, 32)]


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def config(tmp_path: Path, tiny_base_folder: Path) -> TrainConfig:
    config = TrainConfig(
        tmp_path,
        "dog",
        tmp_path / "out",
        base=str(tiny_base_folder),
        num_class_images=3,
        prior_source="sampled",
    )
    return config.resolved("sd1", 32, "sks")


def some_latents() -> LatentCache:
    return LatentCache.of_latents(torch.randn(2, 4, 8, 8), 4)


def disturb(parameters: list[torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_teacher_is_the_base_whatever_was_learned(tiny_base: Base) -> None:
    x_t, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    teacher, time_ids = encode_prompts(tiny_base, [PROMPT]), torch.zeros(2, 6)
    before = tiny_base.unet(x_t, timesteps, teacher.embeddings.expand(2, -1, -1)).sample
    factors = inject(tiny_base.unet, tiny_base.text_encoder, rank=2)
    disturb([*factors.unet, *factors.text_encoder])
    assert torch.equal(teacher_prediction(tiny_base.unet, x_t, timesteps, teacher, time_ids), before)
    adapted = tiny_base.unet(x_t, timesteps, teacher.embeddings.expand(2, -1, -1)).sample
    assert not torch.allclose(adapted, before, atol=1e-3)


def test_teacher_embedding_is_of_the_unadapted_text_encoder(tiny_base: Base, config: TrainConfig) -> None:
    """kohya's fault: embeddings of the adapted encoder let the teacher drift along."""
    prior = distill_prior(tiny_base, replace(config, prior_source="instance"), some_latents(), SIZES, silent)
    assert isinstance(prior.teacher, Conditioning)
    embedding = prior.teacher.embeddings
    kept = embedding.clone()
    disturb(inject(tiny_base.unet, tiny_base.text_encoder, rank=2).text_encoder)
    adapted = encode_prompts(tiny_base, [PROMPT]).embeddings
    assert torch.equal(embedding, kept)
    assert not embedding.requires_grad
    assert not torch.allclose(adapted, embedding, atol=1e-4)


def test_sources_of_distill(tiny_base: Base, config: TrainConfig, tmp_path: Path) -> None:
    instance = some_latents()
    own = distill_prior(tiny_base, replace(config, prior_source="instance"), instance, SIZES, silent)
    assert own.cache.mean is instance.mean
    sampled = distill_prior(tiny_base, config, instance, SIZES, silent)
    assert [sampled.cache.shape(index) for index in range(3)] == [(4, 8, 8)] * 3
    pictures = tmp_path / "dogs"
    pictures.mkdir()
    Image.new("RGB", (40, 40)).save(pictures / "a.png")
    given = distill_prior(tiny_base, replace(config, class_data_dir=pictures), instance, SIZES, silent)
    assert len(given.cache) == 1
    assert given.teacher is not None


def test_class_latents_are_keyed_by_seed_not_by_batch(tiny_base: Base) -> None:
    def draw(count: int, seed: int, batch_size: int) -> torch.Tensor:
        return torch.stack(
            sample_class_latents(
                tiny_base, PROMPT, SIZES * count, seed=seed, num_inference_steps=3, batch_size=batch_size
            )
        )

    three = draw(3, 5, 2)
    assert three.dtype == torch.float32
    assert torch.allclose(three, draw(3, 5, 3), atol=1e-4)
    assert torch.allclose(three[1:2], draw(1, 6, 1), atol=1e-4)


def test_class_latents_are_those_of_diffusers_pipeline(tiny_base: Base) -> None:
    from diffusers import DPMSolverMultistepScheduler

    ours = sample_class_latents(tiny_base, PROMPT, SIZES, seed=5, num_inference_steps=5)[0]
    pipeline = tiny_base.pipeline
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        PROMPT,
        num_inference_steps=5,
        guidance_scale=5.0,
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)),
        output_type="latent",
    ).images
    assert torch.allclose(ours, theirs[0], atol=1e-4)


def test_progress_counts_every_step(tiny_base: Base) -> None:
    seen: list[tuple[str, int, int]] = []
    sample_class_latents(
        tiny_base,
        PROMPT,
        SIZES * 3,
        seed=0,
        num_inference_steps=2,
        batch_size=2,
        progress=lambda *report: seen.append(report),
    )
    assert seen == [("class latents", done, 4) for done in (1, 2, 3, 4)]


def test_latents_that_are_not_finite_are_refused(tiny_base: Base) -> None:
    with torch.no_grad():
        tiny_base.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(BaseError, match="not finite"):
        sample_class_latents(tiny_base, PROMPT, SIZES, seed=0, num_inference_steps=2)


def test_class_latents_take_the_sizes_of_the_photographs(tiny_base: Base) -> None:
    sizes = [(32, 32), (48, 24), (32, 32)]
    latents = sample_class_latents(tiny_base, PROMPT, sizes, seed=5, num_inference_steps=2)
    assert [tuple(latent.shape) for latent in latents] == [(4, 8, 8), (4, 6, 12), (4, 8, 8)]
    alone = sample_class_latents(tiny_base, PROMPT, [(32, 32)], seed=7, num_inference_steps=2)
    assert torch.allclose(latents[2], alone[0], atol=1e-4)  # the third: seed 5 + 2, whatever lies between


def test_every_size_gets_class_pictures(tiny_base: Base, config: TrainConfig, tmp_path: Path) -> None:
    pictures = tmp_path / "dogs"
    pictures.mkdir()
    for index, size in enumerate(((40, 40), (41, 40), (80, 40))):
        Image.new("RGB", size).save(pictures / f"{index}.png")
    sizes = [(32, 32), (24, 40), (40, 24)]
    given = distill_prior(tiny_base, replace(config, class_data_dir=pictures), some_latents(), sizes, silent)
    counts = [len(given.cache.of_shape((4, height // 4, width // 4))) for width, height in sizes]
    assert counts == [2, 3, 1]  # none is upright, so those take all
