"""The inference parts of `benchmarks.gpu`: one guided call of the UNet by torch and ONNX Runtime; swaps."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cells import (
    SIZES,
    TINY,
    Cell,
    NotMeasuredError,
    Settings,
    base_of,
    rate,
    seconds_of,
    synchronise,
    timed_base,
)
from benchmarks.training_runs import RANK

__all__ = ["infer"]

MB = 2**20
ONNX_KINDS = {"cuda": ("cuda-merged", "cuda-swappable"), "cpu": ("merged", "swappable")}
CALLED = {
    "cuda": (
        "cuda_eager",
        "cuda_compile",
        "cuda_merged",
        "cuda_swappable_one",
        "cuda_merged_graph",
        "cuda_swappable_one_graph",
    ),
    "cpu": ("eager", "merged", "swappable_one"),
}


def infer(name: str, settings: Settings) -> Iterator[Cell]:
    """Yield one guided call of the UNet by each variant; the ONNX ones after their exports."""
    device, large = "cuda" if settings.on_gpu else "cpu", name == "sdxl"
    yield Cell("base", 5 if settings.tiny else 90 if large else 30, lambda: timed_base(name, settings))
    needed = {"eager": 25, "compile": 80, "merged": 40, "swappable": 40}
    exported: set[str] = set()
    variants = [each for each in CALLED[device] if not (settings.tiny and each.endswith("compile"))]
    if large:  # a minute or two in which nothing else is measured
        variants.sort(key=lambda each: each.endswith("compile"))
    for variant in variants:
        kind = kind_of(variant)
        if kind is not None and kind not in exported:
            exported.add(kind)
            seconds = 5.0 if settings.tiny else 240.0 if large else 75.0
            wanted = {each for each in variants if kind_of(each) == kind} - settings.done
            if kind == ONNX_KINDS[device][1] and "swap" not in settings.done:
                wanted.add("swap")
            yield Cell(
                f"export_{kind}",
                seconds,
                lambda kind=kind: export(name, kind, settings),
                again=bool(wanted) and not graph(name, kind, settings).is_file(),
            )
        word = next(part for part in needed if part in variant)
        seconds = 3.0 if settings.tiny else float(needed[word]) * (1.5 if large else 0.7)
        yield Cell(variant, seconds, lambda variant=variant: called(name, variant, settings))
    yield Cell("swap", 3 if settings.tiny else 45 if large else 20, lambda: swapped(name, settings))


def kind_of(variant: str) -> str | None:
    """Return the export that a variant runs, or None for torch's."""
    kinds = [kind for both in ONNX_KINDS.values() for kind in both]
    return next((kind for kind in kinds if variant.replace("_", "-").startswith(kind)), None)


def graph(name: str, kind: str, settings: Settings) -> Path:
    """Return the file of one export's UNet."""
    return settings.work / "exports" / name / kind / "unet/model.onnx"


def job_of(name: str, settings: Settings) -> Any:
    """Return what the variants are called with."""
    from benchmarks.inference_variants import Job as Called

    _, cells, _, _ = TINY if settings.tiny else SIZES[name]
    return Called(base_of(name, settings), settings.work / "exports" / name, cells)


def need_onnxruntime() -> None:
    """Raise NotMeasuredError where ONNX Runtime or what exports is not installed."""
    for module in ("onnxruntime", "onnx", "onnxscript"):
        if importlib.util.find_spec(module) is None:
            raise NotMeasuredError(f"{module} is not installed")
    if torch.cuda.is_available():
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise NotMeasuredError(
                "ONNX Runtime has no CUDAExecutionProvider here: onnxruntime-gpu is not installed"
            )


def export(name: str, kind: str, settings: Settings) -> dict[str, Any]:
    """Export the UNet alone, without the gate, unless it is there."""
    need_onnxruntime()
    from benchmarks.inference_peer import export as make

    job = job_of(name, settings)
    if job.graph(kind).is_file():
        return {"there_already": True}
    job.exports.mkdir(parents=True, exist_ok=True)
    return make({"kind": kind, "base": str(job.base), "folder": str(job.exports / kind), "whole": False})


