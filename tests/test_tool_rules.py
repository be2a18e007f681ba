"""What each tool does with a file: the numbers that the tools' own code gave on the names of true sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adapter_layouts as layouts
import pytest
from adapter_layouts import Shape
from hypothesis import given
from hypothesis import strategies as st

from dbadapter.file_layout import describe_key, describe_keys
from dbadapter.tool_rules import AdapterFile, outcomes, tools

TOOLS = ("diffusers", "ComfyUI", "AUTOMATIC1111", "Forge", "InvokeAI", "sd-scripts", "stable-diffusion.cpp")


def rows(shapes: dict[str, Shape], family: str, **more: Any) -> dict[str, Any]:
    entries = describe_keys(shapes)
    alphas = more.pop("alphas", {name: 4.0 for name in shapes if name.endswith(".alpha")})
    file = AdapterFile(entries, shapes, more.pop("metadata", {}), family, alphas, **more)
    return {row.tool: row for row in outcomes(file)}


def trained(layers: dict[str, Shape]) -> dict[str, Shape]:
    """The layers that dbadapter trains with all its targets."""
    from dbadapter.lora import TARGETS

    ends = tuple(end for target in TARGETS.values() for end in target)
    return {
        n: s for n, s in layers.items() if (n.startswith("unet.") and n.endswith(ends)) or ".self_attn." in n
    }


def attention(layers: dict[str, Shape]) -> dict[str, Shape]:
    return {n: s for n, s in layers.items() if ".attn1." in n or ".attn2." in n or ".self_attn." in n}


@pytest.mark.parametrize(("family", "count"), [("sd1", 978), ("sd2", 1110), ("sdxl", 2892)])
def test_our_files_are_loaded_whole_by_all(family: str, count: int) -> None:
    shapes = layouts.kohya(trained(layouts.true_layers(family)), sdxl=family == "sdxl")
    assert len(shapes) == count
    for row in rows(shapes, family).values():
        assert (row.result, row.loaded, row.present, row.reason) == ("loaded", count, count, "")


# Measured: layout, family, tensors, then what is loaded in the order of TOOLS; 0 may be a refusal.
MEASURED: tuple[tuple[str, str, int, tuple[int, ...]], ...] = (
    ("kohya", "sd1", 1062, (1062, 1062, 1062, 1062, 1062, 1050, 1050)),
    ("kohya", "sd2", 1260, (1260, 1260, 1260, 1260, 1260, 1248, 1248)),
    ("kohya", "sdxl", 3174, (3174, 3174, 3174, 3174, 3174, 3156, 3162)),
    ("kohya te1", "sd1", 1062, (1062, 1062, 1062, 1062, 846, 834, 1050)),
    ("kohya te1", "sd2", 1260, (1260, 1260, 846, 1260, 846, 834, 1248)),
    ("diffusers' names", "sdxl", 3174, (3168, 3174, 3165, 3174, 3174, 3156, 3156)),
    ("script", "sd1", 708, (452, 452, 0, 0, 0, 0, 556)),
    ("script", "sdxl", 2116, (996, 996, 0, 0, 0, 0, 1576)),
    ("raw PEFT", "sd1", 708, (708, 452, 0, 0, 0, 0, 556)),
    ("raw PEFT", "sd2", 840, (840, 584, 0, 0, 0, 0, 556)),
    ("old diffusers", "sd1", 352, (352, 256, 0, 0, 0, 0, 256)),
    ("old diffusers", "sdxl", 1472, (1472, 1120, 0, 0, 0, 0, 1120)),
    ("PEFT folder", "sd1", 564, (0, 0, 0, 0, 0, 0, 0)),
    ("DoRA", "sd1", 1416, (1062, 1416, 1416, 1416, 1416, 1050, 1050)),
    ("LoHa", "sd1", 1770, (0, 1770, 1770, 1770, 1770, 0, 1750)),
    ("LoKr", "sd2", 1260, (0, 1260, 1260, 1260, 1260, 0, 1248)),
    ("OFT", "sd1", 708, (0, 708, 708, 0, 0, 0, 0)),
)


def make(layout: str, family: str) -> dict[str, Shape]:
    layers, xl = layouts.true_layers(family), family == "sdxl"
    made: dict[str, Callable[[], dict[str, Shape]]] = {
        "kohya": lambda: layouts.kohya(layers, sdxl=xl),
        "kohya te1": lambda: layouts.kohya(layers, text="lora_te1_"),
        "diffusers' names": lambda: layouts.kohya(layers, text="lora_te1_"),
        # As safetensors writes it: sorted, so that the UNet's first key is `conv_in.lora_A`.
        "script": lambda: dict(sorted(layouts.script(layers).items())),
        "raw PEFT": lambda: layouts.raw_peft(layers),
        "old diffusers": lambda: layouts.old_diffusers(layers),
        "PEFT folder": lambda: layouts.peft_folder(layers, "unet"),
        "DoRA": lambda: layouts.kohya(layers, sdxl=xl, more="dora_scale"),
        "LoHa": lambda: layouts.other_algorithm(layers, layouts.loha, sdxl=xl),
        "LoKr": lambda: layouts.other_algorithm(layers, layouts.lokr, sdxl=xl),
        "OFT": lambda: layouts.other_algorithm(layers, layouts.oft, sdxl=xl),
    }
    return made[layout]()


@pytest.mark.parametrize(("layout", "family", "present", "loaded"), MEASURED)
def test_counts_are_those_of_the_tools(
    layout: str, family: str, present: int, loaded: tuple[int, ...]
) -> None:
    found = rows(make(layout, family), family)
    assert tuple(found) == TOOLS
    assert {row.present for row in found.values()} == {present}
    assert tuple(found[tool].loaded for tool in TOOLS) == loaded
    for row in found.values():
        assert row.result == ("loaded" if row.loaded == present else "partly") or not row.loaded
        assert row.loaded == present or row.reason, row
        assert row.source
        assert row.version
        assert row.basis == "run"


def test_forge_refuses_and_comfyui_loads_in_part() -> None:
    found = rows(make("raw PEFT", "sd1"), "sd1")
    assert found["Forge"].result == "refused"
    assert "more than 12" in found["Forge"].reason
    assert found["ComfyUI"].result == "partly"
    assert "256 of 708 tensors" in found["ComfyUI"].reason
    assert found["InvokeAI"].result == "refused"
    assert found["AUTOMATIC1111"].result == "ignored"


def test_diffusers_needs_its_scripts_spelling_first() -> None:
    only = {n: s for n, s in layouts.true_layers("sd1").items() if ".attn" in n}
    assert rows(layouts.script(only), "sd1")["diffusers"].result == "loaded"


def test_alpha_in_tensors_and_header() -> None:
    shapes = layouts.kohya(attention(layouts.true_layers("sd1")))
    found = rows(shapes, "sd1", metadata={"lora_adapter_metadata": "{}"})
    assert found["diffusers"].result == "refused"
    assert "lora_adapter_metadata" in found["diffusers"].reason
    assert found["ComfyUI"].result == "loaded"


def test_alpha_in_the_header_only_is_lost_elsewhere() -> None:
    shapes = layouts.old_diffusers({n: s for n, s in layouts.true_layers("sd1").items() if ".attn" in n})
    found = rows(shapes, "sd1", peft_scale=True)
    assert found["diffusers"].result == "loaded"
    assert (found["ComfyUI"].result, found["ComfyUI"].loaded) == ("partly", 256)
    assert "alpha" in found["ComfyUI"].reason


def test_alphas_that_differ_in_attention() -> None:
    shapes = layouts.kohya(attention(layouts.true_layers("sd1")))
    alphas = {name: 4.0 for name in shapes if name.endswith(".alpha")}
    alphas[next(name for name in alphas if "attn1" in name)] = 1.0
    assert rows(shapes, "sd1", alphas=alphas)["diffusers"].result == "partly"


def test_text_encoder_without_out_proj() -> None:
    layers = layouts.true_layers("sd1")
    some = {n: s for n, s in layers.items() if n.endswith((".q_proj", ".k_proj"))}
    assert rows(layouts.kohya(some), "sd1")["diffusers"].result == "refused"
    with_mlp = some | {n: s for n, s in layers.items() if n.endswith(".fc1")}
    assert rows(layouts.kohya(with_mlp), "sd1")["diffusers"].loaded == 36


def test_invokeai_takes_convolutions_for_sdxl() -> None:
    """Of SD1's layers, the time embedding's width is SDXL's sign there."""
    resnets = {n: s for n, s in layouts.true_layers("sd1").items() if ".resnets." in n}
    row = rows(layouts.kohya(resnets), "sd1")["InvokeAI"]
    assert (row.result, row.loaded) == ("refused", 0)
    assert "another base" in row.reason


