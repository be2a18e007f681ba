"""`dbadapter evaluate`: the command, its files, and what it refuses in one line."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from evaluated import draw_photographs, write_adapters

from dbadapter.base import load_base
from dbadapter.cli import main
from dbadapter.errors import UsageError
from dbadapter.evaluation import Settings
from dbadapter.sampling import MOST_IMAGES


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def files(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = load_base(str(tiny_base_folder), device="cpu")
    return write_adapters(base, tmp_path_factory.mktemp("adapters"))


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["evaluate", "--class-noun", "dog", *words])


def test_the_command(tiny_base_folder: Path, photographs: Path, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    (tmp_path / "prompts.txt").write_text("a {} on grass\n")
    out = tmp_path / "report.json"
    words = ["--base", str(tiny_base_folder), "--prediction-type", "epsilon", "--json", str(out)]
    words += ["--instance-data-dir", str(photographs)]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--num-inference-steps", "1"]
    words += ["--num-images-per-prompt", "1", "--num-class-images", "2"]
    both = [str(files / "dog.safetensors"), str(files / "hat.safetensors")]
    done = run(*words, "--compare", *both)
    assert done.exit_code == 0, done.output
    assert "encoder efficientnet-lite2" in done.output
    assert "hat minus dog, drift" in done.output
    assert "[unknown: too few]" in done.output
    assert json.loads(out.read_text())["figures"].keys() == {"base", "dog", "hat"}
    again = run(*words, "--compare", *both)
    assert again.exit_code == 1
    assert "--overwrite" in again.output


def test_a_reader_who_goes_away_leaves_the_files(
    photographs: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `dbadapter evaluate ... | head -2` does."""
    command = sys.modules["dbadapter.cli.evaluate"]

    def gone(_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(command, "_show", gone)
    monkeypatch.setattr(command, "_report", lambda *_, **__: {"figures": {}})
    monkeypatch.setattr("dbadapter.evaluation_report.report_page", lambda *_: "a page")
    words = ["--instance-data-dir", str(photographs), "--adapter", str(files / "dog.safetensors")]
    run(*words, "--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "out.html"))
    assert json.loads((tmp_path / "out.json").read_text()) == {"figures": {}}
    assert (tmp_path / "out.html").read_text() == "a page"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give what is scored"),
        (("x.safetensors",), "paths follow --compare"),
        (("--adapter", "none.safetensors"), "does not exist"),
        (
            ("--adapter", "dog.safetensors", "--compare", "dog.safetensors"),
            "dog': the report tells them apart by name and folder",
        ),
        (("--adapter", "dog.safetensors", "--image-encoder", "."), "cannot be loaded"),
        (("--adapter", "peft"), "is a PEFT folder: make a file of it with dbadapter convert"),
        (("--tuned", "peft"), "is a PEFT folder: make a file of it with dbadapter convert"),
        (("--compare", "peft"), "is a PEFT folder: make a file of it with dbadapter convert"),
        (("--adapter", "dog.safetensors", "--image-encoder", "toybox-judge"), "did you mean toybox-judges?"),
        (("--adapter", "."), "is a folder: pass a fully tuned model's with --tuned"),
        (("--tuned", "dog.safetensors"), "is a folder in diffusers' layout; pass an adapter's file"),
        (("--tuned", "nope"), "--tuned nope does not exist: give a tuned model's folder"),
        (("--tuned", "empty"), "empty holds no model: there is no model_index.json in it"),
        (("--tuned", "run"), "run is the folder of a run: pass run/model"),
        (("--adapter", "base.safetensors"), "a candidate is called 'base'"),
        (("--adapter", "dog.safetensors", "--class-noun", " "), "--class-noun must say what the subject is"),
        (
            ("--adapter", "dog.safetensors", "--class-noun", "{}"),
            "--class-noun must be a word without braces",
        ),
        (("--adapter", "dog.safetensors", "--class-noun", " Auto"), "--class-noun auto is for train"),
        (("--adapter", "dog.safetensors", "--identifier", "s\nks"), "--identifier must be one line"),
        (("--adapter", "dog.safetensors", "--identifier", " "), "--identifier is empty: leave it out"),
        (
            ("--tuned", "run/model", "--json", "run/model/model_index.json", "--overwrite"),
            "run/model/model_index.json is a file of run/model, an input of this command",
        ),
        (
            ("--tuned", "run/model", "--json", "run/config.toml", "--overwrite"),
            "run/config.toml is an input of this command",
        ),
        (("--adapter", "dog.safetensors", "--image-encoder", ""), "--image-encoder is empty: leave it out"),
        (("--adapter", "dog.safetensors", "--kind", "live", "--prompts", "x"), "leave one out"),
        (("--compare", "adapter-run"), "pass adapter-run/mine.safetensors"),
        (
            ("--adapter", "dog.safetensors", "--json", "/dev/null", "--overwrite"),
            "is a device or a broken link",
        ),
        (("--adapter", "dog.safetensors", "--json", "broken", "--overwrite"), "is a device or a broken link"),
        (
            ("--adapter", "dog.safetensors", "--json", "dog.safetensors", "--overwrite"),
            "dog.safetensors is an input of this command",
        ),
    ],
)
def test_refusals_are_one_line(
    words: tuple[str, ...], said: str, photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    for folder in ("peft", "empty", "run/model"):
        (files / folder).mkdir(parents=True, exist_ok=True)
    (files / "run/model/model_index.json").write_text("{}")
    (files / "run/config.toml").write_text("")
    (files / "peft" / "adapter_config.json").write_text("{}")
    (files / "adapter-run").mkdir(exist_ok=True)
    (files / "adapter-run/mine.safetensors").touch()
    with suppress(FileExistsError):
        (files / "broken").symlink_to("nowhere")
    before = (files / "dog.safetensors").read_bytes()
    (files / "base.safetensors").write_bytes((files / "dog.safetensors").read_bytes())
    done = run("--instance-data-dir", str(photographs), *words)
    assert done.exit_code in (1, 2)
    assert done.stderr.startswith("Error: ")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (files / "dog.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["photograph", "prompts.txt"])
def test_overwrite_spares_what_is_read(name: str, photographs: Path, files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    (tmp_path / "prompts.txt").write_text("a {} on grass\n")
    path = next(folder.iterdir()) if name == "photograph" else tmp_path / name
    before = path.read_bytes()
    words = ["--instance-data-dir", str(folder), "--prompts", str(tmp_path / "prompts.txt")]
    done = run(*words, "--adapter", str(files / "dog.safetensors"), "--report", str(path), "--overwrite")
    assert f"{path} is an input of this command" in done.stderr
    assert path.read_bytes() == before


def test_more_pictures_than_fit_are_refused_at_once() -> None:
    assert sys.modules["dbadapter.cli.evaluate"]._MOST_IMAGES == MOST_IMAGES
    with pytest.raises(UsageError, match="num_class_images must be from 1 to 1000, got 1001"):
        Settings(num_class_images=1001)
    assert "1<=x<=1000" in run("--instance-data-dir", "x", "--num-images-per-prompt", "1001").output


def test_what_cannot_be_written_takes_nothing_else_with_it(
    photographs: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full at the end, after hours of drawing."""
    command, write = sys.modules["dbadapter.cli.evaluate"], Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if ".json." in path.name:
            write(path, text[:5], **options)
            raise OSError(28, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(command, "_show", lambda _: print("the table"))
    monkeypatch.setattr(command, "_report", lambda *_, **__: {"figures": {}})
    monkeypatch.setattr("dbadapter.evaluation_report.report_page", lambda *_: "a page")
    words = ["--instance-data-dir", str(photographs), "--adapter", str(files / "dog.safetensors")]
    done = run(*words, "--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "out.html"))
    assert done.exit_code == 1
    assert "out.json cannot be written (No space left on device): pass another --json" in done.stderr
    assert "the table" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]
