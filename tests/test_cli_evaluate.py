"""`dbadapter evaluate`: the command, its files, and what it refuses in one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from evaluated import draw_photographs, write_adapters

from dbadapter import evaluation
from dbadapter.base import load_base
from dbadapter.cli import main
from dbadapter.cli.report_files import refuse_input, write_text
from dbadapter.errors import BaseError, UsageError
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


def test_an_interrupted_comparison_keeps_what_was_scored(
    tiny_base_folder: Path, photographs: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    draw = evaluation._scores_of

    def score(candidate: Any, *rest: Any) -> Any:
        if candidate.name == "hat":
            raise KeyboardInterrupt
        return draw(candidate, *rest)

    monkeypatch.setattr(evaluation, "_scores_of", score)
    (tmp_path / "prompts.txt").write_text("a {} on grass\n")
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    words = ["--base", str(tiny_base_folder), "--instance-data-dir", str(photographs)]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--num-inference-steps", "1"]
    words += ["--num-images-per-prompt", "1", "--num-class-images", "2"]
    words += ["--json", str(out), "--report", str(page)]
    both = [str(files / "dog.safetensors"), str(files / "hat.safetensors")]
    done = run(*words, "--compare", *both)
    assert done.exit_code == 130, done.output
    said = "Aborted: interrupted from the keyboard; what was scored before is in"
    assert done.stderr.endswith(f"{said} {out} and {page}\n")
    assert f"left out: hat: {evaluation.NOT_REACHED}" in done.stdout
    report = json.loads(out.read_text())
    assert report["figures"].keys() == {"base", "dog"}
    assert report["left_out"].keys() == {"hat"}
    assert not report["complete"]
    assert evaluation.NOT_REACHED in page.read_text()


def test_ends_of_a_comparison_say_what_is_written(
    photographs: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = sys.modules["dbadapter.cli.evaluate"]
    out = tmp_path / "out.json"
    ends: list[BaseException] = []

    def report(*words: Any, **_: Any) -> Any:
        outputs = words[4]
        outputs.write_so_far({"figures": {"base": {}}})
        out.unlink()
        out.mkdir()
        outputs.write_so_far({"figures": {"base": {}, "dog": {}}})
        raise ends[0]

    monkeypatch.setattr(command, "_report", report)
    monkeypatch.setattr(command, "_show", lambda report: print("shown", *report["figures"]))
    words = ["--instance-data-dir", str(photographs), "--adapter", str(files / "dog.safetensors")]
    ends[:] = [KeyboardInterrupt()]
    done = run(*words, "--json", str(out))
    assert done.stdout == "shown base dog\n"
    assert "Warning" in done.stderr
    assert f"{out} cannot be written" in done.stderr
    assert done.stderr.endswith("Aborted: interrupted from the keyboard\n")  # and nothing of files
    out.rmdir()
    ends[:] = [OSError(28, "No space left on device")]
    done = run(*words, "--json", str(out))
    assert (done.exit_code, done.stdout) == (1, "shown base dog\n")
    assert done.stderr.endswith("Error: the system refused: No space left on device\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give what is scored"),
        (("x.safetensors",), "paths follow --compare"),
        (("--adapter", "none.safetensors"), "does not exist"),
        (
            ("--adapter", "dog.safetensors", "--adapter", "base.safetensors"),
            "--adapter was given 2 times: several are scored by --compare PATH PATH...",
        ),
        (("--tuned", "run/model", "--tuned", "run/model"), "--tuned was given 2 times"),
        (
            ("--adapter", "dog.safetensors", "--compare", "dog.safetensors"),
            "dog.safetensors is given twice: name each adapter and model once",
        ),
        (("--adapter", "dog.safetensors", "--image-encoder", "."), "cannot be loaded"),
        (("--adapter", "peft"), "is a PEFT folder: make a file of it with dbadapter convert"),
        (("--tuned", "peft"), "is a PEFT folder: make a file of it with dbadapter convert"),
        (("--compare", "peft"), "is a PEFT folder: make a file of it with dbadapter convert"),
        (("--adapter", "dog.safetensors", "--image-encoder", "toybox-judge"), "did you mean toybox-judges?"),
        (("--adapter", "adapter-run"), "for its adapter pass adapter-run/mine.safetensors"),
        (("--adapter", "run/model"), "run/model is a fully tuned model's folder: pass it with --tuned"),
        (("--tuned", "dog.safetensors"), "is a folder in diffusers' layout; pass an adapter's file"),
        (("--tuned", "nope"), "--tuned nope does not exist: give a tuned model's folder"),
        (
            ("--tuned", "empty"),
            "empty holds neither a model (there is no model_index.json in it) nor an adapter",
        ),
        (("--tuned", "run"), "run is the folder of a run: pass run/model"),
        (("--tuned", "run/model/unet"), "run/model/unet is a part of a model: pass "),
        (("--adapter", "base.safetensors"), "a candidate is called 'base'"),
        (("--adapter", "dog.safetensors", "--class-noun", " "), "--class-noun must say what the subject is"),
        (
            ("--adapter", "dog.safetensors", "--class-noun", "{}"),
            "--class-noun must be a word without braces",
        ),
        (("--adapter", "dog.safetensors", "--class-noun", " Auto"), "--class-noun auto is for train"),
        (("--adapter", "dog.safetensors", "--identifier", "s\nks"), "--identifier must be one line"),
        (("--adapter", "dog.safetensors", "--identifier", " "), "--identifier is empty: leave it out"),
        (("--adapter", "dog.safetensors", "--identifier", "\udcff"), "--identifier must be valid Unicode"),
        (("--adapter", "dog.safetensors", "--base", ""), "base is empty: pass toybox"),
        (("--adapter", "dog.safetensors", "--image-encoder", "./nope"), "encoder ./nope: no such folder"),
        (
            ("--adapter", "dog.safetensors", "--text-image-encoder", "toybox-judge"),
            "did you mean toybox-judges?",
        ),
        (
            ("--adapter", "dog.safetensors", "--json", "dog.json", "--overwrite"),
            "dog.json is an input of this command, or belongs to one",
        ),
        (
            ("--tuned", "run/model", "--json", "run/model/model_index.json", "--overwrite"),
            "run/model/model_index.json belongs to run/model, a model that is read",
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
        (("--adapter", "dog.safetensors", "--json", "x" * 300), "(File name too long): pass another --json"),
        (("--adapter", "dog.safetensors", "--guidance-scale", "nan"), "--guidance-scale must be 0 or more"),
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
    for folder in ("peft", "empty", "run/model/unet"):
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


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("adapter.safetensors", "adapter.safetensors is an input of this command"),
        ("link.safetensors", "link.safetensors is an input of this command"),
        ("adapter.json", "adapter.json is an input of this command, or belongs to one"),
        ("model/unet/weights", "model/unet/weights belongs to model"),
        ("blobs/weights", "blobs/weights belongs to model"),
        ("linked/new.html", "linked/new.html belongs to model"),
        ("pictures/0.png", "pictures/0.png belongs to pictures, where it would count as a photograph"),
        ("store/0.png", "store/0.png belongs to pictures"),
        ("pictures/1.txt", "pictures/1.txt belongs to pictures"),
        ("pictures/report.json", None),
        ("other/report.html", None),
        ("model.html", None),
    ],
)
def test_outputs_that_lead_to_what_is_read(
    output: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links as in the hub's cache, whose models are links to blobs."""
    monkeypatch.chdir(tmp_path)
    for folder in ("model/unet", "blobs", "pictures", "store"):
        Path(folder).mkdir(parents=True)
    for file in ("adapter.safetensors", "blobs/weights", "store/0.png"):
        Path(file).touch()
    for link, target in (
        ("link.safetensors", "adapter.safetensors"),
        ("model/unet/weights", "../../blobs/weights"),
        ("linked", "model"),
        ("pictures/0.png", "../store/0.png"),
    ):
        Path(link).symlink_to(target)
    words = (
        [Path("link.safetensors"), Path("adapter.json")],
        [Path("model"), Path("nope")],
        Path("pictures"),
    )
    if said is None:
        refuse_input(Path(output), *words)
    else:
        with pytest.raises(UsageError, match=re.escape(said)):
            refuse_input(Path(output), *words)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("checkpoints/step-000020.safetensors", True),
        ("model/unet/config.json", True),
        ("other-best.safetensors", True),
        ("other.json", True),
        ("metrics.jsonl", True),
        ("README.md", True),
        (".finished.json", True),
        ("link.json", True),
        ("evaluation.json", False),
        ("evaluation.html", False),
        ("evaluation.txt", False),  # not there
    ],
)
def test_nothing_that_a_run_left_is_overwritten(name: str, refused: bool, tmp_path: Path) -> None:
    for folder in ("checkpoints", "model/unet", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "config.toml").write_text('instance_data_dir = "photos"\n')
    (tmp_path / "other.safetensors").touch()
    (tmp_path / "link.json").symlink_to("config.toml")
    path = tmp_path / name
    if (refused and not path.exists()) or name == "evaluation.html":
        path.touch()
    words = ([], [tmp_path / "elsewhere"], tmp_path / "elsewhere")
    if refused:
        with pytest.raises(UsageError, match=re.escape(f"{path} belongs to the training run in ")):
            refuse_input(path, *words)
    else:
        refuse_input(path, *words)


