"""PEFT's folders: adapter_config.json and adapter_model.safetensors, one folder a model.

OUT/unet, OUT/text_encoder and OUT/text_encoder_2, as PEFT's DreamBooth example saves them; one such folder
alone is read too. The names in adapter_config.json of a base or of anything else are never followed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dbadapter import keys
from dbadapter.adapter import LoraWeights
from dbadapter.adapter_parts import layers_of, parts_of
from dbadapter.errors import AdapterError, OutputError
from dbadapter.folding import FOLDED
from dbadapter.peft_config import HEADER_KEY, PeftAlphas, read_config
from dbadapter.safetensors_file import DTYPES, Chunks, read_tensors, write_files
from dbadapter.safetensors_header import Header, read_header

__all__ = ["CONFIG", "WEIGHTS", "read", "write"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_ABOUT_ONE_FILE = ("sshs_", "modelspec.hash_sha256", HEADER_KEY, FOLDED, "format")


def read(folder: Path) -> tuple[dict[str, LoraWeights], dict[str, str]]:
    """Return (layers by canonical name, metadata) of the folders of an adapter.

    Raises:
        AdapterError: none is there, or one is broken or no plain LoRA; the message names the file.
    """
    # By any of its files, so that a model whose other file is lost is an error and not left out.
    found = {c: folder / c for c in keys.COMPONENTS if _is_there(folder / c)}
    if not found and _is_there(folder):
        return _read_one(folder, None)
    if not found:
        raise AdapterError(
            f"{folder} is a folder without a PEFT adapter ({CONFIG} in it, or in its unet or text_encoder): "
            "give the .safetensors file of an adapter"
        )
    layers: dict[str, LoraWeights] = {}
    metadata: dict[str, str] = {}
    for component, own in found.items():
        these, said = _read_one(own, component)
        layers |= these
        metadata |= {key: value for key, value in said.items() if not key.startswith(_ABOUT_ONE_FILE)}
    return dict(sorted(layers.items())), metadata


def write(
    folder: Path,
    contents: Mapping[str, tuple[Mapping[str, Any], Chunks]],
    *,
    overwrite: bool,
) -> list[Path]:
    """Write component -> (configuration, weights) as PEFT's folders and return the files.

    The folder appears whole or not at all. An earlier one is replaced whole, so that no model of it is left.

    Raises:
        OutputError: it exists, holds anything but an adapter, or cannot be written.
    """
    if folder.exists():
        _check_replaceable(folder, overwrite)
    target = folder.resolve()
    files: list[Path] = []
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        for component, (config, weights) in contents.items():
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            own = temporary / "new" / component
            write_files({own / CONFIG: [text.encode()], own / WEIGHTS: weights}, overwrite=False)
            files += [folder / component / CONFIG, folder / component / WEIGHTS]
        if target.exists():
            target.rename(temporary / "old")
        (temporary / "new").rename(target)
    except OSError as error:
        raise OutputError(f"Cannot write {error.filename or folder}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            if (temporary / "old").exists() and not target.exists():
                (temporary / "old").rename(target)
            shutil.rmtree(temporary, ignore_errors=True)
    return files


def _is_there(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG, WEIGHTS, _PICKLE))


def _read_one(folder: Path, component: str | None) -> tuple[dict[str, LoraWeights], dict[str, str]]:
    config = read_config(folder / CONFIG)
    weights = folder / WEIGHTS
    if not weights.exists() and (folder / _PICKLE).exists():
        raise AdapterError(
            f"{folder / _PICKLE} is a pickle, which can run code when it is loaded: "
            "convert it to safetensors first"
        )
    header = read_header(weights)
    own = component or _component(folder, config, list(header.entries))
    alphas = PeftAlphas({f"{own}.{key}": value for key, value in config.items()}, str(folder / CONFIG))
    try:
        header = _without_twins(weights, header)
        parts = parts_of(header, lambda key: keys.split_peft_key(key, own), keys.PEFT_PREFIX)
        return layers_of(weights, header, parts, alphas), header.metadata
    except AdapterError as error:
        raise AdapterError(f"{weights}: {error}") from None


def _without_twins(path: Path, header: Header) -> Header:
    """Return the header without the second of a text encoder's two names (`keys.to_peft`).

    Raises:
        AdapterError: the tensors of both differ.
    """
    start = f"{keys.PEFT_PREFIX}text_model."
    twins = {
        key: short
        for key in header.entries
        if key.startswith(start)
        and (short := keys.PEFT_PREFIX + key.removeprefix(start)) in header.entries
        and header.entries[short].shape == header.entries[key].shape
    }
    if not twins:
        return header
    pairs = {
        k: header.entries[k] for pair in twins.items() for k in pair if header.entries[k].dtype in DTYPES
    }
    tensors = read_tensors(path, replace(header, entries=pairs))
    for key, short in twins.items():
        if key in tensors and short in tensors and not torch.equal(tensors[key], tensors[short]):
            raise AdapterError(f"{key!r} and {short!r} are one layer and differ: get the folder again")
    entries = {key: entry for key, entry in header.entries.items() if key not in twins.values()}
    return replace(header, entries=entries)


def _component(folder: Path, config: Mapping[str, Any], names: list[str]) -> str:
    """Return which model a lone folder is for: its own name, the base's class, or its layers tell."""
    if folder.resolve().name in keys.COMPONENTS:
        return folder.resolve().name
    found = keys.component_of_paths(names)
    if found is None:
        raise AdapterError(
            f"{folder / WEIGHTS} is of neither Stable Diffusion's UNet nor its text encoders "
            f"(first key: {next(iter(names), None)!r}): pass an adapter of SD1.x, SD2.x or SDXL"
        )
    mapping = config.get("auto_mapping")
    made_for = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    second = found == "text_encoder" and made_for == "CLIPTextModelWithProjection"
    return "text_encoder_2" if second else found


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder to write: choose another name")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{folder} exists already: choose another name or overwrite it (--overwrite)")
    ours = {folder / c for c in keys.COMPONENTS}
    files = {own / name for own in ours for name in (CONFIG, WEIGHTS)}
    odd = sorted(p for p in folder.rglob("*") if p not in ours | files)
    if odd:
        raise OutputError(
            f"{folder} holds {odd[0].name}, which is no part of a PEFT adapter: choose another name"
        )
