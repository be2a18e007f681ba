"""Photographs: what is found, what is refused by name, how they are cropped; latents and random streams."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dbadapter.base import Base
from dbadapter.data import LatentCache, draw, find_photographs, load_photograph, mirrored, picture_indices
from dbadapter.errors import DataError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def save(path: Path, size: tuple[int, int] = (40, 30), color: object = RED, mode: str = "RGB") -> Path:
    Image.new(mode, size, color).save(path)  # type: ignore[arg-type]
    return path


def test_pictures_are_found_and_junk_is_passed_over(tmp_path: Path) -> None:
    wanted = [save(tmp_path / name) for name in ("b.PNG", "a.jpg", "c.webp", "d.bmp")]
    for junk in (".DS_Store", "Thumbs.db", "a.txt", "a.json", "._a.jpg", "desktop.ini", "movie.mp4"):
        (tmp_path / junk).write_bytes(b"junk")
    (tmp_path / "folder.jpg").mkdir()
    assert find_photographs(tmp_path) == sorted(wanted)


def test_unreadable_picture_is_named(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"this is no JPEG")
    with pytest.raises(DataError, match=r"bad\.jpg cannot be read as a picture; replace or remove it"):
        find_photographs(tmp_path)


def test_truncated_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"cut\.jpg cannot be read"):
        find_photographs(tmp_path)


def test_heic_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match="save it as JPEG or PNG"):
        find_photographs(tmp_path)


def test_missing_empty_and_file_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_photographs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no photographs in"):
        find_photographs(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        find_photographs(save(tmp_path / "a.png"))


def test_crop_keeps_the_centre(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), WHITE)
    image.paste(RED, (100, 0, 200, 100))
    image.save(tmp_path / "wide.png")
    picture = load_photograph(tmp_path / "wide.png", 32)
    assert picture.shape == (3, 32, 32)
    assert picture.dtype == torch.float32
    assert torch.allclose(picture[:, :, 2:-2].mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]), atol=0.01)


def test_small_pictures_are_enlarged(tmp_path: Path) -> None:
    assert load_photograph(save(tmp_path / "small.png", (10, 12)), 64).shape == (3, 64, 64)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), WHITE)
    image.paste(RED, (0, 0, 64, 32))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    image.save(tmp_path / "phone.jpg", exif=exif, quality=100)
    picture = load_photograph(tmp_path / "phone.jpg", 16)
    assert picture[1, 2].mean() > 0.9  # white above now
    assert picture[1, -3].mean() < -0.9


def test_transparency_is_white(tmp_path: Path) -> None:
    picture = load_photograph(save(tmp_path / "t.png", color=(0, 0, 0, 0), mode="RGBA"), 8)
    assert torch.equal(picture, torch.ones(3, 8, 8))
    palette = Image.new("P", (8, 8), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    assert torch.equal(load_photograph(tmp_path / "p.png", 8), torch.ones(3, 8, 8))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        # convert() would clip every value above 255, and the photograph would be white.
        Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(path)
        assert load_photograph(path, 8).mean().item() == pytest.approx(0.0, abs=0.01)
        return
    Image.new(mode, (8, 8)).save(path)
    assert load_photograph(path, 8).shape == (3, 8, 8)


def test_large_jpegs_are_decoded_small_but_alike(tmp_path: Path) -> None:
    y, x = np.mgrid[0:1200, 0:1600] / 1600
    pixels = np.stack([x, y, 1 - x], axis=-1) * 255
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.png")
    difference = load_photograph(tmp_path / "a.jpg", 64) - load_photograph(tmp_path / "a.png", 64)
    assert difference.abs().max() < 0.05


def test_mirrored() -> None:
    picture = torch.arange(12.0).reshape(3, 2, 2)
    both = mirrored([picture])
    assert torch.equal(both[0], picture)
    assert torch.equal(both[1], picture.flip(-1))


def test_latents_are_redrawn_from_the_posterior(tiny_base: Base) -> None:
    pictures = list(torch.rand(3, 3, 32, 32) * 2 - 1)
    cache = LatentCache.encode(tiny_base.vae, pictures, batch_size=2)
    assert len(cache) == 3
    assert cache.mean.shape == cache.std.shape == (3, 4, 8, 8)
    with torch.no_grad():
        posterior = tiny_base.vae.encode(pictures[2][None]).latent_dist
    scale = 0.7  # of the tiny base's config; SD1's 0.18215 would be wrong here
    assert torch.allclose(cache.mean[2], posterior.mean[0] * scale, atol=1e-5)
    noise = torch.randn(2, 4, 8, 8)
    expected = (posterior.mean + posterior.std * noise[1]) * scale
    drawn = cache.sample([0, 2], noise)
    assert torch.allclose(drawn[1], expected[0], atol=1e-5)
    assert not torch.equal(drawn, cache.sample([0, 2], torch.randn(2, 4, 8, 8)))


def test_sampled_latents_stay_as_they_are() -> None:
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(LatentCache.of_latents(latents).sample([1], torch.randn(1, 4, 8, 8)), latents[1:])


def test_draws_are_keyed_by_sample_not_by_batch() -> None:
    whole = draw("instance", 7, 3, range(4), (4, 8, 8), 1000)
    halves = [draw("instance", 7, 3, part, (4, 8, 8), 1000) for part in (range(2), range(2, 4))]
    for index, name in enumerate(whole._fields):
        assert torch.equal(whole[index], torch.cat([half[index] for half in halves])), name


@pytest.mark.parametrize(
    "other", [("prior", 7, 3, [0]), ("instance", 8, 3, [0]), ("instance", 7, 4, [0]), ("instance", 7, 3, [1])]
)
def test_no_two_samples_share_a_noise(other: tuple[str, int, int, list[int]]) -> None:
    one = draw("instance", 7, 3, [0], (4, 8, 8), 1000)
    assert not torch.equal(one.noise, draw(*other, (4, 8, 8), 1000).noise)
    assert not torch.equal(one.noise, one.posterior_noise)


def test_timesteps_cover_the_schedule() -> None:
    timesteps = torch.cat(
        [draw("instance", 0, step, range(8), (1, 1, 1), 10).timesteps for step in range(50)]
    )
    assert set(timesteps.tolist()) == set(range(10))


@given(st.integers(0, 2**63 - 1), st.integers(1, 12), st.integers(0, 30), st.integers(1, 30))
def test_every_pass_uses_every_picture_once(seed: int, pictures: int, first: int, count: int) -> None:
    turns = picture_indices("instance", seed, 0, 3 * pictures, pictures)
    for turn in range(3):
        assert sorted(turns[turn * pictures : (turn + 1) * pictures]) == list(range(pictures))
    # Where a run is taken up again changes nothing.
    whole = picture_indices("instance", seed, 0, first + count, pictures)
    assert picture_indices("instance", seed, first, count, pictures) == whole[first:]


def test_reading_says_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_photograph(save(tmp_path / "a.jpg"), 16)
