"""The command line: every bad input is one line on standard error and an exit code, and leaves nothing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import assert_refused, raises, run, tree


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
        (["export", "--dtype", "int4", "--output-dir", "b"], ["'int4'", "float32"]),
        (["export", "--onnx"], ["--output-dir OUT is missing"]),
        (["export", "--verify", "x", "--swappable"], ["stands alone"]),
        (["convert", "x.safetensors", "--output", "b"], ["--to", "onnx-adapter"]),
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


def test_onnx_folder_that_is_none(tmp_path: Path) -> None:
    words = ["generate", "--prompt", "a", "--output-dir", tmp_path / "out", "--onnx"]
    assert_refused(run(*words, tmp_path / "gone"), 1, "gone")
    assert not (tmp_path / "out").exists()


def test_out_of_memory_names_what_the_command_can_lower(
    monkeypatch: pytest.MonkeyPatch, train_words: list[str | Path], tmp_path: Path
) -> None:
    for module in ("base", "plan"):
        monkeypatch.setattr(f"dbadapter.{module}.load_base", raises(MemoryError()))
    assert_refused(run(*train_words, "--dry-run"), 1, "out of memory", "--train-batch-size")
    words = ["generate", "--prompt", "a", "--output-dir", tmp_path / "pictures"]
    assert_refused(run(*words), 1, "out of memory", "--num-images-per-prompt")


@pytest.mark.parametrize("option", ["--output-dir", "--instance-data-dir"])
def test_empty_paths_are_not_the_current_folder(train_words: list[str | Path], option: str) -> None:
    assert_refused(run(*train_words, option, ""), 2, option, "must not be empty")


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


def _refused_base(folder: Path, kind: str) -> tuple[Path, str]:
    """Return something that --base cannot take, and what its refusal names."""
    import pickle

    import torch
    from safetensors.torch import save_file

    file = folder / f"{kind}.safetensors"
    if kind == "pickle":
        file = folder / "model.ckpt"
        file.write_bytes(pickle.dumps({"state_dict": {}}))
        return file, "pickle"
    keys = {
        "adapter": ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "adapter"),
        "flux": ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        "sd3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "SD3"),
        "vae": ("first_stage_model.decoder.conv_in.weight", "no key of a Stable Diffusion checkpoint"),
    }
    if kind == "garbage":
        file.write_bytes(b"no safetensors at all")
        return file, "garbage.safetensors"
    key, named = keys[kind]
    save_file({key: torch.zeros(4, 4)}, file)
    return file, named


@pytest.mark.parametrize("kind", ["pickle", "adapter", "flux", "sd3", "vae", "garbage"])
def test_files_that_are_no_base(train_words: list[str | Path], tmp_path: Path, kind: str) -> None:
    file, named = _refused_base(tmp_path, kind)
    result = run(*train_words, "--base", file, "--dry-run")
    assert_refused(result, 1, named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--optimizer", "adamw8bit"], 2, "pip install 'dbadapter[adamw8bit]'"),
        (["--logger", "wandb"], 2, "pip install 'dbadapter[wandb]'"),
        (["--full", "--rank", "4"], 2, "rank is an adapter's"),
        (["--masked-loss"], 1, "no photograph in"),
        (["--resolution", "36", "--aspect-ratio-buckets"], 2, "resolution must be a multiple of 8"),
    ],
)
def test_what_a_run_lacks(
    train_words: list[str | Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    part: str,
) -> None:
    for module in ("optimizers", "loggers"):
        monkeypatch.setattr(f"dbadapter.{module}.find_spec", lambda name: None)
    for package in ("bitsandbytes", "wandb"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    assert_refused(run(*train_words, *words, "--dry-run"), code, part)
    assert not (tmp_path / "out").exists()


def test_a_caption_that_does_not_name_the_subject(
    train_words: list[str | Path], photographs: Path, tmp_path: Path
) -> None:
    (photographs / "0.txt").write_text("a dog on a sofa")
    assert_refused(run(*train_words, "--dry-run"), 1, "0.txt does not name the subject", "{identifier}")
    (photographs / "0.txt").write_text("a photo of {identifier} {class} on a sofa")
    printed = run(*train_words, "--dry-run")
    assert "0.png: 48x40, trained at 32x32, caption" in printed.stdout
    assert "a photo of sks dog on a sofa  ->" in printed.stdout


def test_a_folder_that_another_run_writes(train_words: list[str | Path], tmp_path: Path) -> None:
    from dbadapter.lock import only_run

    with only_run(tmp_path / "out"):
        assert_refused(run(*train_words), 1, "is being written by another run of dbadapter")
