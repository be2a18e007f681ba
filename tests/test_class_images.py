"""Class pictures: kept with what made them, completed after a cut, never mixed with anything else's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dbadapter import class_images as module
from dbadapter.base import Base
from dbadapter.class_images import MANIFEST, check_manifest, class_images
from dbadapter.config import TrainConfig
from dbadapter.errors import DataError, OutputError
from dbadapter.prior import generated_prior

PROMPT = "a photo of a dog"
SIZES = [(32, 32)] * 6


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def config(tmp_path: Path, tiny_base_folder: Path) -> TrainConfig:
    config = TrainConfig(tmp_path, "dog", tmp_path / "out", base=str(tiny_base_folder), num_class_images=6)
    return config.resolved("sd1", 32, "sks")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Few steps a picture, and the seeds of all pictures that were drawn."""
    seeds: list[int] = []
    original: Callable[..., Any] = module.generate_pictures

    def generate(*args: Any, **settings: Any) -> Any:
        pictures = original(*args, **settings | {"num_inference_steps": 2})
        seeds.extend(settings["seeds"])
        return pictures

    monkeypatch.setattr(module, "generate_pictures", generate)
    return seeds


def test_pictures_are_kept_with_what_made_them(
    tiny_base: Base, config: TrainConfig, tmp_path: Path, drawn: list[int]
) -> None:
    config = replace(config, seed=7)
    folder = tmp_path / "class_images"
    first = class_images(tiny_base, config, SIZES, folder, silent)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["made_by"]["prompt"], manifest["made_by"]["scheduler"][0]) == (PROMPT, "DDIMScheduler")
    assert manifest["pictures"]["0005.png"] == {"seed": 12, "size": [32, 32]}
    assert [photograph.path.name for photograph in first] == [f"000{index}.png" for index in range(6)]
    assert drawn == [7, 8, 9, 10, 11, 12]
    class_images(tiny_base, config, SIZES, folder, silent)
    assert len(drawn) == 6
    class_images(tiny_base, config, SIZES[:2], folder, silent)
    class_images(tiny_base, config, [*SIZES, (32, 32)], folder, silent)
    assert drawn[6:] == [13]


def test_a_run_that_was_cut_is_completed(
    tiny_base: Base, config: TrainConfig, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, drawing = tmp_path / "class_images", module.generate_pictures

    def cut(*args: Any, **settings: Any) -> Any:
        if drawn:
            raise KeyboardInterrupt
        return drawing(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, "generate_pictures", cut)
        with pytest.raises(KeyboardInterrupt):
            class_images(tiny_base, config, SIZES, folder, silent)
    made = {path: path.read_bytes() for path in folder.glob("*.png")}
    assert len(made) == 4
    class_images(tiny_base, config, SIZES, folder, silent)
    assert drawn == [0, 1, 2, 3, 4, 5]
    assert {path: path.read_bytes() for path in made} == made


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"class_prompt": "a cat"}, {"prediction_type": "v_prediction"}]
)
def test_pictures_of_anything_else_are_not_reused(
    tiny_base: Base, config: TrainConfig, tmp_path: Path, drawn: list[int], change: dict[str, Any]
) -> None:
    folder = tmp_path / "class_images"
    class_images(tiny_base, config, SIZES[:2], folder, silent)
    if "prediction_type" in change:
        scheduler = tiny_base.pipeline.scheduler
        tiny_base.pipeline.scheduler = type(scheduler).from_config(scheduler.config, **change)
    class_images(tiny_base, replace(config, **change), SIZES[:2], folder, silent)
    assert len(drawn) == 4
    assert len(list(folder.glob("*.png"))) == 2


def test_a_broken_manifest_counts_for_nothing(
    tiny_base: Base, config: TrainConfig, tmp_path: Path, drawn: list[int]
) -> None:
    folder = tmp_path / "class_images"
    class_images(tiny_base, config, SIZES[:2], folder, silent)
    (folder / MANIFEST).write_text("{")
    class_images(tiny_base, config, SIZES[:2], folder, silent)
    assert len(drawn) == 4


def test_own_class_pictures_are_taken_as_they_are(
    tiny_base: Base, config: TrainConfig, tmp_path: Path, drawn: list[int]
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    prior = generated_prior(
        tiny_base, replace(config, class_data_dir=tmp_path), SIZES[:1], tmp_path / "none", silent
    )
    assert (len(prior.cache), prior.teacher, drawn) == (1, None, [])
    assert not (tmp_path / "none").exists()


def test_pictures_of_another_run_are_refused_for_another_base_or_prompt(
    tiny_base: Base, config: TrainConfig, tmp_path: Path, drawn: list[int]
) -> None:
    """Pointing --class-data-dir at an earlier run's pictures saves an hour, if they are the right ones."""
    folder = tmp_path / "class_images"
    class_images(tiny_base, config, SIZES[:1], folder, silent)
    check_manifest(folder, tiny_base, config)
    check_manifest(tmp_path, tiny_base, config)
    with pytest.raises(DataError, match="made with prompt 'a photo of a dog', this run has 'a cat'"):
        check_manifest(folder, tiny_base, replace(config, class_prompt="a cat"))
    with torch.no_grad():
        tiny_base.unet.conv_out.weight.add_(1)
    with pytest.raises(DataError, match="made with base_fingerprint"):
        check_manifest(folder, tiny_base, config)


def test_a_picture_of_somebody_else_is_never_replaced(
    config: TrainConfig, tiny_base: Base, tmp_path: Path
) -> None:
    mine = tmp_path / "0000.png"
    Image.new("RGB", (8, 8)).save(mine)
    before = mine.read_bytes()
    with pytest.raises(OutputError, match="no class picture of dbadapter's"):
        class_images(tiny_base, config, [(32, 32)], tmp_path, lambda *_: None)
    assert mine.read_bytes() == before
