"""What a swappable export of one family refuses, and what lies in its folder."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from swappable_exports import Exported
from tiny_bases import write_tiny_base

from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.adapter_file import write_adapter
from dbadapter.base import load_base
from dbadapter.errors import AdapterError, BaseError, ExportError, OutputError, UsageError
from dbadapter.export import OnnxPipeline, export_onnx, load_onnx_pipeline, verify
from dbadapter.export.adapters import (
    fitted_factors,
    mixed,
    onnx_adapter,
    read_onnx_adapter,
    write_onnx_adapter,
)
from dbadapter.export.parity import RECORD_NAME, Record, relative_error, synthetic_adapter


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    place = tmp_path_factory.mktemp("small")
    write_tiny_base(place / "base", "sd1", clip_vocabulary=False)
    base = load_base(str(place / "base"), device="cpu")
    write_adapter(place / "dog.safetensors", synthetic_adapter(base, seed=1))
    report = export_onnx(base, {place / "dog.safetensors": 0.7}, place / "onnx", swappable=True)
    dog, hat = (synthetic_adapter(base, seed=seed) for seed in (1, 0))
    return Exported(place / "onnx", base, report, ("attention", "feed-forward"), dog, hat)


def test_given_adapters_lie_in_the_folder(small: Exported) -> None:
    assert small.report["adapters"] == [{"name": "dog.safetensors", "weight": 0.7}]
    assert small.report["effect_of"] == "the adapters and a synthetic adapter"
    factors = read_onnx_adapter(small.folder / "adapters" / "dog").factors
    expected = onnx_adapter(small.dog).factors  # the file rounds to float16
    assert factors.keys() == expected.keys()
    assert max(relative_error(factors[key], expected[key]) for key in factors) < 1e-3


def test_the_documents_program_runs(small: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of docs/onnx.md that needs neither torch nor us, on an export and an adapter of that name."""
    text = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import json.*?)```", text, re.DOTALL)
    (tmp_path / "base-onnx").symlink_to(small.folder)
    write_onnx_adapter(small.dog, tmp_path / "dog")
    monkeypatch.chdir(tmp_path)
    drawn_by_it: dict[str, Any] = {}
    exec(program, drawn_by_it)
    write_onnx_adapter(synthetic_adapter(small.base, strength=1e-6), tmp_path / "dog", overwrite=True)
    without: dict[str, Any] = {}
    exec(program, without)
    assert drawn_by_it["picture"].shape == (32, 32, 3)
    difference = np.abs(drawn_by_it["picture"].astype(int) - without["picture"].astype(int))
    assert difference.max() >= 10


def test_what_does_not_fit_is_refused_with_the_reason(small: Exported, tmp_path: Path) -> None:
    pipe = OnnxPipeline(small.folder)

    def load(adapter: Adapter) -> None:
        write_onnx_adapter(adapter, tmp_path / "x", overwrite=True)
        pipe.load_adapter("x", tmp_path / "x")

    with pytest.raises(AdapterError, match="is for a base of family sdxl, this export is sd1"):
        load(Adapter("sdxl", small.dog.modules))
    with pytest.raises(AdapterError, match=r"layers that this export has no input for.*--targets"):
        load(synthetic_adapter(small.base, targets=("conv",)))
    narrow = {
        name: LoraWeights(layer.lora_A[:, :-1].contiguous(), layer.lora_B, layer.alpha)
        for name, layer in small.dog.modules.items()
        if name.endswith("to_q")
    }
    with pytest.raises(
        AdapterError, match=r"does not fit this export: unet.*lora_A is \(4, (31|63)\), expected"
    ):
        load(Adapter("sd1", narrow))
    (tmp_path / "x" / "unet.onnx_adapter").write_bytes(b"no adapter")
    with pytest.raises(AdapterError, match=r"unet.onnx_adapter is no .onnx_adapter file"):
        pipe.load_adapter("x", tmp_path / "x")
    with pytest.raises(AdapterError, match="holds no adapter"):
        pipe.load_adapter("x", small.folder)
    assert pipe.adapters == {}


def test_another_checkpoint_of_the_family_is_a_warning(small: Exported, tmp_path: Path) -> None:
    adapter = Adapter("sd1", small.dog.modules, {"ss_sd_model_name": "someone/other"})
    write_onnx_adapter(adapter, tmp_path / "x")
    with pytest.warns(UserWarning, match="was trained on someone/other, this export is of"):
        OnnxPipeline(small.folder).load_adapter("x", tmp_path / "x")


def test_calls_that_the_graph_cannot_take_are_told_apart(small: Exported) -> None:
    pipeline = load_onnx_pipeline(small.folder)
    unet, sample, words = pipeline.unet, torch.zeros(1, 4, 8, 8), torch.zeros(1, 7, 32)
    with pytest.raises(UsageError, match=r"input sample must be .*, got \(1, 5, 8, 8\)"):
        unet(torch.zeros(1, 5, 8, 8), 1, words)
    with pytest.raises(UsageError, match="input encoder_hidden_states must be"):
        unet(sample, 1, torch.zeros(1, 7, 31))
    unet(sample, 1, words)
    with pytest.raises(UsageError, match="input encoder_hidden_states is missing"):
        unet.runner({"sample": sample, "timestep": torch.tensor(1.0)}, {"out_sample": (1, 4, 8, 8)})
    longest = int(pipeline.text_encoder.config.max_position_embeddings)
    with pytest.raises(UsageError, match=f"{longest} tokens at the most, got {longest + 1}"):
        pipeline.text_encoder(torch.zeros(1, longest + 1, dtype=torch.long))


@pytest.mark.parametrize("weight", ["much", None, 1j, float("inf")])
def test_weights_are_finite_numbers(small: Exported, tmp_path: Path, weight: Any) -> None:
    pipe = OnnxPipeline(small.folder)
    pipe.load_adapter("dog", small.folder / "adapters" / "dog")
    with pytest.raises(UsageError, match="must be a finite number"):
        pipe.set_adapters({"dog": weight})
    with pytest.raises(UsageError, match="name -> weight"):
        pipe.set_adapters(["dog"])  # type: ignore[arg-type]


def test_two_files_of_one_name_are_refused_at_once(small: Exported, tmp_path: Path) -> None:
    files = [tmp_path / name / "dog.safetensors" for name in ("one", "two")]
    for file in files:
        write_adapter(file, small.dog)
    with pytest.raises(UsageError, match="two adapters are called dog"):
        export_onnx(small.base, dict.fromkeys(files, 1.0), tmp_path / "onnx", swappable=True)
    assert not (tmp_path / "onnx").exists()


def test_what_float16_cannot_hold_is_refused(small: Exported, tmp_path: Path) -> None:
    huge = {name: LoraWeights(w.lora_A, w.lora_B, 1e9) for name, w in small.dog.modules.items()}
    with pytest.raises(AdapterError, match="too large for float16: pass --dtype float32"):
        write_onnx_adapter(Adapter("sd1", huge), tmp_path / "dog", dtype="float16")
    assert not any(tmp_path.iterdir())


def test_a_folder_with_mixed_up_files_is_refused(small: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(small.folder, folder)
    shutil.copytree(folder / "text_encoder", folder / "unet", dirs_exist_ok=True)
    with pytest.raises(BaseError, match=r"is no unet of ours: it takes input_ids"):
        load_onnx_pipeline(folder)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("settings", {"seed": None}, "its setting seed is missing"),
        ("settings", {"height": "x"}, "its setting height"),
        ("compared", (), "it compares nothing"),
        ("compared", ("on", "zzz"), "it compares on,zzz"),
        ("pictures", {}, "its picture 'off' is missing"),
        ("outputs", {"off": {}, "on": {}}, "it lacks what torch gave for text_encoder, 'off'"),
        ("inputs", {}, "has no case of text_encoder"),
    ],
)
def test_a_record_that_is_not_whole_is_refused(
    small: Exported, tmp_path: Path, part: str, change: Any, said: str
) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(small.folder, folder)
    record = Record.load(folder / RECORD_NAME)
    setattr(record, part, record.settings | change if part == "settings" else change)
    record.save(folder / RECORD_NAME)
    with pytest.raises(ExportError, match=said):
        verify(folder)
    assert (folder / RECORD_NAME).stat().st_mode & 0o044  # others can verify too


def test_an_overwritten_export_takes_nothing_else_away(small: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(small.folder, folder)
    (folder / "holiday.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"holds holiday\.png, which is no part of an export"):
        export_onnx(small.base, {}, folder, overwrite=True)


def test_a_merged_export_takes_no_adapters(small: Exported) -> None:
    with pytest.raises(AdapterError, match="has its adapters merged; export the base with --swappable"):
        fitted_factors(onnx_adapter(small.dog), {}, "sd1", "dog")


def test_sizes_that_the_graph_cannot_take(small: Exported) -> None:
    pipeline = load_onnx_pipeline(small.folder)
    with pytest.raises(UsageError, match=r"got 8 x 7: the nearest are 8 high and 6 or 8 wide"):
        pipeline.unet(torch.zeros(1, 4, 8, 7), 1, torch.zeros(1, 4, 32))


def test_a_tampered_graph_does_not_pass_the_gate(small: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(small.folder, folder)
    data = folder / "unet" / "model.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 4000] = bytes(4000)
    data.write_bytes(raw)
    with pytest.raises(ExportError, match="the exported unet"):
        verify(folder)
    (folder / RECORD_NAME).write_bytes(b"short")
    with pytest.raises(ExportError, match="cannot be read"):
        verify(folder)
    (folder / "unet" / "model.onnx").write_bytes((folder / "unet" / "model.onnx").read_bytes()[:1000])
    with pytest.raises(BaseError, match=r"unet/model\.onnx cannot be loaded"):
        load_onnx_pipeline(folder)


def test_mixing_is_exact_and_leaves_out_weight_0(small: Exported) -> None:
    one, two = onnx_adapter(small.dog).factors, onnx_adapter(small.hat).factors
    layer = next(name for name in small.dog.modules if name.startswith("unet."))
    found = mixed([(one, 0.3), (two, -2.0)])
    joined = found[f"{layer}.lora_B"] @ found[f"{layer}.lora_A"]
    parts = [f[f"{layer}.lora_B"] @ f[f"{layer}.lora_A"] for f in (one, two)]
    torch.testing.assert_close(joined, 0.3 * parts[0] - 2.0 * parts[1])
    assert mixed([(one, 0.0)]) == {}


def test_adapter_folders_are_replaced_only_if_asked(small: Exported, tmp_path: Path) -> None:
    write_onnx_adapter(small.dog, tmp_path / "dog")
    with pytest.raises(OutputError, match="--overwrite"):
        write_onnx_adapter(small.dog, tmp_path / "dog")
    (tmp_path / "dog" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"something else, letter\.txt"):
        write_onnx_adapter(small.dog, tmp_path / "dog", overwrite=True)
    with pytest.raises(UsageError, match="dtype must be"):
        write_onnx_adapter(small.dog, tmp_path / "cat", dtype="int4")
    assert not (tmp_path / "cat").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_an_export_killed_midway_leaves_nothing_that_looks_finished(small: Exported, tmp_path: Path) -> None:
    base = Path(str(small.base.path))
    words = ["export", "--onnx", "--base", str(base), "--output-dir", str(tmp_path / "onnx")]
    process = subprocess.Popen([sys.executable, "-m", "dbadapter", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(".onnx.*.tmp/text_encoder/model.onnx")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "onnx").exists()
    (left,) = tmp_path.iterdir()
    with pytest.raises(BaseError, match="is no ONNX export"):
        load_onnx_pipeline(left)
