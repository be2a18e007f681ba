"""Tensors of safetensors files: read once the header is checked, written with the same bytes every time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dbadapter.errors import AdapterError, OutputError
from dbadapter.safetensors_header import AGAIN, Entry, Header, header_bytes

__all__ = [
    "DTYPES",
    "NAMES",
    "Chunks",
    "check_finite",
    "read_data",
    "read_tensors",
    "serialise",
    "window",
    "write_files",
]

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WRITTEN = NAMES | {torch.uint8: "U8", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
Chunks = Sequence[bytes | memoryview]
"""Bytes of a file in pieces, so that large ones are not copied together."""


def read_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """Return the tensors, in the header's order, on the CPU.

    Raises:
        AdapterError: they cannot be read; the file changed meanwhile.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in header.entries}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"{path} is broken or cut short ({reason}): {AGAIN}") from None


def read_data(path: Path, header: Header) -> bytes:
    """Return all bytes behind the header."""
    try:
        with path.open("rb") as file:
            file.seek(header.data_start)
            return file.read()
    except OSError as error:
        raise AdapterError(f"Cannot read {path}: {error.strerror or error}") from None


def check_finite(name: str, tensor: Tensor) -> None:
    """Pass if every value is a finite number.

    Raises:
        AdapterError: one is NaN or infinite.
    """
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{name!r} has values that are not finite (NaN or infinite): the file is unusable")


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Chunks:
    """Return a file's bytes: the header, then each tensor's; in one order always.

    safetensors' own writer keeps the metadata in a hash map, so that its bytes differ from run to run.
    Larger dtypes come first, as there, so that every tensor is aligned. Contiguous tensors on the CPU are not
    copied: the bytes are theirs.

    Args:
        tensors: of a floating dtype, uint8, int32, int64 or bool.
        metadata: str -> str.
    """
    entries: dict[str, Entry] = {}
    blobs: list[bytes | memoryview] = []
    offset = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        tensor = tensors[name].detach().to("cpu").contiguous()
        blob = tensor.reshape(-1).view(torch.uint8).numpy().data
        entries[name] = Entry(_WRITTEN[tensor.dtype], tuple(tensor.shape), offset, offset + len(blob))
        blobs.append(blob)
        offset += len(blob)
    return [header_bytes(entries, metadata), *blobs]


def write_files(contents: Mapping[Path, Chunks], overwrite: bool) -> None:
    """Write all files under temporary names, then rename; the last is the one that others wait for.

    Raises:
        OutputError: one exists already, or cannot be written; nothing has changed then.
    """
    if folder := next((path for path in contents if path.is_dir()), None):
        raise OutputError(f"{folder} is a folder; expected a file to write: choose another name")
    existing = [path for path in contents if path.exists()]
    if existing and not overwrite:
        raise OutputError(f"{existing[0]} exists already: choose another name or overwrite it (--overwrite)")
    temporary: dict[Path, Path] = {}
    try:
        for path, chunks in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary[path] = Path(file.name)
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            # NamedTemporaryFile is for the owner's eyes only; a file to share has the usual rights.
            temporary[path].chmod(0o666 & ~_umask())
        for path, name in temporary.items():
            name.replace(path)
    except OSError as error:
        where = error.filename or "the adapter"
        raise OutputError(
            f"Cannot write {where}: {error.strerror or error}; make room or choose another name"
        ) from error
    finally:
        for name in temporary.values():
            name.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def window(chunks: Iterable[bytes | memoryview], begin: int, end: int) -> Iterator[memoryview]:
    """Yield the bytes from `begin` to `end` of a file that is given in pieces."""
    position = 0
    for chunk in chunks:
        view = memoryview(chunk)
        yield view[max(0, begin - position) : max(0, end - position)]
        position += len(view)
