"""Pictures: seeds, parameters, files, grids."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from dbadapter import sampling
from dbadapter.base import Base
from dbadapter.errors import BaseError, DataError, OutputError, UsageError
from dbadapter.grid import SMALLEST_CELL, grid, wrap_words
from dbadapter.sampling import (
    Picture,
    check_pictures_folder,
    generate_pictures,
    lora_tags,
    parameters_text,
    save_pictures,
)

PROMPTS = ["a photo of a cat", "a photo of a dog on the beach"]


def pixels(picture: Picture) -> np.ndarray[Any, Any]:
    return np.asarray(picture.image).astype(int)


def plain(color: str, side: int = 32, prompt: str = "a cat", seed: int = 0) -> Picture:
    return Picture(
        Image.new("RGB", (side, side), color), prompt, seed, f"{prompt}\nSteps: 2, Generator: dbadapter"
    )


def test_picture_i_uses_seed_plus_i_whatever_the_batch(tiny_base: Base) -> None:
    def make(prompts: list[str], **settings: Any) -> list[Picture]:
        return generate_pictures(tiny_base.pipeline, prompts, num_inference_steps=3, **settings)

    together = make(PROMPTS, num_images_per_prompt=2, batch_size=4, seed=7)
    apart = make(PROMPTS, num_images_per_prompt=2, batch_size=3, seed=7)
    assert [picture.seed for picture in together] == [7, 8, 9, 10]
    assert [picture.prompt for picture in together] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    for one, other in zip(together, apart, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1  # sums are ordered differently in other batches
    (third,) = make([PROMPTS[1]], seed=9)
    assert np.abs(pixels(third) - pixels(together[2])).max() <= 1
    assert np.abs(pixels(together[0]) - pixels(together[1])).max() > 20


@pytest.mark.parametrize(("family", "expected"), [("toybox", "3"), ("sd1", "7.5"), (None, "7.5")])
def test_guidance_is_the_familys(tiny_base: Base, family: str | None, expected: str) -> None:
    pipeline = copy.copy(tiny_base.pipeline)
    if family is None:
        del pipeline.family
    else:
        pipeline.family = family
    (picture,) = generate_pictures(pipeline, PROMPTS[:1], num_inference_steps=1)
    assert f"CFG scale: {expected}," in picture.parameters


def test_size_progress_and_the_pipelines_own_bar(tiny_base: Base) -> None:
    steps: list[tuple[int, int]] = []
    tiny_base.pipeline.set_progress_bar_config(disable=False, desc="mine")
    (picture,) = generate_pictures(
        tiny_base.pipeline,
        PROMPTS[:1],
        num_inference_steps=2,
        width=48,
        height=32,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert picture.image.size == (48, 32)
    assert steps == [(1, 2), (2, 2)]
    assert tiny_base.pipeline._progress_bar_config == {"disable": False, "desc": "mine"}
    tiny_base.pipeline.set_progress_bar_config(disable=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"num_images_per_prompt": 10**9}, "num_images_per_prompt must be at most 1000, got 1000000000"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be from 1 to 1000, got 0"),
        ({"num_inference_steps": 1001}, "got 1001"),
        ({"guidance_scale": -1.0}, "guidance_scale must be 0 or more, got -1"),
        ({"guidance_scale": float("nan")}, "got nan"),
        ({"seed": -1}, "seed must be from 0"),
        ({"width": 33}, "width must be a multiple of 8 pixels, got 33"),
        ({"height": 0}, "height must be a multiple of 8 pixels, got 0"),
    ],
)
def test_impossible_numbers_are_usage_errors(tiny_base: Base, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        generate_pictures(tiny_base.pipeline, PROMPTS, **settings)


def test_all_faults_at_once_and_long_prompts(tiny_base: Base) -> None:
    with pytest.raises(UsageError, match="at least one prompt is needed; num_images_per_prompt"):
        generate_pictures(tiny_base.pipeline, [], num_images_per_prompt=0)
    long = "photo " * 80
    with pytest.raises(DataError):
        generate_pictures(tiny_base.pipeline, [long], num_inference_steps=1)
    with pytest.raises(DataError):
        generate_pictures(tiny_base.pipeline, PROMPTS, negative_prompt=long, num_inference_steps=1)


def test_values_that_are_not_finite_are_no_black_picture(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = tiny_base.vae.decode
    monkeypatch.setattr(
        tiny_base.vae, "decode", lambda *args, **kwargs: (decode(*args, **kwargs)[0] * np.nan,)
    )
    with pytest.raises(BaseError, match="not finite"):
        generate_pictures(tiny_base.pipeline, PROMPTS[:1], num_inference_steps=1)


def test_parameters_read_as_other_tools_expect(tiny_base: Base) -> None:
    text = parameters_text(
        "a photo of sks cat <lora:cat:0.8>",
        negative_prompt="blurry, dark",
        steps=25,
        scheduler=tiny_base.scheduler,
        guidance_scale=5.0,
        seed=3,
        size=(64, 48),
        model_name="mine, second: try",
    )
    assert text.splitlines() == [
        "a photo of sks cat <lora:cat:0.8>",
        "Negative prompt: blurry, dark",
        f"Steps: 25, Sampler: {text.split('Sampler: ')[1].split(',')[0]}, CFG scale: 5, Seed: 3, "
        'Size: 64x48, Model: "mine, second: try", Generator: dbadapter',
    ]
    assert "Scheduler" not in text


def test_lora_tags() -> None:
    assert (
        lora_tags({Path("out/subject.safetensors"): 1.0, "b.safetensors": 0.5})
        == "<lora:subject:1> <lora:b:0.5>"
    )
    assert lora_tags({}) == ""


def test_the_png_carries_its_parameters(tiny_base: Base, tmp_path: Path) -> None:
    pictures = generate_pictures(
        tiny_base.pipeline, ["a café 猫"], num_inference_steps=1, adapters_text="<lora:cat:1>", seed=5
    )
    written = save_pictures(pictures, tmp_path / "out")
    assert [path.name for path in written] == ["0000.png", "grid.png"]
    with Image.open(written[0]) as image:
        text = image.info["parameters"]
    assert text == pictures[0].parameters
    assert text.startswith("a café 猫 <lora:cat:1>\nSteps: 1, ")
    assert "Seed: 5" in text


def test_pictures_are_refused_where_others_lie(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_pictures([plain("red"), plain("blue", seed=1)], out)
    with pytest.raises(OutputError, match="3 in all"):
        save_pictures([plain("green")], out)
    foreign = out / "0005.png"
    Image.new("RGB", (4, 4)).save(foreign)
    (out / "notes.txt").write_text("mine")
    save_pictures([plain("green")], out, overwrite=True)
    # The second picture of the longer run is gone; what we did not make is not ours to remove.
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "0005.png", "grid.png", "notes.txt"]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_pictures_folder(file)
    check_pictures_folder(tmp_path / "not there yet")


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_pictures_folder(file / "below")

    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr(sampling.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match="Read-only file system; pass another"):
        check_pictures_folder(tmp_path / "not there yet")
    assert list(tmp_path.iterdir()) == [file]


def test_grids_enlarge_small_pictures_and_hold_their_words() -> None:
    small = Image.new("RGB", (64, 64), "red")
    one = grid([[small]])
    assert one.width >= SMALLEST_CELL
    assert one.getpixel((40, 40)) == (255, 0, 0)
    worded = grid(
        [[small, small], [small]], row_labels=["base", "adapter " * 30], column_labels=["a", "b " * 60]
    )
    assert worded.width > one.width
    assert worded.height > 2 * SMALLEST_CELL
    captioned = grid([[small]], captions=[["a photo of a red square on the beach"]])
    assert captioned.height > one.height
    assert (
        np.asarray(captioned)[one.height :].min() < 100
    )  # there is something dark to read under the picture
    assert grid([[Image.new("L", (300, 200))]]).width < 320  # large pictures stay as they are


@pytest.mark.parametrize(
    "labels",
    [{"row_labels": ["a"]}, {"column_labels": ["a"]}, {"captions": [["a"]]}],
    ids=["rows", "columns", "captions"],
)
def test_labels_must_match(labels: dict[str, Any]) -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="expected one"):
        grid([[image, image], [image]], **labels)
    with pytest.raises(ValueError, match="at least one picture"):
        grid([[]])


@given(st.text(alphabet="abc mWi", max_size=80), st.integers(20, 200))
def test_wrapped_words_fit_and_none_is_lost(text: str, width: int) -> None:
    font = ImageFont.load_default(12)
    lines = wrap_words(text, font, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= width for line in lines)


def test_large_pictures_are_decoded_one_by_one(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    together = generate_pictures(tiny_base.pipeline, ["a dog", "a cat"], num_inference_steps=2)
    assert not tiny_base.vae.use_slicing
    monkeypatch.setattr("dbadapter.sampling.DECODED_TOGETHER", 32 * 32 - 1)
    singly = generate_pictures(tiny_base.pipeline, ["a dog", "a cat"], num_inference_steps=2)
    assert tiny_base.vae.use_slicing
    for one, other in zip(together, singly, strict=True):
        difference = np.subtract(np.asarray(one.image, int), np.asarray(other.image, int))
        assert np.abs(difference).max() <= 1
