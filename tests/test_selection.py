"""`--select best`: which checkpoint becomes the file, when a run ends of itself, and its resuming."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pictures import PIXELS
from PIL import Image
from tiny_runs import draw_quickly, tiny_config, write_photographs

from dbadapter import checkpoint, selection
from dbadapter.adapter_file import read_adapter
from dbadapter.cli import main
from dbadapter.config import TrainConfig
from dbadapter.curve import SIZE, draw_curve
from dbadapter.errors import BaseError, ConfigError, DataError, TrainingError, UsageError
from dbadapter.evaluation import Evaluator, Scores
from dbadapter.evaluation_prompts import LIVE, OBJECT, selection_prompts
from dbadapter.model_card import last_losses
from dbadapter.run_folder import read_metrics
from dbadapter.score import ROOM, overall
from dbadapter.selection import Selection, exhausted, remembered
from dbadapter.training import Run, _plotted, train


@pytest.fixture
def config(tmp_path: Path, tiny_base_folder: Path) -> TrainConfig:
    photographs = write_photographs(tmp_path / "photographs")
    made = tiny_config(photographs, tmp_path / "out", tiny_base_folder)
    return replace(made, max_train_steps=10, lr_scheduler="constant", select="best", checkpointing_steps=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_quickly(monkeypatch)
    monkeypatch.setattr(selection, "_judges", lambda *_: (PIXELS, None))
    monkeypatch.setattr(selection, "_CLASS_IMAGES", 2)
    monkeypatch.setattr(selection, "_INFERENCE_STEPS", 1)


def scripted(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Let the scores come as told, whatever is drawn."""
    told: Iterator[float] = iter(scores)
    monkeypatch.setattr(Selection, "score", lambda *_: {"score": next(told), "likeness": 0.5})


def same(one: Path, other: Path) -> bool:
    a, b = read_adapter(one).modules, read_adapter(other).modules
    return a.keys() == b.keys() and all(
        torch.equal(a[name].lora_A, b[name].lora_A) and torch.equal(a[name].lora_B, b[name].lora_B)
        for name in a
    )


