"""The adapter's file: written exactly, read safely."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save, save_file
from small_adapters import CONV, KOHYA_TO_K, Q_PROJ, SMALL, TO_K, example, peft_file

from dbadapter.adapter_file import (
    Adapter,
    AdapterDescription,
    LoraWeights,
    read_adapter,
    verify,
    write_adapter,
)
from dbadapter.errors import AdapterError, OutputError

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "subject.safetensors"
    write_adapter(path, example(), sidecars=False)
    return path


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Any adapter that a file can hold: some layers, ranks, alphas, dtypes and values within float16."""
    names = st.sampled_from(
        [TO_K, Q_PROJ, CONV, TO_K.replace("to_k", "to_out.0"), Q_PROJ.replace("q_", "out_")]
    )
    sizes = st.integers(1, 6)
    modules = {}
    for name in draw(st.sets(names, min_size=1)):
        rank, inner, outer = draw(sizes), draw(sizes), draw(sizes)
        kernel, ones = ((3, 3), (1, 1)) if name == CONV else ((), ())
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        scale = draw(st.sampled_from([1e-8, 1e-3, 1.0, 1e3]))
        a = torch.randn(rank, inner, *kernel, generator=generator) * scale
        b = torch.randn(outer, rank, *ones, generator=generator) * scale
        # a transposed view: writing must not depend on strides
        a = a.transpose(0, 1).contiguous().transpose(0, 1)
        modules[name] = LoraWeights(a, b, draw(st.floats(0.015625, 512, width=32)))
    return Adapter(draw(st.sampled_from(["sd1", "toybox"])), modules)


@given(adapters(), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=40)
def test_reading_gives_what_was_written(tmp_path_factory: Any, adapter: Adapter, dtype: torch.dtype) -> None:
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    write_adapter(path, adapter, dtype=dtype, sidecars=False)
    read = read_adapter(path)
    assert read.family == adapter.family
    assert read.modules.keys() == adapter.modules.keys()
    for name, weights in adapter.modules.items():
        assert read.modules[name].alpha == weights.alpha
        assert read.modules[name].lora_A.dtype == dtype
        assert torch.equal(read.modules[name].lora_A, weights.lora_A.to(dtype))
        assert torch.equal(read.modules[name].lora_B, weights.lora_B.to(dtype))
    verify(path, adapter)
    again = path.with_name("b.safetensors")
    # What was read can be written again without loss.
    write_adapter(again, read, dtype=dtype, sidecars=False)
    verify(again, adapter)


def test_every_length_of_the_header_is_read(tmp_path: Path) -> None:
    """One file in 32 begins with the byte 0x80, as a pickle does."""
    beginnings = set()
    for length in range(0, 256, 8):
        path = tmp_path / f"{length}.safetensors"
        write_adapter(path, SMALL, description=AdapterDescription(title="x" * (1 + length)), sidecars=False)
        beginnings.add(path.read_bytes()[0])
        verify(path, SMALL)
    assert 0x80 in beginnings


