"""The adapter's file: safetensors in kohya's layout, the one that every tool reads, and safe reading of it.

SDXL files have LDM's names in the UNet and `lora_te1_`, `lora_te2_`; SD1 and SD2 files have diffusers' names.

A file is written whole beside its target and then renamed. Reading runs no code from the file, checks
everything, and refuses by name what it could not keep.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dbadapter import keys
from dbadapter.adapter import Adapter, LoraWeights, check_fits
from dbadapter.adapter_metadata import (
    AdapterDescription,
    family_of,
    file_metadata,
    layers_per_block,
    legacy_hash,
    sidecar,
    tensor_hashes,
    thumbnail,
)
from dbadapter.errors import AdapterError, OutputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Adapter",
    "AdapterDescription",
    "LoraWeights",
    "check_fits",
    "read_adapter",
    "verify",
    "write_adapter",
]

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def write_adapter(
    path: str | PathLike[str],
    adapter: Adapter,
    *,
    dtype: torch.dtype = torch.float16,
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
        dtype: of the factors in the file: float16, bfloat16 or float32. alpha is always float32.
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
    if dtype not in _DTYPES:
        raise AdapterError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if not adapter.modules:
        raise AdapterError("The adapter has no layers, there is nothing to write")
    description = description or AdapterDescription()
    tensors = _kohya_tensors(adapter, dtype)
    metadata = file_metadata(adapter, path.stem, description)
    if preview is not None:
        metadata["modelspec.thumbnail"] = thumbnail(preview)
    contents: dict[Path, bytes] = {}
    if sidecars and preview is not None:
        contents[path.with_suffix(".png")] = _png(preview)
    if sidecars:
        fields = sidecar(metadata, adapter.family, description)
        contents[path.with_suffix(".json")] = (json.dumps(fields, indent=2) + "\n").encode()
    contents[path] = _with_hashes(tensors, metadata)
    _write_all(contents, overwrite)


def read_adapter(path: str | PathLike[str]) -> Adapter:
    """Return the adapter in a kohya, diffusers or raw PEFT safetensors file, in the file's own dtype.

    Raises:
        AdapterError: not a safetensors file, broken, not a plain LoRA of SD's UNet and text encoders, or
            with values that are not finite; the message names the file and the key.
    """
    path = Path(path)
    _check_kind(path)
    tensors, metadata = _read_tensors(path)
    try:
        return _adapter(tensors, metadata)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


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
        if torch.tensor(trained.alpha, dtype=torch.float32).item() != read.alpha:
            raise AdapterError(f"{path}: {name} has alpha {read.alpha}, the model has {trained.alpha}")
        for part in ("lora_A", "lora_B"):
            expected, got = getattr(trained, part).detach().cpu(), getattr(read, part)
            if not torch.equal(expected.to(got.dtype), got):
                raise AdapterError(f"{path}: {part} of {name} differs from the model's")


def _kohya_tensors(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    sdxl = adapter.family == "sdxl"
    n = layers_per_block(adapter.metadata, adapter.modules) if sdxl else keys.LAYERS_PER_BLOCK
    for name, weights in adapter.modules.items():
        prefix = keys.to_kohya(name, sdxl=sdxl, layers_per_block=n)
        if f"{prefix}.alpha" in tensors:
            raise AdapterError(f"Two layers have the same name in the file: {prefix}")
        tensors[f"{prefix}.lora_down.weight"] = _cast(weights.lora_A, dtype, name)
        tensors[f"{prefix}.lora_up.weight"] = _cast(weights.lora_B, dtype, name)
        # float32, so that no alpha is rounded; a 0-d tensor is what every reader expects.
        tensors[f"{prefix}.alpha"] = torch.tensor(weights.alpha, dtype=torch.float32)
    return tensors


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(cast).all():
        cause = "is not finite" if not torch.isfinite(tensor).all() else f"is too large for {dtype}"
        raise AdapterError(f"A weight of {name} {cause}: the training diverged, lower the learning rate")
    return cast


def _with_hashes(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    plain = _serialised(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    header_length = struct.unpack("<Q", plain[:8])[0]
    hashes = tensor_hashes(plain[8 + header_length :]) | {"sshs_legacy_hash": legacy_hash(plain)}
    return _serialised(tensors, metadata | hashes)


def _serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the safetensors bytes, in one order always.

    safetensors' own writer keeps the metadata in a hash map, so that its bytes differ from run to run.
    Layout: header's length (8 bytes, little-endian), JSON padded with spaces to 8 bytes, the tensors.
    Larger dtypes come first, as there, so that every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    blobs: list[bytes] = []
    offset = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        tensor = tensors[name]
        blob = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    # UTF-8 as there; a file name that is none cannot be said exactly.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def _png(preview: Image) -> bytes:
    stream = io.BytesIO()
    preview.convert("RGB").save(stream, format="PNG")
    return stream.getvalue()


def _write_all(contents: Mapping[Path, bytes], overwrite: bool) -> None:
    """Write all files under temporary names, then rename; the last is the one that others wait for."""
    existing = [path for path in contents if path.exists()]
    if existing and not overwrite:
        raise OutputError(f"{existing[0]} exists already: choose another name or overwrite it (--overwrite)")
    temporary: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary[path] = Path(file.name)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # NamedTemporaryFile is for the owner's eyes only; a file to share has the usual rights.
            temporary[path].chmod(0o666 & ~_umask())
        for path, name in temporary.items():
            name.replace(path)
    except OSError as error:
        where = error.filename or "the adapter"
        raise OutputError(f"Cannot write {where}: {error.strerror or error}") from error
    finally:
        for name in temporary.values():
            name.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_kind(path: Path) -> None:
    """Refuse what is no safetensors file, by name; the first bytes tell more than the suffix."""
    if path.is_dir():
        raise AdapterError(f"{path} is a folder: give the .safetensors file of an adapter")
    try:
        with path.open("rb") as file:
            beginning = file.read(9)
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist: give the .safetensors file of an adapter") from None
    except OSError as error:
        raise AdapterError(f"Cannot read {path}: {error.strerror or error}") from None
    # The header's JSON is looked for first: a header of 128 bytes, or 384, begins like a pickle.
    if beginning[8:] == b"{":
        return
    if beginning[:4] == b"PK\x03\x04" or beginning[:1] == b"\x80":
        raise AdapterError(
            f"{path} is a pickle, which can run code when it is loaded: convert it to safetensors first"
        )
    raise AdapterError(
        f"{path} is no safetensors file (its header is missing): give the .safetensors file of an adapter"
    )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"{path} is broken or cut short ({reason}): get the file again") from None


def _adapter(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Adapter:
    parts: dict[str, dict[str, Tensor]] = {}
    n = layers_per_block(metadata)
    for key, tensor in tensors.items():
        module, part = keys.split_key(key, layers_per_block=n)
        if part in parts.setdefault(module, {}):
            raise AdapterError(f"Two keys give {part} of {module}, the second is {key!r}")
        _check_values(key, tensor)
        parts[module][part] = tensor
    if not parts:
        raise AdapterError("The file holds no LoRA layers")
    alphas = _PeftAlphas(metadata)
    modules = {name: _weights(name, found, alphas) for name, found in sorted(parts.items())}
    two_text_encoders = any(keys.component_of(name) == "text_encoder_2" for name in modules)
    return Adapter(family_of(metadata, _text_width(modules), two_text_encoders), modules, metadata)


def _check_values(key: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise AdapterError(f"{key!r} has dtype {tensor.dtype}; float16, bfloat16 or float32 is expected")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{key!r} has values that are not finite (NaN or infinite): the file is unusable")


def _weights(name: str, found: Mapping[str, Tensor], alphas: _PeftAlphas) -> LoraWeights:
    for part in ("lora_A", "lora_B"):
        if part not in found:
            present = " and ".join(sorted(found))
            raise AdapterError(f"{name} has {present} but no {part}: the file is incomplete")
    alpha = found.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise AdapterError(f"alpha of {name} must be one number, got shape {tuple(alpha.shape)}")
    try:
        # The convention of kohya, diffusers and PEFT: without alpha the scale alpha / rank is 1.
        value = float(alpha.item()) if alpha is not None else alphas.of(name, found["lora_A"].shape[0])
        return LoraWeights(found["lora_A"], found["lora_B"], value)
    except (AdapterError, IndexError) as error:
        raise AdapterError(f"{name}: {error}") from None


class _PeftAlphas:
    """alpha of files in diffusers' format: PEFT's configuration, as JSON in the header."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        """Read `lora_adapter_metadata`; without it every alpha is the rank.

        Raises:
            AdapterError: broken JSON, or a variant that plain factors cannot express.
        """
        self.fields: dict[str, Any] = {}
        text = metadata.get("lora_adapter_metadata")
        if text is None:
            return
        try:
            self.fields = json.loads(text)
        except (ValueError, RecursionError):
            raise AdapterError(
                "The header's lora_adapter_metadata is no JSON: alpha cannot be known"
            ) from None
        if not isinstance(self.fields, dict):
            raise AdapterError(
                "The header's lora_adapter_metadata must be a JSON object: alpha cannot be known"
            )
        for key, value in self.fields.items():
            if key.rpartition(".")[2] in ("use_dora", "use_rslora", "lora_bias") and value:
                raise AdapterError(f"The file uses {key.rpartition('.')[2]}; only plain LoRA files are read")

    def of(self, module: str, rank: int) -> float:
        """Return alpha of a layer: its own pattern, else its component's, else the rank."""
        component, _, path = module.partition(".")
        patterns = self.fields.get(f"{component}.alpha_pattern") or {}
        for pattern, alpha in patterns.items() if isinstance(patterns, dict) else ():
            literal = re.sub(r"\\(.)|\[\.\]", lambda m: m.group(1) or ".", pattern.removeprefix("^"))
            if path == literal or path.endswith(f".{literal}"):
                return _number(alpha, pattern)
        alpha = self.fields.get(f"{component}.lora_alpha")
        return float(rank) if alpha is None else _number(alpha, f"{component}.lora_alpha")


def _number(value: Any, key: str) -> float:
    # The comparison is false for NaN, and exact for integers too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise AdapterError(f"{key} in the header must be a number, got {str(value)[:40]}")
    return float(value)


def _text_width(modules: Mapping[str, LoraWeights]) -> int | None:
    """Return in_features of a cross-attention key projection, which tells SD1, SD2 and SDXL apart."""
    widths = (w.lora_A.shape[1] for name, w in modules.items() if name.endswith(".attn2.to_k"))
    return next(widths, None)
