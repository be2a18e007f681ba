"""PEFT's folders by others: variants refused by name, JSON that lies, no path that is followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, run
from safetensors.torch import save_file

from dbadapter.adapter_file import read_adapter
from dbadapter.errors import AdapterError
from dbadapter.peft_config import PeftAlphas

TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
PREFIX = "base_model.model."


def folder(path: Path, config: dict[str, Any] | bytes | None = None, **tensors: torch.Tensor) -> Path:
    """Write PATH/unet, with one layer, and return PATH."""
    (path / "unet").mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3} | (config if isinstance(config, dict) else {})
    text = config if isinstance(config, bytes) else json.dumps(fields).encode()
    (path / "unet" / "adapter_config.json").write_bytes(text)
    layer = {
        f"{PREFIX}{TO_K}.lora_A.weight": torch.ones(2, 3),
        f"{PREFIX}{TO_K}.lora_B.weight": torch.ones(4, 2),
    }
    save_file(layer | tensors, path / "unet" / "adapter_model.safetensors")
    return path


def test_alpha_comes_from_the_configuration(tmp_path: Path) -> None:
    for name, config, alpha in (
        ("a", {}, 3.0),
        ("b", {"lora_alpha": 0.5}, 0.5),
        ("c", {"alpha_pattern": {"attn2.to_k": 7}}, 7.0),
        ("d", {"lora_alpha": None}, 2.0),
        (
            "e",
            {"init_lora_weights": "gaussian", "loftq_config": {}, "bias": "none", "modules_to_save": None},
            3.0,
        ),
    ):
        assert read_adapter(folder(tmp_path / name, config)).modules[f"unet.{TO_K}"].alpha == alpha


def test_paths_in_it_are_never_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be opened, or looked up on the hub, by PEFT."""
    secret = tmp_path / "secret.safetensors"
    source = folder(
        tmp_path / "a",
        {
            "base_model_name_or_path": str(secret),
            "auto_mapping": {"parent_library": "os"},
            "revision": "../..",
        },
    )
    opened: list[str] = []
    original = Path.open

    def watched(self: Path, *arguments: Any, **settings: Any) -> Any:
        opened.append(self.name)
        return original(self, *arguments, **settings)

    monkeypatch.setattr(Path, "open", watched)
    assert read_adapter(source).family == "unknown"
    assert set(opened) == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "says LOHA; only plain LoRA"),
        ({"peft_type": "LOKR"}, "says LOKR"),
        ({"peft_type": "OFT"}, "says OFT"),
        ({"peft_type": "BOFT"}, "says BOFT"),
        ({"peft_type": "IA3"}, "says IA3"),
        ({"peft_type": "ADALORA"}, "says ADALORA"),
        ({"peft_type": ["x"] * 99}, "only plain LoRA"),
        ({"use_dora": True}, "uses use_dora"),
        ({"use_rslora": True}, "uses use_rslora"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"bias": "all"}, "trains biases"),
        ({"modules_to_save": ["conv_in"]}, "uses modules_to_save"),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4, which changes the base"),
        ({"init_lora_weights": "olora"}, "changes the base"),
        ({"lora_alpha": "8"}, "lora_alpha in .*adapter_config.json must be a number, got 8"),
        ({"lora_alpha": True}, "must be a number"),
        ({"lora_alpha": 10**400}, "must be a number"),
        ({"alpha_pattern": [1]}, "must be a JSON object of names"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "no layer's name: alpha cannot be known"),
        ({"alpha_pattern": {".*to_k": 4}}, "no layer's name"),
        ({"alpha_pattern": {"to_k": {}}}, "to_k in .* must be a number"),
        (b'{"lora_alpha": NaN}', "has the number NaN"),
        (b'{"lora_alpha": Infinity}', "has the number Infinity"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"a": 1, "a": 2}', "key twice"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "cannot be read"),
        (b"[]", "must hold a JSON object"),
        (b" " * (4 * 2**20 + 1), "has more than 4194304 bytes"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, config: dict[str, Any] | bytes, words: str) -> None:
    source = folder(tmp_path / "a", config)
    with pytest.raises(AdapterError, match=words) as caught:
        read_adapter(source)
    assert "adapter_config.json" in str(caught.value)
    result = run("convert", source, "--to", "diffusers", "--output", tmp_path / "b.safetensors")
    assert_refused(result, 1, "adapter_config.json")


def test_weights_that_are_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", None, **{f"{PREFIX}{TO_K}.lora_magnitude_vector": torch.ones(4)})
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: Key .*\(DoRA\)"):
        read_adapter(source)
    source = folder(tmp_path / "b", None, **{f"{PREFIX}{TO_K}.base_layer.weight": torch.ones(4, 3)})
    with pytest.raises(AdapterError, match="none of a plain LoRA"):
        read_adapter(source)
    source = folder(tmp_path / "c", None, **{f"{PREFIX}conv_in.lora_A.weight": torch.full((2, 3), torch.nan)})
    with pytest.raises(AdapterError, match=r"conv_in has lora_A but no lora_B"):
        read_adapter(source)
    source = folder(tmp_path / "d")
    (source / "unet" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors does not exist"):
        read_adapter(source)
    (source / "unet" / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle.*convert it to safetensors"):
        read_adapter(source)


def test_a_folder_of_another_model(tmp_path: Path) -> None:
    source = folder(tmp_path / "a") / "unet"
    source = source.rename(tmp_path / "llama")
    layer = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 3)}
    save_file(layer, source / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="neither Stable Diffusion's UNet nor its text encoders"):
        read_adapter(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="is a folder without a PEFT adapter"):
        read_adapter(tmp_path / "empty")


def test_a_text_encoders_two_names_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "text_encoder"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    names = [
        f"{PREFIX}{t}encoder.layers.0.mlp.fc1.lora_{p}.weight" for t in ("", "text_model.") for p in "AB"
    ]
    tensors = {name: torch.ones((2, 3) if "lora_A" in name else (3, 2)) for name in names}
    save_file(tensors, path / "adapter_model.safetensors")
    assert set(read_adapter(path).modules) == {"text_encoder.text_model.encoder.layers.0.mlp.fc1"}
    tensors[names[0]][0, 0] = 2
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="are one layer and differ"):
        read_adapter(path)


def test_patterns_match_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    patterns = {"to_k": 1, "attn2.to_q": 2, "^down.0.attn1.to_q": 3, "to_q": 4, "0.attn1.to_q": 5}
    alphas = PeftAlphas({"unet.alpha_pattern": patterns, "unet.lora_alpha": 9}, "here")
    for path in ("down.0.attn1.to_q", "up.0.attn1.to_q", "up.0.attn2.to_q", "mid.to_k", "mid.into_k", "to_q"):
        assert alphas.of(f"unet.{path}", 8) == patterns.get(get_pattern_key(patterns, path), 9), path
