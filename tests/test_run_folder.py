"""The output folder: what --overwrite may replace, and what a run that ends early gives back."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbadapter.errors import OutputError
from dbadapter.run_folder import Finished, RunFolder

CONFIG = 'instance_data_dir = "photos"\n'


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


@pytest.fixture
def earlier(tmp_path: Path) -> RunFolder:
    """A finished run: adapter, metrics, configuration, one checkpoint."""
    run = RunFolder(tmp_path / "out", "subject")
    run.start(CONFIG + "seed = 1\n", resumed_step=0)
    run.append_metrics([{"step": 1}, {"step": 2}])
    run.checkpoints.mkdir()
    (run.checkpoints / "step-000002.safetensors").write_bytes(b"earlier")
    (run.samples / "step-000001").mkdir(parents=True)
    (run.samples / "step-000001" / "0000.png").write_bytes(b"earlier")
    run.adapter.write_bytes(b"adapter")
    run.settle()
    return RunFolder(run.path, run.name)


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path, photographs: Path) -> None:
    out = tmp_path / "models"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "sd15.safetensors").write_bytes(b"a base")
    with pytest.raises(OutputError, match="no run of dbadapter"):
        RunFolder(out, "subject").check(photographs, overwrite=True, resume=False)
    RunFolder(out, "subject").start(CONFIG, resumed_step=0)
    assert (out / "checkpoints" / "sd15.safetensors").read_bytes() == b"a base"


def test_overwriting_is_for_runs_of_ours(earlier: RunFolder, photographs: Path) -> None:
    with pytest.raises(OutputError, match="--overwrite"):
        earlier.check(photographs, overwrite=False, resume=False)
    earlier.check(photographs, overwrite=True, resume=False)


def test_a_run_that_ends_before_its_first_checkpoint_gives_the_earlier_one_back(earlier: RunFolder) -> None:
    before = {path.relative_to(earlier.path): path.read_bytes() for path in earlier.path.rglob("*.*")}
    earlier.start(CONFIG + "seed = 2\n", resumed_step=0)
    assert not list(earlier.checkpoints.glob("*"))
    assert not list(earlier.samples.glob("*"))
    assert earlier.metrics.read_text() == ""
    earlier.give_up()
    assert {path.relative_to(earlier.path): path.read_bytes() for path in earlier.path.rglob("*.*")} == before


def test_a_killed_run_gives_it_back_at_the_next_start(earlier: RunFolder) -> None:
    earlier.start(CONFIG, resumed_step=0)
    again = RunFolder(earlier.path, earlier.name)
    again.start(CONFIG, resumed_step=0)
    again.give_up()
    assert (earlier.checkpoints / "step-000002.safetensors").read_bytes() == b"earlier"


def test_resume_of_a_killed_run_is_not_taken_for_the_run_before_it(
    earlier: RunFolder, photographs: Path
) -> None:
    """The adapter and the card in the folder are the earlier run's still; nothing is moved yet."""
    earlier.finish(Finished(2, {}))
    assert earlier.finished == Finished(2, {})
    earlier.start(CONFIG, resumed_step=0)
    before = set(earlier.path.rglob("*"))
    killed = RunFolder(earlier.path, earlier.name)
    killed.check(photographs, overwrite=False, resume=True)
    assert not killed.finished
    assert set(earlier.path.rglob("*")) == before


def test_a_settled_run_lets_the_earlier_one_go(earlier: RunFolder) -> None:
    earlier.start(CONFIG, resumed_step=0)
    earlier.settle()
    assert not [path for path in earlier.path.rglob("*") if b"earlier" in path.name.encode()]
    assert earlier.adapter.read_bytes() == b"adapter"


def test_a_new_folder_is_taken_away_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new", "subject")
    run.start(CONFIG, resumed_step=0)
    run.give_up()
    assert not run.path.exists()


def test_a_finished_run_keeps_its_note_until_the_next_starts(earlier: RunFolder) -> None:
    earlier.finish(Finished(2, {"seed": 1}))
    earlier.start(CONFIG, resumed_step=2)
    assert earlier.finished is None


@pytest.mark.parametrize("note", ["null", "[]", '"x"', "{", "{}"])
def test_a_damaged_note_is_none(earlier: RunFolder, note: str) -> None:
    earlier.finish(Finished(2, {"seed": 1}))
    (earlier.path / ".finished.json").write_text(note)
    assert earlier.finished is None


def test_metrics_pass_over_a_line_that_was_cut_short(earlier: RunFolder) -> None:
    with earlier.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in earlier.read_metrics()] == [1, 2]
    earlier.metrics.unlink()
    assert earlier.read_metrics() == []


@pytest.mark.parametrize("name", ["samples", "checkpoints", "class_images"])
def test_a_file_where_a_folder_is_written_is_refused_before_the_run(
    tmp_path: Path, photographs: Path, name: str
) -> None:
    run = RunFolder(tmp_path / "out", "subject")
    run.path.mkdir()
    (run.path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{name} is a file, and the run writes a folder there"):
        run.check(photographs, overwrite=True, resume=False)


@pytest.mark.parametrize("inside", ["class_images", "samples/mine"])
def test_photographs_in_a_folder_of_the_run_are_refused(earlier: RunFolder, inside: str) -> None:
    (earlier.path / inside).mkdir(parents=True)
    with pytest.raises(OutputError, match="the photographs lie in"):
        earlier.check(earlier.path / inside, overwrite=True, resume=False)


def test_the_other_kind_of_result_goes(earlier: RunFolder) -> None:
    earlier.drop_other_kind(full=True)
    assert not earlier.adapter.exists()
    earlier.model.mkdir()
    (earlier.model / "model_index.json").write_text("{}")
    earlier.drop_other_kind(full=False)
    assert not earlier.model.exists()
