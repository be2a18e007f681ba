"""Export to ONNX: adapters merged into the weights, or as inputs that are swapped at run time."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbadapter import lora
from dbadapter.adapter import Adapter, LoraWeights, adaptable_layers, fitted
from dbadapter.base import Base
from dbadapter.errors import ConfigError, OutputError, UsageError
from dbadapter.export import parity
from dbadapter.export.adapters import mixed, onnx_adapter, write_onnx_adapter
from dbadapter.export.graphs import DTYPES, component_graphs
from dbadapter.export.layout import (
    check_output,
    check_space,
    folder_bytes,
    publish,
    write_json,
    write_layout,
)
from dbadapter.export.passes.expand import expand
from dbadapter.export.pipeline import REPORT_NAME
from dbadapter.export.tracing import OPSET, convert
from dbadapter.speed import peak_memory_mb

__all__ = ["TARGETS", "export_onnx", "merged"]

TARGETS = ("portable", "cuda")
# What adapters of ours, and of most others, change.
SWAPPABLE_LAYERS = ("attention", "feed-forward")
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Job:
    """What is exported, and how: the arguments of `export_onnx`, checked."""

    base: Base
    adapters: Mapping[Adapter, float]
    dtype: str
    target: str
    layers: tuple[str, ...]  # the swappable ones' targets; none for a merged export
    prompt: str
    progress: Progress

    @property
    def compared(self) -> Mapping[Adapter, float]:
        """The adapters that the gate turns on.

        Where every layer is an input, every layer must show: one that changes them all comes with the given.
        """
        if self.adapters and not self.layers:
            return self.adapters
        every = parity.synthetic_adapter(self.base, targets=self.layers or ("attention",))
        return {every: 1.0, **self.adapters}


def export_onnx(
    base: Base,
    adapters: Mapping[str | os.PathLike[str] | Adapter, float],
    output_dir: str | Path,
    *,
    dtype: str = "float32",
    swappable: bool = False,
    layers: Sequence[str] = (),
    target: str = "portable",
    overwrite: bool = False,
    prompt: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the base with its adapters as an ONNX folder, checked against torch.

    The folder loads in `load_onnx_pipeline` and `OnnxPipeline`, in diffusers' OnnxStableDiffusionPipeline,
    and in optimum-onnx's ORTStableDiffusionPipeline and ORTStableDiffusionXLPipeline. It appears whole or
    not at all. (diffusers' has the VAE factor 8 in its code: for a 64-pixel picture of toybox, whose factor
    is 4, ask it for 128.)

    Args:
        base: with float32 weights; they are bit for bit as they were afterwards.
        adapters: file or Adapter -> weight. Merged: W + sum of weight * (alpha / rank) * B A. Swappable:
            the files are written into the folder's `adapters/`, and nothing of them into the graphs.
        output_dir: the folder to write.
        dtype: "float32"; "float16" for half the size (the VAE still computes in float32); "int8" for weights
            of the UNet in 8 bits, for the CPU: a third of the size, and slower.
        swappable: make the adapters' factors inputs of the graphs.
        layers: of `lora.TARGETS`, the UNet's layers that can be swapped; none means attention and
            feed-forward, and whatever the given adapters change. Text encoders have their attention.
        target: "portable", standard operators, or "cuda", fused ones that ONNX Runtime has for GPUs. Such a
            UNet is compared here with its fused nodes spelled out, and marked unverified until `verify` has
            run on a GPU.
        overwrite: replace an earlier export.
        prompt: of the picture that is compared; None means the adapter's own trigger, else "a photo".
        progress: called with (stage, parts done, of how many).
    Returns:
        The report, which is written into the folder as export_report.json.
    Raises:
        UsageError: an unknown dtype, target or layer, or such as exclude each other.
        AdapterError: an adapter is broken or does not fit the base.
        OutputError: the folder exists, or the disk has no room for it.
        ExportError: the export differs from torch by more than the tolerance.
    """
    started = time.perf_counter()
    output_dir = Path(output_dir)
    _check_words(dtype, target, layers, swappable)
    if base.unet.dtype != torch.float32:
        raise UsageError(f"the base must be loaded in float32 to be exported, got {base.unet.dtype}")
    loaded, named = _load(base, adapters)
    check_output(output_dir, overwrite)
    check_space(output_dir, _expected_bytes(base, dtype))
    job = _Job(
        base=base,
        adapters=loaded,
        dtype=dtype,
        target=target,
        layers=_swapped_layers(base, loaded, layers) if swappable else (),
        prompt=prompt or next(filter(None, map(_trigger, loaded)), None) or "a photo",
        progress=progress or (lambda stage, done, total: None),
    )
    place = output_dir.resolve()  # "." has no name of its own
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with _quiet(), _on_cpu(base):
            report = _export(job, temporary)
        if swappable:
            for name, adapter in named.items():
                kind = "float16" if dtype == "float16" else "float32"
                write_onnx_adapter(adapter, temporary / "adapters" / name, dtype=kind)
        report = _described(job, adapters, report)
        report["seconds"] = round(time.perf_counter() - started, 1)
        report["peak_memory_mb"] = round(peak_memory_mb(torch.device("cpu")))
        write_json(temporary / REPORT_NAME, report)
        publish(temporary, place)
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
    layers = adaptable_layers(base.unet, "unet")
    for name, model in base.text_encoders.items():
        layers |= adaptable_layers(model, name)
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


