"""The header of a safetensors file: names, shapes and metadata without loading a weight, and its checksums.

Without torch: where each tensor lies, for single numbers such as alpha and for the hashes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dbadapter import safetensors_header
from dbadapter.errors import AdapterError
from dbadapter.safetensors_header import Entry, header_bytes

__all__ = ["Checksums", "Header", "TensorInfo", "checksums", "numbers", "read_header"]

_CHUNK = 2**22  # bytes of a tensor that are looked at in one go
# struct's letters; BF16 is the upper half of a float32.
_NUMBERS = {"F16": "<e", "F32": "<f", "F64": "<d", "BF16": "<f"}
# The bits of a float's exponent, all of which are set in NaN and infinity.
_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}
_EXPONENTS["F64"] = ("<u8", 0x7FF0000000000000)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file: `dtype` as safetensors writes it, e.g. "F16"; its bytes from `begin` to `end`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says before its weights; `begin` and `end` of the tensors count from the file's start.

    Attributes:
        path: the file.
        size: in bytes.
        data_start: where the tensors begin.
        metadata: str -> str.
        tensors: name -> information, in the order of their bytes.
    """

    path: Path
    size: int
    data_start: int
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True)
class Checksums:
    """SHA-256 in hex of the whole file and of its tensors, and kohya's short one of old user interfaces."""

    file: str
    tensors: str
    legacy: str


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file; no weight is loaded.

    Raises:
        AdapterError: no safetensors file (a pickle is named and never opened), or broken; one line.
    """
    checked = safetensors_header.read_header(path)
    start = checked.data_start
    tensors = {
        name: TensorInfo(entry.dtype, entry.shape, start + entry.begin, start + entry.end)
        for name, entry in checked.entries.items()
    }
    if not tensors:
        raise AdapterError(f"{path} holds no tensors: give the .safetensors file of an adapter")
    size = max(tensor.end for tensor in tensors.values())
    return Header(path, size, start, checked.metadata, tensors)


def numbers(header: Header, names: Iterable[str]) -> dict[str, float]:
    """Return name -> value of tensors that hold one number, e.g. kohya's alpha; others are left out."""
    found: dict[str, float] = {}
    with header.path.open("rb") as file:
        for name in names:
            tensor = header.tensors[name]
            code = _NUMBERS.get(tensor.dtype)
            if code is None or tensor.end - tensor.begin != struct.calcsize(code) // (
                2 if tensor.dtype == "BF16" else 1
            ):
                continue
            file.seek(tensor.begin)
            data = file.read(tensor.end - tensor.begin)
            found[name] = struct.unpack(code, b"\0\0" + data if tensor.dtype == "BF16" else data)[0]
    return found


def checksums(header: Header) -> Checksums:
    """Return the file's hashes, computed anew; its values are checked in the same pass.

    Raises:
        AdapterError: a value is NaN or infinite; the message names the tensor.
    """
    whole, data = hashlib.sha256(), hashlib.sha256()
    # kohya's: of 64 KiB from 1 MiB on, in the file written with its `ss_*` entries only.
    legacy = hashlib.sha256()
    first = header.data_start + 0x100000 - _length_with_ss_only(header)
    with header.path.open("rb") as file:
        whole.update(file.read(header.data_start))
        for name, tensor in header.tensors.items():
            position = tensor.begin
            while position < tensor.end:
                chunk = file.read(min(_CHUNK, tensor.end - position))
                if not chunk:
                    raise AdapterError(f"{header.path} became shorter while it was read: try again")
                whole.update(chunk)
                data.update(chunk)
                low, high = max(first - position, 0), max(first + 0x10000 - position, 0)
                legacy.update(chunk[low:high])
                if not _finite(chunk, tensor.dtype):
                    raise AdapterError(
                        f"{header.path}: {name!r} has values that are not finite (NaN or infinite): "
                        "the file is unusable"
                    )
                position += len(chunk)
    return Checksums(whole.hexdigest(), data.hexdigest(), legacy.hexdigest()[:8])


def _finite(chunk: bytes, dtype: str) -> bool:
    if dtype not in _EXPONENTS:
        return True
    import numpy as np

    words, exponent = _EXPONENTS[dtype]
    values = np.frombuffer(chunk, words)
    return not bool(((values & exponent) == exponent).any())


def _length_with_ss_only(header: Header) -> int:
    """Return where the tensors would begin if the header had no metadata but `ss_*`.

    Only the length matters for the legacy hash, so that the order of the entries need not be known.
    """
    entries = {
        name: Entry(
            tensor.dtype, tensor.shape, tensor.begin - header.data_start, tensor.end - header.data_start
        )
        for name, tensor in header.tensors.items()
    }
    kept = {key: value for key, value in header.metadata.items() if key.startswith("ss_")}
    return len(header_bytes(entries, kept))
