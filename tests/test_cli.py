"""The command line: what the commands print, leave and load, and how they end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from command_line import assert_refused, raises, run, tree
from PIL import Image

from dbadapter.cli import main
from dbadapter.cli.options import parse_adapters
from dbadapter.errors import OutputError, UsageError

COMMANDS = dict(main.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    command = COMMANDS[name]
    assert command.help is not None
    assert re.search(rf"\bExample:\s+dbadapter {name}\b", command.help)
    for option in command.params:
        if isinstance(option, click.Argument):  # has no help of its own: the text says what it is
            assert option.metavar
            continue
        assert isinstance(option, click.Option)
        assert option.help, f"{name}: {option.opts} has no help"
    short = command.get_short_help_str(60)
    assert not short.endswith("..."), f"{name}: its first sentence is too long for the list of commands"


def test_readme_shows_every_command() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert f"### dbadapter {name}" in readme
        for option in command.params:
            assert (option.metavar if isinstance(option, click.Argument) else option.opts[0]) in readme


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train"], ["train", "--rank", "x"]])
def test_help_and_usage_errors_load_nothing_heavy(words: list[str]) -> None:
    """What keeps `dbadapter --help` under half a second, counted rather than timed."""
    code = (
        "import sys\nfrom dbadapter.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'numpy', 'diffusers', 'transformers', 'PIL') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_dbadapter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dbadapter", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("dbadapter, version ")


def test_no_command_shows_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


def test_junk_files_are_passed_over(train_words: list[str | Path], photographs: Path) -> None:
    (photographs / ".DS_Store").write_bytes(b"junk")
    (photographs / "Thumbs.db").write_bytes(b"junk")
    (photographs / "notes.txt").write_text("a dog")
    (photographs / "folder").mkdir()
    result = run(*train_words, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("# 3 photographs, base family sd1\n")


def test_dry_run_prints_what_config_reads(train_words: list[str | Path], tmp_path: Path) -> None:
    printed = run(*train_words, "--rank", "2", "--dry-run").stdout
    assert "rank = 2\n" in printed
    for part in (
        "#   0.png: 48x40, trained at 32x32",
        "#   a photo of sks dog  ->  a:320 photo:1125 of:539 sks:48136 dog:1929",
        "layers of the UNet at rank 2",
        "layers of the text encoders at rank 2",
        "# Estimated memory on this cpu",
        "# Adapter's file: about",
    ):
        assert part in printed, part
    assert 'identifier = "sks"' in printed
    path = tmp_path / "config.toml"
    path.write_text(printed, encoding="utf-8")
    again = run("train", "--config", path, "--dry-run")
    assert tomllib.loads(again.stdout) == tomllib.loads(printed), again.stderr
    assert "  # diffusers, examples/dreambooth" in printed  # where a preset's value comes from
    assert "  # diffusers, examples/dreambooth" not in again.stdout
    changed = run("train", "--config", path, "--rank", "3", "--dry-run").stdout
    assert "rank = 3\n" in changed


def test_generate_writes_pictures(tmp_path: Path, tiny_base_folder: Path) -> None:
    words = ["generate", "--base", tiny_base_folder, "--output-dir", tmp_path / "out"]
    words += ["--prompt", "a dog", "--prompt", "a cat", "--num-inference-steps", "2"]
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0000.png", "0001.png", "grid.png"}
    assert_refused(run(*words), 1, "--overwrite")
    assert run(*words, "--overwrite").exit_code == 0


def test_train_says_what_it_made(train_words: list[str | Path], tmp_path: Path) -> None:
    words = [*train_words, "--max-train-steps", "2", "--rank", "2"]
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    adapter = tmp_path / "out" / "out.safetensors"
    assert f"Adapter: {adapter}\n" in result.stdout
    assert result.stdout.startswith("2 steps, ")
    before = {path: path.read_bytes() for path in tree(tmp_path) if path.is_file()}
    assert_refused(run(*words), 1, "out", "--overwrite")
    assert {path: path.read_bytes() for path in tree(tmp_path) if path.is_file()} == before


def test_tokens(tiny_base_folder: Path) -> None:
    result = run("tokens", "--base", tiny_base_folder, "--count", "2")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == "sks\t48136"
    assert len(result.stdout.splitlines()) == 2


def test_toybox_on_real_photographs_warns(photographs: Path, tmp_path: Path) -> None:
    from dbadapter import toybox

    words = ["train", "--class-noun", "dog", "--output-dir", tmp_path / "out", "--dry-run"]
    result = run(*words, "--instance-data-dir", photographs)
    assert "Warning: no --base given" in result.stderr
    assert "Stable Diffusion 1.x, 2.x or SDXL" in result.stderr
    for quiet in (["--base", "toybox", "--instance-data-dir", photographs],
                  ["--instance-data-dir", toybox.example_subject().folder]):  # fmt: skip
        result = run(*words, *quiet)
        assert result.exit_code == 0, result.stderr
        assert result.stderr == ""


def test_warnings_are_one_line(train_words: list[str | Path]) -> None:
    result = run(*train_words, "--identifier", "table", "--dry-run")
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: identifier 'table'")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals cannot be sent to one process there")
@pytest.mark.parametrize(
    ("number", "cause", "code"),
    [(signal.SIGINT, "interrupted from the keyboard", 130), (signal.SIGTERM, "terminated by SIGTERM", 143)],
)
def test_signals_end_a_run_cleanly(
    train_words: list[str | Path], tmp_path: Path, number: int, cause: str, code: int
) -> None:
    words = [*train_words, "--max-train-steps", "1000000"]
    command = [sys.executable, "-m", "dbadapter", *map(str, words)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        metrics = tmp_path / "out" / "metrics.jsonl"
        deadline = time.monotonic() + 240  # imports alone take a minute on a busy machine
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.2)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert re.fullmatch(rf"Aborted: {cause}(; add --resume to go on from step \d+)?\n", stderr)
    assert stdout == ""
    assert process.returncode == code
    left = {path.name for path in tree(tmp_path / "out") if path.is_file()}
    assert "out.safetensors" not in left
    assert not [name for name in left if name.endswith((".tmp", ".partial"))]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "Aborted: interrupted from the keyboard\n"),
        (OSError(28, "No space left on device", "x.bin"), 1, "Error: the system refused: No space left"),
        (MemoryError(), 1, "Error: out of memory: close other programs"),
        (UsageError("two\nlines"), 2, "Error: two lines\n"),
    ],
)
def test_what_comes_from_outside(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setattr("dbadapter.base.load_tokenizers_of", raises(error))
    result = run("tokens")
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    assert result.exit_code == code


def test_the_toybox_warning_comes_once_before_training(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(config: Any, progress: Callable[[str, int, int], None], on_log: object) -> None:
        progress("class pictures", 0, 2)
        progress("train", 0, 2)
        raise OutputError("enough")

    monkeypatch.setattr("dbadapter.training.train", stop)
    words = ["train", "--class-noun", "dog", "--output-dir", tmp_path / "out"]
    result = run(*words, "--instance-data-dir", photographs)
    assert [line[:19] for line in result.stderr.splitlines()] == ["Warning: no --base ", "Error: enough"]


def test_export_into_an_empty_folder_is_the_librarys_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def load(spec: str, prediction_type: str | None = None) -> str:
        asked.append(prediction_type)
        return spec

    monkeypatch.setattr("dbadapter.base.load_base", load)
    monkeypatch.setattr("dbadapter.export.export_onnx", lambda *args, **settings: {})
    out = tmp_path / "an empty one"
    out.mkdir()
    result = run("export", "--output-dir", out, "--prediction-type", "v_prediction")
    assert result.exit_code == 0, result.stderr
    assert asked == ["v_prediction"]
    assert f"--onnx '{out}' --prompt" in result.stdout


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbadapter.base.load_tokenizers_of", raises(ZeroDivisionError("a bug")))
    assert isinstance(run("tokens").exception, ZeroDivisionError)


def test_adapter_weights(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.safetensors"
    odd.touch()
    assert parse_adapters(("dog.safetensors", f"{odd}")) == {"dog.safetensors": 1.0, str(odd): 1.0}
    assert parse_adapters((f"{odd}=0.5", "x=-1e-1")) == {str(odd): 0.5, "x": -0.1}
    with pytest.raises(UsageError, match="given twice"):
        parse_adapters(("x=1", "x=2"))


def test_a_finished_run_says_so(train_words: list[str | Path], tmp_path: Path) -> None:
    words = [
        *train_words,
        "--max-train-steps",
        "1",
        "--rank",
        "1",
        "--validation-prompt",
        "a dog",
        "--resume",
    ]
    assert run(*words).exit_code == 0  # without a checkpoint it starts at step 0
    file = tmp_path / "out/out.safetensors"
    before = file.read_bytes()
    again = run(*words)
    assert (again.exit_code, again.stdout.splitlines()[0][:16]) == (0, "Finished already")
    assert file.read_bytes() == before


def test_a_mask_weighs_the_loss(train_words: list[str | Path], photographs: Path, tmp_path: Path) -> None:
    """Only one photograph has one, which is said."""
    Image.new("L", (48, 40), 255).save(photographs / "1.mask.png")
    result = run(*train_words, "--masked-loss", "--max-train-steps", "1", "--validation-prompt", "a dog")
    assert result.exit_code == 0, result.stderr
    assert "2 of 3 photographs have no mask, e.g. 0.png" in result.stderr
