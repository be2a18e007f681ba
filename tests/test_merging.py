"""Merging adapters: against sums in float64, in the file, in diffusers, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import CONV, PROJ, Q_PROJ, SHAPES, TO_K, TO_Q, adapter, flat, reference, relative
from tiny_bases import write_tiny_base
from torch import Tensor

from dbadapter import keys, lora
from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.adapter_file import AdapterDescription, read_adapter, write_adapter
from dbadapter.base import Base, load_base
from dbadapter.errors import AdapterError, UsageError
from dbadapter.export.parity import synthetic_adapter
from dbadapter.merging import RECORD, merge, write_merged


@pytest.fixture
def two() -> dict[Adapter, float]:
    """Two adapters that differ in everything that may differ."""
    one = adapter(1, ranks={TO_Q: 4, TO_K: 2, CONV: 3, Q_PROJ: 5}, alpha=2.0)
    other = adapter(2, ranks={TO_Q: 7, PROJ: 4, Q_PROJ: 1}, alpha=9.0)
    return {one: 0.7, other: -0.4}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-7), (torch.float16, 1e-3)])
def test_the_sum_is_that_of_float64(two: dict[Adapter, float], dtype: torch.dtype, tolerance: float) -> None:
    merged = merge(two, dtype=dtype)
    wanted = reference(two)
    assert merged.adapter.modules.keys() == wanted.keys()
    for name, matrix in wanted.items():
        assert relative(flat(merged.adapter.modules[name]), matrix) < tolerance
    ranks = {name: weights.rank for name, weights in merged.adapter.modules.items()}
    assert ranks == {TO_Q: 11, TO_K: 2, CONV: 3, Q_PROJ: 6, PROJ: 4}
    assert len({weights.alpha for weights in merged.adapter.modules.values()}) == 1
    assert merged.error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank", [1, 3, 6, 40])
def test_the_error_told_is_the_error_measured(
    two: dict[Adapter, float], tmp_path: Path, rank: int, dtype: torch.dtype
) -> None:
    merged = merge(two, rank=rank, dtype=dtype)
    path = tmp_path / "both.safetensors"
    write_merged(path, merged)
    read = read_adapter(path)
    told = json.loads(read.metadata[RECORD])
    wanted = reference(two)
    for name, matrix in wanted.items():
        kept = read.modules[name]
        assert kept.rank <= max(rank, 1)
        measured = relative(flat(kept), matrix)
        values = torch.linalg.svdvals(matrix)
        best = float(values[rank:].norm() / values.norm())
        assert merged.errors[name] == pytest.approx(measured, rel=1e-3, abs=1e-7)
        assert told["layers"][name] == pytest.approx(measured, rel=1e-3, abs=1e-7)
        assert measured < best + (1e-6 if dtype == torch.float32 else 1e-3)
    squares = sum(float((flat(read.modules[n]) - m).square().sum()) for n, m in wanted.items())
    whole = math.sqrt(squares / sum(float(m.square().sum()) for m in wanted.values()))
    assert merged.error == pytest.approx(whole, rel=1e-3, abs=1e-7)
    assert told["relative_error"] == pytest.approx(whole, rel=1e-3, abs=1e-7)


@st.composite
def mixes(draw: st.DrawFn) -> dict[Adapter, float]:
    found = {}
    for _ in range(draw(st.integers(1, 3))):
        names = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
        each = adapter(
            draw(st.integers(0, 2**20)),
            ranks={name: draw(st.integers(1, 6)) for name in sorted(names)},
            alpha=draw(st.sampled_from([0.25, 1.0, 4.0, 7.5])),
            scale=draw(st.sampled_from([1e-3, 0.1, 1.0])),
            dtype=draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
            family=draw(st.sampled_from(["sd1", "toybox"])),
        )
        found[each] = draw(st.floats(-2, 2, width=16).filter(lambda w: abs(w) > 0.01))
    return found


@given(mixes(), st.sampled_from([torch.float16, torch.float32]), st.none() | st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_any_mix(adapters: dict[Adapter, float], dtype: torch.dtype, rank: int | None) -> None:
    merged = merge(adapters, rank=rank, dtype=dtype)
    for name, matrix in reference(adapters).items():
        got = merged.adapter.modules[name]
        assert got.lora_A.dtype == got.lora_B.dtype == dtype
        assert (got.lora_B.shape[0], *got.lora_A.shape[1:]) == SHAPES[name]
        assert relative(flat(got), matrix) == pytest.approx(merged.errors[name], rel=1e-2, abs=2e-7)
        if rank is None:
            assert merged.errors[name] < (2e-7 if dtype == torch.float32 else 1e-3)


def test_a_minus_a_is_nothing(tmp_path: Path) -> None:
    one = adapter(1)
    write_adapter(tmp_path / "a.safetensors", one)
    same = read_adapter(tmp_path / "a.safetensors")
    for rank in (None, 2):
        merged = merge({tmp_path / "a.safetensors": 1.0, same: -1.0}, rank=rank)
        assert merged.error == 0
        assert all(flat(weights).abs().max() < 1e-12 for weights in merged.adapter.modules.values())


def test_a_single_file_with_a_weight_of_one_stays_bit_for_bit(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", adapter(1, alpha=4.0))
    read = read_adapter(tmp_path / "a.safetensors")
    merged = merge({tmp_path / "a.safetensors": 1.0})
    assert merged.error == 0
    for name, weights in read.modules.items():
        assert torch.equal(merged.adapter.modules[name].lora_A, weights.lora_A)
        assert torch.equal(merged.adapter.modules[name].lora_B, weights.lora_B)


def test_factors_that_float16_would_lose_are_balanced() -> None:
    tiny = adapter(1, scale=1.0)
    for weights in tiny.modules.values():
        weights.lora_A.mul_(3e4)
        weights.lora_B.mul_(1e-8)
    assert merge({tiny: 0.3}).error < 1e-3


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"too large for torch\.float16: pass --dtype float32"):
        merge({adapter(1, scale=1e5): 1.0})
    assert merge({adapter(1, scale=1e5): 1.0}, dtype=torch.float32).error < 1e-6


def test_a_linear_layer_and_a_convolution_of_one_pixel_mix() -> None:
    conv = adapter(1, ranks={PROJ: 2})
    a, b = conv.modules[PROJ].lora_A.flatten(1), conv.modules[PROJ].lora_B.flatten(1)
    for family, shape in (("sd1", (4, 32, 1, 1)), ("sdxl", (4, 32))):
        linear = Adapter(family, {PROJ: LoraWeights(a, b, 3.0)})
        own = Adapter(family, conv.modules)
        merged = merge({own: 1.0, linear: 1.0}, dtype=torch.float32).adapter.modules[PROJ]
        assert tuple(merged.lora_A.shape) == shape
        torch.testing.assert_close(flat(merged), 2 * flat(conv.modules[PROJ]))


def spoken(words: str, number: int) -> Adapter:
    tags = {f"{number}_{words}": {words: number}}
    return adapter(
        number,
        metadata={
            "modelspec.trigger_phrase": words,
            "modelspec.prediction_type": "epsilon",
            "modelspec.author": "A. N. Other",
            "ss_tag_frequency": json.dumps(tags),
            "ss_seed": str(number),
            "sshs_model_hash": f"{number}" * 64,
        },
    )


def test_what_the_file_says(tmp_path: Path) -> None:
    files = {}
    for number, words in ((1, "sks dog"), (2, "wxv hat")):
        path = tmp_path / f"{number}.safetensors"
        write_adapter(path, spoken(words, number), description=AdapterDescription(base="mine"))
        files[path] = number / 2
    write_merged(tmp_path / "both.safetensors", merge(files))
    said = read_adapter(tmp_path / "both.safetensors").metadata
    assert said["modelspec.trigger_phrase"] == "sks dog, wxv hat"
    assert json.loads(said["ss_tag_frequency"]) == {"1_sks dog": {"sks dog": 1}, "2_wxv hat": {"wxv hat": 2}}
    assert said["ss_base_model_version"] == "sd_v1"
    assert said["ss_sd_model_name"] == said["dbadapter.base"] == "mine"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("8", "8")
    assert said["modelspec.author"] == "A. N. Other"
    assert "ss_seed" not in said  # theirs differ
    record = json.loads(said[RECORD])
    assert [(each["file"], each["weight"]) for each in record["adapters"]] == [
        ("1.safetensors", 0.5),
        ("2.safetensors", 1.0),
    ]
    hashes = [each["sshs_model_hash"] for each in record["adapters"]]
    assert hashes == [read_adapter(path).metadata["sshs_model_hash"] for path in files]
    assert said["sshs_model_hash"] not in hashes
    assert str(tmp_path) not in json.dumps(said)
    sidecar = json.loads((tmp_path / "both.json").read_text())
    assert sidecar["activation text"] == "sks dog, wxv hat"


def test_a_resized_file_says_what_it_said_before(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", spoken("sks dog", 3))
    write_merged(tmp_path / "b.safetensors", merge({tmp_path / "a.safetensors": 1.0}, rank=2))
    said = read_adapter(tmp_path / "b.safetensors").metadata
    assert said["ss_seed"] == "3"
    assert said["ss_network_dim"] == "2"


def test_toybox_and_sd1_give_sd1() -> None:
    merged = merge({adapter(1, family="toybox"): 1.0, adapter(2): 1.0})
    assert merged.adapter.family == "sd1"
    assert merge({adapter(1, family="unknown"): 1.0, adapter(2): 1.0}).adapter.family == "sd1"


# --- on a model


def predict(pipeline: Any) -> Tensor:
    """Return the UNet's output, the text encoder's in it."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        words = pipeline.text_encoder(torch.arange(24).reshape(2, 12))[0]
        result: Tensor = pipeline.unet(latents, torch.tensor([10, 500]), encoder_hidden_states=words).sample
    return result


