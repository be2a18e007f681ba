"""Pictures from any diffusers pipeline object, torch's or the ONNX one; one seed and one PNG each."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from dbadapter.base import check_prompt
from dbadapter.errors import BaseError, OutputError, UsageError
from dbadapter.grid import grid
from dbadapter.presets import PRESETS

__all__ = [
    "Picture",
    "check_pictures_folder",
    "default_guidance",
    "generate_pictures",
    "grid",
    "is_ours",
    "lora_tags",
    "parameters_text",
    "save_pictures",
    "write_png",
]

DECODED_TOGETHER = 512**2  # pixels of the largest pictures that the VAE takes several of

GENERATOR = "dbadapter"  # written into every PNG, so that we only ever remove pictures of our own
GRID_NAME = "grid.png"
MOST_STEPS = 1000  # of every family's schedule; refused before a base, whose own may be fewer, is there
MOST_IMAGES = 1000  # of one prompt: all pictures stay in memory until the last is drawn
_NUMBERED = re.compile(r"\d{4,}\.png")

# A1111's names of diffusers' samplers, so that its "PNG info" tab and its kin recognise them.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "DEISMultistepScheduler": "DEIS",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


@dataclass(frozen=True)
class Picture:
    """One generated picture and what made it; `parameters` is the text that its PNG carries."""

    image: Image.Image
    prompt: str
    seed: int
    parameters: str


def generate_pictures(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    negative_prompt: str | None = None,
    num_images_per_prompt: int = 1,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    adapters_text: str = "",
    model_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Picture]:
    """Return `num_images_per_prompt` pictures of each prompt, in the order of the prompts.

    Picture i starts from noise drawn on the CPU with `seed + i`, whatever the batch and the device.

    Args:
        pipeline: called like diffusers' StableDiffusionPipeline; left as it was.
        guidance_scale: of classifier-free guidance; None is the preset of the pipeline's family, which
            ours carry, and 7.5 for any other pipeline.
        seeds: one for each picture instead of seed + i.
        height, width: pixels; None means the base's own resolution.
        batch_size: pictures denoised together; it changes speed and memory, no picture.
        adapters_text: appended to the prompt in the parameters, as `lora_tags` writes it; not sampled from.
        model_name: written into the parameters; None means the name of the folder it came from.
        progress: called with (denoising steps done, of how many) over all batches.
    Raises:
        UsageError: an impossible number; all of them are listed.
        DataError: a prompt is too long for the tokenizer.
        BaseError: the model gave values that are not finite.
    """
    if guidance_scale is None:
        guidance_scale = default_guidance(pipeline)
    _check_request(
        pipeline,
        prompts,
        num_images_per_prompt,
        num_inference_steps,
        guidance_scale,
        seed,
        height,
        width,
        batch_size,
    )
    for prompt in [*prompts, negative_prompt or ""]:
        check_prompt(pipeline.tokenizer, prompt)
    repeated = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
    jobs = list(zip(repeated, seeds or range(seed, seed + len(repeated)), strict=True))
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    total = len(batches) * num_inference_steps
    pictures: list[Picture] = []
    _decode_large_ones_singly(pipeline, height, width)
    with _no_progress_bar(pipeline):
        for number, batch in enumerate(batches):
            images = _denoise(
                pipeline,
                batch,
                negative_prompt,
                _step_reporter(progress, number * num_inference_steps, num_inference_steps, total),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
            )
            for image, (prompt, picture_seed) in zip(images, batch, strict=True):
                text = parameters_text(
                    prompt if not adapters_text else f"{prompt} {adapters_text}",
                    negative_prompt=negative_prompt,
                    steps=num_inference_steps,
                    scheduler=pipeline.scheduler,
                    guidance_scale=guidance_scale,
                    seed=picture_seed,
                    size=image.size,
                    model_name=model_name or _model_name(pipeline),
                )
                pictures.append(Picture(image, prompt, picture_seed, text))
    return pictures


def parameters_text(
    prompt: str,
    *,
    negative_prompt: str | None,
    steps: int,
    scheduler: Any,
    guidance_scale: float,
    seed: int,
    size: tuple[int, int],
    model_name: str,
) -> str:
    """Return what made a picture, in the layout that AUTOMATIC1111 writes and most other tools read.

    Prompt; "Negative prompt: ..." where there is one; one line of "Name: value" pairs.

    Args:
        size: (width, height) in pixels.
    """
    class_name = type(scheduler).__name__
    settings: dict[str, object] = {
        "Steps": steps,
        "Sampler": _SAMPLERS.get(class_name, class_name.removesuffix("Scheduler")),
    }
    if scheduler.config.get("use_karras_sigmas"):
        settings["Schedule type"] = "Karras"
    settings |= {
        "CFG scale": f"{guidance_scale:g}",
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model_name,
        "Generator": GENERATOR,
    }
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items()))
    return "\n".join(lines)


def lora_tags(adapters: Mapping[Any, float]) -> str:
    """Return "<lora:NAME:WEIGHT> ..." for adapter files, the prompt tags by which other UIs load them."""
    return " ".join(f"<lora:{Path(str(path)).stem}:{weight:g}>" for path, weight in adapters.items())


def check_pictures_folder(folder: str | Path, overwrite: bool = False) -> None:
    """Pass if pictures may be written into the folder; ask before hours of work, not after.

    Raises:
        OutputError: it is a file, it cannot be written into, or it holds pictures already and `overwrite`
            is not given.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder to write pictures into: pass another path")
    if not overwrite and folder.is_dir():
        present = sorted(path.name for path in folder.iterdir() if _is_output_name(path.name))
        if present:
            raise OutputError(
                f"{folder} holds pictures already ({present[0]}, {len(present)} in all); "
                "pass --overwrite or another --output-dir"
            )
    whole = folder.absolute()
    nearest = next(path for path in (whole, *whole.parents) if path.exists())
    try:
        # A real file, gone at once: access bits say nothing about read-only disks, nor to root.
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OutputError(
            f"pictures cannot be written into {folder}: {error.strerror}; pass another --output-dir"
        ) from None


