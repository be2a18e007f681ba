"""LDM's layer names: as sd-scripts writes them, and back, for every layer of SDXL."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbadapter import keys, ldm_names
from dbadapter.adapter import adaptable_layers
from dbadapter.errors import AdapterError
from dbadapter.lora import TARGETS, target_layers
from dbadapter.single_file import CONFIGS

SDXL: dict[str, Any] = json.loads((CONFIGS / "sdxl/unet/config.json").read_text())


@cache
def unet_on_meta(layers_per_block: int | None = None) -> Any:
    """Return the true SDXL UNet, or a small one like it, without values."""
    from diffusers import UNet2DConditionModel

    small = {
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
        "layers_per_block": layers_per_block,
    }
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(SDXL | (small if layers_per_block else {}))


def paths_of(unet: Any) -> list[str]:
    return [name.removeprefix("unet.") for name in adaptable_layers(unet, "unet")]


@pytest.mark.parametrize(
    ("path", "ldm"),
    [
        # from sd-scripts' SdxlUNet2DConditionModel
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
            "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        ),
        ("down_blocks.2.resnets.0.conv_shortcut", "input_blocks_7_0_skip_connection"),
        ("down_blocks.1.downsamplers.0.conv", "input_blocks_6_0_op"),
        (
            "mid_block.attentions.0.transformer_blocks.4.attn2.to_out.0",
            "middle_block_1_transformer_blocks_4_attn2_to_out_0",
        ),
        ("mid_block.resnets.1.conv2", "middle_block_2_out_layers_3"),
        ("up_blocks.0.attentions.2.proj_out", "output_blocks_2_1_proj_out"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
        (
            "up_blocks.1.attentions.1.transformer_blocks.1.attn2.to_v",
            "output_blocks_4_1_transformer_blocks_1_attn2_to_v",
        ),
        ("up_blocks.2.resnets.2.conv1", "output_blocks_8_0_in_layers_2"),
        ("up_blocks.2.resnets.0.time_emb_proj", "output_blocks_6_0_emb_layers_1"),
        ("conv_in", "input_blocks_0_0"),
        ("time_embedding.linear_2", "time_embed_2"),
        ("add_embedding.linear_1", "label_emb_0_0"),
        ("conv_out", "out_2"),
    ],
)
def test_names_are_those_of_sd_scripts(path: str, ldm: str) -> None:
    assert keys.to_kohya(f"unet.{path}", sdxl=True) == f"lora_unet_{ldm}"
    assert keys.from_kohya(f"lora_unet_{ldm}") == f"unet.{path}"


def test_norms_and_the_upsampler_of_sd1() -> None:
    """They carry no adapter in SDXL files; whole checkpoints have them."""
    assert ldm_names.diffusers_to_ldm("conv_norm_out") == "out.0"
    assert ldm_names.diffusers_to_ldm("mid_block.resnets.0.norm1") == "middle_block.0.in_layers.0"
    assert ldm_names.diffusers_to_ldm("mid_block.attentions.0.norm") == "middle_block.1.norm"
    assert ldm_names.ldm_to_diffusers("output_blocks.2.1.conv") == "up_blocks.0.upsamplers.0.conv"


@pytest.mark.parametrize("layers_per_block", [None, 1, 2, 3])
def test_every_layer_of_sdxl_and_back(layers_per_block: int | None) -> None:
    paths = paths_of(unet_on_meta(layers_per_block))
    n = layers_per_block or 2
    ldm = [ldm_names.diffusers_to_ldm(path, n) for path in paths]
    assert all(
        ldm_names.is_ldm(name) and not ldm_names.is_ldm(path) for name, path in zip(ldm, paths, strict=True)
    )
    assert len(set(ldm)) == len(paths)
    assert [ldm_names.ldm_to_diffusers(name, n) for name in ldm] == paths
    # with the underscores that files have, with and without the base's own names
    known = [f"unet.{path}" for path in paths]
    written = [keys.to_kohya(module, sdxl=True, layers_per_block=n) for module in known]
    assert [keys.from_kohya(name, layers_per_block=n) for name in written] == known
    assert [keys.from_kohya(name, known, layers_per_block=n) for name in written[::50]] == known[::50]


def test_true_sdxl_has_as_many_layers_as_others_count() -> None:
    """794 modules with conv_in and the embeddings; 560 are of attention (formats of other tools)."""
    assert len(paths_of(unet_on_meta())) == 794
    assert len(target_layers(unet_on_meta(), "unet", ("attention",))) == 560
    assert len(target_layers(unet_on_meta(), "unet", tuple(TARGETS))) == 788


@st.composite
def block_paths(draw: st.DrawFn) -> tuple[str, int]:
    """A layer in a block of any UNet, and its layers per block."""
    n = draw(st.integers(1, ldm_names.MAX_LAYERS_PER_BLOCK))
    side = draw(st.sampled_from(["down", "up"]))
    block = f"{side}_blocks.{draw(st.integers(0, 7))}"
    kind = draw(st.sampled_from(["resnets", "attentions", f"{side}samplers"]))
    if kind.endswith("samplers"):
        return f"{block}.{kind}.0.conv", n
    tails = {
        "resnets": ["conv1", "conv2", "norm1", "norm2", "conv_shortcut", "time_emb_proj"],
        "attentions": ["proj_in", "norm", "transformer_blocks.3.attn2.to_out.0"],
    }
    index = draw(st.integers(0, n - 1 if side == "down" else n))
    return f"{block}.{kind}.{index}.{draw(st.sampled_from(tails[kind]))}", n


@given(block_paths(), block_paths())
def test_ldm_and_back(one: tuple[str, int], other: tuple[str, int]) -> None:
    path, n = one
    assert ldm_names.ldm_to_diffusers(ldm_names.diffusers_to_ldm(path, n), n) == path
    another = other[0]
    try:
        same = ldm_names.diffusers_to_ldm(another, n) == ldm_names.diffusers_to_ldm(path, n)
    except AdapterError:
        return  # a layer that n does not reach
    assert same == (another == path)


@given(st.text(max_size=40) | st.from_regex(r"(in|out)put_blocks(\.[0-9]{1,2}){2}\.(conv|op|proj_in|x)"))
def test_any_other_name_is_refused_or_comes_back(path: str) -> None:
    for there, back in (
        (ldm_names.diffusers_to_ldm, ldm_names.ldm_to_diffusers),
        (ldm_names.ldm_to_diffusers, ldm_names.diffusers_to_ldm),
    ):
        try:
            name = there(path)
        except AdapterError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 (either outcome is right)
        else:
            assert back(name) == path.replace(".1.conv", ".2.conv")


@pytest.mark.parametrize(
    "path",
    [
        "encoder_hid_proj",
        "down_blocks.0.resnets.2.conv1",
        "down_blocks.0.upsamplers.0.conv",
        "mid_block.attentions.1.proj_in",
        "mid_block.resnets.0.proj_in",
        "up_blocks.0.attentions.3.proj_in",
        "down_blocks.0.motion_modules.0.proj_in",
    ],
)
def test_layers_without_an_ldm_name(path: str) -> None:
    with pytest.raises(AdapterError, match="has no LDM name"):
        ldm_names.diffusers_to_ldm(path)


@pytest.mark.parametrize(
    "path",
    [
        "out.1",
        "label_emb.0.1",
        "input_blocks.0.1.proj_in",
        "input_blocks.2.0.op",
        "input_blocks.3.1.proj_in",
        "input_blocks.4.1.to_q",
        "middle_block.3.proj_in",
        "output_blocks.1.2.conv",
    ],
)
def test_what_is_no_ldm_name(path: str) -> None:
    with pytest.raises(AdapterError, match="none of Stable Diffusion's UNet"):
        ldm_names.ldm_to_diffusers(path)


@pytest.mark.parametrize("layers_per_block", [None, 1, 2, 3])
@pytest.mark.parametrize("targets", [("attention",), ("conv",), tuple(TARGETS)])
def test_layers_per_block_are_seen_in_names(layers_per_block: int | None, targets: tuple[str, ...]) -> None:
    unet = unet_on_meta(layers_per_block)
    paths = [name.removeprefix("unet.") for name in target_layers(unet, "unet", targets)]
    assert ldm_names.guess_layers_per_block(paths) == unet.config.layers_per_block


@pytest.mark.parametrize(
    "paths",
    [
        [],
        ["conv_in", "mid_block.resnets.0.conv1"],
        # some of SDXL's blocks only, as style adapters have them
        ["up_blocks.0.attentions.0.proj_in", "up_blocks.0.attentions.1.proj_in"],
        ["down_blocks.2.attentions.1.proj_in", "up_blocks.0.attentions.1.proj_in"],
        ["down_blocks.1.attentions.0.proj_in"],
    ],
)
def test_a_part_of_sdxl_is_not_taken_for_a_smaller_unet(paths: list[str]) -> None:
    assert ldm_names.guess_layers_per_block(paths) == 2
