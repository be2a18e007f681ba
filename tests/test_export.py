"""The export's own rules: what it refuses, what the gate lets through, what is left when it fails."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.base import Base, load_base
from dbadapter.errors import AdapterError, ExportError, OutputError, UsageError
from dbadapter.export import export_onnx, layout, parity, to_onnx
from dbadapter.export.graphs import Sizes, component_graphs, example_inputs
from dbadapter.export.parity import compare, gate_sizes, relative_error, synthetic_adapter
from dbadapter.export.pipeline import REPORT_NAME
from dbadapter.export.runtime import pick_providers


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    return load_base(str(tiny_base_folder), device="cpu")


def made_nothing(graph: Any, base: Base, dtype: str, path: Path) -> dict[str, Any]:
    path.parent.mkdir(parents=True)
    return {}


def test_relative_error() -> None:
    assert relative_error(torch.tensor([1.0, 3.9]), torch.tensor([1.0, 4.0])) == pytest.approx(0.025)
    assert relative_error(torch.tensor([math.nan]), torch.tensor([1.0])) == math.inf
    assert relative_error(torch.tensor([1.0]), torch.tensor([math.inf])) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf


def test_the_gate_lets_equal_outputs_through() -> None:
    result = compare("unet", [1e-6, 5e-5], 0.25, 1e-4)
    assert result == {"relative_error": 5e-5, "tolerance": 1e-4, "adapter_effect": 0.25}


@pytest.mark.parametrize(
    ("error", "effect", "words"),
    [
        (0.005, 0.25, "the exported unet differs from torch: relative error 0.005, allowed is 0.0001"),
        (math.inf, 0.25, "is not finite"),
        (0.0, 0.0, "the adapter cannot be seen in the exported unet: its effect is 0"),
        (5e-5, 2.5e-4, "the adapter cannot be seen"),
    ],
)
def test_the_gate_refuses(error: float, effect: float, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        compare("unet", [1e-7, error], effect, 1e-4)


def test_a_faint_adapter_passes_where_the_true_error_is_smaller_still() -> None:
    # 5e-4 is not 20 times the tolerance, but it is more than 20 times the error: the export does hold it.
    assert compare("unet", [5e-6], 5e-4, 1e-4)["adapter_effect"] == 5e-4


def test_the_gates_shapes_differ_in_every_dimension(base: Base) -> None:
    sizes = gate_sizes(base)
    assert len({size.batch for size in sizes}) == 3
    assert any(size.latent_height != size.latent_width for size in sizes)
    assert len({size.sequence_length for size in sizes}) > 1
    for size in sizes:
        assert size.latent_height % base.latent_multiple == size.latent_width % base.latent_multiple == 0


def test_only_changed_components_must_show_the_adapter(base: Base) -> None:
    adapter = synthetic_adapter(base)
    assert parity.adapted_components({adapter: 1.0}) == ("text_encoder", "unet")
    unet_only = Adapter(base.family, adapter.of_component("unet"))
    assert parity.adapted_components({unet_only: 1.0}) == ("unet",)
    zero = {
        name: LoraWeights(layer.lora_A, torch.zeros_like(layer.lora_B), layer.alpha)
        for name, layer in adapter.of_component("text_encoder").items()
    }
    assert parity.adapted_components({Adapter(base.family, unet_only.modules | zero): 1.0}) == ("unet",)
    assert parity.adapted_components({adapter: 0.0}) == ()


def test_the_synthetic_adapter_has_the_stated_strength(base: Base) -> None:
    adapter = synthetic_adapter(base, strength=0.25)
    name, layer = next(iter(adapter.of_component("unet").items()))
    weight = base.unet.get_submodule(name.removeprefix("unet.")).weight
    change = layer.scaling * layer.lora_B @ layer.lora_A
    assert float(change.norm() / weight.norm()) == pytest.approx(0.25, rel=1e-4)
    again = synthetic_adapter(base, strength=0.25).modules[name]
    assert torch.equal(again.lora_B, layer.lora_B)


def test_float16_graphs_keep_the_vae_in_float32(base: Base) -> None:
    graphs = component_graphs(base, "float16")
    assert next(graphs["unet"].module.parameters()).dtype == torch.float16
    assert next(graphs["vae_decoder"].module.parameters()).dtype == torch.float32
    inputs = example_inputs(base, "vae_decoder", Sizes(1, 4, 4, 7), "float16")
    with torch.no_grad():
        assert graphs["vae_decoder"].module(*inputs.values()).dtype == torch.float16
    assert example_inputs(base, "unet", Sizes(1, 4, 4, 7), "float16")["timestep"].dtype == torch.float32
    assert base.unet.dtype == torch.float32


def test_wrong_calls_are_refused(base: Base, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype must be float32, float16, int8, got 'int4'"):
        export_onnx(base, {}, tmp_path / "onnx", dtype="int4")
    with pytest.raises(UsageError, match="target must be portable or cuda, got 'tpu'"):
        export_onnx(base, {}, tmp_path / "onnx", target="tpu")
    with pytest.raises(UsageError, match=r"targets must be among attention.*got 'head'"):
        export_onnx(base, {}, tmp_path / "onnx", swappable=True, layers=["head"])
    with pytest.raises(UsageError, match="pass --swappable too"):
        export_onnx(base, {}, tmp_path / "onnx", layers=["conv"])
    with pytest.raises(UsageError, match="an adapter changes attention layers: add attention to --targets"):
        export_onnx(base, {synthetic_adapter(base): 1.0}, tmp_path / "onnx", swappable=True, layers=["conv"])
    with pytest.raises(UsageError, match="int8 weights are for the CPU"):
        export_onnx(base, {}, tmp_path / "onnx", dtype="int8", target="cuda")
    with pytest.raises(AdapterError):
        export_onnx(base, {tmp_path / "absent.safetensors": 1.0}, tmp_path / "onnx")
    misfit = Adapter("sdxl", synthetic_adapter(base).modules)
    with pytest.raises(AdapterError, match="sdxl"):
        export_onnx(base, {misfit: 1.0}, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_only_an_export_of_ours_is_ever_replaced(base: Base, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        export_onnx(base, {}, tmp_path / "file", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="exists already"):
        export_onnx(base, {}, tmp_path / "home")
    with pytest.raises(OutputError, match="something else"):
        export_onnx(base, {}, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home/letter.txt").read_text() == "dear"


def test_a_full_disk_is_told_before_the_work(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 2**20, 2**20))
    with pytest.raises(OutputError, match="1 MiB free"):
        export_onnx(base, {}, tmp_path / "deep/onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [ExportError("too different"), KeyboardInterrupt(), OSError("disk full")])
def test_a_failed_export_leaves_nothing(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def convert(graph: Any, base: Base, dtype: str, path: Path) -> dict[str, Any]:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
        return {}

    def check(*args: Any, **settings: Any) -> dict[str, Any]:
        raise failure

    monkeypatch.setattr(to_onnx, "convert", convert)
    monkeypatch.setattr(parity, "check", check)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    with pytest.raises((ExportError, KeyboardInterrupt, OutputError)):
        export_onnx(base, {synthetic_adapter(base): 1.0}, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())


def test_a_finished_export_replaces_an_older_one(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "onnx"
    (old / "unet").mkdir(parents=True)
    (old / REPORT_NAME).write_text("{}")
    (old / "unet" / "stale").write_text("")
    monkeypatch.setattr(to_onnx, "convert", made_nothing)
    entry: dict[str, Any] = {}
    components = {name: dict(entry) for name in component_graphs(base)}
    monkeypatch.setattr(parity, "check", lambda *args, **settings: {"components": components, "picture": {}})
    report = export_onnx(base, {}, old, overwrite=True)
    assert json.loads((old / REPORT_NAME).read_text()) == report
    assert not (old / "unet" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_the_older_export_comes_back_where_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    old = tmp_path / "onnx"
    old.mkdir()
    (old / "kept").write_text("")
    with pytest.raises(OSError, match="absent"):
        layout.publish(tmp_path / "absent", old)
    assert (old / "kept").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_the_current_folder_has_a_name_too(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(to_onnx, "convert", made_nothing)
    components: dict[str, Any] = {name: {} for name in component_graphs(base)}
    monkeypatch.setattr(parity, "check", lambda *args, **settings: {"components": components, "picture": {}})
    export_onnx(base, {}, ".")
    assert (folder / REPORT_NAME).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_the_adapters_trigger_is_the_compared_prompt() -> None:
    layer = LoraWeights(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)
    adapter = Adapter("toybox", {"unet.x": layer}, {"modelspec.trigger_phrase": "sks mug"})
    assert to_onnx._trigger(adapter) == "a photo of sks mug"
    assert to_onnx._trigger(Adapter("toybox", {"unet.x": layer})) is None


def test_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    from dbadapter.export import runtime

    monkeypatch.setattr(
        runtime.onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_providers() == ["CPUExecutionProvider"]  # the GPU package names CUDA without a GPU too
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_providers() == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert pick_providers(["CPUExecutionProvider"]) == ["CPUExecutionProvider"]
    with pytest.raises(UsageError, match="no provider TensorrtExecutionProvider"):
        pick_providers(["TensorrtExecutionProvider"])


def test_a_base_in_half_precision_is_refused(base: Base, tmp_path: Path) -> None:
    class Half(nn.Module):
        dtype = torch.float16

    pipeline = type("Pipeline", (), {"unet": Half()})()
    with pytest.raises(UsageError, match="float32"):
        export_onnx(Base("half", "sd1", pipeline), {}, tmp_path / "onnx")
