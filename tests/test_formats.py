"""Formats: round trips without a changed bit, what each file holds, what cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbadapter import formats, keys
from dbadapter.adapter_file import Adapter, AdapterDescription, LoraWeights, read_adapter, write_adapter
from dbadapter.errors import AdapterError, OutputError, UsageError
from dbadapter.folding import FOLDED, fold

TO_K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TO_OUT = TO_K.replace("attn2.to_k", "attn1.to_out.0")
CONV = "unet.down_blocks.0.resnets.1.conv1"
PROJ = "unet.mid_block.attentions.0.proj_in"
FC1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
OUT_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
Q_PROJ_2 = "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj"
NAMES = (TO_K, TO_OUT, CONV, PROJ, FC1, OUT_PROJ, Q_PROJ_2)
METADATA = {
    "modelspec.title": "My mug", "modelspec.author": "A. N. Other",
    "modelspec.thumbnail": "data:image/jpeg;base64,AA", "ss_session_id": "7",
}  # fmt: skip


def layer(
    name: str, rank: int, alpha: float, dtype: torch.dtype, seed: int = 0, width: int = 6
) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    kernel, ones = ((3, 3), (1, 1)) if name == CONV else ((), ())
    a = torch.randn(rank, width, *kernel, generator=generator)
    return LoraWeights(a.to(dtype), torch.randn(5, rank, *ones, generator=generator).to(dtype), alpha)


def example(family: str = "sdxl", dtype: torch.dtype = torch.float16, alpha: float = 2.0) -> Adapter:
    names = [n for n in NAMES if family == "sdxl" or "encoder_2" not in n]
    layers = {name: layer(name, 4, alpha, dtype, seed) for seed, name in enumerate(names)}
    return Adapter(family, layers, dict(METADATA))


def target(folder: Path, kind: str) -> Path:
    return folder / (kind if kind == "peft" else f"{kind}.safetensors")


def assert_same(found: Adapter, adapter: Adapter) -> None:
    assert found.modules.keys() == adapter.modules.keys()
    for name, weights in adapter.modules.items():
        read = found.modules[name]
        assert read.alpha == weights.alpha, name
        for ours, theirs in ((weights.lora_A, read.lora_A), (weights.lora_B, read.lora_B)):
            assert ours.dtype == theirs.dtype, name
            assert torch.equal(ours, theirs), name


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    alphas = st.one_of(st.floats(2**-8, 512, width=32), st.sampled_from([0.1, 1 / 3, 4.0, 16.0]))
    dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
    layers = {
        name: layer(name, draw(st.integers(1, 5)), draw(alphas), draw(dtypes), draw(st.integers(0, 99)))
        for name in draw(st.sets(st.sampled_from(NAMES), min_size=1))
    }
    return Adapter("sdxl", layers, {})


@given(adapters(), st.lists(st.sampled_from(formats.FORMATS), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_any_chain_of_formats_changes_no_bit(
    tmp_path_factory: Any, adapter: Adapter, chain: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    path = folder / "start.safetensors"
    write_adapter(path, adapter, dtype=None, sidecars=False)
    for step, kind in enumerate(chain):
        (folder / str(step)).mkdir()
        done = formats.convert(path, kind, path := target(folder / str(step), kind), family="sdxl")
        assert not [note for note in done.notes if "other than their rank" in note]
    assert_same(read_adapter(path), adapter)


@pytest.mark.parametrize("kind", formats.FORMATS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "toybox"])
def test_metadata_and_family_stay(tmp_path: Path, kind: str, family: str) -> None:
    source, path = tmp_path / "a.safetensors", target(tmp_path, kind)
    adapter = example(family)
    description = AdapterDescription(title="My mug", trigger="sks mug", seed=5)
    write_adapter(source, adapter, dtype=None, description=description, sidecars=False)
    formats.convert(source, kind, path)
    found = read_adapter(path)
    assert found.family == family
    assert_same(found, adapter)
    kept = {key: value for key, value in METADATA.items() if key != "modelspec.thumbnail"}
    kept |= {"ss_seed": "5", "modelspec.trigger_phrase": "sks mug"}
    assert kept.items() <= found.metadata.items()


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_a_thumbnail_stays(tmp_path: Path, kind: str) -> None:
    source, path = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    formats.write_diffusers(source, example())
    formats.convert(source, kind, target(tmp_path, kind))
    formats.convert(target(tmp_path, kind), "kohya", path)
    assert read_adapter(path).metadata["modelspec.thumbnail"] == METADATA["modelspec.thumbnail"]
    assert "lora_adapter_metadata" not in read_adapter(path).metadata
    assert FOLDED not in read_adapter(path).metadata


@pytest.mark.parametrize(
    ("alpha", "dtype", "stored"),
    [
        (4.0, torch.float16, "F16"),  # the rank
        (2.0, torch.float16, "F16"),  # half of it: no digit changes
        (3.0, torch.float16, "F32"),
        (0.1, torch.bfloat16, "F32"),
        (2.0, torch.float32, "F32"),
        (3.0, torch.float32, "F64"),
        (-2.0, torch.float16, "F16"),
        (2.0**-20, torch.float16, "F32"),  # would vanish in float16
    ],
)
def test_the_strength_is_in_the_numbers_for_diffusers(
    tmp_path: Path, alpha: float, dtype: torch.dtype, stored: str
) -> None:
    path = tmp_path / "a.safetensors"
    adapter = Adapter("sd1", {TO_K: layer(TO_K, 4, alpha, dtype)})
    assert formats.write_diffusers(path, adapter) == []
    down, up = keys.to_diffusers(TO_K, "lora_A"), keys.to_diffusers(TO_K, "lora_B")
    with safe_open(path, "pt") as file:
        assert file.get_slice(up).get_dtype() == stored
        said = json.loads(file.metadata()["lora_adapter_metadata"])
        got = file.get_tensor(up).double() @ file.get_tensor(down).double()
        assert (FOLDED in file.metadata()) == (alpha != 4)
    weights = adapter.modules[TO_K]
    expected = weights.lora_B.double() @ weights.lora_A.double() * (alpha / 4)
    assert torch.allclose(got, expected, rtol=1e-6)
    assert said["unet.lora_alpha"] == said["unet.r"] == 4
    assert_same(read_adapter(path), adapter)


def test_a_scale_that_fits_nowhere_stays_in_the_header(tmp_path: Path) -> None:
    adapter = Adapter(
        "sd1", {TO_K: layer(TO_K, 4, 0.0, torch.float16), TO_OUT: layer(TO_OUT, 4, 4.0, torch.float16)}
    )
    assert fold(adapter.modules[TO_K]) is None
    (note,) = formats.write_diffusers(tmp_path / "a.safetensors", adapter)
    assert note.startswith(f"1 layers keep an alpha other than their rank, e.g. {TO_K}")
    assert_same(read_adapter(tmp_path / "a.safetensors"), adapter)


def test_tensors_changed_by_another_program_keep_their_effect(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    formats.write_diffusers(path, Adapter("sd1", {TO_K: layer(TO_K, 4, 3.0, torch.float16)}))
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    up = keys.to_diffusers(TO_K, "lora_B")
    tensors[up] = tensors[up] * 1.001
    save_file(tensors, path, metadata)
    found = read_adapter(path).modules[TO_K]
    assert found.alpha == 4.0
    assert torch.equal(found.lora_B, tensors[up])


def test_peft_folders_hold_one_model_each_and_no_path(tmp_path: Path) -> None:
    formats.write_peft(tmp_path / "dog", example(alpha=3.0))
    assert sorted(p.name for p in (tmp_path / "dog").iterdir()) == ["text_encoder", "text_encoder_2", "unet"]
    for component in keys.COMPONENTS:
        config = json.loads((tmp_path / "dog" / component / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] is None
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 3)
        assert str(tmp_path) not in json.dumps(config)
        alone = read_adapter(tmp_path / "dog" / component)
        assert set(alone.modules) == {n for n in NAMES if keys.component_of(n) == component}
    assert len(load_file(tmp_path / "dog" / "text_encoder" / "adapter_model.safetensors")) == 8


@pytest.mark.parametrize("component", keys.COMPONENTS)
def test_a_lone_peft_folder_tells_its_model(tmp_path: Path, component: str) -> None:
    formats.write_peft(tmp_path / "dog", example())
    (tmp_path / "dog" / component).rename(tmp_path / "renamed")
    found = read_adapter(tmp_path / "renamed")
    assert {keys.component_of(name) for name in found.modules} == {component}


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_model_of_a_peft_folder_is_never_left_out(tmp_path: Path, lost: str) -> None:
    """Its other file shows that it was there."""
    formats.write_peft(tmp_path / "peft", example())
    (tmp_path / "peft" / "unet" / lost).unlink()
    with pytest.raises(AdapterError, match=f"unet/{lost}"):
        read_adapter(tmp_path / "peft")


def test_a_peft_folder_is_replaced_whole_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "dog"
    formats.write_peft(folder, example())
    with pytest.raises(OutputError, match=r"dog exists already.*--overwrite"):
        formats.write_peft(folder, example("sd1"))
    formats.write_peft(folder, example("sd1"), overwrite=True)
    assert not (folder / "text_encoder_2").exists()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt, which is no part of a PEFT adapter"):
        formats.write_peft(folder, example(), overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["dog"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        formats.write_peft(tmp_path / "file", example(), overwrite=True)


def test_a_failed_write_of_folders_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_peft(tmp_path / "dog", example())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        formats.write_peft(tmp_path / "dog", example("sd1"), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["dog"]
    assert_same(read_adapter(tmp_path / "dog"), example())


OLD = {
    TO_K: "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.{}.weight",
    TO_OUT: "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{}.weight",
    OUT_PROJ: "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.{}.weight",
}
SCRIPT = {
    TO_K: f"{TO_K}.lora.{{}}.weight",
    PROJ: f"{PROJ}.lora_{{}}.weight",
    OUT_PROJ: f"{OUT_PROJ}.lora_linear_layer.{{}}.weight",
    FC1: f"{FC1}.lora_{{}}.weight",
}
BARE = {TO_K: OLD[TO_K].removeprefix("unet."), TO_OUT: OLD[TO_OUT].removeprefix("unet.")}
RAW = {name: f"{name}.lora_{{}}.weight" for name in NAMES}


@pytest.mark.parametrize("layout", [OLD, SCRIPT, BARE, RAW], ids=["old", "script", "attention", "raw"])
@pytest.mark.parametrize("kind", formats.FORMATS)
def test_what_diffusers_wrote_over_the_years_comes_in(
    tmp_path: Path, layout: dict[str, str], kind: str
) -> None:
    adapter = Adapter("sdxl", {name: layer(name, 3, 3.0, torch.float16) for name in layout})
    tensors = {}
    for name, template in layout.items():
        words = ("A", "B") if "lora_{}" in template else ("down", "up")
        tensors[template.format(words[0])] = adapter.modules[name].lora_A
        tensors[template.format(words[1])] = adapter.modules[name].lora_B
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    family = None if kind != "kohya" or layout is RAW else "sdxl"
    formats.convert(tmp_path / "a.safetensors", kind, target(tmp_path, kind), family=family)
    assert_same(read_adapter(target(tmp_path, kind)), adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_locon_comes_in_and_a_tucker_core_is_folded(tmp_path: Path, dtype: torch.dtype) -> None:
    """LyCORIS, functional/general.py: rebuild_tucker is einsum("i j ..., i p, j r -> p r ...")."""
    generator = torch.Generator().manual_seed(0)
    down, mid, up = (
        torch.randn(s, generator=generator).to(dtype) for s in ((3, 6, 1, 1), (3, 3, 3, 3), (5, 3, 1, 1))
    )
    prefix = "lora_unet_down_blocks_0_resnets_1_conv1"
    tensors = {
        "lora_down.weight": down,
        "lora_mid.weight": mid,
        "lora_up.weight": up,
        "alpha": torch.tensor(1.5),
    }
    save_file({f"{prefix}.{key}": value for key, value in tensors.items()}, tmp_path / "a.safetensors")
    weights = read_adapter(tmp_path / "a.safetensors").modules[CONV]
    expected = torch.einsum(
        "ijyx,pi,jr->pryx", mid.double(), up.flatten(1).double(), down.flatten(1).double()
    )
    got = torch.einsum("pi,irhw->prhw", weights.lora_B.flatten(1).double(), weights.lora_A.double())
    assert weights.alpha == 1.5
    assert weights.lora_A.dtype == torch.float32
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "DoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_magnitude_vector", "DoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "LoKr"),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "OFT"),
        ("lora_unet_mid_block_attentions_0_proj_in.on_input", "IA3"),
        ("lora_unet_mid_block_attentions_0_proj_in.a1.weight", "GLoRA"),
        ("lora_unet_mid_block_attentions_0_norm.w_norm", "norms"),
        ("lora_unet_mid_block_attentions_0_proj_in.diff", "full weight difference"),
        ("unet.mid_block.attentions.0.proj_in.lora_B.bias", "biases"),
        ("bundle_emb.cat.string_to_param.*", "bundled embedding"),
        ("emb_params", "textual inversion"),
        ("clip_l", "textual inversion"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "SD3"),
        ("lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight", "SD3"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight", "SD3 or Flux"),
        ("lycoris_down_blocks_0.lora_down.weight", "LyCORIS's own names"),
        ("model.diffusion_model.input_blocks.0.0.weight", "whole checkpoint"),
        ("diffusion_model.input_blocks.1.1.proj_in.lora_down.weight", "ComfyUI's own names"),
        ("base_model.model.conv_in.lora_A.weight", "PEFT folder's file"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(tmp_path: Path, key: str, words: str) -> None:
    """A file of such a kind holds plain keys too, which come first."""
    plain = "lora_unet_down_blocks_1_attentions_0_proj_in"
    tensors = {f"{plain}.lora_down.weight": torch.ones(2, 3), f"{plain}.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors | {key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    result = run(
        "convert", tmp_path / "a.safetensors", "--to", "kohya", "--output", tmp_path / "b.safetensors"
    )
    assert_refused(result, 1, "a.safetensors", words, repr(key))
    assert not (tmp_path / "b.safetensors").exists()


def test_usage(tmp_path: Path) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    formats.write_diffusers(path, Adapter("unknown", {TO_K: layer(TO_K, 2, 2.0, torch.float16)}))
    with pytest.raises(AdapterError, match="pass --family sd1, sd2 or sdxl"):
        formats.convert(path, "kohya", out)
    formats.convert(path, "kohya", out, family="sd2")
    assert read_adapter(out).family == "sd2"
    with pytest.raises(AdapterError, match="for a base of family sd2, not sd1: leave out --family"):
        formats.convert(out, "kohya", out, family="sd1", overwrite=True)
    with pytest.raises(OutputError, match=r"must end in \.safetensors"):
        formats.convert(out, "diffusers", tmp_path / "c")
    with pytest.raises(OutputError, match="exists already"):
        formats.convert(out, "diffusers", path)
    for bad in ({"kind": "lora"}, {"kind": "kohya", "family": "flux"}):
        with pytest.raises(UsageError, match="must be one of"):
            formats.convert(out, output=path, **bad)


def test_what_diffusers_misreads_is_said(tmp_path: Path) -> None:
    layers = {n: layer(n, 2, a, torch.float16) for n, a in ((TO_K, 2.0), (TO_OUT, 1.0), (FC1, 2.0))}
    formats.write_peft(tmp_path / "peft", Adapter("sd1", layers))
    words = ("convert", tmp_path / "peft", "--to", "kohya", "--output")
    done = run(*words, tmp_path / "a.safetensors")
    assert done.exit_code == 0
    first, second = done.stderr.splitlines()
    assert "different alphas at the wrong strength: use --to diffusers" in first
    assert "text_encoder part without out_proj" in second
    assert done.stdout == f"Written and read back: {tmp_path / 'a.safetensors'}\n"


@pytest.mark.parametrize(("dtype", "name"), [("float32", "F32"), ("bfloat16", "BF16"), ("keep", "F16")])
def test_dtype_is_kept_unless_asked(tmp_path: Path, dtype: str, name: str) -> None:
    write_adapter(tmp_path / "a.safetensors", example(), sidecars=False)
    words = ("convert", tmp_path / "a.safetensors", "--to", "kohya", "--dtype", dtype)
    assert run(*words, "--output", tmp_path / "b.safetensors").exit_code == 0
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert {file.get_slice(k).get_dtype() for k in file.keys() if "weight" in k} == {name}  # noqa: SIM118


def test_onnx_adapters_are_written_from_any_format(tmp_path: Path) -> None:
    formats.write_peft(tmp_path / "peft", example("sd1"))
    words = ("convert", tmp_path / "peft", "--to", "onnx-adapter", "--output", tmp_path / "onnx")
    assert_refused(run(*words, "--dtype", "bfloat16"), 2, "float32 or float16, got bfloat16")
    assert_refused(run(*words, "--family", "sd1"), 2, "leave it out")
    result = run(*words)
    assert (result.exit_code, result.stderr) == (0, "")
    found = sorted(path.name for path in (tmp_path / "onnx").iterdir())
    assert found == ["adapter.json", "text_encoder.onnx_adapter", "unet.onnx_adapter"]


def test_an_absurd_rank_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbadapter.adapter_parts.MAX_RANK", 3)
    monkeypatch.setattr("dbadapter.adapter_parts.read_tensors", lambda *_: pytest.fail("read"))
    formats.write_peft(tmp_path / "peft", example())
    with pytest.raises(AdapterError, match="has rank 4, at most 3 is read"):
        read_adapter(tmp_path / "peft" / "unet")
