"""The header of a safetensors file, checked before anything else of the file is read. No torch.

Layout: the header's length (8 bytes, little-endian), a JSON object, the tensors' bytes in one row
(https://github.com/huggingface/safetensors, "Format"). Nothing in a header is followed or run.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dbadapter.errors import AdapterError

__all__ = ["AGAIN", "MAX_HEADER_BYTES", "Entry", "Header", "header_bytes", "parse_json", "read_header"]

# SDXL with every layer adapted has 3,200 tensors and a header of 600 kB, thumbnail included; tag lists of
# large data sets take a few megabytes. A header of this size costs 200 MB at the worst while it is parsed.
MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8  # more than any layer has
MAX_NAME = 400  # characters; SDXL's longest is 120

# Bytes of a number. Adapters hold the floats above; whole checkpoints, refused by name, the rest too.
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4,
          "U64": 8, "I64": 8, "C64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # fmt: skip
_FILE = "give the .safetensors file of an adapter"
AGAIN = "get the file again"


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor.

    Attributes:
        dtype: in the format's words, e.g. "F16".
        shape: at most eight dimensions.
        begin, end: in bytes, behind the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A header that was checked against the file's size.

    Attributes:
        entries: tensor name -> entry, in the order of the file's bytes.
        metadata: str -> str.
        data_start: where the tensors begin, in bytes.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file; no tensor is read.

    Raises:
        AdapterError: no such file, a pickle, or a header that is too large, no JSON, or does not describe
            the bytes behind it exactly; the message names the file and the key.
    """
    if path.exists() and not path.is_file():
        raise AdapterError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}: {_FILE}")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            text = _header_text(path, file, size)
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist: {_FILE}") from None
    except OSError as error:
        raise AdapterError(f"Cannot read {path}: {error.strerror or error}") from None
    try:
        return _checked(parse_json(text), 8 + len(text), size)
    except AdapterError as error:
        raise AdapterError(f"{path} is broken or cut short ({error}): {AGAIN}") from None


def parse_json(text: bytes) -> Any:
    """Return the value of JSON text; stricter than Python: no NaN, no key given twice.

    Raises:
        AdapterError: it is none, or is nested too deeply.
    """

    def refuse(constant: str) -> NoReturn:
        raise AdapterError(f"its JSON has the number {constant}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise AdapterError("its JSON has a key twice")
        return found

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        # ValueError stands for bytes that are no UTF-8 and for integers of thousands of digits too.
        raise AdapterError("its JSON cannot be read") from None


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Return the length and the JSON, padded with spaces to 8 bytes; metadata in the order of its keys."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    # UTF-8 as there; a file name that is none cannot be said exactly.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _header_text(path: Path, file: BinaryIO, size: int) -> bytes:
    """Return the header's JSON; the first bytes tell more of a file's kind than its suffix."""
    beginning = file.read(9)
    # The header's JSON is looked for first: a header of 128 bytes, or 384, begins like a pickle.
    if beginning[8:] != b"{":
        if beginning[:4] == b"PK\x03\x04" or beginning[:1] == b"\x80":
            raise AdapterError(
                f"{path} is a pickle, which can run code when it is loaded: convert it to safetensors first"
            )
        raise AdapterError(f"{path} is no safetensors file (its header is missing): {_FILE}")
    length = struct.unpack("<Q", beginning[:8])[0]
    if length > size - 8:
        raise AdapterError(
            f"{path} is broken or cut short (its header has {length} bytes, the file {size}): {AGAIN}"
        )
    if length > MAX_HEADER_BYTES:
        raise AdapterError(
            f"{path} has a header of {length} bytes; an adapter's has at most {MAX_HEADER_BYTES}: {_FILE}"
        )
    return b"{" + file.read(length - 1)


def _checked(header: Any, data_start: int, size: int) -> Header:
    if not isinstance(header, dict):
        raise AdapterError("its header must be a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError("its __metadata__ must be a JSON object of strings")
    if len(header) > MAX_TENSORS:
        raise AdapterError(f"it has {len(header)} tensors, an adapter at most {MAX_TENSORS}")
    entries = {name: _entry(name, fields) for name, fields in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 0
    for name, entry in ordered.items():
        if entry.begin != end:
            raise AdapterError(f"{name!r} begins at byte {entry.begin} of the data, expected {end}")
        end = entry.end
    if data_start + end != size:
        raise AdapterError(f"its tensors take {end} bytes, {size - data_start} are there")
    return Header(ordered, metadata, data_start)


def _entry(name: str, fields: Any) -> Entry:
    if len(name) > MAX_NAME or not name.isprintable():
        raise AdapterError(f"a tensor's name is {name[:40]!r}..., at most {MAX_NAME} printable characters")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise AdapterError(f"{name!r} has dtype {_short(dtype)}, which is none of safetensors'")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise AdapterError(f"{name!r} has shape {_short(shape)}, at most {MAX_DIMENSIONS} numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise AdapterError(f"{name!r} has data_offsets {_short(offsets)}, two numbers are expected")
    needed = _SIZES[dtype]
    for dimension in shape:
        needed *= dimension
    begin, end = offsets
    if end - begin != needed:
        raise AdapterError(f"{name!r} needs {needed} bytes by its shape, {end - begin} are given")
    return Entry(dtype, tuple(shape), begin, end)


def _naturals(values: Any) -> bool:
    # By type, because True is an int; the bound keeps sums and products small.
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _short(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value)[:60])
