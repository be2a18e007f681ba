"""What is no adapter's file: pickles, broken bytes and headers, tensors that do not fit; refused by name."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_adapters import KOHYA_TO_K, SMALL, TO_K, peft_file
from torch import Tensor

from dbadapter.adapter_file import read_adapter, write_adapter
from dbadapter.errors import AdapterError


class Trap:
    """A pickle that shows whether it was run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("trap-was-run"),)


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    with Path(name).open("wb") as stream:
        torch.save({"x": Trap()}, stream) if how == "torch" else pickle.dump(Trap(), stream)
    with pytest.raises(AdapterError, match=f"{name} is a pickle.*convert it to safetensors"):
        read_adapter(name)
    assert not Path("trap-was-run").exists()


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is a folder"):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match="does not exist"):
        read_adapter(tmp_path / "none.safetensors")
    for content in (b"", b"short", b"<html>not found</html>", Path(__file__).read_bytes()):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(AdapterError, match="no safetensors file"):
            read_adapter(tmp_path / "a.safetensors")


@pytest.fixture(scope="module")
def small_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "a.safetensors"
    write_adapter(path, SMALL, sidecars=False)
    return path.read_bytes()


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_file_cut_short_is_refused(tmp_path_factory: Any, small_bytes: bytes, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    path.write_bytes(small_bytes[: data.draw(st.integers(0, len(small_bytes) - 1))])
    with pytest.raises(AdapterError) as caught:
        read_adapter(path)
    assert len(str(caught.value).splitlines()) == 1


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_changed_bytes_are_refused_or_still_an_adapter(
    tmp_path_factory: Any, small_bytes: bytes, data: st.DataObject
) -> None:
    content = bytearray(small_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flip") / "a.safetensors"
    path.write_bytes(content)
    try:
        adapter = read_adapter(path)
    except AdapterError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 (either outcome is right)
    else:
        assert adapter.modules


def relabelled(content: bytes, change: Any) -> bytes:
    """Return the file with a header that lies about the same bytes."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


DOWN = f"{KOHYA_TO_K}.lora_down.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[DOWN].update(shape=[2, 3000]),
        lambda h: h[DOWN].update(shape=[-2, -3]),
        lambda h: h[DOWN].update(shape=[2**62, 3]),
        lambda h: h[DOWN].update(dtype="F64"),
        lambda h: h[DOWN].update(dtype="PICKLE"),
        lambda h: h[DOWN].update(data_offsets=[0, 10**12]),
        lambda h: h[DOWN].update(data_offsets=[12, 0]),
        lambda h: h.update(__metadata__={"a": {"b": "c"}}),
        lambda h: h.pop(DOWN),
        lambda h: h.clear(),
        # two tensors over the same bytes
        lambda h: h.update({DOWN.replace("to_k", "to_q"): h[DOWN]}),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, small_bytes: bytes, change: Any) -> None:
    (tmp_path / "a.safetensors").write_bytes(relabelled(small_bytes, change))
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "a.safetensors")
    assert str(tmp_path / "a.safetensors") in str(caught.value)


def test_a_header_length_that_lies_is_refused(tmp_path: Path, small_bytes: bytes) -> None:
    for length in (0, 3, len(small_bytes), 2**40, 2**64 - 1):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + small_bytes[8:])
        with pytest.raises(AdapterError):
            read_adapter(tmp_path / "a.safetensors")


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Return a small kohya file's tensors with some parts replaced or left out."""
    parts: dict[str, Tensor | None] = {
        "down": torch.ones(2, 3),
        "up": torch.ones(4, 2),
        "alpha": torch.tensor(2.0),
    }
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    return {f"{KOHYA_TO_K}.{names[k]}": v for k, v in (parts | tensors).items() if v is not None}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (changed(down=torch.full((2, 3), float("nan"))), "lora_down.weight.*not finite"),
        (changed(up=torch.full((4, 2), float("inf"))), "lora_up.weight.*not finite"),
        (changed(alpha=torch.tensor(float("nan"))), "alpha.*not finite"),
        (changed(alpha=torch.ones(3)), r"alpha of .* must be one number, got shape \(3,\)"),
        (changed(down=torch.ones(2, 3, dtype=torch.int8)), "has dtype I8; F16"),
        (changed(down=torch.ones(3, 3)), "rank 3 but lora_B .* has rank 2"),
        (changed(down=torch.ones(2)), r"LoRA factors must be"),
        (changed(down=torch.tensor(1.0), alpha=None), r"LoRA factors must be|to_k"),
        (changed(down=torch.ones(0, 3), up=torch.ones(4, 0)), "LoRA factors must be"),
        (changed(up=None), "has alpha and lora_A but no lora_B: the file is incomplete"),
        (changed() | {f"{KOHYA_TO_K}.dora_scale": torch.ones(4)}, "dora_scale.*DoRA"),
        (changed() | {"lora_unet_input_blocks_3_1_proj_in.alpha": torch.tensor(1.0)}, "LDM"),
        (changed() | {f"{TO_K}.lora_A.weight": torch.ones(2, 3)}, "Two keys give lora_A"),
        ({}, "holds no LoRA layers"),
    ],
)
def test_tensors_that_are_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor], words: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=words) as caught:
        read_adapter(tmp_path / "a.safetensors")
    assert str(tmp_path / "a.safetensors") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "must be a JSON object"),
        ({"unet.lora_alpha": "8"}, "must be a number"),
        ('{"unet.lora_alpha": NaN}', "is no JSON .*the number NaN"),
        ({"unet.lora_alpha": 10**400}, "must be a number"),
        ({"unet.use_dora": True}, "uses use_dora"),
        ({"unet.use_rslora": True}, "uses use_rslora"),
    ],
)
def test_broken_alphas_of_diffusers_files(tmp_path: Path, metadata: dict[str, Any] | str, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        read_adapter(peft_file(tmp_path / "a.safetensors", metadata))