def test_kohya_layout_as_every_tool_reads_it(file: Path) -> None:
    tensors = load_file(file)
    assert tensors[f"{KOHYA_TO_K}.lora_down.weight"].shape == (4, 12)
    assert tensors[f"{KOHYA_TO_K}.lora_up.weight"].shape == (8, 4)
    assert tensors[f"{KOHYA_TO_K}.alpha"].shape == ()
    assert tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"].item() == 9.5
    assert {t.dtype for k, t in tensors.items() if not k.endswith("alpha")} == {torch.float16}
    assert len(tensors) == 9


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_adapter(tmp_path / folder / "a.safetensors", example(), preview=picture())
    for name in ("a.safetensors", "a.json", "a.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "alpha"])
def test_verify_sees_one_changed_number(file: Path, part: str) -> None:
    adapter = example()
    verify(file, adapter)
    weights = adapter.modules[TO_K]
    if part == "alpha":
        adapter.modules[TO_K] = LoraWeights(weights.lora_A, weights.lora_B, 2.0001)
    else:
        getattr(weights, part)[0, 0] += 0.01
    with pytest.raises(AdapterError, match="alpha" if part == "alpha" else f"{part} of {TO_K} differs"):
        verify(file, adapter)


def test_verify_sees_a_missing_layer(file: Path) -> None:
    adapter = example()
    del adapter.modules[CONV]
    with pytest.raises(AdapterError, match="1 layers are in the file or in the model only"):
        verify(file, adapter)


def picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGBA").resize((300, 200))


def test_sidecars_and_thumbnail(tmp_path: Path) -> None:
    description = AdapterDescription(trigger="sks mug", usage_hint="try 0.8", description="My mug")
    path = tmp_path / "my.mug.safetensors"
    write_adapter(path, example(), description=description, preview=picture())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.mug.json", "my.mug.png", "my.mug.safetensors"]
    assert json.loads((tmp_path / "my.mug.json").read_text()) == {
        "description": "My mug",
        "sd version": "SD1",
        "activation text": "sks mug",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "try 0.8",
    }
    with Image.open(tmp_path / "my.mug.png") as shown:
        assert shown.size == (300, 200)
    kind, data = read_adapter(path).metadata["modelspec.thumbnail"].split(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as small:
        assert small.format == "JPEG"
        assert max(small.size) == 256


def test_hashes_are_those_that_sd_scripts_computes(tmp_path: Path) -> None:
    """There, safetensors' own writer makes the bytes. The legacy hash begins 1 MiB into them."""
    path = tmp_path / "large.safetensors"
    description = AdapterDescription(base="toybox", trigger="sks café 猫")
    write_adapter(path, example(width=200_000), description=description, preview=picture(), sidecars=False)
    metadata = read_adapter(path).metadata
    own = save(load_file(path), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    begin = 8 + struct.unpack("<Q", own[:8])[0]
    assert metadata["sshs_model_hash"] == hashlib.sha256(own[begin:]).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    assert len(own) > 0x110000
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(own[0x100000:0x110000]).hexdigest()[:8]


def test_toybox_counts_as_sd1_and_is_known_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(path, example("toybox"), description=AdapterDescription(base="toybox"))
    adapter = read_adapter(path)
    assert adapter.family == "toybox"
    assert adapter.metadata["ss_base_model_version"] == "sd_v1"
    assert adapter.metadata["ss_sd_model_name"] == adapter.metadata["dbadapter.base"] == "toybox"


@pytest.mark.parametrize(
    ("metadata", "width", "family"),
    [
        ({"ss_base_model_version": "sd_v1"}, 12, "sd1"),
        ({"ss_base_model_version": "sd_v2_v"}, 12, "sd2"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, 12, "sdxl"),
        ({}, 768, "sd1"),
        ({}, 1024, "sd2"),
        ({}, 2048, "sdxl"),
        ({}, 12, "unknown"),
    ],
)
def test_families_of_files_by_others(
    tmp_path: Path, metadata: dict[str, str], width: int, family: str
) -> None:
    tensors = {
        f"{KOHYA_TO_K}.lora_down.weight": torch.ones(2, width),
        f"{KOHYA_TO_K}.lora_up.weight": torch.ones(8, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.family == family
    assert adapter.modules[TO_K].alpha == 2.0  # none in the file: the scale is 1


def test_metadata_of_a_file_survives_rewriting_but_not_its_hashes(tmp_path: Path) -> None:
    adapter = example()
    adapter.metadata = {
        "ss_session_id": "7",
        "modelspec.author": "A. N. Other",
        "sshs_model_hash": "old",
        # diffusers refuses a kohya file with this entry
        "lora_adapter_metadata": "{}",
    }
    path = tmp_path / "a.safetensors"
    write_adapter(path, adapter, description=AdapterDescription(seed=3))
    metadata = read_adapter(path).metadata
    assert metadata["ss_session_id"] == "7"
    assert metadata["modelspec.author"] == "A. N. Other"
    assert metadata["ss_seed"] == "3"
    assert metadata["sshs_model_hash"] != "old"
    assert "lora_adapter_metadata" not in metadata


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.with_suffix(".json").write_text("mine")
    with pytest.raises(OutputError, match=r"a\.json exists already.*--overwrite"):
        write_adapter(path, example())
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    write_adapter(path, example(), overwrite=True)
    verify(path, example())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_adapter(tmp_path / "a.safetensors", example())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.modules.clear(), "no layers"),
        (lambda a: a.modules[TO_K].lora_A.fill_(float("nan")), "is not finite.*learning rate"),
        (lambda a: a.modules[TO_K].lora_B.fill_(1e6), "too large for torch.float16"),
        (lambda a: setattr(a, "family", "unknown"), "Family must be one of"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, change: Any, words: str) -> None:
    adapter = example()
    change(adapter)
    with pytest.raises(AdapterError, match=words):
        write_adapter(tmp_path / "a.safetensors", adapter)
    assert list(tmp_path.iterdir()) == []


def test_suffix_dtype_and_folder_are_checked(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"must end in \.safetensors"):
        write_adapter(tmp_path / "a.pt", example())
    with pytest.raises(AdapterError, match="dtype must be"):
        write_adapter(tmp_path / "a.safetensors", example(), dtype=torch.int8)
    (tmp_path / "taken").write_text("a file, no folder")
    with pytest.raises(OutputError, match="Cannot write"):
        write_adapter(tmp_path / "taken" / "a.safetensors", example())


@pytest.mark.parametrize(
    ("metadata", "alpha"),
    [
        (None, 2.0),
        ({"unet.lora_alpha": 7, "unet.alpha_pattern": {}}, 7.0),
        ({"text_encoder.lora_alpha": 7}, 2.0),
        ({"unet.lora_alpha": 7, "unet.alpha_pattern": {"attn2.to_k": 3}}, 3.0),
        ({"unet.lora_alpha": 7, "unet.alpha_pattern": {"^" + TO_K.removeprefix("unet."): 3.5}}, 3.5),
        ({"unet.lora_alpha": 7, "unet.alpha_pattern": {"ttn2.to_k": 3}}, 7.0),
    ],
)
def test_alpha_of_diffusers_files(tmp_path: Path, metadata: dict[str, Any] | None, alpha: float) -> None:
    assert read_adapter(peft_file(tmp_path / "a.safetensors", metadata)).modules[TO_K].alpha == alpha


def test_times_are_kohyas(tmp_path: Path) -> None:
    started = datetime(2025, 1, 1, tzinfo=UTC)
    path = tmp_path / "a.safetensors"
    write_adapter(path, example(), description=AdapterDescription(started_at=started))
    assert read_adapter(path).metadata["ss_training_started_at"] == "1735689600.0"