def test_the_merged_file_is_both_adapters_on_the_model(
    two: dict[Adapter, float], tiny_base: Base, tmp_path: Path
) -> None:
    """Through our own loader and diffusers': ranks differ from layer to layer, and alphas must arrive."""
    pipeline = tiny_base.pipeline
    base = predict(pipeline)
    # Every layer of the encoder's attention, because diffusers takes no file without an out_proj.
    full = adapter(3, ranks={Q_PROJ: 2}).modules[Q_PROJ]
    two[Adapter("sd1", {Q_PROJ.replace("q_proj", "out_proj"): full})] = 1.0
    lora.apply(pipeline, two)
    wanted = predict(pipeline)
    lora.apply(pipeline, {})
    assert torch.equal(predict(pipeline), base)
    assert (wanted - base).norm() / base.norm() > 20 * 1e-4
    path = tmp_path / "both.safetensors"
    write_merged(path, merge(two, dtype=torch.float32))
    lora.apply(pipeline, {path: 1.0})
    assert relative(predict(pipeline), wanted) < 1e-4
    lora.apply(pipeline, {})
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert relative(predict(pipeline), wanted) < 1e-4


def test_two_adapters_at_once_and_off_again_bit_for_bit(tiny_base: Base) -> None:
    pipeline = tiny_base.pipeline
    weights = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    base = predict(pipeline)
    one, other = adapter(1), adapter(2, ranks={TO_Q: 6, CONV: 2})
    lora.apply(pipeline, {one: 0.7, other: 0.5})
    both = predict(pipeline)
    lora.apply(pipeline, {merge({one: 0.7, other: 0.5}, dtype=torch.float32).adapter: 1.0})
    assert (both - base).norm() / base.norm() > 20 * 1e-5
    assert relative(predict(pipeline), both) < 1e-5
    lora.apply(pipeline, {})
    assert torch.equal(predict(pipeline), base)
    after = pipeline.unet.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in after.items())


