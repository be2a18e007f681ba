"""What the tests of `evaluate` score: two adapters of a tiny base, and a subject's photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dbadapter.adapter_file import AdapterDescription, write_adapter
from dbadapter.base import Base
from dbadapter.export.parity import synthetic_adapter


def draw_photographs(folder: Path) -> Path:
    """Write three pictures of noise, 48 x 40."""
    drawn = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(drawn.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def write_adapters(base: Base, folder: Path) -> Path:
    """Write dog.safetensors and hat.safetensors, both of "sks dog"."""
    for seed, name in enumerate(("dog", "hat")):
        adapter = synthetic_adapter(base, seed=seed)
        write_adapter(
            folder / f"{name}.safetensors", adapter, description=AdapterDescription(trigger="sks dog")
        )
    return folder