def _export(job: _Job, folder: Path) -> dict[str, Any]:
    """Write the graphs and everything beside them, run the gate, return its report with sizes and times."""
    record = _record(job)
    entries: dict[str, dict[str, Any]] = {}
    with merged(job.base, {} if job.layers else job.adapters):
        graphs = component_graphs(job.base, job.dtype, targets=job.layers, fused=job.target == "cuda")
        for number, graph in enumerate(graphs.values()):
            entries[graph.name] = convert(graph, job.base, job.dtype, folder / graph.name / "model.onnx")
            job.progress("exporting", number + 1, len(graphs))
    del graphs
    write_layout(job.base, folder)
    record.save(folder / parity.RECORD_NAME)
    with _portable_twins(folder, job.target) as twins:
        progress = partial(job.progress, "checking")
        report = parity.check(folder, record, dtype=job.dtype, models=twins, progress=progress)
    for name, entry in report["components"].items():
        entry |= {"bytes": folder_bytes(folder / name), **entries[name]}
    given, synthetic = bool(job.adapters), bool(job.layers) or not job.adapters
    words = [*(["the adapters"] if given else []), *(["a synthetic adapter"] if synthetic else [])]
    return {"effect_of": " and ".join(words), **report}


def _record(job: _Job) -> parity.Record:
    """Ask torch for everything that the gate compares with, without and with the adapters."""
    base, adapted = job.base, parity.adapted_components(job.compared)
    inputs = parity.gate_inputs(base)
    picture = parity.picture_settings(base, job.prompt)
    compared = ("off", "on") if job.layers else ("on",) if job.adapters else ("off",)
    without, without_picture = parity.observe(base, inputs, picture, None if "off" in compared else adapted)
    with merged(base, job.compared):
        found, found_picture = parity.observe(base, inputs, picture, None if "on" in compared else adapted)
    factors: dict[str, Tensor] = {}
    if job.layers:
        factors = mixed([(_factors(base, adapter), weight) for adapter, weight in job.compared.items()])
    return parity.Record(
        inputs,
        {"off": without, "on": found},
        {"off": without_picture, "on": found_picture},
        factors,
        compared,
        {**picture, "adapted": list(adapted)},
    )


def _factors(base: Base, adapter: Adapter) -> Mapping[str, Tensor]:
    """Return the adapter's factors in the shapes of the base's layers."""
    layers: dict[str, nn.Module] = {}
    for component, model in {"unet": base.unet, **base.text_encoders}.items():
        layers |= adaptable_layers(model, component)
    modules = {
        name: LoraWeights(*fitted(factors, layers[name]), factors.alpha)
        for name, factors in adapter.modules.items()
    }
    return onnx_adapter(Adapter(adapter.family, modules)).factors


@contextmanager
def _portable_twins(folder: Path, target: str) -> Iterator[dict[str, Path]]:
    """Give component -> a graph that the CPU runs: of a fused UNet the same with its nodes spelled out.

    The CPU provider has no kernels for most fused nodes. The twin reads the weights of the very file.
    """
    if target != "cuda":
        yield {}
        return
    import onnx_ir as ir

    path = folder / "unet" / "twin.onnx"
    model = ir.load(folder / "unet" / "model.onnx")
    expand(model)
    ir.save(model, path)
    try:
        yield {"unet": path}
    finally:
        path.unlink(missing_ok=True)


