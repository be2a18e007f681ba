"""Adapters in other programs' formats: kohya's, diffusers', PEFT's; any that is read comes in.

    kohya      one file, alpha per layer: what every tool reads
    diffusers  one file, alpha / rank inside lora_B and told in the header, for `load_lora_weights`
    peft       a folder per model, alpha in adapter_config.json, for `PeftModel.from_pretrained`

Every conversion is read back and must give the same factors and alphas, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbadapter import keys, peft_folder
from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.adapter_file import AdapterDescription, cast, kohya_tensors, read_adapter, verify
from dbadapter.adapter_metadata import file_metadata, is_derived, with_hashes
from dbadapter.errors import AdapterError, OutputError, UsageError
from dbadapter.folding import FOLDED, Folded, Foldings, fold
from dbadapter.peft_config import HEADER_KEY, header_config, lora_config
from dbadapter.safetensors_file import write_files

__all__ = ["FAMILIES", "FORMATS", "Converted", "convert", "write_diffusers", "write_peft"]

FORMATS = ("kohya", "diffusers", "peft")
FAMILIES = ("sd1", "sd2", "sdxl")

Alphas = dict[str, float]


@dataclass(frozen=True)
class Converted:
    """What a conversion left.

    Attributes:
        paths: the files written.
        notes: what a tool would read otherwise than one may think, a sentence each.
    """

    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def convert(
    source: str | PathLike[str],
    kind: str,
    output: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write an adapter in another format and check that it reads back the same.

    Args:
        source: a file or folder that `read_adapter` reads.
        kind: one of `FORMATS`.
        output: a .safetensors file, or for peft a folder.
        dtype: of the factors; None keeps each one's own.
        family: "sd1", "sd2" or "sdxl", for a file that does not tell.
        overwrite: replace an earlier output.
    Raises:
        UsageError: an unknown kind or family.
        AdapterError: the source cannot be read, kept exactly, or named for its family.
        OutputError: the output exists already, or cannot be written.
    """
    if kind not in FORMATS:
        raise UsageError(f"The format must be one of {', '.join(FORMATS)}, got {kind!r}")
    if family is not None and family not in FAMILIES:
        raise UsageError(f"The family must be one of {', '.join(FAMILIES)}, got {family!r}")
    adapter, output = read_adapter(source), Path(output)
    if family is not None:
        adapter = _with_family(adapter, family)
    if kind == "peft":
        paths = write_peft(output, adapter, dtype=dtype, overwrite=overwrite)
        notes: list[str] = []
    elif kind == "diffusers":
        paths, notes = [output], write_diffusers(output, adapter, dtype=dtype, overwrite=overwrite)
    else:
        paths, notes = [output], _kohya_notes(adapter)
        _write_kohya(output, adapter, dtype, overwrite)
    verify(output, adapter)
    return Converted(tuple(paths), tuple(notes))


