"""Layer names: kohya and back, and the layouts that diffusers has written over the years."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbadapter import keys
from dbadapter.errors import AdapterError

_INDEX = st.integers(0, 23).map(str)
_ATTENTION = ["attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"]
_RESNET = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
_TEXT = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
]

_blocks = st.one_of(
    st.just("mid_block"), st.builds("{}.{}".format, st.sampled_from(["down_blocks", "up_blocks"]), _INDEX)
)
_unet_paths = st.one_of(
    st.builds(
        "{}.attentions.{}.transformer_blocks.{}.{}".format,
        _blocks,
        _INDEX,
        _INDEX,
        st.sampled_from(_ATTENTION),
    ),
    st.builds("{}.attentions.{}.{}".format, _blocks, _INDEX, st.sampled_from(["proj_in", "proj_out"])),
    st.builds("{}.resnets.{}.{}".format, _blocks, _INDEX, st.sampled_from(_RESNET)),
    st.builds("{}.{}.0.conv".format, _blocks, st.sampled_from(["downsamplers", "upsamplers"])),
    st.sampled_from(["conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"]),
)
_text_paths = st.builds("text_model.encoder.layers.{}.{}".format, _INDEX, st.sampled_from(_TEXT))
modules = st.one_of(
    st.builds("unet.{}".format, _unet_paths),
    st.builds("{}.{}".format, st.sampled_from(["text_encoder", "text_encoder_2"]), _text_paths),
)


@given(modules)
def test_kohya_and_back(module: str) -> None:
    assert keys.from_kohya(keys.to_kohya(module)) == module


@given(modules)
def test_sdxl_names_and_back(module: str) -> None:
    try:
        name = keys.to_kohya(module, sdxl=True)
    except AdapterError as error:
        assert "has no LDM name" in str(error)  # noqa: PT017 (SD's UNet has no so many blocks)
    else:
        assert keys.from_kohya(name) == module


@given(st.lists(modules, min_size=1, max_size=30, unique=True))
def test_known_layers_and_words_agree(known: list[str]) -> None:
    assert [keys.from_kohya(keys.to_kohya(module), known) for module in known] == known


@given(modules, st.sampled_from(["lora_A", "lora_B", "alpha"]))
def test_raw_peft_and_back(module: str, part: keys.Part) -> None:
    assert keys.split_key(keys.to_raw_peft(module, part)) == (module, part)


@given(modules)
def test_kohya_keys_are_split(module: str) -> None:
    prefix = keys.to_kohya(module)
    for suffix, part in (("lora_down.weight", "lora_A"), ("lora_up.weight", "lora_B"), ("alpha", "alpha")):
        assert keys.split_key(f"{prefix}.{suffix}") == (module, part)


@given(st.text(max_size=60) | st.builds("lora_unet_{}.alpha".format, st.text(max_size=40)))
def test_any_other_key_is_refused_in_one_line_or_comes_back(key: str) -> None:
    try:
        module, _ = keys.split_key(key)
    except AdapterError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 (either outcome is right)
    else:
        # known words in an order that no model has: the base decides whether such a layer exists
        assert keys.component_of(module) in keys.COMPONENTS


@pytest.mark.parametrize(
    ("key", "module", "part"),
    [
        # diffusers' DreamBooth script (facts of its files: three spellings in one)
        (
            "unet.mid_block.attentions.0.proj_in.lora.down.weight",
            "unet.mid_block.attentions.0.proj_in",
            "lora_A",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.up.weight",
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
            "lora_B",
        ),
        # the attention processors' names of diffusers before 0.22: no `.0` behind to_out
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "lora_A",
        ),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_q_lora.up.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q",
            "lora_B",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
            "lora_A",
        ),
        # transformers 5 drops text_model. from the names of CLIPTextModel; we put it back
        (
            "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
            "lora_A",
        ),
        # SDXL: kohya's own files, diffusers' names in kohya's layout, diffusers' raw PEFT
        (
            "lora_unet_output_blocks_2_2_conv.lora_up.weight",
            "unet.up_blocks.0.upsamplers.0.conv",
            "lora_B",
        ),
        (
            "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn1_to_q.lora_down.weight",
            "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q",
            "lora_A",
        ),
        (
            "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q.lora_A.weight",
            "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q",
            "lora_A",
        ),
        (
            "lora_te2_text_model_encoder_layers_31_mlp_fc2.alpha",
            "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
            "alpha",
        ),
        (
            "text_encoder_2.text_model.encoder.layers.31.self_attn.v_proj.lora_B.weight",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.v_proj",
            "lora_B",
        ),
        ("text_encoder_2.text_projection.lora_A.weight", "text_encoder_2.text_projection", "lora_A"),
        # kohya's SDXL spelling of the first text encoder, on SD1
        (
            "lora_te1_text_model_encoder_layers_11_self_attn_out_proj.alpha",
            "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
            "alpha",
        ),
    ],
)
def test_what_others_write(key: str, module: str, part: str) -> None:
    assert keys.split_key(key) == (module, part)


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "DoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "LoKr"),
        ("lora_unet_mid_block_attentions_0_proj_in.diff", "full weight"),
        ("lora_unet_input_blocks_3_1_proj_in.alpha", "LDM names with 2 layers per block"),
        ("bundle_emb.cat.string_to_param.*", "bundled embedding"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "transformer"),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_A.weight", "PEFT folder"),
        ("model.diffusion_model.input_blocks.0.0.weight", "whole checkpoint"),
    ],
)
def test_refusals_say_what_it_is(key: str, word: str) -> None:
    with pytest.raises(AdapterError, match=word):
        keys.split_key(key)


@pytest.mark.parametrize("module", ["", "unet", "vae.encoder.conv_in", "mid_block.attentions.0.proj_in"])
def test_canonical_names_begin_with_a_component(module: str) -> None:
    with pytest.raises(AdapterError, match="must begin with one of"):
        keys.to_kohya(module)


def test_sdxl_numbers_its_text_encoders() -> None:
    for component, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        module = f"{component}.text_model.encoder.layers.0.mlp.fc1"
        assert keys.to_kohya(module, sdxl=True) == f"{prefix}text_model_encoder_layers_0_mlp_fc1"


def test_a_layer_that_the_base_lacks_is_refused() -> None:
    with pytest.raises(AdapterError, match="names no layer of the base"):
        keys.from_kohya("lora_unet_mid_block_attentions_0_proj_in", ["unet.mid_block.attentions.0.proj_out"])


def test_canonical_module_restores_text_model() -> None:
    for path in ("encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"):
        assert (
            keys.canonical_module("text_encoder", path) == "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        )
    assert keys.canonical_module("text_encoder_2", "text_projection") == "text_encoder_2.text_projection"
    assert keys.canonical_module("unet", "conv_in") == "unet.conv_in"
