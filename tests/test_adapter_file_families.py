"""The adapter's file for SD2 and SDXL bases: the names in it, what it says, and who may have written it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbadapter.adapter_file import (
    Adapter,
    AdapterDescription,
    LoraWeights,
    read_adapter,
    verify,
    write_adapter,
)
from dbadapter.errors import AdapterError

TO_K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
UPSAMPLER = "unet.up_blocks.0.upsamplers.0.conv"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
Q_PROJ_2 = "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj"
LAYERS_PER_BLOCK = "dbadapter.layers_per_block"


def example(family: str = "sdxl", more: tuple[str, ...] = (), width: int = 12) -> Adapter:
    names = (TO_K, UPSAMPLER, Q_PROJ, *((Q_PROJ_2,) if family == "sdxl" else ()), *more)
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name in names:
        kernel, ones = ((3, 3), (1, 1)) if name == UPSAMPLER else ((), ())
        a = torch.randn(2, width, *kernel, generator=generator)
        modules[name] = LoraWeights(a, torch.randn(5, 2, *ones, generator=generator), 1.5)
    return Adapter(family, modules)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reading_gives_what_was_written(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    path, again = tmp_path / "a.safetensors", tmp_path / "again.safetensors"
    adapter = example(family)
    write_adapter(path, adapter, dtype=dtype)
    read = read_adapter(path)
    assert read.family == family
    assert read.modules.keys() == adapter.modules.keys()
    verify(path, adapter)
    write_adapter(again, read, dtype=dtype, sidecars=False)
    verify(again, adapter)
    assert load_file(again).keys() == load_file(path).keys()
    assert json.loads(path.with_suffix(".json").read_text())["sd version"] == family.upper()


def test_sdxl_files_have_ldm_names_and_numbered_text_encoders(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", example())
    assert {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")} == {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_output_blocks_2_2_conv",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
    }


def test_sd2_files_have_diffusers_names(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", example("sd2"))
    assert {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")} == {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    }


@pytest.mark.parametrize(
    ("family", "prediction_type", "version", "v2", "architecture"),
    [
        ("sd1", "v_prediction", "sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd2", "", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sd2", "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sd2", "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
        ("sdxl", "v_prediction", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_others_see_the_family(
    tmp_path: Path, family: str, prediction_type: str, version: str, v2: str, architecture: str
) -> None:
    path, again = tmp_path / "a.safetensors", tmp_path / "again.safetensors"
    write_adapter(path, example(family), description=AdapterDescription(prediction_type=prediction_type))
    # Written again by someone who does not know what the base predicts: the file still does.
    write_adapter(again, read_adapter(path))
    for file in (path, again):
        metadata = read_adapter(file).metadata
        assert metadata["ss_base_model_version"] == version
        assert metadata["ss_v2"] == v2
        assert metadata["modelspec.architecture"] == architecture


def test_an_sd2_file_of_kohya_stays_one_for_v_prediction(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        kohya_tensors("lora_te_text_model_encoder_layers_0_mlp_fc1"),
        path,
        {"ss_base_model_version": "sd_v2_v"},
    )
    adapter = read_adapter(path)
    assert adapter.family == "sd2"
    write_adapter(path, adapter, overwrite=True)
    assert read_adapter(path).metadata["ss_base_model_version"] == "sd_v2_v"


def kohya_tensors(*prefixes: str, width: int = 12) -> dict[str, Tensor]:
    tensors = {}
    for prefix in prefixes:
        tensors[f"{prefix}.lora_down.weight"] = torch.ones(2, width)
        tensors[f"{prefix}.lora_up.weight"] = torch.ones(5, 2)
        tensors[f"{prefix}.alpha"] = torch.tensor(1.0)
    return tensors


LDM_TO_K = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
KOHYA_TO_K = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TE1 = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
TE2 = "lora_te2_text_model_encoder_layers_31_self_attn_q_proj"


@pytest.mark.parametrize(
    ("prefixes", "width", "family"),
    [
        ((LDM_TO_K, TE1, TE2), 2048, "sdxl"),
        ((LDM_TO_K, TE1), 2048, "sdxl"),
        ((KOHYA_TO_K, TE1, TE2), 2048, "sdxl"),
        ((TE1, TE2), 768, "sdxl"),
        ((KOHYA_TO_K, TE2), 12, "sdxl"),
        ((KOHYA_TO_K, TE1), 768, "sd1"),
        ((TE1,), 768, "unknown"),
    ],
)
def test_files_of_others_say_their_family_by_what_they_hold(
    tmp_path: Path, prefixes: tuple[str, ...], width: int, family: str
) -> None:
    save_file(kohya_tensors(*prefixes, width=width), tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.family == family
    canonical = {LDM_TO_K: TO_K, KOHYA_TO_K: TO_K, TE1: Q_PROJ, TE2: Q_PROJ_2}
    assert set(adapter.modules) == {canonical[prefix] for prefix in prefixes}


def test_diffusers_own_sdxl_files_are_read(tmp_path: Path) -> None:
    tensors = {}
    for name in (TO_K, Q_PROJ, Q_PROJ_2):
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, 2048), f"{name}.lora_B.weight": torch.ones(5, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.family == "sdxl"
    assert set(adapter.modules) == {TO_K, Q_PROJ, Q_PROJ_2}
    write_adapter(tmp_path / "kohya.safetensors", adapter)
    verify(tmp_path / "kohya.safetensors", adapter)


def test_both_names_of_one_layer_are_refused(tmp_path: Path) -> None:
    save_file(kohya_tensors(LDM_TO_K, KOHYA_TO_K), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="Two keys give"):
        read_adapter(tmp_path / "a.safetensors")


# A small UNet of one layer per block, its first level with attention: LDM's numbers differ from SDXL's.
ONE = ("unet.down_blocks.0.resnets.0.time_emb_proj", "unet.up_blocks.0.resnets.1.time_emb_proj")


@pytest.mark.parametrize("stated", [None, "1"])
def test_layers_per_block_are_kept_in_the_file(tmp_path: Path, stated: str | None) -> None:
    more = (*ONE, "unet.up_blocks.0.resnets.0.time_emb_proj") if stated is None else ()
    adapter = example(more=more)
    adapter.metadata = {} if stated is None else {LAYERS_PER_BLOCK: stated}
    path = tmp_path / "a.safetensors"
    write_adapter(path, adapter)
    verify(path, adapter)
    assert f"{LDM_TO_K.replace('_4_1', '_3_1')}.alpha" in load_file(path)
    assert read_adapter(path).metadata[LAYERS_PER_BLOCK] == "1"


def test_the_usual_number_is_kept_too_and_only_for_sdxl(tmp_path: Path) -> None:
    for family, stated in (("sdxl", "2"), ("sd2", None)):
        write_adapter(tmp_path / f"{family}.safetensors", example(family))
        assert read_adapter(tmp_path / f"{family}.safetensors").metadata.get(LAYERS_PER_BLOCK) == stated


@pytest.mark.parametrize("stated", ["0", "9", "-1", "two", "", "2.0", "²", "9" * 5000])
def test_layers_per_block_that_cannot_be(tmp_path: Path, stated: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(kohya_tensors(LDM_TO_K), path, {LAYERS_PER_BLOCK: stated})
    with pytest.raises(AdapterError, match=r"layers_per_block in the header must be 1 to 8, got"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.modules.update({"unet.encoder_hid_proj": a.modules[TO_K]}), "has no LDM name"),
        (lambda a: a.metadata.update({LAYERS_PER_BLOCK: "x"}), "must be 1 to 8"),
        (
            lambda a: (
                a.metadata.update({LAYERS_PER_BLOCK: "1"}),
                a.modules.update({TO_K.replace("attentions.0", "attentions.1"): a.modules[TO_K]}),
            ),
            "with 1 layers per block",
        ),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, change: Any, words: str) -> None:
    adapter = example()
    change(adapter)
    with pytest.raises(AdapterError, match=words):
        write_adapter(tmp_path / "a.safetensors", adapter)
    assert list(tmp_path.iterdir()) == []
