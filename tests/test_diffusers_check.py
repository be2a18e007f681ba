"""A file through diffusers' own loader: equal to our reading, or the difference is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_bases import write_tiny_base
from tiny_runs import tiny_config, write_photographs

from dbadapter import diffusers_check
from dbadapter.adapter import Adapter, LoraWeights, adaptable_layers
from dbadapter.adapter_file import read_adapter, write_adapter
from dbadapter.base import load_base
from dbadapter.diffusers_check import Skeleton, check_file, compare, compare_in_pipeline, load_by_diffusers
from dbadapter.errors import AdapterError
from dbadapter.lora import TARGETS, target_layers


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny base of each family; no test leaves anything on it."""
    folder = write_tiny_base(tmp_path_factory.mktemp("base"), request.param, clip_vocabulary=False)
    return folder, load_base(str(folder), device="cpu")


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tiny_base(tmp_path_factory.mktemp("sd1"), "sd1", clip_vocabulary=False)
    return folder, load_base(str(folder), device="cpu")


def example(loaded: Any, alpha: float = 3.0, rank: int = 2, zero: bool = False) -> Adapter:
    """An adapter on every layer that dbadapter can train."""
    generator = torch.Generator().manual_seed(0)
    modules: dict[str, LoraWeights] = {}
    for component, model in {"unet": loaded.unet, **loaded.text_encoders}.items():
        for name, layer in target_layers(model, component, tuple(TARGETS)).items():
            shape = layer.get_parameter("weight").shape
            a = torch.randn(rank, *shape[1:], generator=generator) * 0.1
            b = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * (
                0 if zero else 0.1
            )
            modules[name] = LoraWeights(a, b, alpha)
    metadata = {"dbadapter.layers_per_block": str(loaded.unet.config.layers_per_block)}
    return Adapter(loaded.family, modules, metadata)


def written(loaded: Any, path: Path, **more: Any) -> Path:
    write_adapter(path, example(loaded, **more), sidecars=False)
    return path


