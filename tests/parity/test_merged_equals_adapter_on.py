"""An adapter merged into the weights gives what the adapter gives when it is on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dbadapter import lora
from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.adapter_file import write_adapter
from dbadapter.base import Base, load_base
from dbadapter.export.graphs import Sizes, example_inputs
from dbadapter.export.parity import EFFECT_OVER_TOLERANCE, relative_error, synthetic_adapter
from dbadapter.export.to_onnx import merged

TOLERANCE = 1e-5  # sums are ordered differently: W x + B (A x) against (W + B A) x


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    return load_base(str(tiny_base_folder), device="cpu")


@pytest.fixture
def adapters(base: Base) -> dict[Adapter, float]:
    return {synthetic_adapter(base, rank=4, seed=1): 0.7, synthetic_adapter(base, rank=3, seed=2): -0.4}


def outputs(base: Base) -> dict[str, Tensor]:
    """Return what the text encoder and the UNet give on fixed inputs, each on its own."""
    sizes = Sizes(2, 8, 8, 9)
    tokens = example_inputs(base, "text_encoder", sizes)["input_ids"]
    noisy = example_inputs(base, "unet", sizes)
    with torch.no_grad():
        words = base.text_encoder(tokens).last_hidden_state
        prediction = base.unet(noisy["sample"], noisy["timestep"], noisy["encoder_hidden_states"]).sample
    return {"text_encoder": words, "unet": prediction}


def state(base: Base) -> dict[str, Tensor]:
    parts = {"unet": base.unet, "text_encoder": base.text_encoder}
    return {f"{part}.{k}": v.clone() for part, model in parts.items() for k, v in model.state_dict().items()}


def outputs_with_adapters_on(base: Base, adapters: Mapping[Any, float]) -> dict[str, Tensor]:
    lora.apply(base.pipeline, adapters)
    try:
        return outputs(base)
    finally:
        lora.apply(base.pipeline, {})


@pytest.mark.parametrize("count", [1, 2])
def test_merged_equals_adapters_on(base: Base, adapters: dict[Adapter, float], count: int) -> None:
    chosen = dict(list(adapters.items())[:count])
    plain = outputs(base)
    on = outputs_with_adapters_on(base, chosen)
    with merged(base, chosen):
        summed = outputs(base)
    for name in plain:
        assert relative_error(plain[name], on[name]) > EFFECT_OVER_TOLERANCE * TOLERANCE
        assert relative_error(summed[name], on[name]) < TOLERANCE


def test_a_file_merges_like_the_adapter_it_was_written_from(
    base: Base, adapters: dict[Adapter, float], tmp_path: Path
) -> None:
    adapter, weight = next(iter(adapters.items()))
    rounded = Adapter(
        adapter.family,
        {
            name: LoraWeights(layer.lora_A.half().float(), layer.lora_B.half().float(), layer.alpha)
            for name, layer in adapter.modules.items()
        },
    )
    write_adapter(tmp_path / "subject.safetensors", adapter)
    on = outputs_with_adapters_on(base, {tmp_path / "subject.safetensors": weight})
    with merged(base, {rounded: weight}):
        summed = outputs(base)
    for name in on:
        assert relative_error(summed[name], on[name]) < TOLERANCE


def test_the_base_is_given_back_bit_for_bit(base: Base, adapters: dict[Adapter, float]) -> None:
    before = state(base)
    with merged(base, adapters):
        inside = state(base)
    assert any(not torch.equal(inside[name], before[name]) for name in before)
    assert all(torch.equal(value, before[name]) for name, value in state(base).items())
    with pytest.raises(KeyboardInterrupt), merged(base, adapters):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in state(base).items())


def test_a_merge_that_fails_halfway_is_taken_back(base: Base, adapters: dict[Adapter, float]) -> None:
    before = state(base)
    good, bad = adapters
    misfit = copy.copy(bad)
    misfit.modules = {**bad.modules, "unet.no.such.layer": next(iter(bad.modules.values()))}
    with pytest.raises(Exception, match="does not fit"), merged(base, {good: 1.0, misfit: 1.0}):
        pass
    assert all(torch.equal(value, before[name]) for name, value in state(base).items())
