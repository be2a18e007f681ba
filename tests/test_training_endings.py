"""Training runs that are stopped, gone on with or refused: what is left, and what --resume makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import draw_quickly, tiny_config, write_photographs

from dbadapter import training
from dbadapter.adapter_file import read_adapter
from dbadapter.config import TrainConfig
from dbadapter.errors import ConfigError, DataError, OutputError, TrainingError, UsageError
from dbadapter.training import Run, train


@pytest.fixture
def config(tmp_path: Path, tiny_base_folder: Path) -> TrainConfig:
    photographs = write_photographs(tmp_path / "photographs")
    return tiny_config(photographs, tmp_path / "out", tiny_base_folder, prior_source="sampled")


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_quickly(monkeypatch)


def test_resumed_run_equals_an_unbroken_one(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, photo_tokens=True)
    whole = train(replace(config, output_dir=tmp_path / "whole"))
    train(replace(config, max_train_steps=2))
    # A crash may leave metrics beyond the checkpoint, the last line cut short.
    with (config.output_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1}\n{"ste')
    resumed = train(replace(config, resume=True))
    assert resumed.steps == 4
    lines = resumed.metrics_path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    ours, theirs = read_adapter(resumed.adapter_path), read_adapter(whole.adapter_path)
    for name, weights in ours.modules.items():
        assert torch.allclose(weights.lora_B, theirs.modules[name].lora_B, atol=1e-4), name


def test_resume_without_a_checkpoint_starts_at_step_0(config: TrainConfig) -> None:
    assert train(replace(config, resume=True)).steps == 4


def test_resume_of_a_finished_run_changes_nothing(config: TrainConfig) -> None:
    first = train(replace(config, max_train_steps=2))
    before = {path: path.read_bytes() for path in config.output_dir.rglob("*") if path.is_file()}
    again = train(replace(config, max_train_steps=2, resume=True))
    assert (again.finished_before, again.steps, again.adapter_path) == (True, 2, first.adapter_path)
    assert again.instance_loss == first.instance_loss
    assert {path: path.read_bytes() for path in config.output_dir.rglob("*") if path.is_file()} == before


def test_resume_refuses_another_run(config: TrainConfig) -> None:
    train(replace(config, max_train_steps=2))
    with pytest.raises(ConfigError, match="rank was 2, is 3"):
        train(replace(config, rank=3, resume=True))


def test_resume_of_a_finished_run_without_checkpoints(config: TrainConfig) -> None:
    config = replace(config, checkpointing_steps=0, max_train_steps=2)
    train(config)
    assert train(replace(config, resume=True)).finished_before
    with pytest.raises(OutputError, match="finished run of 2 steps and no checkpoint to go on from"):
        train(replace(config, resume=True, max_train_steps=4))


def test_outputs_are_refused_unless_overwritten(config: TrainConfig) -> None:
    first = train(replace(config, max_train_steps=1))
    before = first.adapter_path.read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        train(config)
    assert first.adapter_path.read_bytes() == before
    again = train(replace(config, overwrite=True))
    assert again.adapter_path.read_bytes() != before
    assert again.steps == 4


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    original = training.train_step

    def stepping(run: Run, number: int) -> torch.Tensor:
        values = original(run, number)
        return values if number < step else values * action()

    monkeypatch.setattr(training, "train_step", stepping)


def interrupt() -> float:
    raise KeyboardInterrupt


def test_interrupted_run_can_be_resumed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As if it had not been cut, on a falling rate too."""
    config = replace(config, lr_scheduler="linear")
    with monkeypatch.context() as patch:
        stop_at(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt, match="add --resume to go on from step 2"):
            train(config)
    assert not (config.output_dir / "out.safetensors").exists()
    with pytest.raises(OutputError, match="pass --resume to go on with that run"):
        train(config)
    with pytest.raises(UsageError, match="has 2 steps already; to go on pass --max-train-steps above that"):
        train(replace(config, resume=True, max_train_steps=1))  # its steps cannot be taken back
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: float("nan"))
        with pytest.raises(TrainingError, match="add --resume to go on from step 2"):
            train(replace(config, resume=True))
    resumed = train(replace(config, resume=True))
    assert resumed.steps == 4
    whole = train(replace(config, output_dir=tmp_path / "whole"))
    ours, theirs = read_adapter(resumed.adapter_path), read_adapter(whole.adapter_path)
    for name, weights in ours.modules.items():
        assert torch.allclose(weights.lora_B, theirs.modules[name].lora_B, atol=1e-4), name
    assert resumed.instance_loss == pytest.approx(whole.instance_loss, rel=1e-3)