def called(name: str, variant: str, settings: Settings) -> dict[str, Any]:
    """Load one variant, call it, and return seconds, memory and rate."""
    if not variant.endswith(("eager", "compile")):
        need_onnxruntime()
    from benchmarks.inference_gpu import load_gpu
    from benchmarks.inference_variants import load

    job = job_of(name, settings)
    kind = kind_of(variant)
    if kind is not None and not job.graph(kind).is_file():
        raise NotMeasuredError(f"the export {kind} is not there")
    _, _, _, calls = TINY if settings.tiny else SIZES[name]
    free = torch.cuda.mem_get_info()[0] if settings.on_gpu else 0
    began = time.perf_counter()
    made = load_gpu(variant, job, {}) if settings.on_gpu else load(variant, job, {})
    loaded = time.perf_counter()
    made.prepare()
    output = made.call()
    synchronise()
    first = time.perf_counter() - loaded
    about = difference(variant, output.float().cpu(), job)
    every = seconds_of(made.call, calls, warmup=1 if settings.tiny else 5)
    median = statistics.median(every)
    found: dict[str, Any] = {
        "call_seconds": round(median, 6),
        "call_seconds_all": [round(value, 6) for value in every],
        "load_seconds": round(loaded - began, 3),
        "first_call_seconds": round(first, 3),
        **about,
    }
    if settings.on_gpu:
        # ONNX Runtime's memory is not torch's: what the whole device has less. torch's own peak beside it.
        found["device_memory_mb"] = round((free - torch.cuda.mem_get_info()[0]) / MB, 1)
        found["torch_peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / MB, 1)
    return found | rate(operations(job.base, job.latents), median, "fp16" if settings.on_gpu else "fp32")


@functools.cache
def operations(base: Path, latents: int) -> int:
    """Return the operations of one call; counted once for all variants."""
    from benchmarks.flops import call_flops
    from benchmarks.inference_variants import unet_inputs

    return call_flops(base, unet_inputs(base, latents))


def difference(variant: str, output: torch.Tensor, job: Any) -> dict[str, Any]:
    """Keep what torch gives, and return how far another variant without an adapter is from it."""
    reference = job.exports / "eager.pt"
    if variant.endswith("eager"):
        job.exports.mkdir(parents=True, exist_ok=True)
        torch.save(output, reference)
        return {}
    if "swappable" in variant or not reference.is_file():
        return {}
    expected = torch.load(reference, weights_only=True)
    return {"relative_error": float(f"{(output - expected).norm() / expected.norm():.3g}")}


def swapped(name: str, settings: Settings) -> dict[str, Any]:
    """Return seconds of turning from one adapter of rank 8 to another, on the device when they are done."""
    need_onnxruntime()
    from benchmarks.inference_variants import random_factors
    from dbadapter.export.adapters import mixed
    from dbadapter.export.runtime import Runner, open_session

    kind = ONNX_KINDS["cuda" if settings.on_gpu else "cpu"][1]
    file = job_of(name, settings).graph(kind)
    if not file.is_file():
        raise NotMeasuredError(f"the export {kind} is not there")
    runner = Runner(open_session(file))
    both = [random_factors(runner.factor_shapes, RANK, seed) for seed in range(2)]
    turn = iter(range(10**6))
    every = seconds_of(
        lambda: runner.set_factors(mixed([(both[next(turn) % 2], 1.0)])), 4 if settings.tiny else 20
    )
    return {
        "what": "what OnnxPipeline.set_adapters does, on the UNet alone, factors in the host's memory",
        "device": runner.device.type,
        "seconds": round(statistics.median(every), 6),
        "seconds_all": [round(value, 6) for value in every],
    }
