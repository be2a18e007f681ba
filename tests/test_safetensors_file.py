"""Files that are broken in every way: refused from the header, in one line, before anything large is made."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, run
from safetensors.torch import load_file

from dbadapter import safetensors_header
from dbadapter.errors import AdapterError
from dbadapter.safetensors_file import read_tensors, serialise
from dbadapter.safetensors_header import MAX_HEADER_BYTES, read_header

DOWN, UP = (
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",
)
TENSORS = {DOWN: torch.ones(2, 3), UP: torch.ones(4, 2)}


def content(
    change: Callable[[dict[str, Any]], Any] = lambda header: None, data: bytes | None = None
) -> bytes:
    """Return a valid file of two tensors, after a change of its header."""
    own, *blobs = serialise(TENSORS, {"a": "b"})
    header = json.loads(bytes(own)[8:])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (b"".join(blobs) if data is None else data)


def test_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content())
    header = read_header(path)
    assert list(header.entries) == [DOWN, UP]
    assert (header.entries[DOWN].shape, header.entries[DOWN].begin, header.entries[DOWN].end) == (
        (2, 3),
        0,
        24,
    )
    assert header.metadata == {"a": "b"}
    for found in (read_tensors(path, header), load_file(path)):
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape too large": (
        lambda h: h[DOWN].update(shape=[2, 3000]),
        "needs 24000 bytes by its shape, 24 are given",
    ),
    "huge shape": (lambda h: h[DOWN].update(shape=[2**62, 3]), "has shape"),
    "product beyond 64 bits": (lambda h: h[DOWN].update(shape=[2**40] * 4), r"needs \d{49} bytes"),
    "negative shape": (lambda h: h[DOWN].update(shape=[-2, -3]), "has shape"),
    "shape of floats": (lambda h: h[DOWN].update(shape=[2.0, 3.0]), "has shape"),
    "shape of booleans": (lambda h: h[DOWN].update(shape=[True, 6]), "has shape"),
    "no shape": (lambda h: h[DOWN].pop("shape"), "must have dtype, shape and data_offsets"),
    "many dimensions": (lambda h: h[DOWN].update(shape=[2, 3] + [1] * 7), "at most 8 numbers"),
    "other dtype": (lambda h: h[DOWN].update(dtype="F64"), "needs 48 bytes"),
    "unknown dtype": (lambda h: h[DOWN].update(dtype="PICKLE"), "has dtype PICKLE"),
    "dtype that is a list": (lambda h: h[DOWN].update(dtype=["F32"]), "has dtype"),
    "overlap": (
        lambda h: h[UP].update(data_offsets=[0, 32]),
        "begins at byte 0 of the data, expected 32|expected 24",
    ),
    "gap": (lambda h: h[UP].update(data_offsets=[32, 64]), "begins at byte 32 of the data, expected 24"),
    "beyond the end": (lambda h: h[UP].update(data_offsets=[24, 10**12]), "needs 32 bytes"),
    "backwards": (lambda h: h[DOWN].update(data_offsets=[24, 0]), "are given"),
    "three offsets": (lambda h: h[DOWN].update(data_offsets=[0, 24, 24]), "two numbers are expected"),
    "bytes of no tensor": (lambda h: h.pop(UP), "its tensors take 24 bytes, 56 are there"),
    "a field too many": (lambda h: h[DOWN].update(pickle="x"), "must have dtype, shape and data_offsets"),
    "an entry that is none": (lambda h: h.update({DOWN: 3}), "must have dtype, shape and data_offsets"),
    "metadata of numbers": (lambda h: h.update(__metadata__={"a": 1}), "JSON object of strings"),
    "metadata that is a list": (lambda h: h.update(__metadata__=["a"]), "JSON object of strings"),
    "a long name": (lambda h: h.update({"x" * 500: h.pop(UP)}), "at most 400 printable characters"),
    "a name of control characters": (lambda h: h.update({"a\n\x1b[2J": h.pop(UP)}), "printable characters"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(tmp_path: Path, case: str) -> None:
    change, words = HEADERS[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content(change))
    with pytest.raises(AdapterError, match=words) as caught:
        read_header(path)
    assert len(str(caught.value).splitlines()) == 1
    result = run("convert", path, "--to", "kohya", "--output", tmp_path / "b.safetensors")
    assert_refused(result, 1, f"{path} is broken or cut short", "get the file again")


def framed(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        (b"", "no safetensors file"),
        (b"PK\x03\x04" + bytes(40), "is a pickle.*convert it"),
        (b"\x80\x02" + bytes(40), "is a pickle.*convert it"),
        (b"<!DOCTYPE html><html>", "no safetensors file"),
        (b"GGUF" + bytes(40), "no safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", r"its header has 9223372036854775808 bytes, the file 10"),
        (struct.pack("<Q", 11) + b"{}", "its header has 11 bytes, the file 10"),
        (framed(b"{"), "JSON cannot be read"),
        (framed(b"{} ", b"x"), "its tensors take 0 bytes, 1 are there"),
        (framed(b'{"a": NaN}'), "has the number NaN"),
        (framed(b'{"a": -Infinity}'), "has the number -Infinity"),
        (framed(b'{"a": ' + b"9" * 5000 + b"}"), "JSON cannot be read"),
        (framed(b'{"a": ' + b"[" * 100_000 + b"}"), "JSON cannot be read"),
        (framed(b'{"a": ' + b'{"a":' * 100_000 + b"}"), "JSON cannot be read"),
        (framed(b'{"\xff": 1}'), "JSON cannot be read"),
        (framed(b'{"a": {}, "a": {}}'), "has a key twice"),
        (framed(b'{"__metadata__": {"a": "1", "a": "2"}}'), "has a key twice"),
    ],
)
def test_files_that_are_broken(tmp_path: Path, whole: bytes, words: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole)
    with pytest.raises(AdapterError, match=words) as caught:
        read_header(path)
    assert len(str(caught.value).splitlines()) == 1


def test_cut_at_every_byte(tmp_path: Path) -> None:
    whole, path = content(), tmp_path / "a.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterError, match=r"cut short|no safetensors file"):
            read_header(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(AdapterError, match="57 are there"):
        read_header(path)


def peak(path: Path) -> int:
    """Return the most bytes of Python's that reading takes, in a file that is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError):
            read_header(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_header_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
        file.truncate(2**32)
    assert peak(path) < 100_000
    with pytest.raises(AdapterError, match="has a header of 8388609 bytes"):
        read_header(path)


def test_memory_for_the_worst_header_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the largest, in small entries: Python takes 24 times the bytes of the file."""
    small = MAX_HEADER_BYTES // 16
    monkeypatch.setattr(safetensors_header, "MAX_HEADER_BYTES", small)
    path = tmp_path / "a.safetensors"
    many = ",".join(f'"{i:x}":0' for i in range(small // 9))
    path.write_bytes(framed(b"{" + many.encode()[: small - 60] + b',"x":0}'))
    assert peak(path) < 30 * small


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 1)
    path = tmp_path / "a.safetensors"
    path.write_bytes(content())
    with pytest.raises(AdapterError, match="has 2 tensors, an adapter at most 1"):
        read_header(path)


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content())
    header = read_header(path)
    path.write_bytes(content(lambda h: h.pop(UP), bytes(24)))
    with pytest.raises(AdapterError, match="broken or cut short"):
        read_tensors(path, header)
    path.unlink()
    with pytest.raises(AdapterError, match="broken or cut short"):
        read_tensors(path, header)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_what_is_no_file(tmp_path: Path) -> None:
    """A pipe would keep a reader waiting for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterError, match="pipe is no regular file"):
        read_header(tmp_path / "pipe")
    with pytest.raises(AdapterError, match="is a folder"):
        read_header(tmp_path)
