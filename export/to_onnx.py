"""Merged export to ONNX: adapters added into the weights, four graphs, a folder that three pipelines load."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbadapter import lora
from dbadapter.adapter import Adapter, adaptable_layers
from dbadapter.base import Base
from dbadapter.errors import ExportError, OutputError, UsageError
from dbadapter.export import parity
from dbadapter.export.graphs import (
    DTYPES,
    SCALING_FACTOR,
    Graph,
    Sizes,
    component_graphs,
    example_inputs,
)
from dbadapter.export.runtime import REPORT_NAME

__all__ = ["OPSET", "export_onnx", "merged"]

# At opset 23 and its Attention operator, ONNX Runtime no longer finds the GroupNorm fusions.
OPSET = 20
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")

Progress = Callable[[str, int, int], None]


def export_onnx(
    base: Base,
    adapters: Mapping[str | os.PathLike[str] | Adapter, float],
    output_dir: str | Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    prompt: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the base with the adapters merged into it as an ONNX folder, checked against torch.

    The folder loads in `load_onnx_pipeline`, in diffusers' OnnxStableDiffusionPipeline, and in optimum-onnx's
    ORTStableDiffusionPipeline. It appears whole or not at all. (diffusers' has the VAE factor 8 in its code:
    for a 64-pixel picture of toybox, whose factor is 4, ask it for 128.)

    Args:
        base: with float32 weights; they are bit for bit as they were afterwards.
        adapters: file or Adapter -> weight, all of them merged: W + sum of weight * (alpha / rank) * B A.
        output_dir: the folder to write.
        dtype: "float32", or "float16" for half the size (the VAE still computes in float32).
        overwrite: replace an earlier export.
        prompt: of the picture that is compared; None means the adapter's own trigger, else "a photo".
        progress: called with (stage, parts done, of how many).
    Returns:
        The report, which is written into the folder as export_report.json.
    Raises:
        UsageError: an unknown dtype.
        AdapterError: an adapter is broken or does not fit the base.
        OutputError: the folder exists, or the disk has no room for it.
        ExportError: the base is SDXL, or the export differs from torch by more than the tolerance.
    """
    started = time.perf_counter()
    output_dir = Path(output_dir)
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    if base.family == "sdxl":
        raise ExportError(
            f"base {base.name} is SDXL, which this version does not export; pass toybox, SD1.x or SD2.x"
        )
    if base.unet.dtype != torch.float32:
        raise UsageError(f"the base must be loaded in float32 to be exported, got {base.unet.dtype}")
    loaded = _load(base, adapters)
    _check_output(output_dir, overwrite)
    _check_space(output_dir, _expected_bytes(base, dtype))
    prompt = prompt or next(map(_trigger, loaded), None) or "a photo"
    place = output_dir.resolve()  # "." has no name of its own
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with _quiet(), _on_cpu(base):
            report = _export(base, loaded, temporary, dtype, prompt, progress)
        report = _described(base, adapters, dtype, report)
        report["seconds"] = round(time.perf_counter() - started, 1)
        _write_json(temporary / REPORT_NAME, report)
        _publish(temporary, place)
    except OSError as error:
        raise OutputError(f"{output_dir} cannot be written: {error}; pass another --output-dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


@contextmanager
def merged(base: Base, adapters: Mapping[Adapter, float]) -> Iterator[None]:
    """Merge the adapters into the base's weights inside the block, and give back every weight bit for bit.

    Only the weights that change are kept aside: for an attention adapter a sixth of a UNet.
    """
    layers = adaptable_layers(base.unet, "unet") | adaptable_layers(base.text_encoder, "text_encoder")
    changed = {name for adapter in adapters for name in adapter.modules if name in layers}
    weights = {name: layers[name].get_parameter("weight") for name in changed}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for adapter, strength in adapters.items():
            lora.merge_into(base.pipeline, adapter, strength)
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])


def _export(
    base: Base,
    adapters: Mapping[Adapter, float],
    folder: Path,
    dtype: str,
    prompt: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write the graphs and everything beside them, run the gate, return its report with sizes and times."""
    # With no adapter the gate still has to show that it would have seen one.
    compared = dict(adapters) or {parity.synthetic_adapter(base): 1.0}
    adapted = parity.adapted_components(compared)
    without = parity.observe(base, prompt, adapted) if adapters else None
    seconds = {}
    with merged(base, adapters):
        graphs = component_graphs(base, dtype)
        for number, graph in enumerate(graphs.values()):
            began = time.perf_counter()
            inputs = example_inputs(base, graph.name, _traced_sizes(base), dtype)
            _convert(graph, inputs, folder / graph.name / "model.onnx")
            seconds[graph.name] = round(time.perf_counter() - began, 1)
            if progress:
                progress("exporting", number + 1, len(graphs))
        expected = parity.observe(base, prompt)
    if without is None:
        with merged(base, compared):
            without = parity.observe(base, prompt, adapted)
    _write_layout(base, folder)
    report = parity.check(
        base,
        folder,
        prompt=prompt,
        expected=expected,
        without=without,
        dtype=dtype,
        progress=partial(progress, "checking") if progress else None,
    )
    for name, entry in report["components"].items():
        entry["bytes"] = _folder_bytes(folder / name)
        entry["seconds"] = seconds[name]
    return {"effect_of": "adapters" if adapters else "a synthetic adapter", **report}


def _convert(graph: Graph, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Trace one graph with torch's dynamo exporter, pin its names, and save it with its weights beside it."""
    with torch.no_grad():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=dict(graph.dynamic_shapes),
            verbose=False,
        )
    if program is None:
        raise ExportError(f"torch gave no ONNX program for {graph.name}")
    _pin(program.model, graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=True)


