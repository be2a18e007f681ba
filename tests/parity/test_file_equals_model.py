"""The file, read back by plain diffusers, is the trained model: alpha, names and shapes have arrived."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dbadapter import lora
from dbadapter.adapter import Adapter
from dbadapter.adapter_file import read_adapter, verify, write_adapter

ALL_TARGETS = ("attention", "feed-forward", "proj", "conv")

# The same factors, put on the model in two ways: float32's own rounding. Every equality below first shows
# that the adapter's effect is at least 20 times its tolerance.
EXACT = 1e-5
# Factors rounded to float16 (2^-11 = 5e-4 each), carried through the UNet.
ROUNDED = 2e-3


@pytest.fixture(scope="module")
def tiny(tiny_base_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        tiny_base_folder, local_files_only=True, safety_checker=None
    )


def fresh(tiny: Any) -> Any:
    """Return a plain diffusers pipeline with copies of the models that adapters change."""
    own = {name: copy.deepcopy(tiny.components[name]) for name in ("unet", "text_encoder")}
    return type(tiny)(**{**tiny.components, **own}, requires_safety_checker=False)


def predict(pipeline: Any) -> Tensor:
    """Return the UNet's output for a prompt, through the pipeline's own prompt encoding."""
    generator = torch.Generator().manual_seed(3)
    side = pipeline.unet.config.sample_size
    latents = torch.randn(2, pipeline.unet.config.in_channels, side, side, generator=generator)
    with torch.no_grad():
        text, empty = pipeline.encode_prompt("a photo of sks mug", "cpu", 1, True)
        timesteps = torch.tensor([20, 600])
        result: Tensor = pipeline.unet(
            latents, timesteps, encoder_hidden_states=torch.cat([text, empty])
        ).sample
    return result


def give_values(parameters: lora.TrainableParameters, dtype: torch.dtype = torch.float32) -> None:
    """Stand in for training; the values are rounded to `dtype`.

    At three times this strength the random UNet turns chaotic and magnifies every rounding a hundredfold.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in [*parameters.unet, *parameters.text_encoder]:
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.1).to(dtype))


def trained(tiny: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Adapter, Tensor]:
    """Return an adapter with a visible effect and the prediction of the model that carries it."""
    pipeline = fresh(tiny)
    give_values(lora.inject(pipeline.unet, pipeline.text_encoder, **options), dtype)
    return lora.collect(pipeline.unet, pipeline.text_encoder, "sd1"), predict(pipeline)


def relative(got: Tensor, expected: Tensor) -> float:
    """Return |got - expected| / |expected|, Euclidean norms."""
    return ((got - expected).norm() / expected.norm()).item()


OPTIONS: list[dict[str, Any]] = [
    {"rank": 4},
    {"rank": 4, "alpha": 1.0, "targets": ("attention", "feed-forward")},
    {"rank": 4, "alpha": 12.0, "text_encoder_rank": 2, "text_encoder_alpha": 5.0, "targets": ALL_TARGETS},
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_file_is_the_model_with_its_factors(
    tiny: Any, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Nothing but the dtype's rounding happens on the way, so rounded factors arrive exactly."""
    adapter, expected = trained(tiny, dtype, **options)
    path = tmp_path / "subject.safetensors"
    write_adapter(path, adapter, dtype=dtype)
    verify(path, adapter)
    assert relative(predict(fresh(tiny)), expected) > 20 * EXACT

    plain = fresh(tiny)
    plain.load_lora_weights(tmp_path, weight_name=path.name)
    assert relative(predict(plain), expected) < EXACT
    ours = fresh(tiny)
    lora.apply(ours, {path: 1.0})
    assert relative(predict(ours), expected) < EXACT
    merged = fresh(tiny)
    lora.merge_into(merged, path)
    assert relative(predict(merged), expected) < EXACT


@pytest.mark.parametrize("options", OPTIONS)
def test_the_default_file_is_the_trained_model(tiny: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    """As trained, in float32: the file to share is float16, and its rounding is small beside the effect."""
    adapter, expected = trained(tiny, **options)
    write_adapter(tmp_path / "subject.safetensors", adapter)
    assert relative(predict(fresh(tiny)), expected) > 20 * ROUNDED
    plain = fresh(tiny)
    plain.load_lora_weights(tmp_path, weight_name="subject.safetensors")
    assert relative(predict(plain), expected) < ROUNDED


def test_a_weight_means_the_same_in_diffusers(tiny: Any, tmp_path: Path) -> None:
    adapter, full = trained(tiny, rank=4, alpha=8.0)
    path = tmp_path / "subject.safetensors"
    write_adapter(path, adapter, dtype=torch.float32)
    ours, plain = fresh(tiny), fresh(tiny)
    lora.apply(ours, {path: 0.5})
    plain.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="subject")
    plain.set_adapters(["subject"], [0.5])
    assert relative(full, predict(plain)) > 20 * EXACT
    assert relative(predict(ours), predict(plain)) < EXACT


def test_one_part_alone_is_loaded_too(tiny: Any, tmp_path: Path) -> None:
    """An adapter without a text encoder's part, the usual case of --no-train-text-encoder."""
    pipeline = fresh(tiny)
    parameters = lora.inject(pipeline.unet, None, rank=4, alpha=8.0)
    give_values(parameters)
    expected = predict(pipeline)
    write_adapter(tmp_path / "a.safetensors", lora.collect(pipeline.unet, None, "sd1"))
    plain = fresh(tiny)
    plain.load_lora_weights(tmp_path, weight_name="a.safetensors")
    assert relative(predict(fresh(tiny)), expected) > 20 * ROUNDED
    assert relative(predict(plain), expected) < ROUNDED


@pytest.mark.parametrize("peft_names", [True, False])
def test_files_that_diffusers_saves_are_read(tiny: Any, tmp_path: Path, peft_names: bool) -> None:
    """alpha != rank is in the header only there; without it the strength would be wrong."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipeline = fresh(tiny)
    parameters = lora.inject(pipeline.unet, pipeline.text_encoder, rank=4, alpha=12.0, text_encoder_alpha=2.0)
    give_values(parameters)
    expected, base = predict(pipeline), predict(fresh(tiny))
    layers = {}
    for name in ("unet", "text_encoder"):
        state = get_peft_model_state_dict(getattr(pipeline, name), adapter_name=lora.ADAPTER_NAME)
        layers[name] = state if peft_names else convert_state_dict_to_diffusers(state)
    type(pipeline).save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata={"r": 4, "lora_alpha": 12.0},
        text_encoder_lora_adapter_metadata={"r": 4, "lora_alpha": 2.0},
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    adapter = read_adapter(path)
    assert json.loads(adapter.metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 12.0
    ours = fresh(tiny)
    lora.apply(ours, {adapter: 1.0})
    assert relative(base, expected) > 20 * EXACT
    assert relative(predict(ours), expected) < EXACT
