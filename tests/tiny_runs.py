"""Small training runs that several tests share: photographs of noise, settings, pictures in two steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dbadapter import class_images, model_card, prior
from dbadapter.base import load_base
from dbadapter.config import TrainConfig
from dbadapter.photographs import find_photographs
from dbadapter.training import Run, prepare


def write_photographs(folder: Path, sizes: Sequence[tuple[int, int]] = ((48, 40),) * 3) -> Path:
    """Write a picture of noise for each (width, height) in pixels; return the folder."""
    folder.mkdir()
    for index, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def tiny_config(photographs: Path, output_dir: Path, base: Path | str, **settings: Any) -> TrainConfig:
    """Return a run of seconds in float32, so that results repeat on any machine; settings come on top."""
    usual: dict[str, Any] = {
        "instance_data_dir": photographs,
        "class_noun": "dog",
        "output_dir": output_dir,
        "base": str(base),
        "num_class_images": 2,
        "rank": 2,
        "max_train_steps": 4,
        "learning_rate": 1e-2,
        "text_encoder_learning_rate": 1e-2,
        "train_batch_size": 2,
        "mixed_precision": "no",
        "checkpointing_steps": 2,
        "validation_prompt": ("a photo of {identifier} {class}",),
    }
    return TrainConfig(**usual | settings)


def set_up(config: TrainConfig, tmp_path: Path) -> Run:
    """Return the run before its first step."""
    base = load_base(config.base, device="cpu")
    resolved = config.resolved(base.family, base.resolution, "sks")
    photographs = find_photographs(config.instance_data_dir)
    return prepare(resolved, base, photographs, class_folder=tmp_path / "class_images")


def draw_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sampler steps a picture, for tests about what is written, not how it looks."""
    for module, name in (
        (model_card, "generate_pictures"),
        (class_images, "generate_pictures"),
        (prior, "sample_class_latents"),
    ):
        monkeypatch.setattr(module, name, functools.partial(_quick, getattr(module, name)))


def _quick(original: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    return original(*arguments, **settings | {"num_inference_steps": 2})
