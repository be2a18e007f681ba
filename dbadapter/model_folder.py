"""A whole pipeline written as a diffusers folder, so that transformers 4.57 and 5 both read it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import save_file

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
        max_shard_size: a UNet or VAE larger than that is split into files of at most this size.
        cure: what the message says to do where there is no room.
    Raises:
        OutputError: it cannot be written; nothing half-written stays.
    """
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _write_parts(pipeline, partial, max_shard_size)
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


def _write_parts(pipeline: Any, folder: Path, max_shard_size: str) -> None:
    """Write every part into a folder of its name, as the pipeline's own `save_pretrained` does."""
    for name, part in pipeline.components.items():
        if part is None:
            continue
        if name == "text_encoder":
            _write_text_encoder(part, folder / name)
        elif isinstance(part, ModelMixin):
            part.save_pretrained(folder / name, max_shard_size=max_shard_size)
        else:
            part.save_pretrained(folder / name)
        if name.startswith("tokenizer"):
            write_vocabulary(part, folder / name)
    pipeline.save_config(folder)


def _write_text_encoder(model: Any, folder: Path) -> None:
    """Write a CLIPTextModel with `text_model.` in its keys, straight from memory."""
    folder.mkdir(parents=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    state = {_prefixed(key): value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


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
