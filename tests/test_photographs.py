"""Photograph files: what is found, what is refused by name, how they are cropped and turned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import (
    BLUE,
    GREEN,
    RED,
    WHITE,
    Size,
    colour,
    crop,
    gradient,
    near,
    photograph,
    quadrants,
    save,
)
from PIL import Image

from dbadapter.errors import DataError
from dbadapter.photographs import Photograph, find_photographs, load_crop

# -- What is found ---------------------------------------------------------------------------------------


def test_pictures_are_found_and_junk_is_passed_over(tmp_path: Path) -> None:
    wanted = [save(tmp_path / name) for name in ("b.PNG", "a.jpg", "c.webp", "d.bmp")]
    for junk in (".DS_Store", "Thumbs.db", "b.json", "b.xmp", "._a.jpg", "desktop.ini", "movie.mp4"):
        (tmp_path / junk).write_bytes(b"junk")
    save(tmp_path / ".hidden.png")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "notes.txt").write_bytes(b"\xff belongs to no picture")
    found = find_photographs(tmp_path)
    assert found == [Photograph(path, (40, 30), None, None) for path in sorted(wanted)]


def test_missing_empty_and_file_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_photographs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no photographs in"):
        find_photographs(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        find_photographs(save(tmp_path / "a.png"))


@pytest.mark.parametrize("content", [b"this is no JPEG", b""])
def test_unreadable_picture_is_named(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.jpg cannot be read as a picture; replace or remove it"):
        find_photographs(tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_truncated_picture_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=rf"cut\{suffix} cannot be read") as caught:
        find_photographs(tmp_path)
    assert "\n" not in str(caught.value)


def test_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read as a picture \(No such file"):
        find_photographs(tmp_path)


def test_a_picture_that_changes_is_refused(tmp_path: Path) -> None:
    found = photograph(save(tmp_path / "a.png"))
    save(tmp_path / "a.png", (50, 30))
    with pytest.raises(DataError, match=r"a\.png was 40 x 30 pixels when it was found, and is 50 x 30 now"):
        load_crop(found, (16, 16))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        load_crop(found, (16, 16))


# -- Captions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"a photo of  sks dog\non a beach",
        b"\xef\xbb\xbfa photo of  sks dog\r\n\r\n  on a beach \r\n",
    ],
)
def test_caption(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_bytes(content)
    captions = {found.path.name: found.caption for found in find_photographs(tmp_path)}
    caption = "a photo of  sks dog on a beach"
    assert captions == {"a.jpg": caption, "a.png": caption, "b.png": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.TXT is empty; write what the photograph shows, or remove the file"),
        (b" \n\t\n", r"a\.TXT is empty"),
        (b"caf\xe9", r"a\.TXT is not UTF-8 text; save it as UTF-8"),
        ("dog".encode("utf-16"), r"a\.TXT is not UTF-8"),
        ("dog".encode("utf-16-le"), r"a\.TXT is not UTF-8"),
    ],
)
def test_bad_caption_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    save(tmp_path / "a.jpg")
    (tmp_path / "a.TXT").write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_photographs(tmp_path)


# -- Crops -----------------------------------------------------------------------------------------------


def test_crop_keeps_the_centre(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), WHITE)
    image.paste(RED, (100, 0, 200, 100))
    image.save(tmp_path / "wide.png")
    done = crop(tmp_path / "wide.png", (32, 32))
    assert done.pixels.shape == (3, 32, 32)
    assert done.pixels.dtype == torch.float32
    assert done.pixels.is_contiguous()
    assert done.pixels.min() >= -1
    assert done.pixels.max() <= 1
    assert colour(done.pixels[:, :, 2:-2]) == RED
    assert (done.mask, done.original_size, done.top_left) == (None, (100, 300), (0, 32))


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (64, 64), (7, 3)])
@pytest.mark.parametrize("whole", [(61, 40), (33, 90), (48, 32)])
def test_crop_is_cut_from_the_scaled_picture(tmp_path: Path, size: Size, whole: Size) -> None:
    """Scaling only the box gives what scaling the whole and cutting gives; top_left is where it was cut."""
    gradient(whole).save(tmp_path / "a.png")
    done = crop(tmp_path / "a.png", size)
    scale = max(size[0] / whole[0], size[1] / whole[1])
    scaled = gradient(whole).resize(
        (round(whole[0] * scale), round(whole[1] * scale)), Image.Resampling.LANCZOS
    )
    top, left = done.top_left
    assert abs(2 * left + size[0] - scaled.width) <= 1
    assert abs(2 * top + size[1] - scaled.height) <= 1
    cut = np.array(scaled.crop((left, top, left + size[0], top + size[1])), dtype=np.float32)
    assert np.abs(done.pixels.permute(1, 2, 0).numpy() * 127.5 + 127.5 - cut).max() <= 1.01
    assert done.original_size == whole[::-1]


@pytest.mark.parametrize("whole", [(61, 40), (60, 40), (40, 61)])
def test_flip_is_the_crop_of_the_mirrored_picture(tmp_path: Path, whole: Size) -> None:
    (tmp_path / "mirror").mkdir()
    image, mask = gradient(whole), gradient(whole).getchannel("R")
    for folder, turn in ((tmp_path, False), (tmp_path / "mirror", True)):
        for name, picture in (("a.png", image), ("a.mask.png", mask)):
            turned = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if turn else picture
            turned.save(folder / name)
    plain = crop(tmp_path / "a.png", (24, 24), masked=True)
    flipped = crop(tmp_path / "a.png", (24, 24), masked=True, flip=True)
    assert plain.mask is not None
    assert flipped.mask is not None
    assert torch.equal(flipped.pixels, plain.pixels.flip(-1))
    assert torch.equal(flipped.mask, plain.mask.flip(-1))
    scaled_width = max(24, round(whole[0] * 24 / min(whole)))
    assert flipped.top_left == (plain.top_left[0], scaled_width - 24 - plain.top_left[1])
    if scaled_width % 2 == 0:  # else the mirrored picture's centre is rounded to the other side
        mirrored = crop(tmp_path / "mirror" / "a.png", (24, 24), masked=True)
        assert mirrored.top_left == flipped.top_left
        assert (mirrored.pixels - flipped.pixels).abs().max() < 0.02


@pytest.mark.parametrize("whole", [(1, 1), (2, 1), (1, 5000), (10, 12)])
def test_tiny_pictures_are_enlarged(tmp_path: Path, whole: Size) -> None:
    done = crop(save(tmp_path / "tiny.png", whole), (64, 48))
    assert done.pixels.shape == (3, 48, 64)
    assert colour(done.pixels) == RED
    assert done.original_size == whole[::-1]


def test_large_jpegs_are_decoded_small_but_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resized: list[Size] = []
    resize = Image.Image.resize

    def spy(image: Image.Image, *args: Any) -> Image.Image:
        resized.append(image.size)
        return resize(image, *args)

    monkeypatch.setattr(Image.Image, "resize", spy)
    for suffix in (".jpg", ".png"):
        gradient((1600, 1200)).save(tmp_path / f"a{suffix}", quality=95)
    jpeg, png = crop(tmp_path / "a.jpg", (64, 48)), crop(tmp_path / "a.png", (64, 48))
    assert resized == [(200, 150), (1600, 1200)]
    assert (jpeg.pixels - png.pixels).abs().max() < 0.05
    assert jpeg.original_size == png.original_size == (1200, 1600)


# -- EXIF ------------------------------------------------------------------------------------------------

# What a camera that was held so has stored: the inverse of the turn that shows it upright.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def save_turned(path: Path, image: Image.Image, orientation: int) -> Path:
    turn = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image if turn is None else image.transpose(turn)).save(path, exif=exif, quality=100)
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    # Sides that an eighth rounds to a square: the decoded size alone does not tell which side is which.
    upright = quadrants((804, 798))
    found = photograph(save_turned(tmp_path / f"phone{suffix}", upright, orientation))
    assert found.size == (804, 798)
    done = load_crop(found, (32, 24))
    assert done.original_size == (798, 804)
    assert near(done.pixels[:, :10, :14], RED)
    assert near(done.pixels[:, :10, -14:], GREEN)
    assert near(done.pixels[:, -10:, :14], BLUE)
    assert near(done.pixels[:, -10:, -14:], WHITE)


def test_mask_matches_the_upright_photograph(tmp_path: Path) -> None:
    save_turned(tmp_path / "a.jpg", quadrants((60, 40)), 6)
    mask = Image.new("L", (60, 40))
    mask.paste(255, (30, 0, 60, 20))  # over the green
    mask.save(tmp_path / "a.mask.png")
    done = crop(tmp_path / "a.jpg", (30, 20), masked=True)
    assert done.mask is not None
    assert (done.mask[:8, -13:] == 1).all()
    assert (done.mask[12:] == 0).all()
    assert near(done.pixels[:, :8, -13:], GREEN)
    Image.new("L", (40, 60), 255).save(tmp_path / "a.mask.png")  # as the file is stored
    with pytest.raises(DataError, match=r"a\.mask\.png is 40 x 60 pixels, but a\.jpg is 60 x 40, upright"):
        find_photographs(tmp_path)


@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*", b"x"])
def test_broken_exif_is_no_fault_of_the_picture(tmp_path: Path, exif: bytes) -> None:
    assert near(crop(save(tmp_path / "a.jpg", exif=exif)).pixels, RED)
