"""Edit what a file says about itself; the tensors' bytes stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from dbadapter import keys
from dbadapter.adapter import same_family
from dbadapter.adapter_metadata import (
    family_of,
    layers_per_block,
    legacy_hash,
    tensor_hashes,
    thumbnail,
)
from dbadapter.adapter_parts import parts_of
from dbadapter.errors import AdapterError, OutputError, UsageError
from dbadapter.folding import FOLDED
from dbadapter.peft_config import HEADER_KEY
from dbadapter.safetensors_file import read_data, write_files
from dbadapter.safetensors_header import MAX_HEADER_BYTES, Header, header_bytes, read_header

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["edit_metadata"]

_THUMBNAIL = "modelspec.thumbnail"
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
# How the tensors are to be understood: who changes it changes the adapter.
_TENSORS = (HEADER_KEY, FOLDED, "dbadapter.layers_per_block", "ss_network_dim", "ss_network_alpha",
            "ss_network_args", "ss_network_module")  # fmt: skip
_MAX_KEY = 400  # characters


def edit_metadata(
    path: str | PathLike[str],
    changes: Mapping[str, str] | None = None,
    *,
    remove: Collection[str] = (),
    preview: Image | None = None,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write the file with other metadata and return it; hashes that the file has are brought up to date.

    Args:
        path: an adapter in any layout that is one file.
        changes: key -> value, set after `remove`.
        remove: keys to take out; each must be there.
        preview: a picture for the header's thumbnail.
        output: another file; the file itself by default, which needs `overwrite`.
        overwrite: replace the output.
    Raises:
        UsageError: nothing is to be changed, or a key that follows from the tensors is.
        AdapterError: the file is broken or no adapter, or the change says what its tensors are not.
        OutputError: the output exists already, or cannot be written.
    """
    path = Path(path)
    output = path if output is None else Path(output)
    if output.suffix != ".safetensors":
        raise OutputError(f"An adapter's file must end in .safetensors, got {output}")
    wanted = dict(changes or {})
    if not wanted and not remove and preview is None:
        raise UsageError("Nothing to change: pass --set KEY=VALUE, --remove KEY or --thumbnail IMAGE")
    header = read_header(path)
    _check_keys(path, wanted, remove, header.metadata)
    metadata = {key: value for key, value in header.metadata.items() if key not in remove} | wanted
    if preview is not None:
        metadata[_THUMBNAIL] = thumbnail(preview)
    _check_family(path, header, metadata)
    data = read_data(path, header)
    metadata |= _hashes(header, metadata, data)
    text = header_bytes(header.entries, metadata)
    if len(text) > MAX_HEADER_BYTES:
        raise AdapterError(f"{path} would have a header of {len(text)} bytes; {MAX_HEADER_BYTES} are read")
    write_files({output: [text, data]}, overwrite)
    return metadata


def _check_keys(
    path: Path, changes: Mapping[str, str], remove: Collection[str], metadata: Mapping[str, str]
) -> None:
    for key in (*changes, *remove):
        if key in _HASHES:
            raise UsageError(f"{key} is computed from the file: leave it out")
        # Taking it out of a kohya file is a cure, because diffusers refuses such a file with it.
        if key in _TENSORS and not (key == HEADER_KEY and key in remove and _is_kohya(path)):
            raise UsageError(f"{key} says how the tensors are read, so it cannot be edited: leave it out")
    missing = [key for key in remove if key not in metadata]
    if missing:
        raise AdapterError(f"{path} has no metadata {missing[0]!r} that could be removed")
    for key, value in changes.items():
        if not key or len(key) > _MAX_KEY or not key.isprintable():
            raise UsageError(f"A key must have 1 to {_MAX_KEY} printable characters, got {key[:40]!r}")
        if _not_utf8(key + value):
            raise UsageError(f"The value of {key!r} must be text in UTF-8")


def _not_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_kohya(path: Path) -> bool:
    return all(key.startswith("lora_") for key in read_header(path).entries)


def _check_family(path: Path, header: Header, metadata: Mapping[str, str]) -> None:
    """Pass if the file is an adapter and is not said to be for a base whose layers are of other widths."""
    try:
        n = layers_per_block(header.metadata)
        parts = parts_of(header, lambda key: keys.split_key(key, layers_per_block=n))
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    widths = [
        header.entries[found["lora_A"]].shape[1]
        for name, found in parts.items()
        if name.endswith(".attn2.to_k")
    ]
    two = any(keys.component_of(name) == "text_encoder_2" for name in parts)
    by_shape = family_of({}, next(iter(widths), None), two)
    stated, before = family_of(metadata, None), family_of(header.metadata, None)
    if by_shape == "unknown" and not same_family(before, stated):
        raise AdapterError(
            f"{path} is for a base of family {before}, the metadata would say {stated}: leave "
            "ss_base_model_version and dbadapter.family as they are"
        )
    if "unknown" not in (by_shape, stated) and stated.replace("toybox", "sd1") != by_shape:
        raise AdapterError(
            f"{path} holds an adapter for {by_shape} by the shapes of its tensors, the metadata would say "
            f"{stated}: leave ss_base_model_version and dbadapter.family as they are"
        )


def _hashes(header: Header, metadata: Mapping[str, str], data: bytes) -> dict[str, str]:
    """Return the hashes that the file has; the legacy one is over the `ss_*` entries too (sd-scripts)."""
    plain = header_bytes(header.entries, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    hashes = tensor_hashes(data) | {"sshs_legacy_hash": legacy_hash(plain, data)}
    return {key: value for key, value in hashes.items() if key in metadata}
