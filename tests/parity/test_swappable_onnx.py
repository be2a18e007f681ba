"""Swappable exports of each family: what they give with no adapter, one, two, and one after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from swappable_exports import Exported
from tiny_bases import Family, write_tiny_base

from dbadapter import lora
from dbadapter.adapter import Adapter
from dbadapter.base import load_base
from dbadapter.errors import UsageError
from dbadapter.export import OnnxPipeline, export_onnx, verify
from dbadapter.export.adapters import (
    write_onnx_adapter,
)
from dbadapter.export.parity import TOLERANCE, relative_error, synthetic_adapter
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


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join((case[0], *case[1])))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    family: Family
    family, layers = request.param
    place = tmp_path_factory.mktemp(family)
    write_tiny_base(place / "base", family, clip_vocabulary=False, shallow=layers == ("attention",))
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