def changed(path: Path, change: Any, metadata: dict[str, str] | None = None) -> Path:
    """Write the file again with its tensors changed."""
    with safe_open(path, "pt") as file:
        said = dict(file.metadata() or {}) | (metadata or {})
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, said)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_our_files_are_equal_on_a_base(base: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    _, loaded = base
    path = tmp_path / "a.safetensors"
    write_adapter(path, example(loaded), dtype=dtype, sidecars=False)
    before = {n: p.clone() for n, p in loaded.unet.named_parameters()}
    found = compare_in_pipeline(path, loaded.pipeline)
    assert found.equal, found.fault()
    assert found.layers == len(read_adapter(path).modules)
    assert found.effect is not None
    # The check could fail: the effect is far above what is allowed.
    assert found.effect > 20 * found.tolerance or dtype is torch.bfloat16
    after = dict(loaded.unet.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not hasattr(loaded.unet, "peft_config")


def test_a_skeleton_does_as_a_base_does(base: Any, tmp_path: Path) -> None:
    _, loaded = base
    path = written(loaded, tmp_path / "a.safetensors")
    found = check_file(path, Skeleton(loaded.unet, loaded.text_encoders))
    assert found is not None
    assert found.equal
    assert found.difference == 0.0


def test_skeletons_take_no_memory(sd1: Any) -> None:
    _, loaded = sd1
    models = Skeleton(loaded.unet, loaded.text_encoders).models()
    assert {n: tuple(p.shape) for n, p in models["unet"].named_parameters()} == {
        n: tuple(p.shape) for n, p in loaded.unet.named_parameters()
    }
    assert all(p.untyped_storage().nbytes() == 4 for m in models.values() for p in m.parameters())


def test_another_alpha_is_found(sd1: Any, tmp_path: Path) -> None:
    _, loaded = sd1
    path = written(loaded, tmp_path / "a.safetensors")
    ours = read_adapter(path)

    def double(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".alpha")]:
            tensors[name] = tensors[name] * 2

    models = Skeleton(loaded.unet, loaded.text_encoders).models()
    found = compare(ours, load_by_diffusers(changed(path, double), models))
    assert not found.equal
    assert found.difference == pytest.approx(1.0)
    assert "otherwise" in found.fault()


def test_alphas_that_differ_are_named(sd1: Any, tmp_path: Path) -> None:
    """diffusers takes one alpha for all of the UNet's attention: the command says so and exits with 1."""
    folder, loaded = sd1
    path = written(loaded, tmp_path / "a.safetensors")

    def one_less(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in sorted(tensors) if "attn1_to_q.alpha" in n)
        tensors[name] = tensors[name] / 2

    changed(path, one_less)
    found = compare_in_pipeline(path, loaded.pipeline)
    assert "attn1.to_q" in found.fault()
    result = run("inspect", path, "--verify", "--base", folder)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "attn1.to_q" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    as_json = json.loads(run("inspect", path, "--verify", "--base", folder, "--json").stdout)
    assert as_json["verify"]["equal"] is False
    assert as_json["tools"][0]["result"] == "partly"


def test_layers_that_diffusers_leaves_out_are_named(sd1: Any, tmp_path: Path) -> None:
    """Its own script's file, where the UNet's first key is spelled as PEFT does."""
    _, loaded = sd1
    adapter = example(loaded)
    tensors: dict[str, torch.Tensor] = {}
    for name, weights in adapter.modules.items():
        attention = ".attn1.to_" in name or ".attn2.to_" in name
        ends = ("lora.down", "lora.up") if attention else ("lora_A", "lora_B")
        if name.startswith("text_encoder"):
            ends = ("lora_linear_layer.down", "lora_linear_layer.up")
        tensors[f"{name}.{ends[0]}.weight"] = weights.lora_A
        tensors[f"{name}.{ends[1]}.weight"] = weights.lora_B
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    found = compare_in_pipeline(path, loaded.pipeline)
    assert found.left_out
    assert all(".attn" in name for name in found.left_out)
    assert "leaves out" in found.fault()


def test_equal_on_the_command_line(sd1: Any, tmp_path: Path) -> None:
    folder, loaded = sd1
    path = written(loaded, tmp_path / "a.safetensors")
    result = run("inspect", path, "--verify", "--base", folder)
    assert result.exit_code == 0, result.output
    assert "largest difference 0 " in result.stdout
    as_json = json.loads(run("inspect", path, "--verify", "--base", folder, "--json").stdout)
    assert as_json["verify"]["equal"] is True


def test_alpha_said_twice_is_refused(sd1: Any, tmp_path: Path) -> None:
    folder, loaded = sd1
    path = written(loaded, tmp_path / "a.safetensors")
    changed(path, lambda tensors: None, {"lora_adapter_metadata": json.dumps({"unet.r": 2})})
    assert_refused(
        run("inspect", path, "--verify", "--base", folder), 1, "a.safetensors", "diffusers", "metadata"
    )


def test_an_adapter_without_effect(sd1: Any, tmp_path: Path) -> None:
    folder, loaded = sd1
    path = written(loaded, tmp_path / "a.safetensors", zero=True)
    assert check_file(path, Skeleton(loaded.unet, loaded.text_encoders)) is None
    assert_refused(run("inspect", path, "--verify", "--base", folder), 1, "changes no weight")


def test_training_fails_where_diffusers_reads_otherwise(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a diffusers that took alpha otherwise would: the run ends with one line, and what it wrote stays."""
    from dbadapter.training import train

    read = diffusers_check.load_by_diffusers
    asked: list[int] = []

    def other(path: Any, models: Any) -> dict[str, LoraWeights]:
        found = read(path, models)
        asked.append(len(found))
        return {name: LoraWeights(w.lora_A, w.lora_B, w.alpha * 1.01) for name, w in found.items()}

    monkeypatch.setattr(diffusers_check, "load_by_diffusers", other)
    config = tiny_config(
        write_photographs(tmp_path / "photographs"), tmp_path / "out", tiny_base_folder, prior="none"
    )
    with pytest.raises(AdapterError, match=r"out\.safetensors: diffusers .* changes .* by 0\.01 otherwise"):
        train(config)
    assert asked == [len(read_adapter(tmp_path / "out" / "out.safetensors").modules)]


def test_an_adapter_for_another_base(sd1: Any, tmp_path: Path) -> None:
    _, loaded = sd1
    modules = {"unet.mid_block.attentions.7.proj_in": LoraWeights(torch.ones(1, 3), torch.ones(2, 1), 1.0)}
    write_adapter(tmp_path / "a.safetensors", Adapter("sd1", modules), sidecars=False)
    with pytest.raises(AdapterError, match="does not fit"):
        compare_in_pipeline(tmp_path / "a.safetensors", loaded.pipeline)
    assert adaptable_layers(loaded.unet, "unet")