def write_diffusers(
    path: str | PathLike[str],
    adapter: Adapter,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write one file for diffusers' `load_lora_weights` and return notes on it.

    alpha / rank goes into lora_B (see `folding`), because only diffusers reads alpha of such a file, and that
    from the header: so the strength is right in every tool, and `read_adapter` gives the same adapter back.

    Args:
        path: ends in `.safetensors`; diffusers finds `pytorch_lora_weights.safetensors` by itself.
        adapter: of any family.
        dtype: of the factors; None keeps each one's own. lora_B is float32 where a scale that is no power of
            two would be rounded, and float64 where its own float32 would.
        overwrite: replace an earlier file.
    Raises:
        AdapterError: a factor is not finite or too large for the dtype.
        OutputError: the file exists already, or cannot be written.
    """
    path = Path(path)
    _check_suffix(path)
    layers = cast(adapter, dtype)
    tensors: dict[str, Tensor] = {}
    alphas: Alphas = {}
    folded: dict[str, Folded | None] = {}
    for name, weights in layers.items():
        b = fold(weights) if weights.scaling != 1 else None
        alphas[name] = weights.alpha if b is None else float(weights.rank)
        folded[name] = None if b is None else Folded(weights.alpha, weights.lora_B.dtype)
        tensors[keys.to_diffusers(name, "lora_A")] = weights.lora_A
        tensors[keys.to_diffusers(name, "lora_B")] = weights.lora_B if b is None else b
    metadata = _metadata(adapter, path.stem)
    metadata[HEADER_KEY] = header_config(
        {c: lora_config(own, alphas) for c, own in _by_component(layers).items()}
    )
    if any(entry is not None for entry in folded.values()):
        metadata[FOLDED] = Foldings(folded).to_header()
    write_files({path: with_hashes(tensors, metadata)}, overwrite)
    odd = [name for name, weights in layers.items() if alphas[name] != weights.rank]
    if not odd:
        return []
    return [
        f"{len(odd)} layers keep an alpha other than their rank, e.g. {odd[0]}, because their digits leave "
        "no room for the scale: only diffusers reads it; use --to kohya for other tools"
    ]


def write_peft(
    folder: str | PathLike[str],
    adapter: Adapter,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write FOLDER/unet, FOLDER/text_encoder and FOLDER/text_encoder_2 for PEFT and return the files.

    Only the folders of the models that the adapter changes are made.

    Args:
        folder: to be made; an earlier one is replaced whole.
        adapter: of any family.
        dtype: of the factors; None keeps each one's own.
        overwrite: replace an earlier adapter in the folder.
    Raises:
        AdapterError: a factor is not finite or too large for the dtype.
        OutputError: the folder exists, holds anything else, or cannot be written.
    """
    folder = Path(folder)
    layers = cast(adapter, dtype)
    metadata = _metadata(adapter, folder.name)
    contents = {}
    for component, own in _by_component(layers).items():
        config = lora_config(own, {name: weights.alpha for name, weights in own.items()})
        tensors: dict[str, Tensor] = {}
        for name, weights in own.items():
            tensors |= dict.fromkeys(keys.to_peft(name, "lora_A"), weights.lora_A)
            tensors |= dict.fromkeys(keys.to_peft(name, "lora_B"), weights.lora_B)
        contents[component] = (_whole_config(config, component), with_hashes(tensors, metadata))
    return peft_folder.write(folder, contents, overwrite=overwrite)


def _write_kohya(path: Path, adapter: Adapter, dtype: torch.dtype | None, overwrite: bool) -> None:
    if adapter.family == "unknown":
        raise AdapterError(
            "Neither header nor shapes tell the adapter's base, on which names in kohya's layout depend: "
            "pass --family sd1, sd2 or sdxl"
        )
    _check_suffix(path)
    metadata = _metadata(adapter, path.stem)
    del metadata["format"]
    write_files({path: with_hashes(kohya_tensors(adapter, dtype), metadata)}, overwrite)


def _metadata(adapter: Adapter, name: str) -> dict[str, str]:
    """Return the header's entries: those that the source has, with what follows from the layers renewed."""
    said = adapter.metadata
    if adapter.family == "unknown":
        found = {key: value for key, value in said.items() if not is_derived(key)}
    else:
        description = AdapterDescription(title=said.get("modelspec.title", ""))
        found = file_metadata(adapter, name, description)
    return {"format": "pt", **found, **_thumbnail(said)}


def _thumbnail(metadata: Mapping[str, str]) -> dict[str, str]:
    key = "modelspec.thumbnail"
    return {key: metadata[key]} if key in metadata else {}


def _by_component(layers: Mapping[str, LoraWeights]) -> dict[str, dict[str, LoraWeights]]:
    found = {c: {n: w for n, w in layers.items() if keys.component_of(n) == c} for c in keys.COMPONENTS}
    return {component: own for component, own in found.items() if own}


def _whole_config(config: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Return adapter_config.json's fields; no path or name of a base is in it."""
    classes = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
    library = "diffusers.models.unets.unet_2d_condition"
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {
            "base_model_class": classes.get(component, "CLIPTextModelWithProjection"),
            "parent_library": library if component == "unet" else "transformers.models.clip.modeling_clip",
        },
        "base_model_name_or_path": None,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **config,
    }


def _kohya_notes(adapter: Adapter) -> list[str]:
    """Return what diffusers makes of a file in kohya's layout that others read well (diffusers 0.42)."""
    notes = []
    attention = {
        weights.alpha
        for name, weights in adapter.modules.items()
        if name.startswith("unet.") and (".attn1." in name or ".attn2." in name)
    }
    if len(attention) > 1:
        notes.append(
            "diffusers reads attention layers with different alphas at the wrong strength: "
            "use --to diffusers there"
        )
    for component in ("text_encoder", "text_encoder_2"):
        own = adapter.of_component(component)
        if own and not any(name.endswith(".out_proj") for name in own):
            notes.append(
                f"diffusers cannot read a {component} part without out_proj in this layout: "
                "use --to diffusers there"
            )
    return notes


def _with_family(adapter: Adapter, family: str) -> Adapter:
    if adapter.family not in ("unknown", family):
        raise AdapterError(
            f"The adapter is for a base of family {adapter.family}, not {family}: leave out --family"
        )
    return replace(adapter, family=family)


def _check_suffix(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise OutputError(f"An adapter's file must end in .safetensors, got {path}")
