"""The training parts of `benchmarks.gpu`: an adapter and full fine-tuning by precision, and their script."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_cells import SIZES, TINY, Cell, Settings, base_of, free_memory, rate, timed_base
from benchmarks.training_runs import RANK, Job, pictures, run

__all__ = ["train"]

WARMUP = 5
# Cell -> what it trains with: options, precision. A batch is in the name; else it is one photograph.
TRAINED: dict[str, tuple[list[str], str]] = {
    "adapter_bf16": ([], "bf16"),
    "full_bf16": (["--full"], "bf16"),
    "adapter_bf16_batch4": ([], "bf16"),  # one photograph a step leaves a large GPU waiting for the host
    "full_bf16_batch4": (["--full"], "bf16"),
    "adapter_fp32": ([], "no"),
    "full_fp32": (["--full"], "no"),
    "adapter_bf16_compile": (["--compile"], "bf16"),
    "adapter_fp16": ([], "fp16"),
    "adapter_fp32_batch4": ([], "no"),
    "full_bf16_checkpointing": (["--full", "--gradient-checkpointing"], "bf16"),
}
# Both sides of `benchmarks.training`'s like for like, where the script is given.
ON_THE_SCRIPTS_JOB = {"peer_on_the_scripts_job_bf16": "peer", "ours_on_the_scripts_job_bf16": "ours"}
# In order of worth.
PLANS = {
    "sd15": (
        *("adapter_bf16", "full_bf16", *ON_THE_SCRIPTS_JOB, "adapter_bf16_batch4", "full_bf16_batch4"),
        *("adapter_fp32", "full_fp32", "adapter_bf16_compile", "adapter_fp16"),
    ),
    "sdxl": ("adapter_bf16", "full_bf16", "full_bf16_checkpointing", "adapter_bf16_compile"),
    "tiny": ("adapter_fp32", "full_fp32", *ON_THE_SCRIPTS_JOB, "adapter_fp32_batch4"),
}


def train(name: str, settings: Settings) -> Iterator[Cell]:
    """Yield training runs on one base, each in a process of its own, then diffusers' script."""
    pixels, _, steps, _ = TINY if settings.tiny else SIZES[name]
    large = name == "sdxl"
    yield Cell("base", 5 if settings.tiny else 90 if large else 30, lambda: timed_base(name, settings))
    for cell in PLANS["tiny" if settings.tiny else name]:
        if cell not in ON_THE_SCRIPTS_JOB:
            measure = functools.partial(trained, cell)
        elif settings.script is None or large:
            continue
        else:
            measure = functools.partial(on_their_job, ON_THE_SCRIPTS_JOB[cell])
        job = functools.partial(measure, name, pixels, steps, settings)
        yield Cell(cell, seconds(cell, large, settings), job)


def seconds(cell: str, large: bool, settings: Settings) -> float:
    """Return about how long one run takes, starting and loading included."""
    if settings.tiny:
        return 10.0 if cell in ON_THE_SCRIPTS_JOB else 5.0
    return (50.0 if large else 25.0) + 60.0 * cell.endswith("compile")


def job_on(name: str, pixels: int, settings: Settings, batch: int = 1) -> Job:
    """Return the job of one base's runs."""
    from dbadapter import toybox

    example, folder = toybox.example_subject(), base_of(name, settings)
    instances, classes = pictures(settings.work, example.folder, 1, pixels, batch)
    return Job(
        base=name,
        folder=folder,
        ours=str(folder),
        instances=instances,
        classes=classes,
        pictures=1,
        noun=example.class_noun,
        resolution=pixels,
        batch=batch,
        work=settings.work,
        threads=settings.threads,
        script=settings.script or Path(),
    )


def trained(cell: str, name: str, pixels: int, steps: int, settings: Settings) -> dict[str, Any]:
    """Run one training and return its figures with the operations of a step."""
    from benchmarks.cost import side_arguments
    from benchmarks.flops import step_flops
    from benchmarks.training_figures import figures

    options, precision = TRAINED[cell]
    with_text = name != "sdxl"
    words = ["--prior", "distill", "--prior-source", "instance", "--mixed-precision", precision, *options]
    words.append("--train-text-encoder" if with_text else "--no-train-text-encoder")
    _, _, batch = cell.partition("_batch")
    job = job_on(name, pixels, settings, int(batch or 1))
    warmup = 1 if settings.tiny else WARMUP
    free_memory()  # this process's own share of the device
    record = run(job, "ours", f"gpu-{name}-{cell}", side_arguments(job, words), warmup + steps)
    found = figures([record], warmup)
    count = step_flops(
        job.folder,
        pixels,
        job.batch,
        full="--full" in options,
        rank=RANK,
        text_encoder=with_text,
        distill=True,
    )
    return found | rate(count, found["step_seconds"], float32_name(settings, precision))


def on_their_job(side: str, name: str, pixels: int, steps: int, settings: Settings) -> dict[str, Any]:
    """Run one side of `benchmarks.training`'s like for like in bfloat16 and return its figures."""
    from benchmarks.training import check_script, like_for_like
    from benchmarks.training_figures import figures

    about = check_script(settings.script or Path())
    job = job_on(name, pixels, settings)
    theirs, ours = like_for_like(job, "bf16")
    arguments = job.peer_arguments(theirs) if side == "peer" else job.our_arguments(ours)
    warmup = 1 if settings.tiny else WARMUP
    record = run(job, side, f"gpu-{name}-{side}", arguments, warmup + steps)
    return figures([record], warmup) | {"script": about}


def float32_name(settings: Settings, precision: str) -> str:
    """Return a precision by its limit's name: what trains in float32 on a GPU multiplies in TF32."""
    if precision != "no":
        return precision
    return "tf32" if settings.on_gpu else "fp32"
