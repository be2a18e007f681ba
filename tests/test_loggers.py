"""Loggers: what is told arrives once, and no logger ends a run."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dbadapter import loggers
from dbadapter.errors import OutputError, UsageError
from dbadapter.loggers import check_logger, make_logger

CONFIG: dict[str, Any] = {"rank": 8, "output_dir": Path("out"), "targets": ("attention",), "alpha": None}
RED = Image.new("RGB", (4, 3), (255, 0, 0))


def test_none_writes_nothing(tmp_path: Path) -> None:
    logger = make_logger("none", tmp_path, CONFIG)
    logger.log(1, {"loss": 0.5})
    logger.images(1, {"a dog": RED})
    logger.close()
    assert list(tmp_path.iterdir()) == []


def test_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="must be one of none, tensorboard, wandb, got 'mlflow'"):
        check_logger("mlflow")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package_is_one_line_with_the_cure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    with pytest.raises(UsageError) as caught:
        check_logger(name)
    assert f"pip install 'dbadapter[{name}]'" in str(caught.value)
    assert "\n" not in str(caught.value)


def read_back(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "logs"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def test_tensorboard_gets_figures_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = make_logger("tensorboard", tmp_path, CONFIG)
    logger.images(2, {"a photo of sks dog, at night": RED})
    logger.log(1, {"loss": 0.5, "prior_loss": None})
    logger.log(2, {"loss": 0.25, "prior_loss": None})
    logger.close()
    found = read_back(tmp_path)
    assert found.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    (image,) = found.Images("samples/a photo of sks dog, at night")
    assert (image.step, image.width, image.height) == (2, 4, 3)
    assert found.Tags()["tensors"] == ["config/text_summary"]
    assert b"rank = 8" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize(("first_step", "steps"), [(3, [1, 2, 3, 4, 5]), (0, [1, 2])])
def test_a_second_run_writes_no_step_twice(first_step: int, steps: list[int], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = make_logger("tensorboard", tmp_path, CONFIG)
    for step in range(1, 6):  # two steps more than the checkpoint holds
        first.log(step, {"loss": 1.0})
    first.close()
    second = make_logger("tensorboard", tmp_path, CONFIG, first_step=first_step)
    for step in range(first_step + 1, first_step + 3):
        second.log(step, {"loss": 2.0})
    second.close()
    events = read_back(tmp_path).Scalars("loss")
    assert [event.step for event in events] == steps
    assert [event.value for event in events] == [1.0 if step <= first_step else 2.0 for step in steps]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "logs").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        make_logger("tensorboard", tmp_path, CONFIG)


class FakeWandb(types.ModuleType):
    """What the logger uses of wandb; remembers everything."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.defined: list[Any] = []
        self.finished = 0
        self.fails: Exception | None = None

    def init(self, **options: Any) -> FakeWandb:
        if self.fails:
            raise self.fails
        self.started = options
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        if self.fails:
            raise self.fails
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1

    def Image(self, picture: Image.Image, caption: str) -> tuple[str, tuple[int, int]]:  # noqa: N802
        return caption, picture.size


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for variable in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return fake


def test_wandb_gets_figures_and_pictures(wandb: FakeWandb, tmp_path: Path) -> None:
    logger = make_logger("wandb", tmp_path, CONFIG, first_step=20)
    logger.images(22, {"a dog": RED})
    logger.log(21, {"loss": 0.5, "prior_loss": None})
    logger.close()
    assert wandb.started["dir"] == tmp_path
    assert wandb.started["project"] == "dbadapter"
    assert wandb.started["name"] == tmp_path.name
    assert wandb.started["config"] == {
        "rank": 8,
        "output_dir": "out",
        "targets": ["attention"],
        "alpha": None,
        "first_step": 20,
    }
    # Our own step as the axis: wandb drops rows whose own step goes back.
    assert wandb.defined == [("*", "step")]
    assert wandb.rows == [{"samples": [("a dog", (4, 3))], "step": 22}, {"loss": 0.5, "step": 21}]
    assert wandb.finished == 1


def test_wandb_listens_to_the_environment(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "third")
    make_logger("wandb", tmp_path, CONFIG)
    assert (wandb.started["project"], wandb.started["name"]) == ("mine", "third")
    assert "mode" not in wandb.started  # WANDB_MODE is its own to read


def test_wandb_that_cannot_start_is_one_line_with_the_cure(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.fails = RuntimeError("no API key\nconfigured")
    with pytest.raises(UsageError, match=r"\(no API key\); run `wandb login`, or set WANDB_MODE=offline$"):
        make_logger("wandb", tmp_path, CONFIG)


def test_a_failure_while_training_is_one_warning(wandb: FakeWandb, tmp_path: Path) -> None:
    logger = make_logger("wandb", tmp_path, CONFIG)
    wandb.fails = ConnectionError("the line is dead")
    with pytest.warns(UserWarning, match=r"logger wandb fails, training goes on \(the line is dead\)"):
        logger.log(1, {"loss": 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.log(2, {"loss": 0.5})
        logger.images(2, {"a dog": RED})
        wandb.fails = None
        logger.log(3, {"loss": 0.5})  # the line is back
        logger.close()
    assert wandb.rows == [{"loss": 0.5, "step": 3}]


def test_an_interrupt_goes_through(wandb: FakeWandb, tmp_path: Path) -> None:
    logger = make_logger("wandb", tmp_path, CONFIG)
    wandb.fails = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        logger.log(1, {"loss": 0.5})
