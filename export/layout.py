"""The folder of an export: what lies beside the graphs, the room it needs, and how it comes into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbadapter.base import Base
from dbadapter.errors import OutputError
from dbadapter.export.graphs import SCALING_FACTOR
from dbadapter.export.pipeline import REPORT_NAME

__all__ = ["check_output", "check_space", "folder_bytes", "publish", "write_json", "write_layout"]


_OURS = {
    *("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"),
    *("tokenizer", "tokenizer_2", "scheduler", "adapters"),
    *("model_index.json", REPORT_NAME, "parity.safetensors"),
}


def write_layout(base: Base, folder: Path) -> None:
    """Write configs, tokenizer, scheduler and model_index.json as diffusers and optimum-onnx expect them."""
    import diffusers

    base.unet.save_config(folder / "unet")
    for half in ("vae_decoder", "vae_encoder"):
        base.vae.save_config(folder / half)
        config = json.loads((folder / half / "config.json").read_text(encoding="utf-8"))
        write_json(folder / half / "config.json", config | {"scaling_factor": SCALING_FACTOR})
    base.scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", type(base.scheduler).__name__],
    }
    if base.family == "sdxl":
        zeros = bool(base.pipeline.config.get("force_zeros_for_empty_prompt", True))
        index |= {
            "_class_name": "ORTStableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": zeros,
            "image_encoder": [None, None],
        }
    else:
        index |= {
            "_class_name": "ORTStableDiffusionPipeline",
            "requires_safety_checker": False,
            "safety_checker": [None, None],
        }
    for (name, model), tokenizer in zip(base.text_encoders.items(), base.tokenizers, strict=True):
        model.config.save_pretrained(folder / name)
        place = name.replace("text_encoder", "tokenizer")
        _write_tokenizer(tokenizer, folder / place)
        index[place] = ["transformers", "CLIPTokenizer"]
    for name in (*base.text_encoders, "unet", "vae_decoder", "vae_encoder"):
        index[name] = ["diffusers", "OnnxRuntimeModel"]
    write_json(folder / "model_index.json", dict(sorted(index.items())))


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer for transformers 4 too, which ignores the tokenizer.json that 5 writes alone."""
    tokenizer.save_pretrained(folder)
    if not (folder / "merges.txt").is_file():
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    if not (folder / "vocab.json").is_file():
        vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise OutputError unless the folder is absent, empty, or an earlier export that may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder to write: pass another --output-dir")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{folder} exists already: pass --overwrite or another --output-dir")
    if not (folder / REPORT_NAME).is_file():
        raise OutputError(f"{folder} holds something else than an export of ours: pass another --output-dir")
    if foreign := sorted(path.name for path in folder.iterdir() if path.name not in _OURS):
        raise OutputError(
            f"{folder} holds {foreign[0]}, which is no part of an export and would be lost: move it, or pass "
            "another --output-dir"
        )


def check_space(folder: Path, needed: int) -> None:
    """Raise OutputError unless the disk has room for that many bytes."""
    present = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(present).free
    if free < needed:
        raise OutputError(
            f"{present} has {free / 2**20:.0f} MiB free, the export needs {needed / 2**20:.0f} MiB: "
            "make room or pass another --output-dir"
        )


def publish(temporary: Path, folder: Path) -> None:
    """Rename the finished folder into place; the one it replaces goes away last."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    replaced = folder.exists()
    if replaced:
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        if replaced:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, indented, in place of an earlier one at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())