def test_interruption_before_any_checkpoint_leaves_nothing(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 0, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert not config.output_dir.exists()


def test_interruption_keeps_finished_class_pictures(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have taken an hour; the next run uses them."""
    config = replace(config, prior="generated")
    config.output_dir.mkdir()
    with monkeypatch.context() as patch:
        stop_at(patch, 0, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    picture = config.output_dir / "class_images/0000.png"
    made = picture.stat().st_mtime_ns
    train(replace(config, overwrite=True))
    assert picture.stat().st_mtime_ns == made


def test_loss_that_is_not_finite(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing learned before is lost, and the message gives step and cure."""
    with monkeypatch.context() as patch:
        stop_at(patch, 3, lambda: float("nan"))
        with pytest.raises(TrainingError, match=r"at step 4: lower --learning-rate .* from step 2"):
            train(config)
    assert train(replace(config, resume=True, learning_rate=1e-3)).steps == 4


def test_fp16_that_overflows_for_ever(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler skips step after step: without this the run would end well, with nothing learned."""
    original = training.train_step

    def stepping(run: Run, number: int) -> torch.Tensor:
        values = original(run, number)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
        return values

    monkeypatch.setattr(training, "train_step", stepping)
    with pytest.raises(TrainingError, match=r"overflow in fp16 at step 2.*bf16 or no, and start again"):
        train(config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"instance_data_dir": Path("nowhere")}, DataError, "does not exist"),
        ({"class_data_dir": Path("nowhere")}, DataError, "does not exist"),
        ({"instance_prompt": "{identifier} " + "dog " * 40}, DataError, "tokens long"),
        ({"class_prompt": "dog " * 40}, DataError, "tokens long"),
        ({"validation_prompt": ("dog " * 40,)}, DataError, "tokens long"),
        ({"mixed_precision": "fp16"}, UsageError, "needs a GPU"),
        ({"rank": 0}, ConfigError, "rank"),
    ],
)
def test_bad_input_leaves_nothing(
    config: TrainConfig, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "mixed_precision" in change and torch.cuda.is_available():
        pytest.skip("fp16 is possible here")
    with pytest.raises(error, match=message):
        train(replace(config, **change))
    assert not config.output_dir.exists()


def test_a_finished_run_is_known_whatever_its_checkpoints_are(config: TrainConfig) -> None:
    train(replace(config, max_train_steps=2))
    longer = replace(config, resume=True, checkpointing_steps=0)
    first = train(longer)
    before = first.adapter_path.read_bytes()
    again = train(longer)
    assert (again.finished_before, again.steps) == (True, 4)
    assert again.adapter_path.read_bytes() == before
    for path in config.output_dir.glob("checkpoints/*"):
        path.unlink()
    with pytest.raises(ConfigError, match="seed was 0, is 7"):
        train(replace(longer, seed=7))


def test_photographs_are_no_output_folder(config: TrainConfig) -> None:
    with pytest.raises(OutputError, match="holds the photographs"):
        train(replace(config, output_dir=config.instance_data_dir))


def test_class_pictures_are_those_of_another_folder(config: TrainConfig) -> None:
    settings = replace(config, prior="generated", class_data_dir=config.instance_data_dir)
    with pytest.raises(UsageError, match="cannot be the class's as well"):
        train(settings)


def test_a_logger_that_fails_leaves_nothing(config: TrainConfig) -> None:
    config.output_dir.mkdir()
    (config.output_dir / "logs").write_text("mine")
    with pytest.raises((OutputError, UsageError)):
        train(replace(config, logger="tensorboard"))
    assert [path.name for path in config.output_dir.iterdir()] == ["logs"]
