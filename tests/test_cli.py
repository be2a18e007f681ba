"""The command line: every bad input is one line on standard error and an exit code, and leaves nothing."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dbadapter.cli import main
from dbadapter.cli.options import parse_adapters
from dbadapter.errors import OutputError, UsageError

COMMANDS = dict(main.commands)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="dbadapter")


def assert_refused(result: Result, code: int, *parts: str) -> None:
    """One line on standard error that says `parts`, nothing else, and this exit code."""
    assert isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Warning: no --base")]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("Error: "), errors[0]
    for part in parts:
        assert part in errors[0], f"{part!r} is not in: {errors[0]}"
    assert result.exit_code == code
    assert result.stdout == ""


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (48, 40), (80 * index, 90, 120)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def train_words(photographs: Path, tmp_path: Path, tiny_base_folder: Path) -> list[str | Path]:
    """A `train` command that works, up to --dry-run; more options may follow."""
    return [
        *("train", "--base", tiny_base_folder, "--instance-data-dir", photographs),
        *("--class-noun", "dog", "--output-dir", tmp_path / "out"),
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    command = COMMANDS[name]
    assert command.help is not None
    assert re.search(rf"\bExample:\s+dbadapter {name}\b", command.help)
    for option in command.params:
        assert isinstance(option, click.Option)
        assert option.help, f"{name}: {option.opts} has no help"
    short = command.get_short_help_str(60)
    assert not short.endswith("..."), f"{name}: its first sentence is too long for the list of commands"


def test_readme_shows_every_command() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert f"### dbadapter {name}" in readme
        for option in command.params:
            assert option.opts[0] in readme


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


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["No such command 'trian'"]),
        (["train", "--rnak", "4"], ["--rnak", "--rank"]),
        (["train", "--rank", "many"], ["'--rank'", "'many'", "dbadapter train --help"]),
        (["train"], ["--instance-data-dir, --class-noun, --output-dir"]),
        (["train", "--instance-data-dir", "a", "--output-dir", "b"], ["missing --class-noun", "e.g."]),
        (["train", "--config", "none.toml"], ["cannot read configuration none.toml"]),
        (["generate", "--output-dir", "b"], ["'--prompt'"]),
        (["generate", "--prompt", "a", "--onnx", "x", "--base", "y", "--output-dir", "b"], ["leave out"]),
        (["generate", "--prompt", "a", "--adapter", "x=big", "--output-dir", "b"], ["a number, got 'big'"]),
        (["generate", "--prompt", "a", "--adapter", "x=nan", "--output-dir", "b"], ["finite, got nan"]),
        (["export", "--dtype", "int8", "--output-dir", "b"], ["'int8'", "float32"]),
        (
            ["generate", "--prompt", "a", "--onnx", "x", "--prediction-type", "epsilon", "--output-dir", "b"],
            ["leave out"],
        ),
        (["tokens", "--count", "0"], ["--count", "0"]),
    ],
)
def test_bad_usage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run(*words), 2, *parts)
    assert not tree(tmp_path)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--rank", "0"], "rank must be from 1"),
        (["--max-train-steps", "-3"], "max_train_steps must be from 1"),
        (["--learning-rate", "nan"], "learning_rate must be greater than 0, got nan"),
        (["--resolution", "30"], "resolution must be a multiple of 8, got 30"),
        (["--targets", "attention,mind"], "'mind'"),
        (["--targets", ","], "targets must name at least one"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--class-noun", " "], "class_noun must say what the subject is"),
        (["--rank", "0", "--seed", "-1"], "2 faults"),
    ],
)
def test_impossible_numbers(
    train_words: list[str | Path], tmp_path: Path, words: list[str], part: str
) -> None:
    before = tree(tmp_path)
    assert_refused(run(*train_words, *words), 2, part)
    assert tree(tmp_path) == before


def _missing(folder: Path) -> str:
    shutil.rmtree(folder)
    return str(folder)


def _empty(folder: Path) -> str:
    for path in folder.iterdir():
        path.unlink()
    return str(folder)


def _is_a_file(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.write_text("no folder")
    return str(folder)


def _only_junk(folder: Path) -> str:
    _empty(folder)
    (folder / ".DS_Store").write_bytes(b"junk")
    return str(folder)


def _no_picture_inside(folder: Path) -> str:
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    return "broken.jpg"


def _cut_off(folder: Path) -> str:
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    return "1.png"


@pytest.mark.parametrize("spoil", [_missing, _empty, _is_a_file, _only_junk, _no_picture_inside, _cut_off])
def test_bad_photographs(
    train_words: list[str | Path], photographs: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    named = spoil(photographs)
    before = tree(tmp_path)
    assert_refused(run(*train_words), 1, named)
    assert tree(tmp_path) == before


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
    assert 'identifier = "sks"' in printed
    path = tmp_path / "config.toml"
    path.write_text(printed, encoding="utf-8")
    again = run("train", "--config", path, "--dry-run")
    assert again.stdout == printed, again.stderr
    changed = run("train", "--config", path, "--rank", "3", "--dry-run").stdout
    assert "rank = 3\n" in changed


@pytest.mark.parametrize("option", ["--instance-prompt", "--class-prompt", "--validation-prompt"])
def test_prompt_too_long(train_words: list[str | Path], tmp_path: Path, option: str) -> None:
    text = "a photo of " + "very " * 100 + "large dog"
    if option == "--instance-prompt":
        text = "{identifier} " + text
    before = tree(tmp_path)
    assert_refused(run(*train_words, option, text), 1, "prompt")
    assert_refused(run(*train_words, option, text, "--dry-run"), 1, "prompt")
    assert tree(tmp_path) == before


def test_generate_prompt_too_long(tmp_path: Path, tiny_base_folder: Path) -> None:
    words = ["generate", "--base", tiny_base_folder, "--output-dir", tmp_path / "out"]
    assert_refused(run(*words, "--prompt", "very " * 100), 1, "prompt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["generate", "--prompt", "a"], ["export", "--onnx"], ["tokens"]], ids=lambda words: words[0]
)
def test_base_that_is_none(tmp_path: Path, words: list[str]) -> None:
    output = [] if words == ["tokens"] else ["--output-dir", tmp_path / "out"]
    assert_refused(run(*words, *output, "--base", tmp_path / "nothing"), 1, "nothing", "toybox")
    (tmp_path / "empty").mkdir()
    assert_refused(run(*words, *output, "--base", tmp_path / "empty"), 1, "empty")
    assert not (tmp_path / "out").exists()


def test_train_on_a_base_that_is_none(train_words: list[str | Path], tmp_path: Path) -> None:
    before = tree(tmp_path)
    assert_refused(run(*train_words, "--base", tmp_path / "nothing"), 1, "nothing", "toybox")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_adapter_that_is_none(tmp_path: Path, tiny_base_folder: Path, content: bytes) -> None:
    path = tmp_path / "dog.safetensors"
    path.write_bytes(content)
    for command in (["generate", "--prompt", "a"], ["export"]):
        words = [*command, "--base", tiny_base_folder, "--output-dir", tmp_path / "out"]
        assert_refused(run(*words, "--adapter", path), 1, "dog.safetensors")
        assert_refused(run(*words, "--adapter", tmp_path / "gone.safetensors"), 1, "gone.safetensors")
    assert not (tmp_path / "out").exists()


def test_adapter_for_another_base(tmp_path: Path, tiny_base_folder: Path) -> None:
    import torch

    from dbadapter.adapter import Adapter, LoraWeights
    from dbadapter.adapter_file import write_adapter

    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = LoraWeights(lora_A=torch.zeros(2, 320), lora_B=torch.zeros(320, 2), alpha=2.0)
    path = tmp_path / "dog.safetensors"
    write_adapter(path, Adapter(family="sd1", modules={module: weights}, metadata={}))
    for command in (["generate", "--prompt", "a"], ["export"]):
        words = [*command, "--base", tiny_base_folder, "--output-dir", tmp_path / "out"]
        assert_refused(run(*words, "--adapter", path), 1, "320")
    assert not (tmp_path / "out").exists()


def test_output_that_exists(train_words: list[str | Path], tmp_path: Path, tiny_base_folder: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "out.safetensors").write_bytes(b"mine")
    (out / "0000.png").write_bytes(b"mine")
    before = tree(tmp_path)
    base = ["--base", tiny_base_folder, "--output-dir", out]
    for extra in ([], ["--dry-run"]):
        assert_refused(run(*train_words, *extra), 1, "out", "--overwrite")
    assert_refused(run("generate", "--prompt", "a", *base), 1, "out", "--overwrite")
    assert_refused(run("export", *base), 1, "out", "--overwrite")
    assert_refused(run("demo", "--output-dir", out), 1, "out")
    assert tree(tmp_path) == before
    assert (out / "out.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("option", ["--num-inference-steps", "--num-images-per-prompt"])
def test_generate_impossible_numbers(tmp_path: Path, tiny_base_folder: Path, option: str) -> None:
    words = ["generate", "--base", tiny_base_folder, "--prompt", "a", "--output-dir", tmp_path / "out"]
    assert_refused(run(*words, option, "0"), 2, "0")
    assert not (tmp_path / "out").exists()


def test_generate_writes_pictures(tmp_path: Path, tiny_base_folder: Path) -> None:
    words = ["generate", "--base", tiny_base_folder, "--output-dir", tmp_path / "out"]
    words += ["--prompt", "a dog", "--prompt", "a cat", "--num-inference-steps", "2"]
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0000.png", "0001.png", "grid.png"}
    assert_refused(run(*words), 1, "--overwrite")
    assert run(*words, "--overwrite").exit_code == 0


def test_onnx_folder_that_is_none(tmp_path: Path) -> None:
    words = ["generate", "--prompt", "a", "--output-dir", tmp_path / "out", "--onnx"]
    assert_refused(run(*words, tmp_path / "gone"), 1, "gone")
    assert not (tmp_path / "out").exists()


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
    assert "--base FOLDER" in result.stderr
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


def test_train_says_what_it_made(train_words: list[str | Path], tmp_path: Path) -> None:
    words = [*train_words, "--max-train-steps", "2", "--num-class-images", "2", "--rank", "2"]
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    adapter = tmp_path / "out" / "out.safetensors"
    assert f"Adapter: {adapter}\n" in result.stdout
    assert result.stdout.startswith("2 steps in ")
    before = {path: path.read_bytes() for path in tree(tmp_path) if path.is_file()}
    assert_refused(run(*words), 1, "out", "--overwrite")
    assert {path: path.read_bytes() for path in tree(tmp_path) if path.is_file()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process there")
def test_interrupt_ends_cleanly(train_words: list[str | Path], tmp_path: Path) -> None:
    words = [*train_words, "--max-train-steps", "1000000", "--num-class-images", "2"]
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
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert re.fullmatch(
        r"Aborted: interrupted from the keyboard(; add --resume to go on from step \d+)?\n", stderr
    )
    assert stdout == ""
    assert process.returncode == 130
    left = {path.name for path in tree(tmp_path / "out") if path.is_file()}
    assert "out.safetensors" not in left
    assert not [name for name in left if name.endswith((".tmp", ".partial"))]


def _raises(error: BaseException) -> Callable[..., Any]:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    return load


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
    monkeypatch.setattr("dbadapter.base_folder.load_tokenizer", _raises(error))
    result = run("tokens")
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    assert result.exit_code == code


def test_out_of_memory_names_what_the_command_can_lower(
    monkeypatch: pytest.MonkeyPatch, train_words: list[str | Path], tmp_path: Path
) -> None:
    for module in ("base", "plan"):
        monkeypatch.setattr(f"dbadapter.{module}.load_base", _raises(MemoryError()))
    assert_refused(run(*train_words, "--dry-run"), 1, "out of memory", "--train-batch-size")
    words = ["generate", "--prompt", "a", "--output-dir", tmp_path / "pictures"]
    assert_refused(run(*words), 1, "out of memory", "--num-images-per-prompt")


@pytest.mark.parametrize("option", ["--output-dir", "--instance-data-dir"])
def test_empty_paths_are_not_the_current_folder(train_words: list[str | Path], option: str) -> None:
    assert_refused(run(*train_words, option, ""), 2, option, "must not be empty")


@pytest.mark.parametrize("missing", [True, False])
def test_an_error_without_base_is_one_line(photographs: Path, tmp_path: Path, missing: bool) -> None:
    if missing:
        _missing(photographs)
    else:
        _cut_off(photographs)
    words = ["train", "--class-noun", "dog", "--output-dir", tmp_path / "out"]
    result = run(*words, "--instance-data-dir", photographs)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("Error: ")


def test_the_toybox_warning_comes_once_before_training(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(config: Any, progress: Callable[[str, int, int], None]) -> None:
        progress("class pictures", 0, 2)
        progress("train", 0, 2)
        raise OutputError("enough")

    monkeypatch.setattr("dbadapter.training.train", stop)
    words = ["train", "--class-noun", "dog", "--output-dir", tmp_path / "out"]
    result = run(*words, "--instance-data-dir", photographs)
    assert [line[:19] for line in result.stderr.splitlines()] == ["Warning: no --base ", "Error: enough"]


def test_prediction_type_of_the_adapter(tmp_path: Path, tiny_base_folder: Path) -> None:
    import torch

    from dbadapter.adapter import Adapter, LoraWeights
    from dbadapter.adapter_file import write_adapter

    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = LoraWeights(lora_A=torch.zeros(2, 32), lora_B=torch.zeros(32, 2), alpha=2.0)
    path = tmp_path / "dog.safetensors"
    write_adapter(path, Adapter("sd1", {module: weights}, {"modelspec.prediction_type": "v"}))
    for command in (["generate", "--prompt", "a"], ["export"]):
        words = [*command, "--base", tiny_base_folder, "--adapter", path, "--output-dir", tmp_path / "out"]
        assert_refused(run(*words), 1, "this base says epsilon", "--prediction-type v_prediction")
    words = ["generate", "--prompt", "a", "--base", tiny_base_folder, "--adapter", path]
    words += ["--output-dir", tmp_path / "out", "--num-inference-steps", "1"]
    result = run(*words, "--prediction-type", "v_prediction")
    assert result.exit_code == 0, result.stderr


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


def test_a_folder_is_no_earlier_demo_because_of_a_files_name(tmp_path: Path) -> None:
    from dbadapter import demo

    for content in ("{}", "[1]", "no JSON", '{"finished": true}'):
        (tmp_path / "summary.json").write_text(content)
        (tmp_path / "demo.png").write_bytes(b"mine")
        assert_refused(run("demo", "--output-dir", tmp_path), 1, "holds no earlier demo")
        assert (tmp_path / "summary.json").read_text() == content
        assert (tmp_path / "demo.png").read_bytes() == b"mine"
    demo._prepare(tmp_path / "new", overwrite=True)
    demo._prepare(tmp_path / "new", overwrite=True)  # marked as ours from the start


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbadapter.base_folder.load_tokenizer", _raises(ZeroDivisionError("a bug")))
    assert isinstance(run("tokens").exception, ZeroDivisionError)


def test_adapter_weights(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.safetensors"
    odd.touch()
    assert parse_adapters(("dog.safetensors", f"{odd}")) == {"dog.safetensors": 1.0, str(odd): 1.0}
    assert parse_adapters((f"{odd}=0.5", "x=-1e-1")) == {str(odd): 0.5, "x": -0.1}
    with pytest.raises(UsageError, match="given twice"):
        parse_adapters(("x=1", "x=2"))
