"""`dbadapter merge`: what it prints and writes, and every refusal in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from command_line import assert_refused, run, tree
from safetensors.torch import save_file
from sums import TO_K, adapter, flat, reference, relative

from dbadapter.adapter_file import read_adapter, write_adapter
from dbadapter.merging import RECORD


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for number in (1, 2):
        write_adapter(tmp_path / f"{number}.safetensors", adapter(number), sidecars=False)
    return [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]


def test_the_command_prints_what_it_made(files: list[Path], tmp_path: Path) -> None:
    words = ["merge", f"{files[0]}=0.7", f"{files[1]}=-0.5", "--output", tmp_path / "both.safetensors"]
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert "2 adapters in" in result.stdout
    assert "5 layers, rank 8; exact but for rounding, float16: relative error" in result.stdout
    assert_refused(run(*words), 1, "exists already", "--overwrite")
    assert run(*words, "--overwrite", "--dtype", "float32").exit_code == 0
    read = read_adapter(tmp_path / "both.safetensors")
    wanted = reference({read_adapter(files[0]): 0.7, read_adapter(files[1]): -0.5})
    assert all(relative(flat(read.modules[name]), matrix) < 1e-6 for name, matrix in wanted.items())


def test_the_command_tells_what_a_smaller_rank_costs(files: list[Path], tmp_path: Path) -> None:
    result = run("merge", files[0], "--rank", "2", "--output", tmp_path / "small.safetensors")
    assert result.exit_code == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    before, after = read_adapter(files[0]), read_adapter(tmp_path / "small.safetensors")
    assert len(lines) == len(before.modules)
    for line in lines:
        error, _, rank, name = line.split()
        wanted = flat(before.modules[name])
        assert int(rank) == 2
        assert float(error) == pytest.approx(relative(flat(after.modules[name]), wanted), rel=1e-3)
    told = json.loads(after.metadata[RECORD])["relative_error"]
    assert float(last.rpartition(" ")[2]) == pytest.approx(told, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ([], 2, "either --output"),
        (["--output", "o.safetensors", "--output-base", "o"], 2, "either --output"),
        (["--output", "o.safetensors", "--base", "toybox"], 2, "go with --output-base"),
        (["--output-base", "o"], 2, "needs --base"),
        (["--output-base", "o", "--base", "toybox", "--rank", "2"], 2, "--rank is for --output"),
        (["--output", "o.safetensors", "--rank", "0"], 2, "--rank"),
        (["--output", "o.pt"], 1, "must end in .safetensors"),
        (["gone.safetensors", "--output", "o.safetensors"], 1, "gone.safetensors does not exist"),
        (
            ["other.safetensors=half", "--output", "o.safetensors"],
            2,
            "merge other.safetensors=half: the weight",
        ),
        (["1.safetensors", "--output", "o.safetensors"], 2, "is given twice"),
        (["broken.safetensors", "--output", "o.safetensors"], 1, "broken.safetensors"),
        (["nan.safetensors", "--output", "o.safetensors"], 1, "nan.safetensors"),
        (["xl.safetensors", "--output", "o.safetensors"], 1, "xl.safetensors for sdxl"),
    ],
)
def test_refusals(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = files[0].read_bytes()
    Path("broken.safetensors").write_bytes(content[: len(content) // 2])
    key = "lora_unet_mid_block_attentions_0_proj_in"
    save_file(
        {
            f"{key}.lora_down.weight": torch.full((2, 3), math.nan),
            f"{key}.lora_up.weight": torch.ones(3, 2),
        },
        "nan.safetensors",
    )
    write_adapter("xl.safetensors", adapter(1, family="sdxl", ranks={TO_K: 2}), sidecars=False)
    before = tree(tmp_path)
    assert_refused(run("merge", "1.safetensors", *words), code, part)
    assert tree(tmp_path) == before


def test_a_family_that_nobody_says(tmp_path: Path) -> None:
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 3), f"{key}.lora_up.weight": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    result = run("merge", tmp_path / "a.safetensors", "--output", tmp_path / "b.safetensors")
    assert_refused(result, 1, "which family of bases")
    assert not (tmp_path / "b.safetensors").exists()


def test_generate_takes_several(files: list[Path], tmp_path: Path, tiny_base_folder: Path) -> None:
    words = ["generate", "--base", tiny_base_folder, "--prompt", "a dog", "--num-inference-steps", "2"]
    one = ["--adapter", f"{files[0]}=0.7"]
    two = [*one, "--adapter", f"{files[1]}=0.5"]
    for name, adapters in (("none", []), ("one", one), ("two", two)):
        result = run(*words, *adapters, "--output-dir", tmp_path / name)
        assert result.exit_code == 0, result.stderr
    pictures = {(tmp_path / name / "0000.png").read_bytes() for name in ("none", "one", "two")}
    assert len(pictures) == 3
