"""Photograph files: what is found, what is refused by name, every kind of file, how they are cropped."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features
from torch import Tensor

from dbadapter.errors import DataError
from dbadapter.photographs import Crop, Photograph, find_photographs, load_crop

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
Size = tuple[int, int]


def save(path: Path, size: Size = (40, 30), color: Any = RED, mode: str = "RGB", **options: Any) -> Path:
    Image.new(mode, size, color).save(path, **options)
    return path


def photograph(path: Path) -> Photograph:
    """The photograph of one file, as it is found."""
    return next(found for found in find_photographs(path.parent) if found.path == path)


def crop(path: Path, size: Size = (16, 16), **options: Any) -> Crop:
    return load_crop(photograph(path), size, **options)


def colour(pixels: Tensor) -> tuple[int, int, int]:
    """Mean colour in 0 ... 255."""
    red, green, blue = ((pixels.mean((1, 2)) + 1) * 127.5).round().int().tolist()
    return red, green, blue


def near(pixels: Tensor, expected: Size | tuple[int, int, int], tolerance: int = 3) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(colour(pixels), expected, strict=True))


def quadrants(size: Size = (60, 40)) -> Image.Image:
    """Red, green above; blue, white below: no orientation looks like another."""
    width, height = size
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(WHITE, (width // 2, height // 2, width, height))
    return image


def gradient(size: Size) -> Image.Image:
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    return Image.fromarray((np.stack([x, y, 1 - x], axis=-1) * 255).astype(np.uint8))


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


# -- Kinds of files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), mode=mode, color=0)
    assert crop(path).pixels.shape == (3, 16, 16)


def test_grey(tmp_path: Path) -> None:
    assert near(crop(save(tmp_path / "a.png", mode="L", color=100)).pixels, (100, 100, 100), 0)
    assert near(crop(save(tmp_path / "b.jpg", mode="L", color=100)).pixels, (100, 100, 100))
    half = save(tmp_path / "c.png", mode="LA", color=(0, 128))
    assert near(crop(half).pixels, (127, 127, 127), 1)


def test_transparency_is_white(tmp_path: Path) -> None:
    clear = save(tmp_path / "t.png", color=(0, 0, 0, 0), mode="RGBA")
    half = save(tmp_path / "h.png", color=(255, 0, 0, 128), mode="RGBA")
    palette = save(tmp_path / "p.png", color=0, mode="P", transparency=0)
    key = save(tmp_path / "k.png", color=RED, transparency=RED)
    webp = save(tmp_path / "w.webp", color=(0, 0, 0, 0), mode="RGBA")
    for path in (clear, palette, key, webp):
        assert torch.equal(crop(path).pixels, torch.ones(3, 16, 16)), path.name
    assert near(crop(half).pixels, (255, 127, 127), 1)
    assert {found.mask for found in find_photographs(tmp_path)} == {"alpha"}


def test_palette_with_an_alpha_of_each_colour(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (20, 0, 40, 40))
    image.save(tmp_path / "a.png", transparency=bytes([0, 255]))
    done = crop(tmp_path / "a.png", masked=True)
    assert near(done.pixels[:, :, :6], WHITE)
    assert near(done.pixels[:, :, -6:], BLUE)
    assert done.mask is not None
    assert (done.mask[:, :6] == 0).all()
    assert (done.mask[:, -6:] == 1).all()


def test_opaque_alpha_is_no_mask(tmp_path: Path) -> None:
    assert photograph(save(tmp_path / "a.png", mode="RGBA", color=(*RED, 255))).mask is None


def test_hidden_colours_do_not_bleed(tmp_path: Path) -> None:
    # Editors keep colours under full transparency; scaling unweighted would draw them into the edge.
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    pixels = crop(tmp_path / "a.png", (15, 15)).pixels
    assert (pixels[0] > 0.98).all()
    assert torch.allclose(pixels[1], pixels[2], atol=0.02)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", mode="CMYK", color=(0, 255, 255, 0), quality=95)
    assert near(crop(path).pixels, RED, 5)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey(tmp_path: Path, suffix: str) -> None:
    # convert() would clip every value above 255, and the photograph would be white.
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(path)
    assert crop(path).pixels.mean().item() == pytest.approx(0.0, abs=0.01)


def test_float_grey(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    assert crop(tmp_path / "a.tif").pixels.mean().item() == pytest.approx(0.0, abs=0.01)


def png(size: Size, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG of any header: Pillow writes no 16-bit RGB, and none that lies about its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, bit_depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_rgb_png(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">HHH", 65535, 32768, 256) * 8
    (tmp_path / "a.png").write_bytes(png((8, 8), 16, 2, row * 8))
    assert near(crop(tmp_path / "a.png").pixels, (255, 128, 1), 0)


def test_webp_and_jpeg_2000(tmp_path: Path) -> None:
    assert near(crop(save(tmp_path / "a.webp", quality=95)).pixels, RED, 5)
    if features.check("jpg_2000"):
        assert near(crop(save(tmp_path / "a.jp2")).pixels, RED)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # the same container as HEIC, but Pillow's own
    assert near(crop(save(tmp_path / "a.avif", quality=95)).pixels, RED, 5)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in (BLUE, GREEN)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert near(crop(tmp_path / f"a{suffix}").pixels, BLUE)


def test_jpeg_with_a_second_picture(tmp_path: Path) -> None:
    # Phones append gain maps and depth so (MPO), under the name .jpg.
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = quadrants((800, 400)).transpose(Image.Transpose.ROTATE_90)
    second = Image.new("RGB", (400, 800), BLACK)
    stored.save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second], exif=exif, quality=95
    )
    done = crop(tmp_path / "a.jpg", (32, 16))
    assert done.original_size == (400, 800)
    assert near(done.pixels[:, :6, :14], RED, 5)


def test_lab(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (40, 30), (200, 60, 40)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    lab.save(tmp_path / "a.tif")
    assert near(crop(tmp_path / "a.tif").pixels, (200, 60, 40))


# -- HEIC ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["IMG_0001.HEIC", "renamed.jpg"])
def test_heic(tmp_path: Path, name: str) -> None:
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = quadrants((60, 40)).transpose(Image.Transpose.ROTATE_90)
    heif.from_pillow(stored).save(tmp_path / name, quality=-1, exif=exif.tobytes())
    found = photograph(tmp_path / name)
    assert found.size == (60, 40)
    done = load_crop(found, (30, 20))
    assert near(done.pixels[:, :8, :12], RED, 5)
    assert near(done.pixels[:, :8, -12:], GREEN, 5)
    assert near(done.pixels[:, -8:, :12], BLUE, 5)


def test_jpeg_that_is_called_heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    save(tmp_path / "a.jpg").rename(tmp_path / "a.heic")
    assert near(crop(tmp_path / "a.heic").pixels, RED)


def test_heic_without_its_package_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    message = (
        r"IMG_0001\.HEIC is a HEIC picture.*: pip install 'dbadapter\[heic\]', or save it as JPEG or PNG"
    )
    with pytest.raises(DataError, match=message):
        find_photographs(tmp_path)


def test_broken_heic_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(
        DataError, match=r"IMG_0001\.HEIC cannot be read as a picture.*; replace or remove it"
    ):
        find_photographs(tmp_path)


# -- Colour profiles -------------------------------------------------------------------------------------


def icc_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A version 2 display profile (ICC.1:2001-04) of the tags."""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78), **tags}
    tags[b"wtpt"] = xyz(0.9642, 1.0, 0.8249)
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(
        ">I4sI4s4s4s12x4s", offset + len(body), bytes(4), 0x02100000, b"mntr", space, b"XYZ ", b"acsp"
    )
    header = (header + bytes(28) + struct.pack(">iii", *map(fixed, (0.9642, 1.0, 0.8249)))).ljust(128, b"\0")
    return header + table + body


