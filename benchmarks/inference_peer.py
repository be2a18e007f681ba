"""One measured part of `benchmarks.inference`, in a process of its own; it leaves a JSON record."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.inference_variants import (
    CPU_VARIANTS,
    Job,
    Variant,
    load,
    measure,
    random_factors,
)
from benchmarks.training_peer import resident_mb

# Name -> dtype, target, whether adapters are inputs.
EXPORTS = {
    "merged": ("float32", "portable", False),
    "swappable": ("float32", "portable", True),
    "cuda-merged": ("float16", "cuda", False),
    "cuda-swappable": ("float16", "cuda", True),
    "half-merged": ("float16", "portable", False),
}
SWAPPED = ("attention", "feed-forward")  # what `export --swappable` takes if not told
PROMPT = "a photo of a mug"
MB = 2**20


def export(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Export a base, or its UNet alone without the gate, and return its seconds, loading included."""
    from dbadapter.base import load_base
    from dbadapter.export import to_onnx
    from dbadapter.export.graphs import component_graphs
    from dbadapter.export.tracing import convert

    dtype, target, swappable = EXPORTS[settings["kind"]]
    folder = Path(settings["folder"])
    began = time.perf_counter()
    base = load_base(settings["base"], device="cpu")
    loaded = time.perf_counter() - began
    words: dict[str, Any] = {"dtype": dtype, "target": target}
    about: dict[str, Any] = {"parts": "all, with the gate"}
    if settings["whole"]:
        shutil.rmtree(folder, ignore_errors=True)  # it may hold a UNet alone, which is no export to replace
        report = to_onnx.export_onnx(base, {}, folder, swappable=swappable, **words)
        about["components"] = {
            name: {key: entry[key] for key in ("relative_error", "seconds")}
            for name, entry in report["components"].items()
        }
    else:
        layers = SWAPPED if swappable else ()
        half_made = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(half_made, ignore_errors=True)
        graph = component_graphs(base, dtype, targets=layers, fused=target == "cuda")["unet"]
        with to_onnx._quiet():
            convert(graph, base, dtype, half_made / "unet/model.onnx")
        shutil.rmtree(folder, ignore_errors=True)
        half_made.rename(folder)
        about["parts"] = "the UNet alone, without the gate"
    return {"seconds": time.perf_counter() - began, "seconds_of_loading": loaded, **about}


