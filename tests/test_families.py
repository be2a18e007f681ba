"""A run on each base family: tiny random models with all the parts of the real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm import write_ldm
from tiny_bases import write_tiny_base
from tiny_runs import draw_quickly, set_up, tiny_config, write_photographs

from dbadapter import prior
from dbadapter.adapter_file import read_adapter
from dbadapter.base import Base, load_base
from dbadapter.batches import batches
from dbadapter.conditioning import encode_prompts, predict, unconditional
from dbadapter.config import TrainConfig
from dbadapter.errors import UsageError
from dbadapter.lora import adapters_off, apply
from dbadapter.training import batch_losses, train, train_step, validation_loss

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = {family: write_tiny_base(folder / family, family) for family in FAMILIES}
    made["sd2-v"] = write_tiny_base(folder / "sd2-v", "sd2", prediction_type="v_prediction")
    return made


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_quickly(monkeypatch)


@pytest.fixture
def config(tmp_path: Path, bases: dict[str, Path]) -> TrainConfig:
    sizes = ((48, 40), (40, 64), (70, 40))  # square, upright, wide
    photographs = write_photographs(tmp_path / "photographs", sizes)
    return tiny_config(
        photographs,
        tmp_path / "out",
        bases["sd1"],
        num_class_images=3,
        max_train_steps=2,
        train_batch_size=3,
        gradient_accumulation_steps=1,
        checkpointing_steps=None,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_told_from_configs(bases: dict[str, Path], family: str) -> None:
    base = load_base(str(bases[family]), device="cpu")
    assert base.family == family
    assert list(base.text_encoders) == ["text_encoder", "text_encoder_2"][: 2 if family == "sdxl" else 1]
    models = (base.unet, base.vae, *base.text_encoders.values())
    assert not any(parameter.requires_grad for model in models for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "kind", "train_text_encoder", "precision"),
    [
        ("sd1", "distill", True, "bf16"),
        ("sd1", "generated", False, "no"),
        ("sd2", "distill", True, "no"),
        ("sd2", "generated", True, "bf16"),
        ("sd2-v", "distill", False, "bf16"),
        ("sd2-v", "generated", True, "no"),
        ("sdxl", "distill", True, "no"),
        ("sdxl", "distill", False, "bf16"),
        ("sdxl", "generated", True, "bf16"),
        ("sdxl", "generated", False, "no"),
    ],
)
def test_a_run(
    config: TrainConfig,
    bases: dict[str, Path],
    family: str,
    kind: str,
    train_text_encoder: bool,
    precision: str,
) -> None:
    result = train(
        replace(
            config,
            base=str(bases[family]),
            prior=kind,
            prior_source="sampled",
            train_text_encoder=train_text_encoder,
            mixed_precision=precision,
        )
    )
    assert result.steps == 2
    assert result.prior_loss is not None
    adapter = read_adapter(result.adapter_path)
    assert adapter.family == family.removesuffix("-v")
    components = {name.partition(".")[0] for name in adapter.modules}
    texts = {"text_encoder", "text_encoder_2"} if family == "sdxl" else {"text_encoder"}
    assert components == {"unet"} | (texts if train_text_encoder else set())
    base = load_base(str(bases[family]), device="cpu")
    before = prediction(base)
    apply(base.pipeline, {result.adapter_path: 1.0})
    assert not torch.allclose(prediction(base), before, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "prior", "precision"),
    [
        ("sd1", "generated", "bf16"),
        ("sd2", "distill", "no"),
        ("sd2-v", "generated", "no"),
        ("sdxl", "distill", "bf16"),
    ],
)
def test_a_single_file_trains_as_its_folder(
    config: TrainConfig, bases: dict[str, Path], tmp_path: Path, family: str, prior: str, precision: str
) -> None:
    file = write_ldm(bases[family], tmp_path / "base.safetensors")
    settings = replace(config, prior=prior, mixed_precision=precision, name="it")
    adapters = []
    for name, base in (("folder", bases[family]), ("file", file)):
        run = replace(settings, base=str(base), output_dir=tmp_path / name)
        adapters.append(read_adapter(train(run).adapter_path))
    whole, single = adapters
    assert single.family == whole.family == family.removesuffix("-v")
    assert single.modules.keys() == whole.modules.keys()
    for name, weights in whole.modules.items():
        assert torch.equal(single.modules[name].lora_B, weights.lora_B), name


def prediction(base: Base) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    with torch.no_grad():
        conditioning = encode_prompts(base, ["a photo of sks dog"])
        return predict(base.unet, latents, torch.tensor([500]), conditioning, time_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_pipeline(bases: dict[str, Path], family: str) -> None:
    base = load_base(str(bases[family]), device="cpu")
    prompt = "a photo of sks dog"
    with torch.no_grad():
        theirs = base.pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    ours, empty = encode_prompts(base, [prompt]), unconditional(base)
    assert torch.equal(ours.embeddings, theirs[0])
    assert torch.equal(empty.embeddings, theirs[1])
    if family == "sdxl":
        assert torch.equal(ours.pooled, theirs[2])
        assert torch.equal(empty.pooled, theirs[3])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_text_encoder", [True, False])
def test_teacher_is_the_untouched_base_exactly(
    config: TrainConfig, bases: dict[str, Path], tmp_path: Path, family: str, train_text_encoder: bool
) -> None:
    """After steps that moved the adapters of every part, and by the original text encoders' embeddings."""
    config = replace(config, train_text_encoder=train_text_encoder, validation_steps=1)
    run = set_up(replace(config, base=str(bases[family])), tmp_path)
    untouched = load_base(str(bases[family]), device="cpu")
    for step in range(2):
        train_step(run, step)
    assert run.prior is not None
    assert run.prior.teacher is not None
    batch = next(iter(batches(run.samples, 2)))
    x, timesteps, time_ids = batch.x0, batch.timesteps, batch.time_ids
    ours = prior.teacher_prediction(run.teacher, x, timesteps, run.prior.teacher, time_ids)
    with torch.no_grad():
        untouched.unet.set_attn_processor(run.base.unet.attn_processors)  # the same way through attention
        conditioning = encode_prompts(untouched, ["a photo of a dog"]).expand(len(x))
        theirs = predict(untouched.unet, x, timesteps, conditioning, time_ids)
        moved = predict(run.base.unet, x, timesteps, conditioning, time_ids)
    assert torch.equal(ours, theirs)
    assert not torch.equal(moved, theirs)
    with adapters_off(*run.base.text_encoders.values()):
        assert torch.equal(
            encode_prompts(run.base, ["a photo of a dog"]).embeddings, run.prior.teacher.embeddings
        )


