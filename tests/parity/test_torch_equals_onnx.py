"""One export of the tiny base with a synthetic adapter: its folder, its report, what runners make of it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dbadapter import lora
from dbadapter.adapter import Adapter
from dbadapter.base import Base, load_base
from dbadapter.errors import BaseError, OutputError, UsageError
from dbadapter.export import export_onnx, load_onnx_pipeline
from dbadapter.export.graphs import SCALING_FACTOR, component_graphs
from dbadapter.export.parity import (
    EFFECT_OVER_TOLERANCE,
    TOLERANCE,
    relative_error,
    synthetic_adapter,
)
from dbadapter.export.pipeline import REPORT_NAME
from dbadapter.sampling import Picture, generate_pictures

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
PROMPTS = ["a photo of sks cat", "a dog on the beach"]
WEIGHT = 0.8


@dataclass(frozen=True)
class Exported:
    """The export and what it was made from."""

    folder: Path
    base: Base
    adapter: Adapter
    report: dict[str, Any]
    progress: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def exported(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    base = load_base(str(tiny_base_folder), device="cpu")
    adapter = synthetic_adapter(base)
    folder = tmp_path_factory.mktemp("export") / "onnx"
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    progress: list[tuple[str, int, int]] = []
    report = export_onnx(base, {adapter: WEIGHT}, folder, progress=lambda *parts: progress.append(parts))
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    return Exported(folder, base, adapter, report, progress)


@pytest.fixture(scope="module")
def pipeline(exported: Exported) -> Any:
    return load_onnx_pipeline(exported.folder)


@pytest.fixture
def torch_pipeline(exported: Exported) -> Iterator[Any]:
    """Give the torch pipeline with the adapter on, and take it off afterwards."""
    lora.apply(exported.base.pipeline, {exported.adapter: WEIGHT})
    yield exported.base.pipeline
    lora.apply(exported.base.pipeline, {})


def largest_difference(ones: list[Picture], others: list[Picture]) -> int:
    pairs = zip(ones, others, strict=True)
    return max(
        int(np.abs(np.asarray(one.image).astype(int) - np.asarray(other.image).astype(int)).max())
        for one, other in pairs
    )


def test_the_family_goes_with_the_export(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(exported.folder, folder)
    report = folder / REPORT_NAME
    report.write_text(report.read_text().replace('"sd1"', '"toybox"'))
    assert load_onnx_pipeline(folder).family == "toybox"
    report.unlink()
    assert load_onnx_pipeline(folder).family == ""


def test_the_report_says_what_was_compared(exported: Exported) -> None:
    assert exported.report == json.loads((exported.folder / REPORT_NAME).read_text())
    components = exported.report["components"]
    assert sorted(components) == sorted(COMPONENTS)
    for name, entry in components.items():
        assert entry["relative_error"] <= entry["tolerance"] == TOLERANCE["float32"]
        assert len(entry["cases"]) == 3
        assert max(case["relative_error"] for case in entry["cases"]) == entry["relative_error"]
        assert {case["adapter"] for case in entry["cases"]} == {"on"}
        assert entry["bytes"] == sum(path.stat().st_size for path in (exported.folder / name).iterdir())
        if name in ("unet", "text_encoder"):
            assert entry["adapter_effect"] >= EFFECT_OVER_TOLERANCE * entry["tolerance"]
    picture = exported.report["picture"]
    assert picture["max_difference"] <= picture["tolerance"] == 3
    assert picture["adapter_effect"] > EFFECT_OVER_TOLERANCE * picture["max_difference"]
    assert exported.report["adapters"] == [{"name": "in memory", "weight": WEIGHT}]
    assert exported.progress[-1] == ("checking", 5, 5)
    assert exported.progress[0] == ("exporting", 1, 4)


def test_same_seed_same_picture_as_torch(pipeline: Any, torch_pipeline: Any, exported: Exported) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 20, "seed": 3, "num_images_per_prompt": 2}
    by_onnx = generate_pictures(pipeline, PROMPTS, **settings)
    by_torch = generate_pictures(torch_pipeline, PROMPTS, **settings)
    lora.apply(exported.base.pipeline, {})
    without = generate_pictures(exported.base.pipeline, PROMPTS, **settings)
    assert (
        largest_difference(without, by_torch) >= EFFECT_OVER_TOLERANCE
    )  # 20 of the one step that is allowed
    assert largest_difference(by_onnx, by_torch) <= 1
    assert [picture.seed for picture in by_onnx] == [3, 4, 5, 6]


def test_other_sizes_batches_and_negative_prompts(pipeline: Any, torch_pipeline: Any) -> None:
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "width": 64,
        "height": 32,
        "negative_prompt": "blurry",
        "batch_size": 3,
        "num_images_per_prompt": 2,
    }
    by_onnx = generate_pictures(pipeline, PROMPTS, **settings)
    by_torch = generate_pictures(torch_pipeline, PROMPTS, **settings)
    assert by_onnx[0].image.size == (64, 32)
    assert largest_difference(by_onnx, by_torch) <= 1


def test_drop_ins_answer_like_torchs_models(pipeline: Any, exported: Exported) -> None:
    base = exported.base
    ids = torch.tensor([[base.tokenizer.bos_token_id, 5, 6, base.tokenizer.eos_token_id]])
    with torch.no_grad():
        adapted = pipeline.text_encoder(ids)
        pixels = torch.rand(1, 3, 32, 48) * 2 - 1
        expected = base.vae.encode(pixels).latent_dist
    assert adapted[0].shape == adapted.last_hidden_state.shape == (1, 4, base.text_encoder.config.hidden_size)
    assert adapted.pooler_output.shape == (1, base.text_encoder.config.hidden_size)
    actual = pipeline.vae.encode(pixels).latent_dist
    ours, theirs = pipeline.vae.config.scaling_factor, base.vae.config.scaling_factor
    assert (ours, theirs) == (SCALING_FACTOR, 0.7)
    assert relative_error(actual.mean * ours, expected.mean * theirs) < 1e-4
    assert relative_error(actual.std * ours, expected.std * theirs) < 1e-4
    decoded = pipeline.vae.decode(actual.mean).sample
    assert relative_error(decoded, base.vae.decode(expected.mean).sample) < 1e-4
    assert pipeline.unet.dtype == torch.float32


def test_what_the_graphs_cannot_do_is_refused(pipeline: Any, exported: Exported) -> None:
    width = exported.base.text_encoder.config.hidden_size
    multiple = exported.base.latent_multiple
    words = torch.zeros(1, 4, width)
    with pytest.raises(UsageError, match=f"multiple of {multiple} high and wide"):
        pipeline.unet(torch.zeros(1, 4, multiple + 1, multiple), 1, words)
    with pytest.raises(UsageError, match="cross_attention_kwargs"):
        pipeline.unet(torch.zeros(1, 4, 8, 8), 1, words, cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(UsageError, match="clip_skip"):
        pipeline.text_encoder(torch.zeros(1, 4, dtype=torch.int64), output_hidden_states=True)
    with pytest.raises(UsageError, match="pixels high and wide"):
        pipeline.vae.encode(torch.zeros(1, 3, 33, 32))


@pytest.mark.parametrize("name", COMPONENTS)
def test_names_of_inputs_and_outputs(exported: Exported, name: str) -> None:
    model = onnx.load(exported.folder / name / "model.onnx", load_external_data=False)
    graph = component_graphs(exported.base)[name]

    def dims(value: Any) -> tuple[str | int, ...] | None:
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            return None
        return tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)

    assert {value.name: dims(value) for value in model.graph.input} == dict(graph.inputs)
    assert {value.name: dims(value) for value in model.graph.output} == dict(graph.outputs)
    assert [value.name for value in model.graph.output] == list(graph.outputs)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    weights = {tensor.name for tensor in model.graph.initializer}
    assert {value.name for value in model.graph.value_info} <= weights  # no symbols of torch's between
    # torch notes stack traces on every node, and with them the paths of the machine
    assert b"site-packages" not in (exported.folder / name / "model.onnx").read_bytes()


def test_diffusers_own_onnx_pipeline_loads_the_folder(exported: Exported, torch_pipeline: Any) -> None:
    """OnnxStableDiffusionPipeline, up to diffusers 0.42, has 0.18215 and factor 8 written into it."""
    from diffusers import OnnxStableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its own removal
        theirs = OnnxStableDiffusionPipeline.from_pretrained(
            exported.folder, provider="CPUExecutionProvider", local_files_only=True
        )
    theirs.set_progress_bar_config(disable=True)
    base = exported.base
    side = base.resolution // base.vae_scale_factor
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
    expected = torch_pipeline(PROMPTS[0], latents=latents, **settings).images
    actual = theirs(PROMPTS[0], latents=latents.numpy(), height=side * 8, width=side * 8, **settings).images
    assert np.abs(actual - expected).max() < 1e-4


def test_the_layout_is_what_optimum_reads(exported: Exported) -> None:
    """optimum-onnx cannot share an environment with this diffusers; its loader asks for these files."""
    index = json.loads((exported.folder / "model_index.json").read_text())
    assert index["_class_name"] == "ORTStableDiffusionPipeline"
    assert all(index[name] == ["diffusers", "OnnxRuntimeModel"] for name in COMPONENTS)
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    for name in COMPONENTS:
        assert {path.name for path in (exported.folder / name).iterdir()} == {
            "config.json",
            "model.onnx",
            "model.onnx.data",
        }
    configs = {name: json.loads((exported.folder / name / "config.json").read_text()) for name in COMPONENTS}
    assert {"time_cond_proj_dim", "in_channels", "sample_size"} <= set(configs["unet"])
    assert {"scaling_factor", "block_out_channels"} <= set(configs["vae_decoder"])
    assert "num_hidden_layers" in configs["text_encoder"]
    assert (exported.folder / "scheduler/scheduler_config.json").is_file()
    tokenizer = exported.folder / "tokenizer"
    vocabulary = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary == exported.base.tokenizer.get_vocab()
    assert (tokenizer / "merges.txt").read_text(encoding="utf-8").startswith("#version")


def test_an_export_is_replaced_only_if_asked(exported: Exported) -> None:
    with pytest.raises(OutputError, match="--overwrite"):
        export_onnx(exported.base, {}, exported.folder)


def test_a_broken_folder_is_named(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"model_index\.json"):
        load_onnx_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BaseError, match=r"text_encoder/model\.onnx is missing"):
        load_onnx_pipeline(tmp_path)
    for name in COMPONENTS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BaseError, match=r"cannot be read|cannot be loaded"):
        load_onnx_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_bytes((exported.folder / "model_index.json").read_bytes())
    with pytest.raises(BaseError, match="cannot be loaded"):
        load_onnx_pipeline(tmp_path)


@pytest.mark.slow
def test_float16_exports_within_its_tolerance(tiny_base_folder: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base_folder), device="cpu")
    report = export_onnx(base, {}, tmp_path / "onnx", dtype="float16")
    assert report["effect_of"] == "a synthetic adapter"
    assert report["components"]["unet"]["relative_error"] <= TOLERANCE["float16"]
    assert base.unet.dtype == torch.float32
    (picture,) = generate_pictures(load_onnx_pipeline(tmp_path / "onnx"), PROMPTS[:1], num_inference_steps=4)
    (expected,) = generate_pictures(base.pipeline, PROMPTS[:1], num_inference_steps=4)
    assert largest_difference([picture], [expected]) <= 3
