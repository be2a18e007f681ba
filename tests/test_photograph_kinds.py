"""Every kind of picture file that people have: modes, formats, colour profiles, sizes."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import (
    BLACK,
    BLUE,
    GREEN,
    RED,
    WHITE,
    Size,
    crop,
    near,
    photograph,
    quadrants,
    save,
)
from PIL import Image, ImageCms, features

from dbadapter.errors import DataError
from dbadapter.photographs import find_photographs, load_crop

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