def step(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Time one UNet call of every variant by turns, and compare what they return."""
    opened: dict[str, Any] = {}
    variants: dict[str, Variant] = {}
    first: dict[str, float] = {}
    outputs: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in settings["variants"]:
        try:
            variant = _load(name, settings, opened)
            variant.prepare()
            began = time.perf_counter()
            output = variant.call()
            first[name] = time.perf_counter() - began
        except Exception as error:  # a GPU's variants need libraries that are not in every installation
            if name in CPU_VARIANTS:
                raise
            left_out[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        variants[name], outputs[name] = variant, output.float().cpu().clone()
    reference = next(iter(outputs.values()))
    difference = {
        name: float((value - reference).abs().max() / reference.abs().max())
        for name, value in list(outputs.items())[1:]
    }
    calls = measure(variants, settings["rounds"], settings["calls"], settings["lead_in"])
    return {"calls": calls, "first": first, "difference": difference, "left_out": left_out}


def alone(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Load one variant and call it three times; return seconds of the loading and of the first call."""
    import diffusers
    import onnxruntime

    # All that any variant needs, so that every one starts from the same memory.
    assert diffusers.UNet2DConditionModel
    assert onnxruntime.InferenceSession
    before = resident_mb()[0]
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    began = time.perf_counter()
    variant = _load(settings["variant"], settings, {})
    loaded = time.perf_counter()
    variant.prepare()
    variant.call()
    called = time.perf_counter()
    for _ in range(2):
        variant.call()
    found = {
        "load_seconds": loaded - began,
        "first_call_seconds": called - loaded,
        "peak_memory_mb": resident_mb()[1] - before,
    }
    if torch.cuda.is_available():  # at the end: torch's and ONNX Runtime's allocators give nothing back
        found["gpu_memory_mb"] = (free - torch.cuda.mem_get_info()[0]) / MB
    return found


def swap(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Time swaps between two loaded adapters of rank 8, each followed by a call that is not counted."""
    from dbadapter.export.adapters import mixed
    from dbadapter.export.runtime import Runner, open_session

    job = _job(settings)
    folder = job.exports / "swappable"
    if (folder / "model_index.json").is_file():
        turn_on, call = _pipeline_swaps(folder, settings["family"])
        what = "OnnxPipeline.set_adapters"
    else:
        runner = Runner(open_session(job.graph("swappable"), ["CPUExecutionProvider"]))
        both = [random_factors(runner.factor_shapes, 8, seed) for seed in range(2)]
        turn_on = lambda number: runner.set_factors(mixed([(both[number], 1.0)]))  # noqa: E731
        call = load("swappable", job, {"swappable": runner}).call
        what = "what OnnxPipeline.set_adapters does, on the UNet alone"
    for number in range(2):
        turn_on(number)
        call()
    seconds = []
    for number in range(settings["swaps"]):
        began = time.perf_counter()
        turn_on(number % 2)
        seconds.append(time.perf_counter() - began)
        call()
    return {"what": what, "seconds": statistics.median(seconds), "seconds_all": seconds}


def picture(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Time whole pictures by turns: text encoder, every step and VAE."""
    from dbadapter.base import load_base
    from dbadapter.export import OnnxPipeline, load_onnx_pipeline
    from dbadapter.sampling import generate_pictures

    exports = Path(settings["exports"])
    providers = ["CPUExecutionProvider"]
    pipelines: dict[str, Any] = {"eager": load_base(settings["base"], device="cpu").pipeline}
    if "compile" in settings["variants"]:
        pipelines["compile"] = load_base(settings["base"], device="cpu").pipeline
        pipelines["compile"].unet = torch.compile(pipelines["compile"].unet)
    pipelines["merged"] = load_onnx_pipeline(exports / "merged", providers)
    swappable = OnnxPipeline(exports / "swappable", providers)
    _load_adapters(swappable, settings["family"], 1)
    swappable.set_adapters({"0": 1.0})
    pipelines["swappable_one"] = swappable.pipeline

    def drawn(pipeline: Any) -> Any:
        return lambda: generate_pictures(pipeline, [PROMPT], num_inference_steps=settings["steps"])

    variants = {name: Variant(drawn(pipeline)) for name, pipeline in pipelines.items()}
    for variant in variants.values():
        variant.call()
    return {"calls": measure(variants, settings["rounds"], calls=1, lead_in=0)}


def _pipeline_swaps(folder: Path, family: str) -> tuple[Callable[[int], None], Callable[[], Any]]:
    """Return a swap to adapter 0 or 1 on a pipeline, and a short picture in between."""
    from dbadapter.export import OnnxPipeline

    pipe = OnnxPipeline(folder, ["CPUExecutionProvider"])
    _load_adapters(pipe, family, 2)
    call = lambda: pipe(PROMPT, num_inference_steps=1, output_type="latent")  # noqa: E731
    return lambda number: pipe.set_adapters({str(number): 1.0}), call


def _load_adapters(pipe: Any, family: str, count: int) -> None:
    """Load random adapters of rank 8 as files into an OnnxPipeline, called "0", "1" and so on."""
    import tempfile

    from dbadapter.adapter import Adapter, LoraWeights
    from dbadapter.export.adapters import write_onnx_adapter
    from dbadapter.export.pipeline import runners_of

    shapes: dict[str, Any] = {}
    for runner in runners_of(pipe.pipeline).values():
        shapes |= runner.factor_shapes
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in shapes))
    with tempfile.TemporaryDirectory() as place:
        for number in range(count):
            values = random_factors(shapes, 8, number)
            modules = {
                name: LoraWeights(values[f"{name}.lora_A"], values[f"{name}.lora_B"], 8.0) for name in layers
            }
            write_onnx_adapter(Adapter(family, modules), Path(place) / str(number))
            pipe.load_adapter(str(number), Path(place) / str(number))


def _job(settings: Mapping[str, Any]) -> Job:
    return Job(Path(settings["base"]), Path(settings["exports"]), settings["latents"])


def _load(name: str, settings: Mapping[str, Any], opened: dict[str, Any]) -> Variant:
    if name in CPU_VARIANTS:
        return load(name, _job(settings), opened)
    from benchmarks.inference_gpu import load_gpu

    return load_gpu(name, _job(settings), opened)


TASKS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "export": export,
    "step": step,
    "alone": alone,
    "swap": swap,
    "picture": picture,
}


def main() -> None:
    """Do one task and leave its record in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--settings", required=True, help="JSON; see each task")
    parser.add_argument("--record", type=Path, required=True, help="the JSON file")
    given = parser.parse_args()
    found = TASKS[given.task](json.loads(given.settings))
    # Of `alone` the peak above the imports; of the other tasks the whole process's.
    found = {"peak_memory_mb": resident_mb()[1], "threads": torch.get_num_threads(), **found}
    given.record.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
