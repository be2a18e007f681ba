"""Training on a tiny base: the step, and the run's folder."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_runs import draw_quickly, set_up, tiny_config, write_photographs

from dbadapter import training
from dbadapter.adapter_file import read_adapter
from dbadapter.base import Base, load_base
from dbadapter.config import TrainConfig
from dbadapter.data import picture_indices
from dbadapter.lora import adapters_off, apply, collect
from dbadapter.training import Run, train, train_step

GOLDEN = Path(__file__).parent / "golden" / "loss_curve.json"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = write_photographs(tmp_path / "photographs")
    (folder / ".DS_Store").write_bytes(b"junk")
    return folder


@pytest.fixture
def config(tmp_path: Path, photographs: Path, tiny_base_folder: Path) -> TrainConfig:
    return tiny_config(photographs, tmp_path / "out", tiny_base_folder, prior_source="sampled")


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_quickly(monkeypatch)


def curve(run: Run, steps: int) -> list[list[float]]:
    return [train_step(run, step).tolist() for step in range(steps)]


# From the same weights it is the golden one there too, but transformers 4 draws others for a random base.
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="another random base")
def test_loss_curve_is_the_golden_one(config: TrainConfig, tmp_path: Path) -> None:
    """Guards against silent changes of noise, order, targets and update.

    With a reason to change it: REWRITE_GOLDEN=1 pytest tests/test_training.py -k golden
    """
    # A high rate, so that the prior, whose loss starts at zero, is seen too.
    config = replace(config, learning_rate=0.1, text_encoder_learning_rate=0.1)
    found = curve(set_up(config, tmp_path), 5)
    if os.environ.get("REWRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"total, instance, prior, grad_norm": found}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    np.testing.assert_allclose(found, golden["total, instance, prior, grad_norm"], rtol=2e-2, atol=1e-6)


def test_prior_loss_starts_at_zero_and_is_felt_later(config: TrainConfig, tmp_path: Path) -> None:
    """The untrained adapter changes nothing, so student and teacher agree; one step later they do not."""
    first, second, *_ = curve(set_up(config, tmp_path), 2)
    assert first[2] == pytest.approx(0, abs=1e-8)  # batches of other sizes round differently
    assert second[2] > 1e-7


def test_training_learns(config: TrainConfig, tmp_path: Path) -> None:
    run = set_up(replace(config, prior="none", learning_rate=2e-2), tmp_path)
    losses = [row[1] for row in curve(run, 30)]
    assert np.mean(losses[-8:]) < 0.95 * np.mean(losses[:8])


def test_only_the_adapter_changes(config: TrainConfig, tmp_path: Path) -> None:
    run = set_up(config, tmp_path)
    trained = {id(parameter) for parameter in run.parameters}
    models = (run.base.unet, run.base.text_encoder)
    frozen = [p for model in models for p in model.parameters() if id(p) not in trained]
    before = [parameter.clone() for parameter in frozen]
    curve(run, 2)
    assert all(torch.equal(one, other) for one, other in zip(frozen, before, strict=True))
    assert all(parameter.dtype == torch.float32 for parameter in run.parameters)
    assert all(parameter.abs().sum() > 0 for parameter in run.parameters)


def test_bf16_trains_float32_factors_on_bf16_weights(config: TrainConfig, tmp_path: Path) -> None:
    """Factors in bfloat16 would lose updates of 1e-4."""
    run = set_up(replace(config, mixed_precision="bf16"), tmp_path)
    exact = curve(set_up(config, tmp_path), 3)
    assert {parameter.dtype for parameter in run.parameters} == {torch.float32}
    assert run.base.unet.conv_in.weight.dtype == torch.bfloat16
    np.testing.assert_allclose(np.array(curve(run, 3))[:, 1], np.array(exact)[:, 1], rtol=0.03)


def test_accumulation_equals_one_large_batch(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, photo_tokens=True)
    whole = curve(set_up(replace(config, train_batch_size=4), tmp_path), 2)
    parts = replace(config, train_batch_size=2, gradient_accumulation_steps=2)
    np.testing.assert_allclose(curve(set_up(parts, tmp_path), 2), whole, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    plain = curve(set_up(config, tmp_path), 2)
    sparing = curve(set_up(replace(config, gradient_checkpointing=True), tmp_path), 2)
    np.testing.assert_allclose(sparing, plain, rtol=1e-3, atol=1e-4)


def test_frozen_text_encoder_is_encoded_once(config: TrainConfig, tmp_path: Path) -> None:
    run = set_up(replace(config, train_text_encoder=False), tmp_path)
    assert run.conditioning is not None
    assert run.conditioning.embeddings.shape == (2, 32, 32)
    curve(run, 1)
    adapter = collect(run.base.unet, run.base.text_encoder, run.base.family)
    assert not adapter.of_component("text_encoder")


def test_text_encoder_has_its_own_rank_and_the_same_scale(config: TrainConfig, tmp_path: Path) -> None:
    run = set_up(replace(config, rank=4, alpha=2.0, text_encoder_rank=2), tmp_path)
    adapter = collect(run.base.unet, run.base.text_encoder, run.base.family)
    ranks = {c: {w.rank for w in adapter.of_component(c).values()} for c in ("unet", "text_encoder")}
    assert ranks == {"unet": {4}, "text_encoder": {2}}
    assert {weights.scaling for weights in adapter.modules.values()} == {0.5}


def test_min_snr_weighs_both_terms(config: TrainConfig, tmp_path: Path) -> None:
    plain = curve(set_up(replace(config, prior="generated"), tmp_path), 1)
    weighed = curve(set_up(replace(config, prior="generated", snr_gamma=0.01), tmp_path), 1)
    assert weighed[0][1] < plain[0][1]
    assert weighed[0][2] < plain[0][2]


def test_flipping_doubles_the_photographs(config: TrainConfig, tmp_path: Path) -> None:
    assert len(set_up(replace(config, random_flip=True), tmp_path).samples.instance) == 6


def test_photo_tokens_give_each_photograph_its_prompt(config: TrainConfig, tmp_path: Path) -> None:
    """Mirrored pictures keep their photograph's token, and the class prompt stays as it is."""
    run = set_up(replace(config, photo_tokens=True, random_flip=True), tmp_path)
    assert run.samples.prompt_of.tolist() == [[0] * 6, [1, 2, 3, 1, 2, 3], [1, 2, 3, 1, 2, 3]]
    assert len(run.prompt_ids[0]) == 5
    words = run.base.tokenizer.batch_decode(run.prompt_ids[0], skip_special_tokens=True)
    assert words[0] == "a photo of sks dog"
    assert [text.rpartition(" ")[0] for text in words[1:4]] == ["a photo of sks dog on"] * 3
    assert words[4] == "a photo of a dog"