def save_pictures(pictures: Sequence[Picture], folder: str | Path, overwrite: bool = False) -> list[Path]:
    """Write 0000.png, 0001.png, ... and grid.png with the prompts on it; return the paths, the grid's last.

    Each picture is written beside its target and renamed. With `overwrite`, pictures that an earlier, longer
    run of ours left behind are removed, so that the folder shows one run.

    Raises:
        OutputError: the folder holds pictures already, or cannot be written.
    """
    folder = Path(folder)
    check_pictures_folder(folder, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / f"{index:04d}.png" for index in range(len(pictures))]
        for picture, path in zip(pictures, written, strict=True):
            write_png(picture.image, path, picture.parameters)
        if pictures:
            written.append(folder / GRID_NAME)
            write_png(_pictures_grid(pictures), written[-1])
        for path in folder.iterdir():
            if _NUMBERED.fullmatch(path.name) and path not in written and is_ours(path):
                path.unlink()
    except OSError as error:
        raise OutputError(
            f"pictures cannot be written into {folder}: {error}; pass another --output-dir"
        ) from error
    return written


def _check_request(
    pipeline: Any,
    prompts: Sequence[str],
    num_images_per_prompt: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    height: int | None,
    width: int | None,
    batch_size: int,
) -> None:
    """Raise UsageError with every impossible number at once."""
    faults = [] if prompts else ["at least one prompt is needed"]
    least = {"num_images_per_prompt": num_images_per_prompt, "batch_size": batch_size}
    faults += [f"{name} must be at least 1, got {value}" for name, value in least.items() if value < 1]
    if num_images_per_prompt > MOST_IMAGES:
        faults.append(f"num_images_per_prompt must be at most {MOST_IMAGES}, got {num_images_per_prompt}")
    most_steps = int(pipeline.scheduler.config.num_train_timesteps)
    if not 1 <= num_inference_steps <= most_steps:
        faults.append(f"num_inference_steps must be from 1 to {most_steps}, got {num_inference_steps}")
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        faults.append(f"guidance_scale must be 0 or more, got {guidance_scale:g}")
    if not 0 <= seed < 2**63:
        faults.append(f"seed must be from 0 to 2**63 - 1, got {seed}")
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < 8 or value % 8):
            faults.append(f"{name} must be a multiple of 8 pixels, got {value}")
    if faults:
        raise UsageError("; ".join(faults))


