"""The whole job on the embedded base: train, show base beside adapter, export, generate from ONNX."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dbadapter import toybox
from dbadapter.base import load_base
from dbadapter.config import TrainConfig
from dbadapter.errors import OutputError
from dbadapter.export import export_onnx, load_onnx_pipeline
from dbadapter.grid import grid
from dbadapter.lora import apply
from dbadapter.sampling import generate_pictures
from dbadapter.tokens import pick_identifier
from dbadapter.training import train

if TYPE_CHECKING:
    from dbadapter.sampling import Picture

__all__ = ["next_commands", "run_demo"]

CELL = 160  # pixels of a picture on the sheet; toybox draws 64
CONTEXTS = 5
SUMMARY = "summary.json"
SHEET = "demo.png"
# In the summary, so that only a folder of ours is ever taken for an earlier demo.
MARK = {"generator": "dbadapter demo"}

Report = Callable[[str, int, int], None]


def run_demo(
    output_dir: str | Path = "dbadapter-demo",
    quick: bool = False,
    overwrite: bool = True,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Teach toybox its example subject, and return what was written and how long it took.

    Leaves `demo.png`, `adapter/subject.safetensors` and what belongs to it, `onnx/` and `summary.json`.
    The summary says `"finished": true` once all of it is there.

    Args:
        output_dir: new, empty, or that of an earlier demo.
        quick: a few steps only, to see that everything works; the subject will not look right.
        overwrite: False refuses an earlier demo's folder too.
        progress: called with (stage, parts done, of how many).
    Raises:
        OutputError: the folder holds something else.
    """
    folder = Path(output_dir)
    _prepare(folder, overwrite)
    subject = toybox.example_subject()
    report = progress or (lambda stage, done, total: None)
    seconds: dict[str, float] = {}
    base = load_base("toybox")
    word = pick_identifier(base.tokenizer, subject.class_noun)
    prompts = [f"a photo of {word} {subject.class_noun} {place}" for place in subject.contexts[:CONTEXTS]]
    config = TrainConfig(
        instance_data_dir=subject.folder,
        class_noun=subject.class_noun,
        output_dir=folder / "adapter",
        name="subject",
        identifier=word,
        max_train_steps=10 if quick else None,
        num_class_images=4 if quick else None,
        checkpointing_steps=0,
        overwrite=True,
    )

    def draw(pipeline: Any, stage: str) -> list[Picture]:
        with _timed(seconds, stage):
            return generate_pictures(
                pipeline,
                prompts,
                num_inference_steps=4 if quick else 25,
                progress=lambda done, total: report(stage, done, total),
            )

    before = draw(base.pipeline, "base")
    with _timed(seconds, "train"):
        result = train(config, progress=report)
    apply(base.pipeline, {result.adapter_path: 1.0})
    after = draw(base.pipeline, "adapter")
    apply(base.pipeline, {})
    with _timed(seconds, "export"):
        export_onnx(base, {result.adapter_path: 1.0}, folder / "onnx", overwrite=True, progress=report)
    exported = draw(load_onnx_pipeline(folder / "onnx"), "onnx")

    photographs = [_opened(path) for path in sorted(subject.folder.glob("*.png"))]
    _write_picture(_sheet(photographs, before, after, exported, subject.class_noun), folder / SHEET)
    summary = {
        **MARK,
        "finished": True,
        "quick": quick,
        "class_noun": subject.class_noun,
        "identifier": word,
        "prompts": prompts,
        "steps": result.steps,
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
        "peak_memory_mb": round(result.peak_memory_mb),
        "adapter_bytes": result.adapter_path.stat().st_size,
        "onnx_bytes": sum(path.stat().st_size for path in (folder / "onnx").rglob("*") if path.is_file()),
        "changed_by_adapter": _difference(before, after)[0],
        "torch_onnx_largest_difference": _difference(after, exported)[1],
    }
    _write_json(summary, folder / SUMMARY)
    return summary


