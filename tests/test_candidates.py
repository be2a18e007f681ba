"""What is scored: an adapter or a tuned model, its words for the subject, and its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluated import write_adapters

from dbadapter.adapter import Adapter
from dbadapter.adapter_file import write_adapter
from dbadapter.base import Base, load_base
from dbadapter.candidates import load_candidate, pipeline_of, told_apart
from dbadapter.errors import UsageError
from dbadapter.export.parity import synthetic_adapter
from dbadapter.model_folder import write_model_folder


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    return load_base(str(tiny_base_folder), device="cpu")


@pytest.fixture(scope="module")
def files(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(base, tmp_path_factory.mktemp("adapters"))


def test_a_tuned_model_keeps_the_noise_schedule_that_it_was_trained_with(base: Base, tmp_path: Path) -> None:
    write_model_folder(base.pipeline, tmp_path / "tuned")
    path = tmp_path / "tuned/scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    trained = {"beta_end": 0.02, "prediction_type": "v_prediction", "set_alpha_to_one": True}
    path.write_text(json.dumps({**config, **trained}))
    with pipeline_of(base, load_candidate(tmp_path / "tuned", "dog", "sks")) as pipeline:
        told = pipeline.scheduler.config
    assert (told.beta_end, told.prediction_type) == (0.02, "v_prediction")
    ours = base.pipeline.scheduler.config
    assert told.set_alpha_to_one == ours.set_alpha_to_one
    assert told.timestep_spacing == ours.timestep_spacing


def test_the_trigger_may_stand_for_the_identifier(files: Path, recwarn: pytest.WarningsRecorder) -> None:
    told = load_candidate(files / "dog.safetensors", "dog").subject
    assert load_candidate(files / "dog.safetensors", "dog", told).subject == told
    assert not recwarn.list


def test_two_of_one_name_are_told_apart_by_their_folder(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dog.safetensors").write_bytes((files / "dog.safetensors").read_bytes())
    paths = [tmp_path / "a/dog.safetensors", tmp_path / "b/dog.safetensors", files / "hat.safetensors"]
    names = [each.name for each in told_apart([load_candidate(path, "dog") for path in paths])]
    assert names == ["a/dog", "b/dog", "hat"]
    for name in ("x", "y"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run/dog.safetensors").write_bytes((files / "dog.safetensors").read_bytes())
    paths = [tmp_path / "x/run/dog.safetensors", tmp_path / "y/run/dog.safetensors", paths[0]]
    names = [each.name for each in told_apart([load_candidate(path, "dog") for path in paths])]
    assert names == ["x/run/dog", "y/run/dog", "a/dog"]
    monkeypatch.chdir(tmp_path / "x")
    (tmp_path / "x/model_index.json").write_text("{}")
    assert load_candidate(".", "dog", "sks").name == "x"
    (tmp_path / "x/run/dog").mkdir()
    (tmp_path / "x/run/dog/model_index.json").write_text("{}")
    alike = told_apart(
        [load_candidate(Path("run", name), "dog", "sks") for name in ("dog", "dog.safetensors")]
    )
    assert {each.name for each in alike} == {str(tmp_path / "x/run/dog")}  # which the command refuses


def test_an_adapter_of_another_noun_is_told(files: Path) -> None:
    with pytest.warns(UserWarning, match="has no cat in it: was it trained with another --class-noun"):
        assert load_candidate(files / "dog.safetensors", "cat").subject.endswith("dog")


def test_another_word_than_the_adapters_own_is_told(files: Path) -> None:
    with pytest.warns(UserWarning, match="and is asked for 'zzz dog': leave --identifier out if that is not"):
        assert load_candidate(files / "dog.safetensors", "dog", "zzz").subject == "zzz dog"


def test_an_adapter_without_words_asks_for_them(base: Base, tmp_path: Path) -> None:
    adapter = synthetic_adapter(base)
    write_adapter(tmp_path / "mute.safetensors", Adapter(adapter.family, adapter.modules, {}))
    with pytest.raises(UsageError, match="pass --identifier"):
        load_candidate(tmp_path / "mute.safetensors", "dog")
    assert load_candidate(tmp_path / "mute.safetensors", "dog", "wxv").subject == "wxv dog"