def _decode_large_ones_singly(pipeline: Any, height: int | None, width: int | None) -> None:
    """Let the VAE decode pictures above SD1.5's size one by one: four of SDXL's take 16 GB in float32."""
    vae: Any = getattr(pipeline, "vae", None)
    unet: Any = getattr(pipeline, "unet", None)
    if not hasattr(vae, "enable_slicing") or unet is None:
        return
    usual = int(unet.config.sample_size) * 2 ** (len(vae.config.block_out_channels) - 1)
    if (height or usual) * (width or usual) > DECODED_TOGETHER:
        vae.enable_slicing()


def default_guidance(pipeline: Any) -> float:
    """Return the guidance scale of a pipeline's family, which ours carry; 7.5 for any other pipeline."""
    return PRESETS.get(getattr(pipeline, "family", ""), PRESETS["sd1"]).guidance_scale


def _denoise(
    pipeline: Any,
    batch: Sequence[tuple[str, int]],
    negative_prompt: str | None,
    on_step_end: Callable[..., dict[str, Any]] | None,
    **settings: Any,
) -> list[Image.Image]:
    """Return one picture for each (prompt, seed) of the batch."""
    values = pipeline(
        prompt=[prompt for prompt, _ in batch],
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(batch),
        generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
        callback_on_step_end=on_step_end,
        output_type="np",
        **settings,
    ).images
    if not np.isfinite(values).all():  # as a PNG it would be a silent black picture
        raise BaseError(
            "the model gave values that are not finite (NaN); use float32, another VAE, or a smaller weight "
            "of the adapter if there is one"
        )
    return [Image.fromarray(np.round(value * 255).astype(np.uint8)) for value in values]


def _step_reporter(
    progress: Callable[[int, int], None] | None, before: int, steps: int, total: int
) -> Callable[..., dict[str, Any]] | None:
    """Return diffusers' callback_on_step_end that reports the steps of all batches as one count."""
    if progress is None:
        return None

    def report(_pipeline: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        # Samplers such as PNDM and Heun take more steps than asked for.
        progress(before + min(step + 1, steps), total)
        return {}

    return report


@contextmanager
def _no_progress_bar(pipeline: Any) -> Iterator[None]:
    """Silence the pipeline's own bar, which starts anew with every batch, and bring it back."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def _model_name(pipeline: Any) -> str:
    """Return the name of the folder that the pipeline came from; "model" and "onnx" alone say nothing."""
    path = Path(str(getattr(pipeline, "name_or_path", None) or "unknown"))
    return path.parent.name if path.name in ("model", "onnx") and path.parent.name else path.name


def _quoted(value: str) -> str:
    """Return the value as A1111 writes it: in JSON quotes where it would break the line's grammar."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n]', value) else value


def _is_output_name(name: str) -> bool:
    return name == GRID_NAME or _NUMBERED.fullmatch(name) is not None


def is_ours(path: Path) -> bool:
    """Tell whether a file is a PNG that this module wrote."""
    try:
        with Image.open(path) as image:
            return f"Generator: {GENERATOR}" in str(image.info.get("parameters", ""))
    except OSError:
        return False


def write_png(image: Image.Image, path: Path, parameters: str | None = None) -> None:
    """Write a PNG beside its target and rename it; `parameters` as `parameters_text` makes them."""
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_text("parameters", parameters)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _pictures_grid(pictures: Sequence[Picture]) -> Image.Image:
    """Return prompts as rows where they have several pictures each, else a sheet with captions."""
    rows = [list(group) for _, group in groupby(pictures, key=lambda picture: picture.prompt)]
    if any(len(row) > 1 for row in rows):
        return grid([[picture.image for picture in row] for row in rows], [row[0].prompt for row in rows])
    columns = math.ceil(math.sqrt(len(pictures)))
    lines = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return grid(
        [[picture.image for picture in line] for line in lines],
        captions=[[picture.prompt for picture in line] for line in lines],
    )