def test_an_sdxl_file_of_mixed_ranks_arrives_in_diffusers(tmp_path: Path) -> None:
    """What each layer of all three models adds there, weight by weight."""
    from diffusers import StableDiffusionXLPipeline
    from peft.tuners.lora import LoraLayer

    folder = write_tiny_base(tmp_path / "base", "sdxl", clip_vocabulary=False)
    base = load_base(str(folder), device="cpu")
    small = synthetic_adapter(base, rank=2, seed=1, targets=("attention",))
    large = synthetic_adapter(base, rank=5, seed=2, targets=("attention", "feed-forward", "proj", "conv"))
    given = {small: 0.7, large: 0.5}
    path = tmp_path / "both.safetensors"
    write_merged(path, merge(given, dtype=torch.float32))
    assert {weights.rank for weights in read_adapter(path).modules.values()} == {5, 7}
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    wanted, seen = reference(given), set()
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for module, layer in getattr(pipeline, component).named_modules():
            if isinstance(layer, LoraLayer):
                name = keys.canonical_module(component, module)
                got = layer.get_delta_weight("default_0").detach().double().flatten(1)
                assert relative(got, wanted[name]) < 1e-5, name
                seen.add(name)
    assert seen == wanted.keys()


# --- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: setattr(a, "family", "sdxl"), "is for a base of family sd1, .* for sdxl"),
        (
            lambda a: a.metadata.update({"modelspec.prediction_type": "v"}),
            "says epsilon, .* says v_prediction.*cannot be merged",
        ),
        (
            lambda a: a.modules.update({TO_K: LoraWeights(torch.ones(2, 64), torch.ones(32, 2), 2.0)}),
            r"At .*attn2.to_k, .* shape \(32, 32\), .* shape \(32, 64\)",
        ),
        (lambda a: a.metadata.update({"dbadapter.layers_per_block": "1"}), "layers per block"),
        (lambda a: a.metadata.update({"ss_base_model_version": "sd_v2_v"}), "says v_prediction"),
    ],
)
def test_what_cannot_be_merged(change: Any, words: str) -> None:
    plain = {"modelspec.prediction_type": "epsilon", "dbadapter.layers_per_block": "2"}
    one, other = adapter(1, metadata=dict(plain)), adapter(2)
    change(other)
    with pytest.raises(AdapterError, match=words) as caught:
        merge({one: 1.0, other: 1.0})
    assert len(str(caught.value).splitlines()) == 1


def test_impossible_calls() -> None:
    one = adapter(1)
    for call, words in (
        (lambda: merge({one: 1.0}, rank=0), "rank must be at least 1"),
        (lambda: merge({one: float("inf")}), "finite number"),
        (lambda: merge({one: 0.0}), "Nothing to merge"),
        (lambda: merge({}), "Nothing to merge"),
        (lambda: merge({one: 1.0}, dtype=torch.int8), "dtype must be"),
    ):
        with pytest.raises(UsageError, match=words):
            call()
