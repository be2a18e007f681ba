"""Masks: beside the picture or in its transparency, and what they weigh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import (
    BLACK,
    RED,
    WHITE,
    Size,
    crop,
    near,
    photograph,
    save,
)
from PIL import Image
from torch import Tensor

from dbadapter.errors import DataError
from dbadapter.photographs import find_photographs

# -- Masks -----------------------------------------------------------------------------------------------


def right_half(size: Size = (40, 40), mode: str = "L", colours: tuple[Any, Any] = (0, 255)) -> Image.Image:
    image = Image.new(mode, size, colours[0])
    image.paste(colours[1], (size[0] // 2, 0, *size))
    return image


def mask_of(folder: Path, mask: Image.Image, size: Size = (16, 16)) -> Tensor:
    save(folder / "a.jpg", (40, 40))
    mask.save(folder / "a.mask.png")
    done = crop(folder / "a.jpg", size, masked=True)
    assert done.mask is not None
    return done.mask


def test_mask_is_found_beside_its_picture(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "a.webp")
    save(tmp_path / "b.mask.png")  # a picture, since there is no b
    mask = save(tmp_path / "a.mask.PNG", color=255, mode="L")
    found = find_photographs(tmp_path)
    assert [(one.path.name, one.mask) for one in found] == [
        ("a.jpg", mask),
        ("a.webp", mask),
        ("b.mask.png", None),
    ]


def test_mask_file_comes_before_transparency(tmp_path: Path) -> None:
    save(tmp_path / "a.png", (40, 40), mode="RGBA", color=(*RED, 0))
    right_half().save(tmp_path / "a.mask.png")
    assert photograph(tmp_path / "a.png").mask == tmp_path / "a.mask.png"


def test_mask_is_loaded_only_when_asked_for(tmp_path: Path) -> None:
    mask_of(tmp_path, right_half())
    assert crop(tmp_path / "a.jpg").mask is None
    save(tmp_path / "b.jpg")
    assert crop(tmp_path / "b.jpg", masked=True).mask is None


@pytest.mark.parametrize(
    "mask",
    [
        right_half(),
        right_half(mode="1"),
        right_half(mode="P", colours=(0, 1)),
        right_half(mode="RGB", colours=(BLACK, WHITE)),
        right_half(mode="I;16", colours=(0, 65535)),
        right_half(mode="LA", colours=((0, 255), (255, 255))),
        right_half(mode="LA", colours=((0, 0), (255, 255))),  # white on nothing
        right_half(mode="RGBA", colours=((255, 255, 255, 0), (0, 0, 0, 255))),  # black on nothing
        right_half(mode="RGBA", colours=((0, 0, 0, 0), (255, 0, 0, 255))),  # red on nothing
        right_half((80, 80)),  # of the same shape, but not size
        right_half((402, 400)),  # rounded by an editor
    ],
    ids=["grey", "bits", "palette", "rgb", "16-bit", "opaque", "white", "black", "red", "larger", "rounded"],
)
def test_white_counts(tmp_path: Path, mask: Image.Image) -> None:
    if mask.mode == "P":
        mask.putpalette([0, 0, 0, 255, 255, 255])
    loaded = mask_of(tmp_path, mask)
    assert loaded.shape == (16, 16)
    assert loaded.dtype == torch.float32
    assert (loaded[:, :7] == 0).all()
    assert (loaded[:, -7:] == 1).all()


def test_grey_is_in_between(tmp_path: Path) -> None:
    assert mask_of(tmp_path, Image.new("L", (40, 40), 51)).unique().tolist() == [pytest.approx(0.2)]


def test_transparent_grey_on_black(tmp_path: Path) -> None:
    # Two brightnesses are visible, so they are the mask, and what cannot be seen is black.
    mask = right_half(mode="LA", colours=((255, 0), (255, 255)))
    mask.paste((102, 255), (20, 0, 40, 20))
    loaded = mask_of(tmp_path, mask)
    assert (loaded[:, :7] == 0).all()
    assert (loaded[9:, -7:] == 1).all()
    assert torch.allclose(loaded[:7, -7:], torch.tensor(0.4))


def test_alpha_as_mask(tmp_path: Path) -> None:
    right_half(mode="RGBA", colours=((0, 0, 0, 0), (*RED, 255))).save(tmp_path / "a.png")
    done = crop(tmp_path / "a.png", masked=True)
    assert done.mask is not None
    assert (done.mask[:, :7] == 0).all()
    assert (done.mask[:, -7:] == 1).all()
    assert near(done.pixels[:, :, :6], WHITE)
    assert near(done.pixels[:, :, -6:], RED)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (40, 41), 255), r"a\.mask\.png is 40 x 41 pixels, but a\.jpg is 40 x 40"),
        (Image.new("L", (20, 40), 255), r"a\.mask\.png is 20 x 40 pixels, but a\.jpg is 40 x 40"),
        (Image.new("L", (40, 40)), r"a\.mask\.png is black; paint the subject white"),
        (Image.new("RGBA", (40, 40), (0, 0, 0, 255)), r"a\.mask\.png is black"),
        (Image.new("RGBA", (40, 40), (255, 255, 255, 0)), r"a\.mask\.png is black"),
    ],
)
def test_bad_mask_is_named(tmp_path: Path, mask: Image.Image, message: str) -> None:
    save(tmp_path / "a.jpg", (40, 40))
    mask.save(tmp_path / "a.mask.png")
    with pytest.raises(DataError, match=message):
        find_photographs(tmp_path)


def test_unreadable_mask_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    (tmp_path / "a.mask.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"a\.mask\.png cannot be read as a picture"):
        find_photographs(tmp_path)


def test_mask_outside_the_crop_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", (100, 40))
    mask = Image.new("L", (100, 40))
    mask.paste(255, (0, 0, 20, 40))
    mask.save(tmp_path / "a.mask.png")
    assert crop(tmp_path / "a.jpg").mask is None
    with pytest.raises(DataError, match=r"a\.mask\.png is black in all of the 16 x 16 crop .* of a\.jpg"):
        crop(tmp_path / "a.jpg", masked=True)
    assert crop(tmp_path / "a.jpg", (50, 20), masked=True).mask is not None
    clear = save(tmp_path / "b.png", mode="RGBA", color=(0, 0, 0, 0))
    with pytest.raises(DataError, match=r"b\.png is transparent in all of the 16 x 16 crop"):
        crop(clear, masked=True)