def test_sdxl_reads_true_sizes_and_crops(config: TrainConfig, bases: dict[str, Path], tmp_path: Path) -> None:
    """Original height and width, top and left of the crop, target height and width, of each photograph."""
    run = set_up(replace(config, base=str(bases["sdxl"])), tmp_path)
    sizes = [tuple(int(value) for value in row) for row in run.samples.instance.time_ids]
    shapes = {(row[4], row[5]) for row in sizes}
    assert [row[:2] for row in sizes] == [(40, 48), (64, 40), (40, 70)]
    assert len(shapes) > 1
    for row, shape in zip(sizes, map(run.samples.instance.shape, range(3)), strict=True):
        assert (row[4] // 4, row[5] // 4) == shape[1:]
        assert row[2] == 0 or row[3] == 0
    seen: list[Any] = []
    run.base.unet.register_forward_pre_hook(
        lambda _, inputs, keywords: seen.append(keywords), with_kwargs=True
    )
    train_step(run, 0)
    given = {tuple(int(v) for v in row) for call in seen for row in call["added_cond_kwargs"]["time_ids"]}
    assert set(sizes) <= given


@pytest.mark.parametrize(("family", "kind"), [("sd1", "generated"), ("sdxl", "distill")])
def test_full_trains_the_models_themselves(
    config: TrainConfig, bases: dict[str, Path], family: str, kind: str
) -> None:
    config = replace(config, base=str(bases[family]), full=True, rank=None, prior=kind, learning_rate=1e-3,
                     text_encoder_learning_rate=1e-3)  # fmt: skip
    result = train(config)
    assert result.adapter_path == config.output_dir / "model"
    assert result.prior_loss is not None
    tuned, base = (
        load_base(str(result.adapter_path), device="cpu"),
        load_base(str(bases[family]), device="cpu"),
    )
    assert tuned.family == family
    assert not torch.allclose(tuned.unet.conv_in.weight, base.unet.conv_in.weight, atol=1e-5)
    assert torch.equal(tuned.vae.decoder.conv_in.weight, base.vae.decoder.conv_in.weight)


def test_full_distills_from_an_untouched_copy(
    config: TrainConfig, bases: dict[str, Path], tmp_path: Path
) -> None:
    run = set_up(replace(config, full=True, rank=None, learning_rate=1e-2), tmp_path)
    before = run.teacher.conv_in.weight.clone()
    first = train_step(run, 0)
    second = train_step(run, 1)
    assert torch.equal(run.teacher.conv_in.weight, before)
    assert float(first[2]) == pytest.approx(0, abs=1e-8)
    assert float(second[2]) > 1e-7


def test_shapes_of_a_batch_share_its_loss(
    config: TrainConfig, bases: dict[str, Path], tmp_path: Path
) -> None:
    run = set_up(replace(config, train_text_encoder=False), tmp_path)
    parts = list(batches(run.samples, 0))
    assert len(parts) > 1
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert sum(part.num_instance for part in parts) == 3
    for part in parts:
        assert len(part.x0) == 2 * part.num_instance == len(part.time_ids)
    alone = sum(float(batch_losses(run, part).instance) * part.share for part in parts)
    assert float(train_step(run, 0)[1]) == pytest.approx(alone, rel=1e-4)


def test_validation_loss_repeats(config: TrainConfig, bases: dict[str, Path], tmp_path: Path) -> None:
    run = set_up(config, tmp_path)
    first = validation_loss(run)
    assert validation_loss(run) == first
    train_step(run, 0)
    assert validation_loss(run) != first


@pytest.mark.parametrize("settings", [{"prior": "generated"}, {"prior_source": "sampled"}])
def test_every_shape_gets_a_class_picture(
    config: TrainConfig, tmp_path: Path, settings: dict[str, str]
) -> None:
    photographs = write_photographs(tmp_path / "shapes", ((48, 48), (48, 48), (80, 40)))
    config = replace(config, instance_data_dir=photographs, **settings)
    with pytest.raises(UsageError, match="1 class images are fewer than the photographs' 2 shapes"):
        train(replace(config, num_class_images=1))
    assert train(replace(config, num_class_images=2)).steps == 2