def _pin(model: Any, graph: Graph) -> None:
    """Give inputs and outputs the graph's dimension names, and drop what torch notes about values between.

    Its names are symbols such as `2*s48`, which optimum cannot compute with; its notes on every node hold
    stack traces with the paths of the machine, and are half the size of a small model.
    """
    import onnx_ir as ir

    ends = {id(value) for value in [*model.graph.inputs, *model.graph.outputs]}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in ends:
                value.shape = value.type = None
    model.graph.metadata_props.clear()
    dims = dict(graph.inputs) | dict(graph.outputs)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.metadata_props.clear()
        shape = dims[value.name]
        value.shape = None if shape is None else ir.Shape(shape)


def _write_layout(base: Base, folder: Path) -> None:
    """Write configs, tokenizer, scheduler and model_index.json as diffusers and optimum-onnx expect them."""
    import diffusers

    base.unet.save_config(folder / "unet")
    for half in ("vae_decoder", "vae_encoder"):
        base.vae.save_config(folder / half)
        config = json.loads((folder / half / "config.json").read_text(encoding="utf-8"))
        _write_json(folder / half / "config.json", config | {"scaling_factor": SCALING_FACTOR})
    base.text_encoder.config.save_pretrained(folder / "text_encoder")
    base.scheduler.save_pretrained(folder / "scheduler")
    _write_tokenizer(base.tokenizer, folder / "tokenizer")
    models = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    index = {
        "_class_name": "ORTStableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(base.scheduler).__name__],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **{name: ["diffusers", "OnnxRuntimeModel"] for name in models},
    }
    _write_json(folder / "model_index.json", dict(sorted(index.items())))


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer for transformers 4 too, which ignores the tokenizer.json that 5 writes alone."""
    tokenizer.save_pretrained(folder)
    if not (folder / "merges.txt").is_file():
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    if not (folder / "vocab.json").is_file():
        vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")


def _load(base: Base, adapters: Mapping[str | os.PathLike[str] | Adapter, float]) -> dict[Adapter, float]:
    """Return the adapters read and checked; one of weight 0 is none."""
    loaded = {
        adapter if isinstance(adapter, Adapter) else lora.load_adapter(adapter): weight
        for adapter, weight in adapters.items()
        if weight != 0
    }
    for adapter in loaded:
        lora.check_fits_pipeline(adapter, base.pipeline)
    return loaded


def _trigger(adapter: Adapter) -> str | None:
    words = adapter.metadata.get("modelspec.trigger_phrase")
    return f"a photo of {words}" if words else None


def _traced_sizes(base: Base) -> Sizes:
    """Return sizes that differ from each other and from 1, which torch.export would take for a constant."""
    return Sizes(2, 2 * base.latent_multiple, 3 * base.latent_multiple, 7)


def _described(
    base: Base,
    adapters: Mapping[str | os.PathLike[str] | Adapter, float],
    dtype: str,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    named = [
        {"name": "in memory" if isinstance(adapter, Adapter) else Path(adapter).name, "weight": weight}
        for adapter, weight in adapters.items()
    ]
    return {
        "base": {"name": base.name, "family": base.family},
        "adapters": named,
        "dtype": dtype,
        "opset": OPSET,
        "versions": {name: version(name) for name in _PACKAGES} | {"onnxruntime": _onnxruntime_version()},
        **report,
        "bytes": sum(entry["bytes"] for entry in report["components"].values()),
    }


def _onnxruntime_version() -> str:
    import onnxruntime  # the distribution is called onnxruntime or onnxruntime-gpu, the module is one

    return str(onnxruntime.__version__)


def _check_output(folder: Path, overwrite: bool) -> None:
    """Raise OutputError unless the folder is absent, empty, or an earlier export that may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder to write: pass another --output-dir")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{folder} exists already: pass --overwrite or another --output-dir")
    if not (folder / REPORT_NAME).is_file():
        raise OutputError(f"{folder} holds something else than an export of ours: pass another --output-dir")


def _check_space(folder: Path, needed: int) -> None:
    present = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(present).free
    if free < needed:
        raise OutputError(
            f"{present} has {free / 2**20:.0f} MiB free, the export needs {needed / 2**20:.0f} MiB: "
            "make room or pass another --output-dir"
        )


def _expected_bytes(base: Base, dtype: str) -> int:
    """Return the bytes of the weights, and a tenth more for the graphs."""
    parts = {"unet": base.unet, "text_encoder": base.text_encoder, "vae": base.vae}
    widths = {name: 4 if name == "vae" else DTYPES[dtype].itemsize for name in parts}
    weights = [p.numel() * widths[name] for name, part in parts.items() for p in part.parameters()]
    return int(sum(weights) * 1.1) + 2**24


def _publish(temporary: Path, folder: Path) -> None:
    """Rename the finished folder into place; the one it replaces goes away last."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    replaced = folder.exists()
    if replaced:
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        if replaced:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@contextmanager
def _on_cpu(base: Base) -> Iterator[None]:
    """Compute on the CPU in the block: on a GPU torch's convolutions are TF32, off by more than we allow."""
    device = base.device
    base.pipeline.to("cpu")
    try:
        yield
    finally:
        base.pipeline.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter, which talks about torchvision and about its own deprecated calls."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
