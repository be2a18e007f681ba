"""Editing what a file says: the tensors' bytes stay, the hashes follow, what describes tensors stays."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, run
from PIL import Image
from safetensors.torch import load_file, save, save_file

from dbadapter import formats
from dbadapter.adapter_file import (
    Adapter,
    AdapterDescription,
    LoraWeights,
    read_adapter,
    verify,
    write_adapter,
)
from dbadapter.errors import AdapterError, OutputError, UsageError
from dbadapter.metadata_edit import edit_metadata

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def example(width: int = 768) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, width, generator=generator), torch.randn(6, 4, generator=generator)
    return Adapter("sd1", {TO_K: LoraWeights(a.half(), b.half(), 3.0)})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mug.safetensors"
    write_adapter(path, example(200_000), description=AdapterDescription(trigger="sks mug", author="Me"))
    return path


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + struct.unpack("<Q", content[:8])[0] :]


def test_the_tensors_stay_and_the_hashes_follow(file: Path, tmp_path: Path) -> None:
    before, beside = read_adapter(file).metadata, file.with_suffix(".json").read_bytes()
    out = tmp_path / "new.safetensors"
    changes = {"ss_training_comment": "for café 猫", "modelspec.title": "Mug=cup"}
    edit_metadata(file, changes, remove=["modelspec.author"], output=out)
    after = read_adapter(out).metadata
    assert data_of(out) == data_of(file)
    assert file.with_suffix(".json").read_bytes() == beside
    assert after["modelspec.title"] == "Mug=cup"
    assert "modelspec.author" not in after
    assert {k for k in before if before[k] != after.get(k)} == {
        "modelspec.author",
        "modelspec.title",
        "sshs_legacy_hash",
    }
    # As sd-scripts computes it, with safetensors' own writer.
    own = save(load_file(out), {key: value for key, value in after.items() if key.startswith("ss_")})
    assert after["sshs_legacy_hash"] == hashlib.sha256(own[0x100000:0x110000]).hexdigest()[:8]
    assert after["sshs_model_hash"] == hashlib.sha256(data_of(out)).hexdigest()


def test_there_and_back_gives_the_same_bytes(file: Path) -> None:
    whole = file.read_bytes()
    edit_metadata(file, {"modelspec.author": "You", "x": "y"}, overwrite=True)
    assert file.read_bytes() != whole
    edit_metadata(file, {"modelspec.author": "Me"}, remove=["x"], overwrite=True)
    assert file.read_bytes() == whole


def test_from_the_command_line(file: Path, tmp_path: Path) -> None:
    Image.new("RGB", (400, 300), "red").save(tmp_path / "red.png")
    words = ("metadata", file, "--set", "modelspec.author=You", "--thumbnail", tmp_path / "red.png")
    assert_refused(run(*words), 1, "exists already", "--overwrite")
    result = run(*words, "--overwrite")
    assert (result.exit_code, result.stdout) == (0, f"Written: {file}\n")
    found = read_adapter(file).metadata
    assert found["modelspec.author"] == "You"
    assert found["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    verify(file, example(200_000))


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ([], 2, "Nothing to change"),
        (["--set", "author"], 2, "must be KEY=VALUE, got 'author'"),
        (["--set", "=x"], 2, "A key must have 1 to 400"),
        (["--set", "a=b", "--remove", "a"], 2, "a is given twice"),
        (["--set", "sshs_model_hash=0"], 2, "computed from the file"),
        (["--set", "lora_adapter_metadata={}"], 2, "says how the tensors are read"),
        (["--set", "ss_network_alpha=1"], 2, "says how the tensors are read"),
        (["--remove", "ss_network_dim"], 2, "says how the tensors are read"),
        (["--set", "dbadapter.layers_per_block=1"], 2, "says how the tensors are read"),
        (["--remove", "nothing"], 1, "has no metadata 'nothing'"),
        (["--thumbnail", "none.png"], 1, "Cannot read the picture none.png"),
        (["--thumbnail", "broken.png"], 1, "Cannot read the picture broken.png"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write_adapter("a.safetensors", example(), sidecars=False)
    whole = Path("a.safetensors").read_bytes()
    assert_refused(run("metadata", "a.safetensors", *words, "--overwrite"), code, part)
    assert Path("a.safetensors").read_bytes() == whole


@pytest.mark.parametrize("key", ["ss_base_model_version", "dbadapter.family"])
def test_a_family_that_the_shapes_deny(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(path, example(768), sidecars=False)
    if key != "dbadapter.family":
        edit_metadata(path, remove=["dbadapter.family"], overwrite=True)
    value = "sdxl" if key == "dbadapter.family" else "sdxl_base_v1-0"
    with pytest.raises(AdapterError, match=r"an adapter for sd1 by the shapes .* would say sdxl"):
        edit_metadata(path, {key: value}, overwrite=True)
    edit_metadata(path, {"ss_base_model_version": "sd_v1"}, overwrite=True)


def test_an_entry_that_diffusers_refuses_can_be_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(path, example(), sidecars=False)
    save_file(load_file(path), path, {"lora_adapter_metadata": "{}", "ss_v2": "False"})
    edit_metadata(path, remove=["lora_adapter_metadata"], overwrite=True)
    assert read_adapter(path).metadata == {"ss_v2": "False"}
    formats.write_diffusers(path, example(), overwrite=True)
    for key in ("lora_adapter_metadata", "dbadapter.folded"):
        with pytest.raises(UsageError, match="says how the tensors are read"):
            edit_metadata(path, remove=[key], overwrite=True)
    edit_metadata(path, {"modelspec.author": "Me"}, overwrite=True)
    verify(path, example())


def test_a_file_that_is_no_adapter_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"emb_params": torch.ones(1, 768)}, path)
    with pytest.raises(AdapterError, match="textual inversion"):
        edit_metadata(path, {"a": "b"}, overwrite=True)
    write_adapter(tmp_path / "b.safetensors", example(), sidecars=False)
    with pytest.raises(AdapterError, match="would have a header of"):
        edit_metadata(tmp_path / "b.safetensors", {"a": "x" * (8 * 2**20)}, overwrite=True)
    with pytest.raises(OutputError, match="exists already"):
        edit_metadata(tmp_path / "b.safetensors", {"a": "b"})
    with pytest.raises(UsageError, match="UTF-8"):
        edit_metadata(tmp_path / "b.safetensors", {"a": "\ud800"}, overwrite=True)


def test_json_entries_stay_json(file: Path) -> None:
    tags: dict[str, Any] = {"mug": {"sks mug": 5}}
    edit_metadata(file, {"ss_tag_frequency": json.dumps(tags)}, overwrite=True)
    assert json.loads(read_adapter(file).metadata["ss_tag_frequency"]) == tags
