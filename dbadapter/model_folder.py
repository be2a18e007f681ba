"""A whole pipeline written as a diffusers folder, so that transformers 4.57 and 5 both read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dbadapter.errors import OutputError

__all__ = ["write_model_folder", "write_vocabulary"]

# The largest file of a folder; diffusers' own default. SDXL's UNet in float32 is two.
MAX_SHARD_SIZE = "10GB"


def write_model_folder(
    pipeline: Any,
    folder: Path,
    *,
    extra: Mapping[str, str] | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    cure: str = "make room, and add --resume",
) -> None:
    """Write the pipeline in its own dtype; an earlier folder is replaced when the new one is whole.

    transformers 5 drops `text_model.` from CLIPTextModel's keys, and 4.57 then loads random weights with only
    a warning; so the prefix is written back. The older one also wants vocab.json and merges.txt beside
    tokenizer.json.

    Args:
        pipeline: its models stay as they are.
        folder: replaced if it is there.
        extra: name -> text of files that go into it besides.
        max_shard_size: weights larger than that are split into files of at most this size.
        cure: what the message says to do where there is no room.
    Raises:
        OutputError: it cannot be written; nothing half-written stays.
    """
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        pipeline.save_pretrained(partial, max_shard_size=max_shard_size)
        _prefix_text_encoder(partial / "text_encoder")
        for name in ("tokenizer", "tokenizer_2"):
            if (tokenizer := getattr(pipeline, name, None)) is not None:
                write_vocabulary(tokenizer, partial / name)
        for name, text in (extra or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        for weights in partial.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors makes files that their owner alone can read
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        partial.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            old.replace(folder)
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"the model cannot be written to {folder}: {reason}; {cure}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prefix_text_encoder(folder: Path) -> None:
    for weights in folder.glob("model*.safetensors"):
        tensors = {_prefixed(key): value for key, value in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"  # where it is in several files
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {_prefixed(key): file for key, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _prefixed(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"


def write_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Write vocab.json and merges.txt from the fast tokenizer's own model, where they are not there."""
    if (folder / "merges.txt").is_file():
        return  # transformers 4 writes them, and its usual tokenizer is not a fast one
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
