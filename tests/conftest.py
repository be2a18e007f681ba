"""Bases for tests: a tiny random one in Stable Diffusion 1's own layout. No network, a thread a worker."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # before torch is imported; threads that compete are many times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # its OpenMP sets the number for torch too

if TYPE_CHECKING:
    from dbadapter.base import Base

# They train in the test's own process: after exports in the same worker they take several times as long.
FIRST = (
    "test_selection.py",
    "test_training.py",
    "test_training_endings.py",
    "test_benchmarks_quality_commands.py",
    "test_benchmarks_select.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole training runs before everything else; the others stay in their order."""
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage() -> None:
    """Keep what the libraries made when they were imported out of all collections of a worker."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        for name in ("diffusers.loaders", "peft", "transformers.models.clip"):
            import_module(name)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Keep what a file has left behind out of later collections.

    torch.export leaves millions of objects in a worker, and training collects three times a run: late runs
    took ten times as long as alone.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD1-like folder: 32 px, latents 8 x 8 x 4, cross-attention 32 wide, CLIP's vocabulary."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from dbadapter import toybox

    folder = tmp_path_factory.mktemp("tiny-base")
    vocabulary = toybox.folder() / "tokenizer"
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.7,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(vocabulary),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(vocabulary / name, folder / "tokenizer" / name)
    return folder


@pytest.fixture
def tiny_base(tiny_base_folder: Path) -> Base:
    """The tiny base, loaded afresh on the CPU in fp32: a test may change it."""
    from dbadapter.base import load_base

    return load_base(str(tiny_base_folder), device="cpu")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (48, 40), (80 * index, 90, 120)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def train_words(photographs: Path, tmp_path: Path, tiny_base_folder: Path) -> list[str | Path]:
    """A `train` command that works, up to --dry-run; more options may follow."""
    return [
        *("train", "--base", tiny_base_folder, "--instance-data-dir", photographs),
        *("--class-noun", "dog", "--output-dir", tmp_path / "out"),
    ]
