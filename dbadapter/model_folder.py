"""A whole pipeline written as a diffusers folder, so that transformers 4.57 and 5 both read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dbadapter.errors import OutputError

__all__ = ["write_model_folder"]


def write_model_folder(pipeline: Any, folder: Path) -> None:
    """Write the pipeline in its own dtype; an earlier folder is replaced when the new one is whole.

    transformers 5 drops `text_model.` from CLIPTextModel's keys, and 4.57 then loads random weights with only
    a warning; so the prefix is written back. The older one also wants vocab.json and merges.txt beside
    tokenizer.json.

    Raises:
        OutputError: it cannot be written; nothing half-written stays.
    """
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        pipeline.save_pretrained(partial)
        _prefix_text_encoder(partial / "text_encoder" / "model.safetensors")
        for name in ("tokenizer", "tokenizer_2"):
            if (tokenizer := getattr(pipeline, name, None)) is not None:
                _write_vocabulary(tokenizer, partial / name)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        partial.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            old.replace(folder)
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"the model cannot be written to {folder}: {reason}; make room, and add --resume"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prefix_text_encoder(weights: Path) -> None:
    tensors = {
        key if key.startswith("text_model.") else f"text_model.{key}": value
        for key, value in load_file(weights).items()
    }
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # save_file makes it readable for its owner only


def _write_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Write vocab.json and merges.txt from the fast tokenizer's own model, where they are not there."""
    if (folder / "merges.txt").is_file():
        return  # transformers 4 writes them, and its usual tokenizer is not a fast one
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
