"""Adapters of full fine-tunes: exact at full rank, nearest at a lower one; what they leave out is told."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, run, tree
from tiny_bases import FAMILIES, Family, write_tiny_base
from torch import Tensor

from dbadapter import lora
from dbadapter.adapter import LoraWeights, adaptable_layers
from dbadapter.adapter_file import read_adapter
from dbadapter.baking import write_base
from dbadapter.base import Base, load_base
from dbadapter.errors import BaseError, UsageError
from dbadapter.extraction import RECORD, extract


def load(path: Path) -> Base:
    return load_base(str(path), device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: write_tiny_base(root / family, family, clip_vocabulary=False) for family in FAMILIES}


def tuned(base: Base, seed: int = 1, *, everything: bool = True) -> Base:
    """Return a copy whose parameters all changed, or the UNet's self-attention alone."""
    other = copy.copy(base)
    other.name = "tuned"
    other.pipeline = copy.deepcopy(base.pipeline)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in (other.unet, *other.text_encoders.values()):
            for name, parameter in model.named_parameters():
                if everything or ".attn1." in name:
                    parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    return other


def weights(base: Base) -> dict[str, Tensor]:
    models = {"unet": base.unet, **base.text_encoders}
    return {
        name: layer.get_parameter("weight").detach().clone()
        for component, model in models.items()
        for name, layer in adaptable_layers(model, component).items()
    }


def flat(factors: LoraWeights) -> Tensor:
    a, b = factors.lora_A.double().flatten(1), factors.lora_B.double().flatten(1)
    return (b @ a) * factors.scaling


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_the_adapter_is_the_fine_tune(folders: dict[str, Path], family: Family) -> None:
    base = load(folders[family])
    other = tuned(base)
    found = extract(base, other, rank=10_000, dtype=torch.float32)
    before, wanted = weights(base), weights(other)
    assert found.adapter.modules.keys() == wanted.keys()  # every linear layer and convolution
    lora.merge_into(base.pipeline, found.adapter)
    for name, weight in weights(base).items():
        torch.testing.assert_close(weight, wanted[name], atol=2e-7, rtol=2e-6)
        assert (weight - before[name]).abs().max() > 1e-3
    assert found.total_energy == pytest.approx(1)
    assert set(found.left_out) == {"norms", "biases", "embeddings"}


@pytest.mark.parametrize("rank", [1, 5])
def test_a_lower_rank_is_the_nearest_and_its_energy_is_told(folders: dict[str, Path], rank: int) -> None:
    base = load(folders["sd1"])
    other = tuned(base)
    found = extract(base, other, rank=rank, dtype=torch.float32)
    before, after = weights(base), weights(other)
    for name, factors in found.adapter.modules.items():
        change = (after[name].double() - before[name].double()).flatten(1)
        values = torch.linalg.svdvals(change)
        kept = float(values[:rank].square().sum() / values.square().sum())
        assert found.energy[name] == pytest.approx(kept, rel=1e-6)
        error = float((flat(factors) - change).norm() / change.norm())
        assert 1 - error**2 == pytest.approx(kept, abs=1e-5)
        assert factors.rank <= rank


@pytest.mark.parametrize("energy", [0.3, 0.95, 1.0])
def test_the_energy_picks_the_rank(folders: dict[str, Path], energy: float) -> None:
    base = load(folders["sd1"])
    other = tuned(base)
    found = extract(base, other, energy=energy, dtype=torch.float32)
    before, after = weights(base), weights(other)
    for name, factors in found.adapter.modules.items():
        change = (after[name].double() - before[name].double()).flatten(1)
        shares = torch.linalg.svdvals(change).square().cumsum(0)
        wanted = int((shares / shares[-1] < energy * (1 - 1e-12)).sum()) + 1
        assert factors.rank == wanted, name
        assert found.energy[name] >= energy * (1 - 1e-9)
    assert len({factors.alpha for factors in found.adapter.modules.values()}) == 1


