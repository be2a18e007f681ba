"""What toybox is pretrained on: scenes, their pictures, batches of them and captions in tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTokenizer

from dbadapter.toybox import captions, world

__all__ = ["batches", "captions_of", "draw", "scene", "tokenize"]

PRETRAINING_SEED = (
    20_260  # scenes of pretraining are default_rng((PRETRAINING_SEED, i)); nothing else uses it
)
_CHUNK = 500


def scene(index: int) -> world.Scene:
    """Return pretraining's scene number `index`."""
    return world.sample_scene(np.random.default_rng((PRETRAINING_SEED, index)))


def draw(folder: Path, count: int, log: Callable[..., None]) -> np.ndarray[Any, Any]:
    """Return `count` pictures, shape (count, 64, 64, 3), uint8, drawn once and kept as a file.

    Args:
        folder: of `pictures.npy`, and of how many are done.
        log: takes the stage and its figures.
    """
    from dbadapter.toybox.render import render

    path, done = folder / "pictures.npy", folder / "pictures.done"
    have = int(done.read_text()) if done.exists() else 0
    mode = "r+" if path.exists() else "w+"
    pictures = np.lib.format.open_memmap(path, mode=mode, dtype=np.uint8, shape=(count, 64, 64, 3))
    start = time.perf_counter()
    for first in range(have, count, _CHUNK):
        last = min(first + _CHUNK, count)
        pictures[first:last] = render([scene(i) for i in range(first, last)])[0]
        pictures.flush()
        done.write_text(str(last))
    if have < count:
        log("pictures", count=count, seconds=round(time.perf_counter() - start, 1))
    return pictures


def batches(count: int, size: int, seed: int, first_step: int) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Yield (step, indices) for ever: shuffled epochs that depend on the seed and the step alone."""
    per_epoch = count // size
    step, order, epoch_of = first_step, None, -1
    while True:
        epoch = step // per_epoch
        if epoch != epoch_of or order is None:
            order, epoch_of = np.random.default_rng((seed, epoch)).permutation(count), epoch
        at = step % per_epoch
        yield step, order[at * size : (at + 1) * size]
        step += 1


def captions_of(
    indices: np.ndarray[Any, Any], scenes: list[world.Scene], rare: list[str], seed: int, step: int
) -> list[captions.Caption]:
    """Return one random caption a scene, the same for the same (seed, step)."""
    rng = np.random.default_rng((seed, step))
    return [captions.caption(scenes[i], rng, rare) for i in indices]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], device: torch.device) -> torch.Tensor:
    """Return token ids, shape (batch, length)."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    ids: torch.Tensor = encoded.input_ids.to(device)
    return ids