def next_commands(output_dir: str | Path, summary: dict[str, Any]) -> str:
    """Return what to try next, as lines to paste into a shell."""
    folder = Path(output_dir)
    prompt = f"a photo of {summary['identifier']} {summary['class_noun']} at night"
    return "\n".join(
        [
            "",
            "More pictures of this subject:",
            f"  dbadapter generate --adapter {shlex.quote(str(folder / 'adapter/subject.safetensors'))} \\",
            f'      --prompt "{prompt}" --output-dir pictures',
            "Your own subject, from 3 to 6 photographs in one folder:",
            "  dbadapter train --base BASE --instance-data-dir photos --class-noun dog --output-dir my-dog",
            "  (BASE: Stable Diffusion 1.x, 2.x or SDXL; without --base it trains the 64-pixel",
            "  toybox, which runs anywhere and shows the way)",
        ]
    )


def _prepare(folder: Path, overwrite: bool) -> None:
    """Make the folder, or take the one of an earlier demo and mark it as unfinished."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, expected a folder: pass another --output-dir")
    earlier = _is_ours(folder / SUMMARY)
    if folder.is_dir() and any(folder.iterdir()) and not (earlier and overwrite):
        cure = "pass another --output-dir" if not earlier else "pass overwrite=True or another folder"
        raise OutputError(f"{folder} is not empty{'' if earlier else ' and holds no earlier demo'}: {cure}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SHEET).unlink(missing_ok=True)
    # From the start, so that the folder of an interrupted run is known as ours, and as unfinished.
    _write_json({**MARK, "finished": False}, folder / SUMMARY)


def _is_ours(summary: Path) -> bool:
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and MARK.items() <= content.items()


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _difference(one: Sequence[Picture], other: Sequence[Picture]) -> tuple[float, int]:
    """Return the mean and the largest difference of pixel values, of 255."""
    pairs = zip(one, other, strict=True)
    gaps = np.stack([np.abs(np.asarray(a.image, int) - np.asarray(b.image, int)) for a, b in pairs])
    return round(float(gaps.mean()), 2), int(gaps.max())


def _sheet(
    photographs: Sequence[Image.Image],
    before: Sequence[Picture],
    after: Sequence[Picture],
    exported: Sequence[Picture],
    noun: str,
) -> Image.Image:
    """Return one picture of it all: a column for each prompt, written above."""
    shown = grid([_enlarged(photographs)], row_labels=[f"the photographs: a {noun}"], scale=1)
    rows = [_enlarged([picture.image for picture in row]) for row in (before, after, exported)]
    drawn = grid(
        rows,
        row_labels=["the base, before", "with the adapter", "the same, through ONNX"],
        column_labels=[picture.prompt for picture in after],
        scale=1,
    )
    title = _title("dbadapter: one subject, taken to places where it was never photographed", drawn.width)
    width = max(shown.width, drawn.width)
    sheet = Image.new("RGB", (width, title.height + shown.height + drawn.height), "white")
    sheet.paste(title, (0, 0))
    # Their row labels differ in width; flush right, photographs stand above the pictures.
    left = drawn.width - shown.width if len(photographs) == len(after) else 0
    sheet.paste(shown, (max(left, 0), title.height))
    sheet.paste(drawn, (0, title.height + shown.height))
    return sheet


def _title(text: str, width: int) -> Image.Image:
    # The largest size at which the line fits beside a margin.
    sizes = (ImageFont.load_default(size) for size in range(28, 9, -1))
    font = next((font for font in sizes if font.getlength(text) <= width - 16), ImageFont.load_default(10))
    image = Image.new("RGB", (width, 44), "white")
    ImageDraw.Draw(image).text((8, 8), text, font=font, fill="black")
    return image


def _enlarged(images: Sequence[Image.Image]) -> list[Image.Image]:
    return [image.resize((CELL, CELL), Image.Resampling.LANCZOS) for image in images]


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _write_picture(image: Image.Image, path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    image.save(partial, format="PNG")
    partial.replace(path)


def _write_json(value: dict[str, Any], path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