def fixed(value: float) -> int:
    return round(value * 65536)


def xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">iii", fixed(x), fixed(y), fixed(z))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def display_p3(exponent: float = 2.2) -> bytes:
    """Display P3's primaries adapted to D50, with a power in place of sRGB's curve."""
    primaries = {
        b"rXYZ": xyz(0.51512, 0.24120, -0.00105),
        b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.15710, 0.06657, 0.78407),
    }
    return icc_profile(b"RGB ", {**primaries, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(exponent))})


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_embedded_profile_is_converted_to_srgb(tmp_path: Path, suffix: str) -> None:
    # Display P3 (234, 51, 35) is sRGB's pure red, by CSS Color 4's matrices.
    path = save(tmp_path / f"a{suffix}", color=(234, 51, 35), icc_profile=display_p3(), quality=98)
    assert near(crop(path).pixels, RED, 6)


def test_profile_and_transparency(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", color=(234, 51, 35, 128), mode="RGBA", icc_profile=display_p3())
    assert near(crop(path).pixels, (255, 127, 127), 6)


def test_profile_of_another_kind_of_colours(tmp_path: Path) -> None:
    # An RGB profile on a grey picture, as some scanners write it, is followed too: linear 55 is sRGB's 128.
    scan = save(tmp_path / "scan.png", mode="L", color=55, icc_profile=display_p3(1.0))
    assert near(crop(scan).pixels, (128, 128, 128), 3)
    # A grey profile with another curve on a grey picture is followed, on a coloured one it is ignored.
    linear = icc_profile(b"GRAY", {b"kTRC": gamma(1.0)})
    dark = save(tmp_path / "dark.png", mode="L", color=55, icc_profile=linear)
    assert near(crop(dark).pixels, (128, 128, 128), 3)
    coloured = save(tmp_path / "coloured.png", icc_profile=linear)
    assert near(crop(coloured).pixels, RED, 0)


def test_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert near(
        crop(save(tmp_path / "a.png", color=(10, 100, 200), icc_profile=profile)).pixels, (10, 100, 200), 1
    )


@pytest.mark.parametrize("damage", [lambda whole: b"junk", lambda whole: whole[:150], lambda whole: b""])
def test_broken_profile_is_ignored(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = save(tmp_path / "a.jpg", color=(234, 51, 35), icc_profile=damage(display_p3()), quality=98)
    assert near(crop(path).pixels, (234, 51, 35), 4)


# -- Huge pictures ---------------------------------------------------------------------------------------


def test_huge_jpeg_loads(tmp_path: Path) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    path = save(tmp_path / "huge.jpg", (20_000, 18_000), color=90, mode="L", quality=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = crop(path, (32, 24))
    assert near(done.pixels, (90, 90, 90))
    assert done.original_size == (18_000, 20_000)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".gif"])
def test_pillows_limit_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crop(path)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_threads_leave_pillows_limit_alone(tmp_path: Path) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    found = photograph(save(tmp_path / "a.png"))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: load_crop(found, (16, 16)), range(40)))
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("size", [(40_000, 25_001), (60_000, 60_000)])
def test_decompression_bomb_is_refused(tmp_path: Path, size: Size) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    (tmp_path / "bomb.png").write_bytes(png(size, 8, 2, b""))
    with pytest.raises(DataError, match=r"bomb\.png has more than 1000 million pixels; scale it down"):
        find_photographs(tmp_path)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_reading_says_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", exif=b"Exif\0\0junk")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crop(path)


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