def test_an_encoder_that_is_none_is_told_before_a_base_is_fetched(
    photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbadapter.base.load_base", None)
    words = ["--instance-data-dir", str(photographs), "--adapter", str(files / "dog.safetensors")]
    for option in ("--image-encoder", "--text-image-encoder"):
        done = run(*words, option, "nobody/nothing-at-all")
        assert done.exit_code == 2
        assert "nobody/nothing-at-all" in done.stderr
    assert "from 1 to 1000, got 1001" in run(*words, "--num-inference-steps", "1001").stderr


def test_the_words_of_a_run_are_found_through_links(tmp_path: Path, photographs: Path) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/model_index.json").write_text("{}")
    (tmp_path / "run/config.toml").write_text('identifier = "sks"\n')
    (tmp_path / "link").symlink_to("run/model")
    words = ["--instance-data-dir", str(photographs), "--tuned", str(tmp_path / "link"), "--overwrite"]
    done = run(*words, "--json", str(tmp_path / "run/config.toml"))
    assert "run/config.toml is an input of this command" in done.stderr
    assert (tmp_path / "run/config.toml").read_text() == 'identifier = "sks"\n'


def test_the_prediction_type_is_the_bases(
    photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load(spec: str, **options: Any) -> Any:
        asked.update(options, spec=spec)
        raise BaseError("enough")

    monkeypatch.setattr("dbadapter.base.load_base", load)
    words = ["--instance-data-dir", str(photographs), "--adapter", str(files / "dog.safetensors")]
    assert "enough" in run(*words, "--base", "x", "--prediction-type", "v_prediction").stderr
    assert asked == {"spec": "x", "prediction_type": "v_prediction"}


def test_one_photograph_is_told_before_a_model_is_fetched(
    photographs: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbadapter.base.load_base", None)
    shutil.copy(next(photographs.iterdir()), tmp_path)
    done = run("--instance-data-dir", str(tmp_path), "--adapter", str(files / "dog.safetensors"))
    assert done.exit_code == 1
    assert "holds one photograph" in done.stderr


def test_judges_of_toybox_are_told_to_know_nothing_else(
    tiny_base_folder: Path, photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enough(*_: Any, **__: Any) -> None:
        raise BaseError("enough")

    monkeypatch.setattr("dbadapter.evaluation.evaluate", enough)
    words = ["--instance-data-dir", str(photographs), "--adapter", str(files / "dog.safetensors")]
    words += ["--base", str(tiny_base_folder), "--image-encoder", "toybox-judges"]
    said = run(*words).stderr
    assert "Warning: toybox-judges know toybox's pictures alone" in said
    assert "enough" in said


@pytest.mark.parametrize("name", ["photograph", "prompts.txt"])
def test_overwrite_spares_what_is_read(name: str, photographs: Path, files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    (tmp_path / "prompts.txt").write_text("a {} on grass\n")
    path = next(folder.iterdir()) if name == "photograph" else tmp_path / name
    before = path.read_bytes()
    words = ["--instance-data-dir", str(folder), "--prompts", str(tmp_path / "prompts.txt")]
    done = run(*words, "--adapter", str(files / "dog.safetensors"), "--report", str(path), "--overwrite")
    assert f"{path} {'belongs to' if name == 'photograph' else 'is an input of'}" in done.stderr
    assert path.read_bytes() == before


def test_an_interrupted_page_leaves_nothing_beside_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out.html").write_text("old")
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "out.html", "new", "--report", [])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.html": "old"}


def test_more_pictures_than_fit_are_refused_at_once() -> None:
    assert sys.modules["dbadapter.cli.evaluate"]._MOST_IMAGES == MOST_IMAGES
    with pytest.raises(UsageError, match="num_class_images must be from 2 to 1000, got 1001"):
        Settings(num_class_images=1001)
    with pytest.raises(UsageError, match=r"from 2 to 1000, got 1$"):
        Settings(num_class_images=1)  # diversity is of pairs
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
