"""Bases of the published sizes with random weights, `write_base(folder, "sd1")`: noise at the full cost.

The configurations are those that dbadapter reads single files by; speed and memory depend on nothing else.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbadapter import toybox
from dbadapter.single_file import CONFIGS

__all__ = ["FAMILIES", "build", "read_config", "write_base"]

FAMILIES = ("sd1", "sd2", "sdxl")


def read_config(family: str, part: str) -> dict[str, Any]:
    """Return the configuration of one model of a family."""
    config: dict[str, Any] = json.loads((CONFIGS / family / part / "config.json").read_text(encoding="utf-8"))
    return config


def build(
    family: str,
    part: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    """Return one model of a family with the libraries' own random weights, in evaluation mode.

    Args:
        family: "sd1", "sd2" or "sdxl".
        part: "unet", "vae", "text_encoder" or, for sdxl, "text_encoder_2".
        device: "meta" takes no memory and gives no values.
        dtype: of every weight.
        seed: of the weights.
    Raises:
        OSError, KeyError: no such family or part.
    """
    import diffusers
    import transformers

    library, name = _read_index(family)[part]
    config = read_config(family, part)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not cast afterwards: SDXL's UNet in float32 is 10 GB
    try:
        with torch.device(device):
            if library == "diffusers":
                model: nn.Module = getattr(diffusers, name).from_config(config)
            else:
                model = getattr(transformers, name)(transformers.CLIPTextConfig.from_dict(config))
    finally:
        torch.set_default_dtype(before)
    # nn.Module's own `to`: diffusers' prints a warning about an empty list of layers to keep in float32.
    return nn.Module.to(model, dtype).eval()


def write_base(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Path:
    """Write a diffusers folder of a family's true size with random weights, unless it is there already.

    Takes the memory of its largest part: 3.4 GB for sd1 and sd2, 10 GB for sdxl; half that in bfloat16.

    Args:
        folder: replaced if it holds another family, dtype or seed.
        family: "sd1", "sd2" or "sdxl".
        dtype: of every weight.
        seed: of the weights.
        device: where they are drawn; a GPU does it in seconds, and draws others.
    Returns:
        The folder.
    Raises:
        OSError: no such family, or nothing can be written.
        ValueError: the folder is there and was not written by this function.
    """
    index = _read_index(family)
    record = {"family": family, "dtype": str(dtype).removeprefix("torch."), "seed": seed}
    note = folder / "true_size.json"
    if (folder / "model_index.json").exists() and note.exists() and json.loads(note.read_text()) == record:
        return folder
    if folder.exists() and any(folder.iterdir()) and not note.exists():
        raise ValueError(f"{folder} holds something else; pass an empty folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    note.write_text(json.dumps(record) + "\n")
    for part, (_, name) in _parts(index).items():
        if name == "CLIPTokenizer":
            _write_tokenizer(folder / part, CONFIGS / family / part)
        elif part == "scheduler":
            shutil.copytree(CONFIGS / family / part, folder / part)
        else:
            build(family, part, dtype=dtype, seed=seed, device=device).save_pretrained(folder / part)
    # Last: a folder with it is whole.
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _read_index(family: str) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((CONFIGS / family / "model_index.json").read_text(encoding="utf-8"))
    return index


def _parts(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return each part's library and class, parts that are left out apart."""
    return {part: (kind[0], kind[1]) for part, kind in index.items() if isinstance(kind, list) and kind[0]}


def _write_tokenizer(folder: Path, settings: Path) -> None:
    """Write CLIP's tokenizer with a family's settings; toybox carries the same vocabulary."""
    shutil.copytree(settings, folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(toybox.folder() / "tokenizer" / name, folder / name)