@pytest.mark.parametrize("train_text_encoder", [True, False])
def test_photo_tokens_reach_the_model(config: TrainConfig, tmp_path: Path, train_text_encoder: bool) -> None:
    """Each sample has the embedding of its own photograph's prompt, or the plain one in every third pass."""
    config = replace(config, photo_tokens=True, train_batch_size=32, train_text_encoder=train_text_encoder)
    run = set_up(config, tmp_path)
    text_encoder = load_base(config.base, device="cpu").text_encoder  # the run's own leaves, if not trained
    with torch.no_grad():
        expected = text_encoder(run.prompt_ids[0]).last_hidden_state
    seen: list[tuple[torch.Tensor, ...]] = []
    run.base.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    train_step(run, 0)
    _, _, embeddings = seen[-1]  # the teacher's come before
    chosen = picture_indices("instance", config.seed, range(32), 3)
    wanted = [1 + picture if index // 3 % 3 else 0 for index, picture in enumerate(chosen)]
    torch.testing.assert_close(embeddings.detach(), expected[[*wanted, *[4] * 32]])


def test_learning_rates_follow_the_schedule(config: TrainConfig, tmp_path: Path) -> None:
    run = set_up(replace(config, text_encoder_learning_rate=2e-2, lr_scheduler="linear"), tmp_path)
    found = []
    for step in range(4):
        train_step(run, step)
        found.append([group["lr"] for group in run.optimizer.param_groups])
    assert np.array(found) == pytest.approx(np.outer([1, 0.75, 0.5, 0.25], [1e-2, 2e-2]))


def test_run_leaves_what_it_promises(config: TrainConfig) -> None:
    stages: list[str] = []
    result = train(config, progress=lambda stage, done, total: stages.append(stage))
    out = config.output_dir
    assert {path.name for path in out.iterdir()} == {
        "out.safetensors",
        "out.json",
        "out.png",
        "config.toml",
        "metrics.jsonl",
        "samples",
        "checkpoints",
        "README.md",
        ".finished.json",
    }
    assert list(dict.fromkeys(stages)) == ["class latents", "train", "samples"]
    assert (result.steps, result.adapter_path) == (4, out / "out.safetensors")
    assert result.sample_paths == (out / "samples/0000.png", out / "samples/grid.png")
    lines = [json.loads(line) for line in result.metrics_path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) == {"step", "loss", "instance_loss", "prior_loss", "grad_norm", "seconds"}
    written = tomllib.loads((out / "config.toml").read_text())
    assert written["identifier"] == "sks"
    assert written["instance_prompt"] == "a photo of sks dog"
    card = (out / "README.md").read_text()
    assert "`sks dog`" in card
    assert "samples/grid.png" in card
    adapter = read_adapter(result.adapter_path)
    assert adapter.metadata["modelspec.trigger_phrase"] == "sks dog"
    assert adapter.metadata["ss_num_train_images"] == "3"


def test_file_is_the_trained_model(
    config: TrainConfig, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prediction of a fresh base with the file equals that of the model that was trained."""
    kept: list[Run] = []
    original: Callable[..., Run] = training.prepare
    monkeypatch.setattr(training, "prepare", lambda *a, **k: kept.append(original(*a, **k)) or kept[-1])
    result = train(config)
    trained = kept[0].base
    latents, timestep = torch.randn(1, 4, 8, 8), torch.tensor([500])

    def predict(base: Base) -> torch.Tensor:
        ids = kept[0].prompt_ids[0][:1]
        with torch.no_grad():
            prediction: torch.Tensor = base.unet(latents, timestep, base.text_encoder(ids)[0]).sample
        return prediction

    with adapters_off(trained.unet, trained.text_encoder):
        without = predict(trained)
    apply(tiny_base.pipeline, {result.adapter_path: 1.0})
    effect = (predict(trained) - without).norm()
    assert (predict(tiny_base) - predict(trained)).norm() < effect / 20


@pytest.mark.parametrize("kind", ["generated", "none"])
def test_other_priors_run(config: TrainConfig, kind: str) -> None:
    result = train(replace(config, prior=kind, max_train_steps=1))
    assert (result.prior_loss is None) == (kind == "none")
    assert (config.output_dir / "class_images/0001.png").exists() == (kind == "generated")


def test_runs_repeat(config: TrainConfig, tmp_path: Path) -> None:
    one = train(replace(config, output_dir=tmp_path / "one"))
    other = train(replace(config, output_dir=tmp_path / "other"))
    ours, theirs = read_adapter(one.adapter_path), read_adapter(other.adapter_path)
    for name, weights in ours.modules.items():
        assert torch.equal(weights.lora_A, theirs.modules[name].lora_A), name
        assert torch.equal(weights.lora_B, theirs.modules[name].lora_B), name


def test_previews_are_drawn_on_the_way(config: TrainConfig) -> None:
    train(replace(config, max_train_steps=3, validation_steps=2, mixed_precision="bf16"))
    assert (config.output_dir / "samples/step-000002/0000.png").exists()
    assert (config.output_dir / "samples/0000.png").exists()


def test_short_prompts_make_the_default_samples(config: TrainConfig) -> None:
    result = train(replace(config, validation_prompt=(), max_train_steps=1))
    assert len(result.sample_paths) == 5  # four places and the grid


def test_captions_may_end_in_capitals(config: TrainConfig, tmp_path: Path) -> None:
    (config.instance_data_dir / "0.TXT").write_text("a photo of {identifier} {class} in snow")
    result = train(replace(config, max_train_steps=2))
    assert train(replace(config, max_train_steps=2, resume=True)).finished_before
    assert result.steps == 2
