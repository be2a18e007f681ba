"""Pictures for the tests of photographs: made, read and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dbadapter.encoders import Encoder
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


def pixels(pictures: Any) -> torch.Tensor:
    """Return pictures as embeddings that hide nothing, shape (n, 192)."""
    small = [np.asarray(picture.convert("RGB").resize((8, 8)), dtype=np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(small)).flatten(1) - 128


PIXELS = Encoder("pixels", pixels)