def lines(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_exhausted_after_three_scores_that_fall_short() -> None:
    assert not exhausted([])
    assert not exhausted([0.5, 0.4, 0.3])
    assert exhausted([0.5, 0.4, 0.3, 0.49])
    assert not exhausted([0.5, 0.4, 0.3, 0.5])
    assert not exhausted([0.0] * 9)
    assert not exhausted([0.5, 0.4, 0.3, 0.51])
    assert not exhausted([0.1, 0.5, 0.4, 0.4])


def test_the_best_checkpoint_becomes_the_file(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 0.2, 0.3, 0.6, 0.9, 0.8, 0.7, 0.95, 0.1)
    result = train(replace(config, checkpointing_steps=None))
    # Scored from step 3 of 10: 3, 4, ..., 10.
    assert (result.steps, result.chosen_step) == (10, 9)
    assert [line["step"] for line in lines(config) if "score" in line] == list(range(3, 11))
    until_9 = replace(config, max_train_steps=9, select="last", output_dir=config.output_dir / "9")
    assert same(result.adapter_path, train(until_9).adapter_path)
    whole = replace(config, select="last", output_dir=config.output_dir / "10")
    assert result.last_path is not None
    assert same(result.last_path, train(whole).adapter_path)
    assert read_adapter(result.adapter_path).metadata["ss_max_train_steps"] == "9"
    assert read_adapter(result.last_path).metadata["ss_max_train_steps"] == "10"
    assert Image.open(config.output_dir / "selection.png").size == SIZE
    assert "chosen step | 9" in (config.output_dir / "README.md").read_text()


def test_it_ends_when_no_score_gets_better(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 0.5, 0.4, 0.4, 0.3)
    result = train(config)
    assert (result.steps, result.chosen_step) == (6, 3)
    again = train(replace(config, resume=True))
    assert again.finished_before
    assert again.adapter_path.stat().st_mtime_ns == result.adapter_path.stat().st_mtime_ns
    assert again.chosen_step == 3


def test_a_run_that_ended_goes_on_with_new_patience(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 0.5, 0.4, 0.4, 0.3, 0.1, 0.2, 0.9)
    assert train(config).steps == 6
    longer = train(replace(config, resume=True, max_train_steps=9))
    assert (longer.steps, longer.chosen_step) == (9, 9)


def test_a_run_that_ended_and_was_cut_before_its_file_is_finished(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut_before_its_file(config, monkeypatch)
    result = train(replace(config, resume=True))
    assert (result.steps, result.chosen_step) == (6, 3)


@pytest.mark.parametrize("damage", ["gone", "broken"])
def test_a_best_checkpoint_that_is_lost_is_told(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    _cut_before_its_file(config, monkeypatch)
    best = config.output_dir / "checkpoints" / "step-000003.safetensors"
    if damage == "gone":
        best.unlink()
    else:
        best.write_bytes(best.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-000003.safetensors, the best .* or broken: step 5 of before"):
        result = train(replace(config, resume=True))
    assert (result.steps, result.chosen_step) == (6, 5)


def test_steps_that_were_asked_for_are_no_curve() -> None:
    assert _plotted({"step": 3, "score": 0.5, selection.GIVEN: 10}) == {"score": 0.5}


def test_damaged_lines_of_metrics_are_left_out(config: TrainConfig) -> None:
    path = config.instance_data_dir / "metrics.jsonl"
    good = {"step": 3, "score": 0.5, "likeness": 0.25}
    damaged = ['{"step": Infinity}', "[" * 100_000, '{"step": 4, "lo', '{"score": 0.9}', "[1]"]
    damaged.append('{"step": "4"}')
    values = '{"step": 5, "score": null}', '{"step": 6, "score": NaN}', '{"step": 7, "score": "0.9"}'
    path.write_bytes("\n".join([json.dumps(good), *damaged, *values]).encode() + b"\n\xff\xfe")
    found = read_metrics(path)
    assert [line["step"] for line in found] == [3, 5, 6, 7]
    assert selection.chosen_step(found) == 3
    assert remembered(found, 10) == [(3, {"score": 0.5, "likeness": 0.25})]
    assert selection.curve(found, 3) is not None
    assert last_losses(found) == {"instance_loss": None, "prior_loss": None}
    assert read_metrics(path.with_name("none.jsonl")) == []


def _cut_before_its_file(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until patience ends it at step 6 of 10, and no further; nothing is left to score."""
    with monkeypatch.context() as patch:
        patch.setattr("dbadapter.training.write_results", _killed)
        scripted(patch, 0.5, 0.4, 0.4, 0.3)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    scripted(monkeypatch)


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_new_patience_is_for_another_number_of_steps() -> None:
    def line(step: int, score: float, given: int) -> dict[str, Any]:
        return {"step": step, "score": score, selection.GIVEN: given}

    ended = [line(step, score, 10) for step, score in enumerate((0.5, 0.4, 0.4, 0.3), start=1)]
    assert [step for step, _ in remembered(ended, 10)] == [1, 2, 3, 4]
    assert remembered(ended, 12) == remembered(ended, 8) == []
    # Cut after it was given more, it goes on with the patience that it had.
    more = [*ended, line(5, 0.2, 12), {"step": 6, "loss": 1.0}, line(7, 0.1, 12)]
    assert remembered(more, 12) == [(5, {"score": 0.2}), (7, {"score": 0.1})]
    assert [step for step, _ in remembered(ended[:3], 12)] == [1, 2, 3]
    # Where it was not noted, as before it was, an end is one that is gone on from.
    unnoted = [{name: value for name, value in each.items() if name != selection.GIVEN} for each in ended]
    assert remembered(unnoted, 10) == []


def test_scores_of_nothing_choose_the_last_step(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, *[0.0] * 9)
    result = train(replace(config, max_train_steps=6))
    assert (result.steps, result.chosen_step, result.last_path) == (6, 6, None)


def test_pictures_that_are_not_finite_end_the_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter((0.4, 0.5))

    def score(*_: Any) -> dict[str, float]:
        return {"score": next(told, 0.0)} if told.__length_hint__() else {}

    monkeypatch.setattr(Selection, "score", score)
    with pytest.warns(UserWarning, match="not finite any more at step 5: the run ends, and the best"):
        result = train(config)
    assert (result.steps, result.chosen_step, result.last_path) == (5, 4, None)
    assert [line["score"] for line in lines(config) if "score" in line] == [0.4, 0.5]
    # Nobody goes on from what draws nothing: neither after a cut nor with more steps.
    assert checkpoint.newest(config.output_dir / "checkpoints") == (
        config.output_dir / "checkpoints" / "step-000004.safetensors"
    )
    scripted(monkeypatch, 0.6, 0.7)
    longer = train(replace(config, resume=True, max_train_steps=6))
    assert (longer.steps, longer.chosen_step) == (6, 6)


def test_a_broken_model_has_no_score(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> None:
    def broken(*_: Any) -> Scores:
        raise BaseError("the model gave values that are not finite (NaN)")

    monkeypatch.setattr(Evaluator, "score", broken)
    with pytest.raises(
        TrainingError, match="not finite at step 1, the first that was scored, so there is no"
    ):
        train(replace(config, max_train_steps=4))
    assert not list(config.output_dir.glob("*.safetensors"))


def test_a_resumed_run_remembers_its_scores(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = (0.2, 0.9, 0.8, 0.7, 0.85)
    scripted(monkeypatch, *scores)
    unbroken = train(config)
    stopped = replace(config, output_dir=config.output_dir / "stopped")
    told = iter(scores[:3])

    def score(*_: Any) -> dict[str, float]:
        try:
            return {"score": next(told), "likeness": 0.5}
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(Selection, "score", score)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    scripted(monkeypatch, *scores[3:])
    resumed = train(replace(stopped, resume=True))
    assert (resumed.steps, resumed.chosen_step) == (unbroken.steps, unbroken.chosen_step) == (7, 4)
    assert same(resumed.adapter_path, unbroken.adapter_path)
    assert lines(config)[-1]["score"] == lines(stopped)[-1]["score"]


def test_what_the_encoder_cannot_tell_apart_is_said() -> None:
    def found(subject: float, of_class: float) -> Any:
        figures = {"subject_fidelity": {"value": subject}, "prior_preservation": {"value": of_class}}
        return SimpleNamespace(figures=figures)

    blind: Any = SimpleNamespace(ceiling=lambda: 0.9, encoder=SimpleNamespace(name="pixels"))
    with pytest.warns(UserWarning, match=r"by pixels the photographs are hardly more like .* \(by 0.02\)"):
        selection._warn_of_little_room(blind, found(0.88, 0.5))
    with pytest.warns(UserWarning, match=r"class are as near .* \(-0.01 is between them\), so whether"):
        selection._warn_of_little_room(blind, found(0.5, 0.91))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection._warn_of_little_room(blind, found(0.5, 0.5))


def test_scores_are_those_of_the_model_in_training(config: TrainConfig) -> None:
    """Drawn for real: the adapter that does nothing yet has gone no way, and scoring changes no step."""
    seen: list[dict[str, float]] = []
    original = Selection.start

    def start(run: Run, *rest: Any) -> Selection:
        found = original(run, *rest)
        seen.append(found.score(run))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selection, "start", start)
        result = train(replace(config, max_train_steps=4))
    assert seen[0]["class_kept"] == pytest.approx(1)
    assert seen[0]["class_spread"] == pytest.approx(1, abs=1e-4)
    plain = train(replace(config, max_train_steps=4, select="last", output_dir=config.output_dir / "plain"))
    assert same(result.last_path or result.adapter_path, plain.adapter_path)
    assert 0 <= lines(config)[-1]["score"] <= 1


def test_whole_models_are_chosen_too(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 0.9, 0.8, 0.7, 0.6)
    whole = replace(config, full=True, rank=None, targets=None, max_train_steps=4, learning_rate=1e-3)
    result = train(whole)
    assert (result.steps, result.chosen_step) == (4, 1)
    short = replace(whole, max_train_steps=1, select="last", output_dir=config.output_dir / "1")
    one, other = result.adapter_path, train(short).adapter_path
    unet = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (one / unet).read_bytes() == (other / unet).read_bytes()


def test_refusals(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="give checkpointing_steps more than 0"):
        train(replace(config, checkpointing_steps=0))
    with pytest.raises(ConfigError, match="image_encoder does nothing without select best"):
        train(replace(config, select="last", image_encoder="clip"))
    with pytest.raises(ConfigError, match="select must be one of last, best"):
        train(replace(config, select="finest"))
    one = tmp_path / "one"
    one.mkdir()
    Image.new("RGB", (40, 40)).save(one / "0.png")
    with pytest.raises(DataError, match="holds 1 photograph, and --select best needs two"):
        train(replace(config, instance_data_dir=one))
    monkeypatch.undo()
    with pytest.raises(UsageError, match="cannot be loaded"):
        train(replace(config, image_encoder=str(one)))
    assert not config.output_dir.exists()


def test_another_choice_is_another_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, *[0.5] * 20)
    train(replace(config, max_train_steps=4))
    with pytest.raises(ConfigError, match="select was 'best'"):
        train(replace(config, select="last", resume=True))


def test_the_command_says_what_was_chosen(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 0.9, 0.8, 0.7, 0.6, 0.5)
    text = replace(config, output_dir=config.output_dir).to_toml()
    file = config.instance_data_dir.parent / "run.toml"
    file.write_text(text)
    done = CliRunner().invoke(main, ["train", "--config", str(file)])
    assert done.exit_code == 0, done.output
    assert "Best score: step 3 of 6, 0.900 of 1" in done.output
    assert "Ended before step 10: no checkpoint after step 3 scored better" in done.output
    assert "out-last.safetensors" in done.output


@pytest.mark.parametrize(
    ("likeness", "score", "said"),
    [(0.0, 0.0, "pass more --max-train-steps"), (0.9, 0.0, "look at the pictures"), (0.9, 0.5, "0.500 of 1")],
)
def test_a_score_of_nothing_says_which_part_is_nothing(
    tmp_path: Path, likeness: float, score: float, said: str
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 6, "score": score, "likeness": likeness}) + "\n")
    result: Any = SimpleNamespace(metrics_path=metrics, chosen_step=6)
    assert sys.modules["dbadapter.cli.train"]._score_of(result).endswith(said)


def test_few_prompts_that_fit_things_and_animals() -> None:
    prompts = selection_prompts("sd1", "dog")
    assert 4 <= len(prompts.subject) <= 10
    assert set(prompts.subject) <= set(OBJECT) & set(LIVE)
    assert prompts.unrelated == ()
    assert len(selection_prompts("toybox", "mug").subject) == 10


def test_overall_by_hand() -> None:
    def figures(subject: float, prompt: float, prior: float, spread: float) -> dict[str, Any]:
        names = ("subject_fidelity", "prompt_fidelity", "prior_preservation", "diversity")
        told = {"class_fidelity": "not measured"}
        return told | {
            name: {"value": value}
            for name, value in zip(names, (subject, prompt, prior, spread), strict=True)
        }

    before = figures(0.2, 0.8, 0.2, 0.5)
    found = overall(figures(0.6, 0.4, 0.4, 0.25), before, ceiling=1.0)
    assert found["likeness"] == pytest.approx(0.5)
    assert found["obedience"] == pytest.approx(0.5)
    assert found["class_kept"] == pytest.approx(0.75)
    assert found["class_spread"] == pytest.approx(0.5)
    assert found["score"] == pytest.approx((0.5 * 0.5 * 0.75 * 0.5) ** 0.25)
    perfect = overall(figures(1.0, 0.8, 0.2, 0.5), before, ceiling=1.0)
    assert perfect["score"] == pytest.approx(1)
    broken = {"class_fidelity": {"value": 0.25}}
    found = overall(figures(1.0, 0.8, 0.2, 0.5) | broken, before | {"class_fidelity": {"value": 1.0}}, 1.0)
    assert found["class_obedience"] == pytest.approx(0.25)
    assert found["score"] == pytest.approx(0.25**0.2)
    blind = figures(0.6, 0.4, 0.2, 0.5) | {"prompt_fidelity": "not measured"}
    assert "obedience" not in overall(blind, before, ceiling=1.0)
    # Where the base is as near the photographs as these to each other, a hair's breadth decides nothing.
    near = before | {"subject_fidelity": {"value": 1.0}, "prior_preservation": {"value": 0.99}}
    found = overall(figures(1.01, 0.4, 1.0, 0.25), near, ceiling=1.0)
    assert found["likeness"] == pytest.approx(0.01 / ROOM)
    assert found["class_kept"] == pytest.approx(1 - 0.01 / ROOM)
    # The base itself has gone no way; a memorising adapter whose class became the subject is worth nothing.
    assert overall(before, before, 1.0)["score"] == 0
    assert overall(figures(1.0, 0.8, 1.0, 0.0), before, 1.0)["score"] == 0


def test_a_plot_needs_points() -> None:
    assert draw_curve({"score": [(1, 0.5)]}).size == SIZE
    assert draw_curve({"score": [(1, 0.5), (2, 1.5)], "other": [(1, -1.0)]}, chosen=2).size == SIZE
    with pytest.raises(ValueError, match="got 0"):
        draw_curve({})
    assert selection.curve([{"step": 1, "loss": 2.0}], None) is None
