"""The adapter's file: safetensors in kohya's layout, the one that every tool reads, and safe reading of any.

SDXL files have LDM's names in the UNet and `lora_te1_`, `lora_te2_`; SD1 and SD2 files have diffusers' names.

A file is written whole beside its target and then renamed. Reading runs no code from the file, checks
everything, and refuses by name what it could not keep. Other formats are written by `formats`.
"""

from __future__ import annotations

import io
import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dbadapter import keys, peft_folder
from dbadapter.adapter import Adapter, LoraWeights, check_fits
from dbadapter.adapter_metadata import (
    AdapterDescription,
    family_of,
    file_metadata,
    layers_per_block,
    sidecar,
    thumbnail,
    with_hashes,
)
from dbadapter.adapter_parts import layers_of, parts_of, text_width
from dbadapter.errors import AdapterError, OutputError
from dbadapter.peft_config import PeftAlphas
from dbadapter.safetensors_file import Chunks, write_files
from dbadapter.safetensors_header import read_header

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "WRITTEN_DTYPES",
    "Adapter",
    "AdapterDescription",
    "LoraWeights",
    "cast",
    "check_fits",
    "kohya_tensors",
    "read_adapter",
    "verify",
    "write_adapter",
]

WRITTEN_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def write_adapter(
    path: str | PathLike[str],
    adapter: Adapter,
    *,
    dtype: torch.dtype | None = torch.float16,
    description: AdapterDescription | None = None,
    preview: Image | None = None,
    sidecars: bool = True,
    overwrite: bool = False,
) -> None:
    """Write NAME.safetensors (kohya layout), and beside it NAME.json and, with a preview, NAME.png.

    The same input gives the same bytes.

    Args:
        path: ends in `.safetensors`; its folder is made if need be.
        adapter: its family decides about names. SDXL's count layers in one row: where the UNet has not 2
            layers per block, `adapter.metadata["dbadapter.layers_per_block"]` says so, else names tell.
        dtype: of the factors in the file: float16, bfloat16 or float32; None keeps each factor's own. alpha
            is float32, and float64 where that would round it.
        description: what other programs shall show.
        preview: a picture of the subject, for the header's thumbnail and the PNG.
        sidecars: False writes the one file only.
        overwrite: replace files that exist.
    Raises:
        AdapterError: a factor is not finite or too large for the dtype, the family cannot be written, or
            has no name for a layer.
        OutputError: an output exists already, or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise OutputError(f"An adapter's file must end in .safetensors, got {path}")
    description = description or AdapterDescription()
    tensors = kohya_tensors(adapter, dtype)
    metadata = file_metadata(adapter, path.stem, description)
    if preview is not None:
        metadata["modelspec.thumbnail"] = thumbnail(preview)
    contents: dict[Path, Chunks] = {}
    if sidecars and preview is not None:
        contents[path.with_suffix(".png")] = [_png(preview)]
    if sidecars:
        fields = sidecar(metadata, adapter.family, description)
        contents[path.with_suffix(".json")] = [(json.dumps(fields, indent=2) + "\n").encode()]
    contents[path] = with_hashes(tensors, metadata)
    write_files(contents, overwrite)


def read_adapter(path: str | PathLike[str]) -> Adapter:
    """Return the adapter in a kohya, diffusers or raw PEFT file or in PEFT's folders, in its own dtype.

    Everything that the header tells is checked before a tensor is read, and no path in a file is followed.

    Raises:
        AdapterError: not a safetensors file, broken, not a plain LoRA of SD's UNet and text encoders, or
            with values that are not finite; the message names the file and the key.
    """
    path = Path(path)
    if path.is_dir():
        modules, metadata = peft_folder.read(path)
    else:
        modules, metadata = _read_file(path)
    two_text_encoders = any(keys.component_of(name) == "text_encoder_2" for name in modules)
    return Adapter(family_of(metadata, text_width(modules), two_text_encoders), modules, metadata)


def _read_file(path: Path) -> tuple[dict[str, LoraWeights], dict[str, str]]:
    header = read_header(path)
    try:
        n = layers_per_block(header.metadata)
        parts = parts_of(header, lambda key: keys.split_key(key, layers_per_block=n))
        modules = layers_of(path, header, parts, PeftAlphas.of_header(header.metadata))
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    return modules, header.metadata


def verify(path: str | PathLike[str], adapter: Adapter) -> None:
    """Check that the file holds exactly this adapter: the factors, cast to the file's dtype, bit for bit.

    Raises:
        AdapterError: it does not; the message names the first layer.
    """
    written = read_adapter(path)
    if set(written.modules) != set(adapter.modules):
        odd = sorted(set(written.modules) ^ set(adapter.modules))
        raise AdapterError(f"{path}: {len(odd)} layers are in the file or in the model only, e.g. {odd[0]}")
    for name, trained in adapter.modules.items():
        read = written.modules[name]
        if trained.alpha != read.alpha:
            raise AdapterError(f"{path}: {name} has alpha {read.alpha}, the model has {trained.alpha}")
        for part in ("lora_A", "lora_B"):
            expected, got = getattr(trained, part).detach().cpu(), getattr(read, part)
            if not torch.equal(expected.to(got.dtype), got):
                raise AdapterError(f"{path}: {part} of {name} differs from the model's")


def cast(adapter: Adapter, dtype: torch.dtype | None) -> dict[str, LoraWeights]:
    """Return the layers as a file holds them: on the CPU, contiguous, of a dtype.

    Args:
        adapter: to be written.
        dtype: float16, bfloat16 or float32; None keeps each factor's own.
    Raises:
        AdapterError: there are no layers, or a factor is not finite or too large for the dtype.
    """
    if dtype is not None and dtype not in WRITTEN_DTYPES:
        raise AdapterError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if not adapter.modules:
        raise AdapterError("The adapter has no layers, there is nothing to write")
    return {
        name: LoraWeights(_cast(w.lora_A, dtype, name), _cast(w.lora_B, dtype, name), w.alpha)
        for name, w in adapter.modules.items()
    }


def kohya_tensors(adapter: Adapter, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of kohya's layout by their names there; arguments and errors as `cast`."""
    layers = cast(adapter, dtype)
    tensors: dict[str, Tensor] = {}
    sdxl = adapter.family == "sdxl"
    n = layers_per_block(adapter.metadata, adapter.modules) if sdxl else keys.LAYERS_PER_BLOCK
    for name, weights in layers.items():
        prefix = keys.to_kohya(name, sdxl=sdxl, layers_per_block=n)
        if f"{prefix}.alpha" in tensors:
            raise AdapterError(f"Two layers have the same name in the file: {prefix}")
        tensors[f"{prefix}.lora_down.weight"] = weights.lora_A
        tensors[f"{prefix}.lora_up.weight"] = weights.lora_B
        tensors[f"{prefix}.alpha"] = _alpha(weights.alpha)
    return tensors


def _alpha(alpha: float) -> Tensor:
    """Return a 0-d tensor, as every reader expects."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)


def _cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    cast = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    if not torch.isfinite(cast).all():
        cause = "is not finite" if not torch.isfinite(tensor).all() else f"is too large for {dtype}"
        raise AdapterError(f"A weight of {name} {cause}: the training diverged, lower the learning rate")
    return cast


def _png(preview: Image) -> bytes:
    stream = io.BytesIO()
    preview.convert("RGB").save(stream, format="PNG")
    return stream.getvalue()
