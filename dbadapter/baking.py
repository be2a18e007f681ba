"""Adapters added to a base's own weights for good, and the base written: a diffusers folder or one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from dbadapter import lora
from dbadapter.adapter import Adapter, adaptable_layers
from dbadapter.base import Base
from dbadapter.errors import AdapterError, OutputError
from dbadapter.merging import RECORD, merge
from dbadapter.model_folder import MAX_SHARD_SIZE, write_model_folder
from dbadapter.single_file_writing import check_single_file_output, write_single_file

__all__ = ["NOTE", "bake", "check_base_output", "write_base"]

# What was baked, in a folder; a single file says it in its header.
NOTE = "dbadapter_merge.json"
_PARTS = {
    *("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
    *("safety_checker", "feature_extractor", "image_encoder", "model_index.json", NOTE),
}


def bake(base: Base, adapters: Mapping[str | PathLike[str] | Adapter, float]) -> dict[str, Any]:
    """Add adapters to the base's weights in place: W += sum_i w_i (alpha_i / r_i) B_i A_i.

    The whole sum is added in float32 and rounded once to the dtype of W. There is no way back but the same
    with negative weights, which is exact up to this rounding.

    Args:
        base: its models must carry no adapter.
        adapters: file or Adapter -> weight.
    Returns:
        What was done, for the record.
    Raises:
        AdapterError: an adapter is broken or does not fit (nothing was changed then), or a weight becomes too
            large for its dtype.
        UsageError: as `merging.merge`.
    """
    total = merge(adapters, dtype=torch.float32).adapter
    lora.merge_into(base.pipeline, total)
    models = {"unet": base.unet, **base.text_encoders}
    for component, model in models.items():
        layers = adaptable_layers(model, component)
        for name in total.of_component(component):
            weight = layers[name].get_parameter("weight")
            if not torch.isfinite(weight).all():
                raise AdapterError(
                    f"A weight of {name} is too large for {weight.dtype}: pass --dtype float32"
                )
    record: dict[str, Any] = json.loads(total.metadata[RECORD])
    return {"base": base.name, "adapters": record["adapters"]}


def check_base_output(path: Path, overwrite: bool) -> None:
    """Pass if a base may be written there, a single file where the name ends in .safetensors.

    Raises:
        OutputError: something exists there and may not be replaced.
    """
    if path.suffix == ".safetensors":
        check_single_file_output(path, overwrite)
    elif path.is_file():
        raise OutputError(f"{path} is a file; expected a folder to write: pass another --output-base")
    elif path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise OutputError(f"{path} exists already: pass --overwrite or another --output-base")
        if not (path / "model_index.json").is_file():
            raise OutputError(f"{path} holds something else than a model: pass another --output-base")
        if foreign := sorted(each.name for each in path.iterdir() if each.name not in _PARTS):
            raise OutputError(
                f"{path} holds {foreign[0]}, which is no part of a model and would be lost: move it, or pass "
                "another --output-base"
            )


def write_base(
    base: Base,
    path: Path,
    *,
    record: Mapping[str, Any] | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> Path | None:
    """Write a base in its models' own dtype, whole or not at all.

    Args:
        path: ends in .safetensors for one checkpoint in LDM's layout, else a folder in diffusers'.
        record: what `bake` returned: kept in the header, or as a file in the folder.
        max_shard_size: of a folder's weights, which are split if larger.
        overwrite: replace an earlier model.
    Returns:
        The folder of configs that a single file of another architecture than the published ones needs beside
        it, else None.
    Raises:
        BaseError: a single file has no place for a layer.
        OutputError: it exists already, or cannot be written.
    """
    check_base_output(path, overwrite)
    said = json.dumps(record, ensure_ascii=False) if record else ""
    if path.suffix == ".safetensors":
        return write_single_file(base, path, metadata={RECORD: said} if said else None, overwrite=overwrite)
    write_model_folder(
        base.pipeline,
        path.resolve(),
        extra={NOTE: said + "\n"} if said else None,
        max_shard_size=max_shard_size,
        cure="make room, or pass another --output-base",
    )
    return None
