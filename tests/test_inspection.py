"""`inspect`: what a file is told to be, the JSON that stays, and one line for what is broken."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapter_layouts as layouts
import pytest
import torch
from adapter_layouts import Shape, write_file
from command_line import assert_refused, run
from hypothesis import given
from hypothesis import strategies as st

from dbadapter import formats
from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.errors import AdapterError
from dbadapter.inspection import inspect_file

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = {f"unet.{BLOCK}.attn2.to_k": (320, 768), f"unet.{BLOCK}.attn1.to_out.0": (320, 320)}
TEXT = {f"text_encoder.text_model.encoder.layers.0.self_attn.{p}": (768, 768) for p in ("q_proj", "out_proj")}
LAYERS: dict[str, Shape] = {**UNET, **TEXT}
GOLDEN = Path(__file__).parent / "golden" / "inspect.json"


def example(tmp_path: Path, **more: Any) -> Path:
    metadata = {"ss_v2": "False", "ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "sks dog"}
    return write_file(tmp_path / "a.safetensors", layouts.kohya(LAYERS), metadata, **more)


def test_json_is_the_golden_one(tmp_path: Path) -> None:
    """Fields and their form are kept; where a field must go or change, SCHEMA is raised."""
    result = run("inspect", example(tmp_path, alpha=2.0), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    found["file"] = "a.safetensors"
    for row in found["tools"]:  # these change with the tools
        assert row.pop("version")
        assert row.pop("source")
    assert found == json.loads(GOLDEN.read_text())


def test_text_says_what_json_says(tmp_path: Path) -> None:
    result = run("inspect", example(tmp_path))
    assert result.exit_code == 0, result.output
    for part in ("kohya, LoRA", "base:      sd1", "rank:      4", "2 text attention", "sks dog", "12 of 12"):
        assert part in result.stdout, part
    assert sum("loaded" in line for line in result.stdout.splitlines()) == 7


@pytest.mark.parametrize(
    ("shapes", "kind", "form", "algorithms"),
    [
        (layouts.kohya(LAYERS), "adapter", "kohya", ["LoRA"]),
        (layouts.kohya(LAYERS, more="dora_scale"), "adapter", "kohya", ["DoRA"]),
        (layouts.script(LAYERS), "adapter", "diffusers' script", ["LoRA"]),
        (layouts.raw_peft(LAYERS), "adapter", "raw PEFT", ["LoRA"]),
        (layouts.old_diffusers(LAYERS), "adapter", "old diffusers", ["LoRA"]),
        (layouts.peft_folder(LAYERS, "unet"), "adapter", "PEFT folder", ["LoRA"]),
        (layouts.other_algorithm(UNET, layouts.loha, sdxl=False), "adapter", "kohya", ["LoHa"]),
        (layouts.other_algorithm(UNET, layouts.lokr, sdxl=False), "adapter", "kohya", ["LoKr"]),
        (layouts.other_algorithm(UNET, layouts.oft, sdxl=False), "adapter", "kohya", ["OFT"]),
        ({"lora_unet_conv_in.diff": (320, 4, 3, 3)}, "adapter", "kohya", ["full weight differences"]),
        ({"emb_params": (4, 768)}, "textual-inversion", "textual inversion", []),
        ({"bundle_emb.a.string_to_param.*": (2, 768)}, "textual-inversion", "textual inversion", []),
        ({"model.diffusion_model.out.2.weight": (4, 320, 3, 3)}, "checkpoint", "whole checkpoint", []),
        ({"something.else": (3,)}, "unknown", "unknown", []),
    ],
)
def test_formats(
    tmp_path: Path, shapes: dict[str, Shape], kind: str, form: str, algorithms: list[str]
) -> None:
    found = inspect_file(write_file(tmp_path / "a.safetensors", shapes))
    assert (found["kind"], found["format"], found["algorithms"]) == (kind, form, algorithms)
    assert found["tensors"] == len(shapes)
    assert len(found["tools"]) == 7
    if kind != "adapter":
        assert {row["loaded"] for row in found["tools"]} == {0}
        assert {row["basis"] for row in found["tools"]} == {"not run"}


def test_locon(tmp_path: Path) -> None:
    shapes = layouts.kohya({"unet.down_blocks.0.resnets.0.conv1": (320, 320, 3, 3)})
    path = write_file(tmp_path / "a.safetensors", shapes, {"ss_network_module": "lycoris.kohya"})
    assert inspect_file(path)["format"].startswith("LyCORIS LoCon")


@pytest.mark.parametrize(
    ("shapes", "metadata", "family", "evidence"),
    [
        (layouts.kohya(LAYERS), {}, "sd1", "768 wide"),
        ({"lora_unet_x.alpha": ()}, {}, "unknown", "neither"),
        ({"lora_unet_x.alpha": ()}, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl", "ss_base_model"),
        (layouts.kohya(LAYERS), {"dbadapter.family": "toybox"}, "toybox", "dbadapter.family"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": (8, 4)}, {}, "flux", "double_blocks"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)}, {}, "sd3", "attn.to_q"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": ()}, {}, "sdxl", "second text encoder"),
    ],
)  # fmt: skip
def test_base_and_how_it_is_known(
    tmp_path: Path, shapes: dict[str, Shape], metadata: dict[str, str], family: str, evidence: str
) -> None:
    base = inspect_file(write_file(tmp_path / "a.safetensors", shapes, metadata))["base"]
    assert base["family"] == family
    assert evidence in base["evidence"]


def test_header_and_shapes_at_odds(tmp_path: Path) -> None:
    metadata = {"ss_base_model_version": "sd_v2"}
    found = inspect_file(write_file(tmp_path / "a.safetensors", layouts.kohya(LAYERS), metadata))
    assert found["base"]["family"] == "sd2"
    assert found["base"]["conflicts"] == ["its cross-attention is 768 wide, which is sd1"]


def test_flux_files_are_described_and_not_judged(tmp_path: Path) -> None:
    shapes = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)}
    found = inspect_file(write_file(tmp_path / "a.safetensors", shapes))
    assert {row["result"] for row in found["tools"]} == {"unknown"}
    assert "not flux" in found["tools"][0]["reason"]


def test_ranks_that_vary_are_told(tmp_path: Path) -> None:
    shapes = layouts.kohya(LAYERS)
    odd = next(iter(shapes))
    shapes[odd], shapes[odd.replace("lora_down", "lora_up")] = (8, 768), (320, 8)
    found = inspect_file(write_file(tmp_path / "a.safetensors", shapes))
    assert found["rank"]["common"] == 4
    assert found["rank"]["counts"] == {"4": 3, "8": 1}
    assert odd.startswith(found["rank"]["examples_of_others"]["8"])


def test_our_own_file_is_told_whole(tmp_path: Path) -> None:
    import torch
    from PIL import Image

    from dbadapter.adapter_file import Adapter, AdapterDescription, LoraWeights, write_adapter

    modules = {n: LoraWeights(torch.randn(4, s[1]), torch.randn(s[0], 4), 2.0) for n, s in LAYERS.items()}
    path = tmp_path / "a.safetensors"
    write_adapter(
        path,
        Adapter("sd1", modules),
        description=AdapterDescription(trigger="sks dog", max_train_steps=7),
        preview=Image.new("RGB", (300, 300)),
    )
    found = inspect_file(path)
    assert found["hashes"]["stored_agree"] == dict.fromkeys(
        ("sshs_model_hash", "modelspec.hash_sha256", "sshs_legacy_hash"), True
    )
    assert found["thumbnail"]
    assert found["trigger"] == ["sks dog"]
    assert found["alpha"]["common"] == 2.0
    assert found["training"]["ss_max_train_steps"] == "7"
    assert [row["result"] for row in found["tools"]] == ["loaded"] * 7
    # A tensor changed after the hashes were written.
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert set(inspect_file(path)["hashes"]["stored_agree"].values()) >= {False}


def test_peft_folder(tmp_path: Path) -> None:
    for component in ("unet", "text_encoder"):
        (tmp_path / component).mkdir()
        path = tmp_path / component / "adapter_model.safetensors"
        write_file(path, layouts.peft_folder(LAYERS, component))
        (tmp_path / component / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    found = inspect_file(tmp_path)
    assert found["format"] == "PEFT folder"
    assert found["layers"] == {"text_encoder": {"text attention": 2}, "unet": {"attention": 2}}
    assert found["alpha"]["common"] == 8.0
    alone = inspect_file(tmp_path / "unet")
    assert alone["tensors"] == 4
    assert {row["loaded"] for row in alone["tools"]} == {0}


def test_alpha_of_a_layer_by_its_pattern(tmp_path: Path) -> None:
    """As `convert --to diffusers` and `--to peft` write layers of different ranks."""
    modules = {name: LoraWeights(torch.ones(rank, 8), torch.ones(8, rank), 3.0) for name, rank in PATTERNED}
    adapter = Adapter("sd1", modules)
    formats.write_diffusers(tmp_path / "a.safetensors", adapter)
    formats.write_peft(tmp_path / "peft", adapter)
    plain = inspect_file(tmp_path / "a.safetensors")
    assert plain["rank"]["counts"] == plain["alpha"]["counts"]  # folded: alpha is the rank
    assert not any("alpha" in (row["reason"] or "") for row in plain["tools"])
    folder = inspect_file(tmp_path / "peft")
    assert folder["alpha"]["common"] == 3
    assert folder["layers"] == {"text_encoder": {"text attention": 1}, "unet": {"attention": 2}}


PATTERNED = (
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 2),
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k", 5),
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 5),
)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"lora_alpha": 1%s}' % ("0" * 400), "lora_alpha"),
        ('{"lora_alpha": NaN}', "NaN"),
        ('{"lora_alpha": "8"}', "lora_alpha"),
        ('{"peft_type": "LOHA"}', "LOHA"),
        ('{"use_rslora": true}', "use_rslora"),
        ("[]", "JSON object"),
        (None, "is missing"),
    ],
)
def test_a_peft_folder_whose_alpha_cannot_be_known(tmp_path: Path, config: str | None, said: str) -> None:
    write_file(tmp_path / "adapter_model.safetensors", layouts.peft_folder(LAYERS, "unet"))
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(AdapterError, match=said) as caught:
        inspect_file(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_dora_is_known_by_the_configuration(tmp_path: Path) -> None:
    write_file(tmp_path / "adapter_model.safetensors", layouts.peft_folder(LAYERS, "unet"))
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true, "lora_alpha": 4}')
    assert inspect_file(tmp_path)["algorithms"] == ["DoRA"]


def broken_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    whole = example(folder).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    name = next(n for n in header if n.endswith("up.weight"))
    begin = 8 + length + header[name]["data_offsets"][0]
    return {
        "empty": (b"", "no safetensors file"),
        "text": (b"hello, this is no model", "no safetensors file"),
        "pickle": (b"\x80\x02}q\x00.", "pickle"),
        "zip": (b"PK\x03\x04" + bytes(30), "pickle"),
        "cut in the header": (whole[: 8 + length // 2], "broken or cut short"),
        "cut in the tensors": (whole[:-1], "broken or cut short"),
        "more at the end": (whole + b"x", "broken or cut short"),
        "length of the header": (struct.pack("<Q", 2**60) + whole[8:], "broken or cut short"),
        "no JSON": (whole[:9] + b"!" + whole[10:], "broken or cut short"),
        "no tensors": (struct.pack("<Q", 8) + b'{}      ', "holds no tensors"),
        "not a number": (whole[:begin] + b"\xff\x7f" + whole[begin + 2 :], "not finite"),
    }  # fmt: skip


KINDS = ("empty", "text", "pickle", "zip", "cut in the header", "cut in the tensors", "more at the end",
         "length of the header", "no JSON", "no tensors", "not a number")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_give_one_line(tmp_path: Path, kind: str) -> None:
    files = broken_files(tmp_path)
    assert tuple(files) == KINDS
    content, message = files[kind]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    assert_refused(run("inspect", path), 1, "broken.safetensors", message)


def test_what_is_not_there(tmp_path: Path) -> None:
    assert_refused(run("inspect", tmp_path / "none.safetensors"), 1, "does not exist")
    assert_refused(run("inspect", tmp_path), 1, "folder without adapter_model.safetensors")


def test_usage(tmp_path: Path) -> None:
    path = example(tmp_path)
    assert_refused(run("inspect", path, "--verify"), 2, "--base")
    assert_refused(run("inspect", path, "--base", "toybox"), 2, "--verify")


def test_metadata_of_any_form_is_told(tmp_path: Path) -> None:
    metadata = {
        "ss_tag_frequency": "[1]",
        "lora_adapter_metadata": "no JSON",
        "dbadapter.layers_per_block": "x",
    }
    assert (
        inspect_file(write_file(tmp_path / "a.safetensors", layouts.kohya(LAYERS), metadata))["trigger"] == []
    )


def test_tags_are_the_trigger_where_no_phrase_is(tmp_path: Path) -> None:
    metadata = {"ss_tag_frequency": json.dumps({"10_dog": {"sks dog": 5, "grass": 2}})}
    found = inspect_file(write_file(tmp_path / "a.safetensors", layouts.kohya(LAYERS), metadata))
    assert found["trigger"] == ["sks dog", "grass"]


def test_inspection_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from dbadapter.inspection import inspect_file; from pathlib import Path\n"
    code += f"inspect_file(Path({str(example(tmp_path))!r})); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_folder_with_a_broken_configuration(tmp_path: Path) -> None:
    write_file(tmp_path / "adapter_model.safetensors", layouts.peft_folder(LAYERS, "unet"))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config.json cannot be read"):
        inspect_file(tmp_path)


@given(data=st.binary(max_size=200), sized=st.booleans())
def test_bytes_of_any_kind_give_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, sized: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data if sized else data)
    message = ""
    try:
        inspect_file(path)
    except AdapterError as error:
        message = str(error)
    assert "\n" not in message
    assert not message or str(path) in message
