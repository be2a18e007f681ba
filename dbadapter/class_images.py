"""Class pictures for prior `generated`: drawn by the base, kept with a manifest of what made them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dbadapter.base import Base
from dbadapter.config import TrainConfig
from dbadapter.errors import DataError, OutputError
from dbadapter.photographs import Photograph
from dbadapter.run_folder import write_text
from dbadapter.sampling import generate_pictures, is_ours, write_png

__all__ = ["MANIFEST", "check_manifest", "class_images"]

MANIFEST = "manifest.json"
PICTURE_STEPS = 25  # 20 to 25 steps of a fast sampler suffice (Lu et al. 2022, arXiv 2211.01095)
GUIDANCE_SCALE = 5.0
BATCH_SIZE = 4

Progress = Callable[[str, int, int], None]


def class_images(
    base: Base, config: TrainConfig, sizes: Sequence[tuple[int, int]], folder: Path, progress: Progress
) -> list[Photograph]:
    """Return pictures of the class, drawn by the base where the folder does not hold them yet.

    Picture i starts from seed + i. A picture is used again only if the manifest says that the same model,
    prompt, scheduler and seed made it; a run that was cut goes on with the missing ones; pictures of
    anything else are drawn anew, never mixed in.

    Args:
        sizes: (width, height) of each picture in pixels.
        folder: made if need be; only pictures of our own are ever replaced.
    Raises:
        OutputError: a picture of somebody else's has the name of one to be drawn.
    """
    maker = _maker(base, config)
    made = _listed(folder, maker)
    wanted: dict[str, dict[str, Any]] = {
        f"{index:04d}.png": {"seed": config.seed + index, "size": list(size)}
        for index, size in enumerate(sizes)
    }
    made = {name: entry for name, entry in made.items() if wanted.get(name, entry) == entry}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, maker, made)
    missing = [name for name in wanted if name not in made]
    for name in missing:  # one of ours may be left of a run that was cut before it was listed
        if (folder / name).exists() and not is_ours(folder / name):
            raise OutputError(f"{folder / name} is no class picture of dbadapter's; move it elsewhere")
    batches = _batches(missing, wanted)

    def report(batch: int, done: int, _total: int) -> None:
        progress("class pictures", batch * PICTURE_STEPS + done, len(batches) * PICTURE_STEPS)

    for number, names in enumerate(batches):
        width, height = wanted[names[0]]["size"]
        pictures = generate_pictures(
            base.pipeline,
            [str(config.class_prompt)] * len(names),
            num_inference_steps=PICTURE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            seeds=[wanted[name]["seed"] for name in names],
            height=height,
            width=width,
            batch_size=BATCH_SIZE,
            model_name=base.name,
            progress=functools.partial(report, number),
        )
        for name, picture in zip(names, pictures, strict=True):
            write_png(picture.image, folder / name, picture.parameters)
            made[name] = wanted[name]
        _write(folder, maker, made)
    return [Photograph(folder / name, (entry["size"][0], entry["size"][1]), None, None)
            for name, entry in wanted.items()]  # fmt: skip


def check_manifest(folder: Path, base: Base, config: TrainConfig) -> None:
    """Pass if a folder of class pictures holds no manifest, or one of this base and prompt.

    Raises:
        DataError: its pictures were drawn by another model or for another prompt; the message says which.
    """
    if (manifest := _read(folder)) is None:
        return
    maker = _maker(base, config)
    for name in ("base_fingerprint", "prompt"):
        if (found := manifest["made_by"].get(name)) != maker[name]:
            raise DataError(
                f"class pictures in {folder} were made with {name} {found!r}, this run has {maker[name]!r}"
                f"; leave out --class-data-dir to have new ones drawn, or remove {folder / MANIFEST}"
            )


def _maker(base: Base, config: TrainConfig) -> dict[str, Any]:
    """Return what decides the class pictures, as JSON would give it back."""
    scheduler = {key: value for key, value in base.scheduler.config.items() if not key.startswith("_")}
    return dict(
        json.loads(
            json.dumps(
                {
                    "base": config.base,
                    "base_fingerprint": base.fingerprint,
                    "prediction_type": base.prediction_type,
                    "prompt": config.class_prompt,
                    "scheduler": [type(base.scheduler).__name__, scheduler],
                    "num_inference_steps": PICTURE_STEPS,
                    "guidance_scale": GUIDANCE_SCALE,
                },
                default=str,
            )
        )
    )


def _batches(names: Sequence[str], wanted: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    of_size: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        of_size.setdefault(tuple(wanted[name]["size"]), []).append(name)
    return [
        group[start : start + BATCH_SIZE]
        for group in of_size.values()
        for start in range(0, len(group), BATCH_SIZE)
    ]


def _listed(folder: Path, maker: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pictures that are there and were made by the same; remove those of anything else."""
    if (manifest := _read(folder)) is None:
        return {}
    if manifest["made_by"] == maker:
        return {name: entry for name, entry in manifest["pictures"].items() if (folder / name).is_file()}
    for name in manifest["pictures"]:
        (folder / Path(name).name).unlink(missing_ok=True)
    return {}


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = isinstance(manifest["made_by"], dict) and isinstance(manifest["pictures"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole else None


def _write(folder: Path, maker: Mapping[str, Any], pictures: Mapping[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps({"made_by": maker, "pictures": pictures}, indent=2) + "\n")