def test_only_what_changed_is_held_and_a_low_rank_change_needs_no_more(folders: dict[str, Path]) -> None:
    base = load(folders["sd1"])
    other = tuned(base, everything=False)
    found = extract(base, other, rank=4)
    assert found.adapter.modules
    assert all(".attn1." in name for name in found.adapter.modules)
    assert set(found.left_out) == {"biases"}  # of to_out
    merged = load(folders["sd1"])
    lora.merge_into(merged.pipeline, found.adapter)
    again = extract(load(folders["sd1"]), merged, energy=0.999999)
    assert {factors.rank for factors in again.adapter.modules.values()} == {4}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_base_that_was_only_rounded_did_not_change(folders: dict[str, Path], half: torch.dtype) -> None:
    base = load(folders["sd1"])
    other = tuned(base, everything=False)
    for model in (other.unet, other.text_encoder, other.vae):
        torch.nn.Module.to(model, half)
        torch.nn.Module.to(model, torch.float32)
    found = extract(base, other, rank=2)
    assert all(".attn1." in name for name in found.adapter.modules)
    assert set(found.left_out) == {"biases"}


def test_models_that_do_not_go_together(folders: dict[str, Path]) -> None:
    base = load(folders["sd1"])
    with pytest.raises(BaseError, match="nothing to extract"):
        extract(base, load(folders["sd1"]), rank=2)
    with pytest.raises(BaseError, match="is of family sd1, sdxl of sdxl"):
        extract(base, load(folders["sdxl"]), rank=2)
    from diffusers import UNet2DConditionModel

    other = copy.copy(base)
    other.pipeline = copy.copy(base.pipeline)
    other.pipeline.unet = UNet2DConditionModel(**{**base.unet.config, "block_out_channels": (32, 96)})
    with pytest.raises(BaseError, match="differ in more than weights"):
        extract(base, other, rank=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either --rank"),
        ({"rank": 2, "energy": 0.5}, "either --rank"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 0.0}, "greater than 0"),
        ({"energy": 1.5}, "at most 1"),
    ],
)
def test_impossible_calls(folders: dict[str, Path], options: dict[str, Any], words: str) -> None:
    base = load(folders["sd1"])
    with pytest.raises(UsageError, match=words):
        extract(base, base, **options)


def test_the_command(folders: dict[str, Path], tmp_path: Path) -> None:
    base = load(folders["sdxl"])
    write_base(tuned(base), tmp_path / "tuned")
    output = tmp_path / "subject.safetensors"
    words = ["extract", "--base", folders["sdxl"], "--tuned", tmp_path / "tuned", "--output", output]
    result = run(*words, "--energy", "0.5")
    assert result.exit_code == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    read = read_adapter(output)
    assert len(lines) == len(read.modules)
    told = json.loads(read.metadata[RECORD])
    for line in lines:
        share, _, rank, name = line.split()
        assert float(share) == pytest.approx(told["layers"][name], abs=1e-4)
        assert int(rank) == read.modules[name].rank
    assert "of the change is kept" in last
    assert read.family == "sdxl"
    assert result.stderr.count("\n") == 1
    assert "an adapter cannot hold what else changed: " in result.stderr
    assert_refused(run(*words, "--rank", "2"), 1, "exists already", "--overwrite")


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--tuned", "gone", "--rank", "2"], 1, "gone: no such file or folder"),
        (["--tuned", "base"], 2, "either --rank N or --energy X"),
        (["--tuned", "base", "--rank", "2", "--energy", "0.5"], 2, "either --rank N or --energy X"),
        (["--tuned", "base", "--energy", "nan"], 2, "--energy must be"),
        (["--tuned", "base", "--rank", "2"], 1, "nothing to extract"),
        (["--tuned", "broken", "--rank", "2"], 1, "broken"),
    ],
)
def test_refusals(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(folders["sd1"])
    Path("broken").mkdir()
    before = tree(tmp_path)
    result = run("extract", "--base", "base", *words, "--output", "out.safetensors")
    assert_refused(result, code, part)
    assert tree(tmp_path) == before
