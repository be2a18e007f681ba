"""The variants of `benchmarks.inference` on an NVIDIA GPU, in float16: CUDA, CUDA graphs, TensorRT.

ONNX Runtime captures a CUDA graph at the second run of a session with `enable_cuda_graph` and replays it from
then on, so shapes and addresses must stay (its page on the CUDA provider): all memory is bound once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.inference_variants import Job, Variant, load_unet, random_factors, torch_variant, unet_inputs

__all__ = ["GPU_VARIANTS", "load_gpu"]

_CUDA, _TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_NUMPY = {torch.float16: np.float16, torch.float32: np.float32}
# Name -> export, rank of the adapter that is on (0: none), provider, its options.
_SESSIONS: dict[str, tuple[str, int, str, dict[str, str]]] = {
    "cuda_merged": ("cuda-merged", 0, _CUDA, {}),
    "cuda_swappable_one": ("cuda-swappable", 8, _CUDA, {}),
    "cuda_merged_graph": ("cuda-merged", 0, _CUDA, {"enable_cuda_graph": "1"}),
    "cuda_swappable_one_graph": ("cuda-swappable", 8, _CUDA, {"enable_cuda_graph": "1"}),
    # TensorRT knows none of ONNX Runtime's own operators: it is given the portable graph.
    "tensorrt_merged": ("half-merged", 0, _TENSORRT, {"trt_fp16_enable": "1"}),
}
GPU_VARIANTS = ("cuda_eager", "cuda_compile", *_SESSIONS)


def load_gpu(name: str, job: Job, opened: dict[str, Any]) -> Variant:
    """Return one variant on the first GPU.

    Args:
        name: of `GPU_VARIANTS`.
        opened: models that are there already; filled.
    Raises:
        RuntimeError: ONNX Runtime has not the provider, or its libraries are missing.
    """
    inputs = {key: value.to("cuda") for key, value in unet_inputs(job.base, job.latents).items()}
    if name in ("cuda_eager", "cuda_compile"):
        if "cuda" not in opened:
            unet = load_unet(job.base, torch.float16).to("cuda")
            opened["cuda"] = unet.to(memory_format=torch.channels_last)  # what tensor cores read
        half = {key: value.half() for key, value in inputs.items() if key not in ("timestep", "time_ids")}
        return torch_variant(opened["cuda"], inputs | half, compiled=name == "cuda_compile")
    kind, rank, provider, options = _SESSIONS[name]
    session = _open(job.graph(kind), provider, options)
    return Variant(_bound(session, inputs, rank))


def _open(path: Path, provider: str, options: Mapping[str, str]) -> Any:
    """Return a session whose first provider is the one asked for, or raise RuntimeError."""
    import onnxruntime  # after torch, whose folders hold CUDA and cuDNN

    onnxruntime.preload_dlls()  # CUDA and cuDNN lie in torch's folders, where the loader does not look
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(f"ONNX Runtime has no {provider} here")
    # TensorRT hands what it cannot do to CUDA; shapes are computed on the CPU.
    providers: list[Any] = [(provider, dict(options)), *([_CUDA] if provider != _CUDA else [])]
    session = onnxruntime.InferenceSession(
        str(path), settings, providers=[*providers, "CPUExecutionProvider"]
    )
    if session.get_providers()[0] != provider:  # it falls back without an error
        raise RuntimeError(f"{provider} did not start: its libraries are missing")
    return session


def _bound(session: Any, inputs: Mapping[str, Tensor], rank: int) -> Any:
    """Return a call without arguments that runs a session on memory bound once; the output stays in place."""
    from dbadapter.export.runtime import Runner

    runner = Runner(session)
    values: dict[str, Tensor] = dict(inputs)
    if rank:
        values |= random_factors(runner.factor_shapes, rank)
    values = {name: value.to("cuda", runner.inputs[name]).contiguous() for name, value in values.items()}
    output = torch.empty(inputs["sample"].shape, dtype=runner.outputs["out_sample"], device="cuda")
    binding = session.io_binding()

    def place(bind: Any, name: str, value: Tensor) -> None:
        bind(name, "cuda", 0, _NUMPY[value.dtype], tuple(value.shape), value.data_ptr())

    for name, value in values.items():
        place(binding.bind_input, name, value)
    place(binding.bind_output, "out_sample", output)
    torch.cuda.synchronize()  # ONNX Runtime works on a stream of its own

    def call(kept: Any = values) -> Tensor:  # the bound memory lives as long as the call
        session.run_with_iobinding(binding)  # waits for the device
        return output

    return call