def test_ldm_names_are_for_sdxl() -> None:
    names = layouts.kohya({n: s for n, s in layouts.true_layers("sd1").items() if ".attn" in n}, sdxl=True)
    found = rows(names, "sd1")
    assert found["diffusers"].result == "refused"
    assert found["ComfyUI"].result == "loaded"
    assert found["sd-scripts"].result == "ignored"


def test_metadata_of_another_family_hides_a_file() -> None:
    shapes = layouts.kohya(attention(layouts.true_layers("sdxl")), sdxl=True)
    row = rows(shapes, "sdxl", metadata={"title": "x"})["AUTOMATIC1111"]
    assert (row.result, row.loaded) == ("loaded", len(shapes))
    assert "hidden" in row.reason


def test_bundled_embeddings() -> None:
    shapes = layouts.kohya(attention(layouts.true_layers("sd1"))) | {
        "bundle_emb.x.string_to_param.*": (2, 768)
    }
    found = rows(shapes, "sd1")
    assert found["diffusers"].result == "refused"
    assert found["AUTOMATIC1111"].result == "loaded"
    assert found["InvokeAI"].loaded == len(shapes) - 1


def test_rules_are_whole() -> None:
    """Every rule has a source and a known result; conditions are known, or `outcomes` would have failed."""
    assert tuple(tool["name"] for tool in tools()) == TOOLS
    for tool in tools():
        for rule in (*tool.get("tensor", ()), *tool.get("file", ())):
            assert rule["source"].count(":") == 1, rule
            assert rule["result"] in ("loaded", "ignored", "refused", "note", "wrong")


@pytest.mark.parametrize(
    ("key", "layout", "kind"),
    [
        ("lora_unet_conv_in.alpha", "kohya", "conv in and out"),
        ("lora_unet_time_embed_0.lora_up.weight", "kohya", "time embedding"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "raw-peft", "proj"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight", "raw-peft", "text feed-forward"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
         "old-diffusers", "attention"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "kohya", "other"),
        ("model.diffusion_model.out.2.bias", "checkpoint", "other"),
        ("what.is.this", "unknown", "other"),
        (".alpha", "unknown", "other"),
        ("", "unknown", "other"),
    ],
)  # fmt: skip
def test_a_key_is_described(key: str, layout: str, kind: str) -> None:
    entry = describe_key(key)
    assert (entry.layout, entry.kind) == (layout, kind)


@given(st.text(max_size=80))
def test_no_key_is_too_odd(text: str) -> None:
    for key in (
        text,
        f"lora_unet_{text}.alpha",
        f"unet.{text}.lora_A.weight",
        f"lycoris_{text}.lora_up.weight",
    ):
        assert describe_key(key).key == key
        assert len(rows({key: (4, 4)}, "sd1", alphas={})) == len(TOOLS)