def _check_words(dtype: str, target: str, layers: Sequence[str], swappable: bool) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be {', '.join(DTYPES)}, got {dtype!r}")
    if target not in TARGETS:
        raise UsageError(f"target must be {' or '.join(TARGETS)}, got {target!r}")
    if unknown := [name for name in layers if name not in lora.TARGETS]:
        raise UsageError(f"targets must be among {', '.join(lora.TARGETS)}, got {unknown[0]!r}")
    if layers and not swappable:
        raise UsageError(
            "targets name the layers that can be swapped: pass --swappable too, or leave them out"
        )
    if dtype == "int8" and target == "cuda":
        raise UsageError("int8 weights are for the CPU: pass --target portable, or --dtype float16")


def _swapped_layers(base: Base, adapters: Mapping[Adapter, float], wished: Sequence[str]) -> tuple[str, ...]:
    """Return the targets whose layers are inputs: the wished, or the usual and what the adapters change."""
    every = {name: set(lora.target_layers(base.unet, "unet", [name])) for name in _targets_of(base)}
    chosen = list(wished) or [name for name in SWAPPABLE_LAYERS if name in every]
    for name, layers in every.items():
        changed = any(layers & set(adapter.modules) for adapter in adapters)
        if changed and name not in chosen:
            if wished:
                raise UsageError(
                    f"an adapter changes {name} layers: add {name} to --targets, or leave it out"
                )
            chosen.append(name)
    return tuple(chosen)


def _targets_of(base: Base) -> list[str]:
    """Return the targets of which the UNet has any layer."""
    found = []
    for name in lora.TARGETS:
        try:
            lora.target_layers(base.unet, "unet", [name])
        except ConfigError:
            continue
        found.append(name)
    return found


def _load(
    base: Base, adapters: Mapping[str | os.PathLike[str] | Adapter, float]
) -> tuple[dict[Adapter, float], dict[str, Adapter]]:
    """Return the adapters read and checked with their weights, but for 0; and the files' by their stems."""
    loaded: dict[Adapter, float] = {}
    named: dict[str, Adapter] = {}
    for given, weight in adapters.items():
        adapter = given if isinstance(given, Adapter) else lora.load_adapter(given)
        lora.check_fits_pipeline(adapter, base.pipeline)
        if weight != 0:
            loaded[adapter] = weight
        if not isinstance(given, Adapter):
            name = Path(given).stem
            if name in named:
                raise UsageError(
                    f"two adapters are called {name}: the export tells them apart by name, rename one"
                )
            named[name] = adapter
    return loaded, named


def _trigger(adapter: Adapter) -> str | None:
    words = adapter.metadata.get("modelspec.trigger_phrase")
    return f"a photo of {words}" if words else None


def _described(
    job: _Job,
    adapters: Mapping[str | os.PathLike[str] | Adapter, float],
    report: Mapping[str, Any],
) -> dict[str, Any]:
    named = [
        {"name": "in memory" if isinstance(adapter, Adapter) else Path(adapter).name, "weight": weight}
        for adapter, weight in adapters.items()
    ]
    return {
        "base": {"name": job.base.name, "family": job.base.family},
        "adapters": named,
        "swappable": list(job.layers),
        "dtype": job.dtype,
        "target": job.target,
        **({"cuda": "unverified"} if job.target == "cuda" else {}),
        "opset": OPSET,
        "versions": {name: version(name) for name in _PACKAGES} | {"onnxruntime": _onnxruntime_version()},
        **report,
        "bytes": sum(entry["bytes"] for entry in report["components"].values()),
    }


def _onnxruntime_version() -> str:
    import onnxruntime  # the distribution is called onnxruntime or onnxruntime-gpu, the module is one

    return str(onnxruntime.__version__)


def _expected_bytes(base: Base, dtype: str) -> int:
    """Return the bytes of the weights, and a tenth more for the graphs."""
    parts = {"unet": base.unet, "vae": base.vae, **base.text_encoders}
    widths = {name: 4 if name == "vae" else DTYPES[dtype].itemsize for name in parts}
    weights = [p.numel() * widths[name] for name, part in parts.items() for p in part.parameters()]
    return int(sum(weights) * 1.1) + 2**24


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
