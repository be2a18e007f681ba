"""Swappable exports of each family: what they give with no adapter, one, two, and one after the other."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_bases import Family, write_tiny_base

from dbadapter import lora
from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.adapter_file import write_adapter
from dbadapter.base import Base, load_base
from dbadapter.errors import AdapterError, BaseError, ExportError, OutputError, UsageError
from dbadapter.export import OnnxPipeline, export_onnx, load_onnx_pipeline, verify
from dbadapter.export.adapters import (
    fitted_factors,
    mixed,
    onnx_adapter,
    read_onnx_adapter,
    write_onnx_adapter,
)
from dbadapter.export.parity import RECORD_NAME, TOLERANCE, Record, relative_error, synthetic_adapter
from dbadapter.export.pipeline import REPORT_NAME
from dbadapter.lora import TARGETS

# An export takes half a minute: two by default, the others in slow runs.
CASES: list[Any] = [
    ("sd1", tuple(TARGETS)),
    ("sdxl", ("attention",)),
    pytest.param(("sd2", tuple(TARGETS)), marks=pytest.mark.slow),
    pytest.param(("sdxl", tuple(TARGETS)), marks=pytest.mark.slow),
]
SETTINGS: dict[str, Any] = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "np"}


@dataclass(frozen=True)
class Exported:
    """A swappable export, the base, and two adapters of different ranks and layers."""

    folder: Path
    base: Base
    report: dict[str, Any]
    layers: tuple[str, ...]
    dog: Adapter
    hat: Adapter


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join((case[0], *case[1])))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    family: Family
    family, layers = request.param
    place = tmp_path_factory.mktemp(family)
    write_tiny_base(place / "base", family, clip_vocabulary=False)
    base = load_base(str(place / "base"), device="cpu")
    report = export_onnx(base, {}, place / "onnx", swappable=True, layers=layers)
    dog = synthetic_adapter(base, seed=1, rank=3, targets=layers)
    hat = synthetic_adapter(base, seed=2, rank=5, targets=layers[:1])
    return Exported(place / "onnx", base, report, layers, dog, hat)


@pytest.fixture
def pipe(exported: Exported, tmp_path: Path) -> OnnxPipeline:
    loaded = OnnxPipeline(exported.folder)
    for name in ("dog", "hat"):
        write_onnx_adapter(getattr(exported, name), tmp_path / name)
        loaded.load_adapter(name, tmp_path / name)
    return loaded


def drawn(pipeline: Any, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    return pipeline("a dog", generator=generator, **SETTINGS, **more).images[0]


def by_torch(exported: Exported, weights: Mapping[Adapter, float]) -> Any:
    lora.apply(exported.base.pipeline, weights)
    try:
        return drawn(exported.base.pipeline)
    finally:
        lora.apply(exported.base.pipeline, {})


def test_the_report_says_what_is_swapped(exported: Exported) -> None:
    report = exported.report
    assert report["swappable"] == list(exported.layers)
    assert report == json.loads((exported.folder / REPORT_NAME).read_text())
    for name, entry in report["components"].items():
        assert len(entry["cases"]) == 6
        assert {case["adapter"] for case in entry["cases"]} == {"off", "on"}
        if name.startswith("vae"):
            assert "adapter_inputs" not in entry
            continue
        layers = [layer for layer in exported.dog.modules if layer.startswith(f"{name}.")]
        assert entry["adapter_inputs"] == {"expected": 2 * len(layers), "live": 2 * len(layers)}
        assert entry["adapter_effect"] > 20 * TOLERANCE["float32"]
    assert report["peak_memory_mb"] > 100


def test_inputs_have_readable_ranks_and_a_default_that_adds_nothing(exported: Exported) -> None:
    model = onnx.load(exported.folder / "unet" / "model.onnx", load_external_data=False)
    inputs = {value.name: value for value in model.graph.input}
    defaults = {value.name: tuple(value.dims) for value in model.graph.initializer if value.name in inputs}
    layer = next(name for name in exported.dog.modules if name.startswith("unet."))
    dims = [dim.dim_param or dim.dim_value for dim in inputs[f"{layer}.lora_A"].type.tensor_type.shape.dim]
    assert dims == [f"rank of {layer}", *exported.dog.modules[layer].lora_A.shape[1:]]
    assert defaults[f"{layer}.lora_A"] == (0, *dims[1:])
    assert len(defaults) == exported.report["components"]["unet"]["adapter_inputs"]["expected"]


def test_off_one_two_and_back_again(pipe: OnnxPipeline, exported: Exported) -> None:
    """Each as torch draws it, and nothing of a subject stays when the next one comes."""
    none, first = drawn(pipe), drawn(pipe, adapters={"dog": 1.0})
    other = drawn(pipe, adapters={"hat": -0.5})
    both = drawn(pipe, adapters={"dog": 0.4, "hat": 0.8})
    again = drawn(pipe, adapters={"dog": 1.0})
    assert np.array_equal(first, again)
    assert np.array_equal(none, drawn(pipe, adapters={}))
    assert pipe.adapters == {}
    expected = [
        (none, {}),
        (first, {exported.dog: 1.0}),
        (other, {exported.hat: -0.5}),
        (both, {exported.dog: 0.4, exported.hat: 0.8}),
    ]
    for found, weights in expected:
        assert np.abs(found - by_torch(exported, weights)).max() < 1e-4
    assert min(np.abs(none - each).max() for each in (first, other, both)) > 0.02


def test_adapters_stay_on_until_they_are_changed(pipe: OnnxPipeline) -> None:
    pipe.set_adapters({"dog": 0.5})
    on = drawn(pipe)
    assert np.array_equal(on, drawn(pipe, adapters={"dog": 0.5}))
    assert pipe.adapters == {"dog": 0.5}
    with pytest.raises(UsageError, match="no adapter 'cat' is loaded \\(loaded: dog, hat\\)"):
        drawn(pipe, adapters={"cat": 1.0})
    assert np.array_equal(on, drawn(pipe))
    pipe.unload_adapter("dog")
    assert pipe.adapters == {}
    with pytest.raises(UsageError, match="finite"):
        pipe.set_adapters({"hat": float("nan")})


def test_bare_onnxruntime_drives_the_files(exported: Exported, tmp_path: Path) -> None:
    """As docs/onnx-adapters.md has it: no line of ours, nor of torch's."""
    files = write_onnx_adapter(exported.dog, tmp_path / "dog")
    assert {file.name for file in files} == {
        f"{name}.onnx_adapter" for name in ("unet", *exported.base.text_encoders)
    }
    session = onnxruntime.InferenceSession(
        exported.folder / "text_encoder" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(tmp_path / "dog" / "text_encoder.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    ids = np.arange(7, dtype=np.int32)[None]
    (found,) = session.run(["last_hidden_state"], {"input_ids": ids}, options)
    (without,) = session.run(["last_hidden_state"], {"input_ids": ids})
    lora.apply(exported.base.pipeline, {exported.dog: 1.0})
    with torch.no_grad():
        expected = exported.base.text_encoder(torch.from_numpy(ids).long()).last_hidden_state
    lora.apply(exported.base.pipeline, {})
    assert relative_error(torch.from_numpy(found), expected) < TOLERANCE["float32"]
    assert relative_error(torch.from_numpy(without), expected) > 20 * TOLERANCE["float32"]


def test_image_to_image_takes_the_parts(pipe: OnnxPipeline, exported: Exported) -> None:
    import diffusers
    from PIL import Image

    xl = exported.base.family == "sdxl"
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if xl else diffusers.StableDiffusionImg2ImgPipeline
    more = {} if xl else {"requires_safety_checker": False}
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    pipe.set_adapters({"dog": 1.0})
    found = []
    for parts in (pipe.components, exported.base.pipeline.components):
        if parts is not pipe.components:
            lora.apply(exported.base.pipeline, {exported.dog: 1.0})
        pipeline = kind(**parts, **more)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        found.append(
            pipeline(
                "a dog",
                image=picture,
                strength=0.7,
                num_inference_steps=4,
                generator=generator,
                output_type="np",
            ).images[0]
        )
    lora.apply(exported.base.pipeline, {})
    assert np.abs(found[0] - found[1]).max() < 1e-4


def test_threads_share_one_pipeline(pipe: OnnxPipeline) -> None:
    """Each call has its own adapter, whatever the others do."""
    alone = {name: drawn(pipe, adapters={name: 1.0}) for name in ("dog", "hat")}
    names = ["dog", "hat"] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: drawn(pipe, adapters={name: 1.0}), names))
    assert all(np.array_equal(alone[name], picture) for name, picture in zip(names, found, strict=True))


def test_verify_needs_no_base(exported: Exported) -> None:
    found = verify(exported.folder, ["CPUExecutionProvider"])
    assert found["components"]["unet"]["relative_error"] <= TOLERANCE["float32"]
    report = json.loads((exported.folder / REPORT_NAME).read_text())
    assert report["verified"]["CPUExecutionProvider"]["picture"] == found["picture"]


# --- refusals, on one family


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
