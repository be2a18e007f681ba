"""SDXL's file, read by plain diffusers: every tensor finds its own layer, and all three models change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dbadapter import keys, lora, toybox
from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.adapter_file import read_adapter, verify, write_adapter
from dbadapter.lora import TARGETS, target_layers

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
ALL_TARGETS = tuple(TARGETS)
EXACT = 1e-5  # float32's own rounding


def text_encoder(width: int, layers: int, heads: int, *, second: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return (CLIPTextModelWithProjection if second else CLIPTextModel)(config)


def unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        **options,
    )


@pytest.fixture(scope="module")
def true_models() -> dict[str, Any]:
    """SDXL's own sizes, without values."""
    with torch.device("meta"):
        return {
            "unet": unet(
                block_out_channels=(320, 640, 1280),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "text_encoder": text_encoder(768, 12, 12, second=False),
            "text_encoder_2": text_encoder(1280, 32, 20, second=True),
        }


@pytest.fixture(scope="module", params=[2, 1])
def tiny(request: pytest.FixtureRequest) -> Any:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(toybox.folder() / "tokenizer")
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        text_encoder=text_encoder(32, 2, 4, second=False),
        text_encoder_2=text_encoder(48, 2, 4, second=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(
            sample_size=8,
            layers_per_block=request.param,
            block_out_channels=(32, 64, 64),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=4,
            cross_attention_dim=80,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 48,
            norm_num_groups=8,
        ),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def fresh(tiny: Any) -> Any:
    own = {name: copy.deepcopy(tiny.components[name]) for name in COMPONENTS}
    return type(tiny)(**{**tiny.components, **own}, add_watermarker=False)


def synthetic(models: dict[str, Any], rank: int, targets: tuple[str, ...]) -> Adapter:
    """Return random factors for every layer of the targets in all three models."""
    generator = torch.Generator().manual_seed(7)
    modules = {}
    for component, model in models.items():
        for name, layer in target_layers(model, component, targets).items():
            a_shape, b_shape = factor_shapes(layer, rank)
            a = torch.randn(a_shape, generator=generator) * 0.1
            modules[name] = LoraWeights(a, torch.randn(b_shape, generator=generator) * 0.1, 2.0 * rank)
    return Adapter("sdxl", modules)


def factor_shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    out, inner, *kernel = layer.get_parameter("weight").shape
    return (rank, inner, *kernel), (out, rank, *(1 for _ in kernel))


def outputs(pipeline: Any) -> dict[str, Tensor]:
    """Return what both text encoders and the UNet give for one prompt."""
    unet = pipeline.unet
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(
            "a photo of sks mug", device="cpu", do_classifier_free_guidance=False
        )
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        sample = unet(latents, 20, encoder_hidden_states=text, added_cond_kwargs=added).sample
    first, second = text[..., :32], text[..., 32:]
    return {"unet": sample, "text_encoder": first, "text_encoder_2": second, "pooled": pooled}


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("targets", [("attention",), ALL_TARGETS])
def test_diffusers_knows_every_tensor_of_true_sdxl(
    true_models: dict[str, Any], tmp_path: Path, targets: tuple[str, ...]
) -> None:
    """The way of `load_lora_weights`, up to the names that PEFT is given."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    path = tmp_path / "a.safetensors"
    adapter = synthetic(true_models, 1, targets)
    write_adapter(path, adapter)
    verify(path, adapter)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(
        tmp_path, weight_name=path.name, unet_config=true_models["unet"].config
    )
    assert len(state) == 2 * len(adapter.modules)
    assert len(load_file(path)) == len(state) + len(alphas)

    found = 0
    for component, model in true_models.items():
        mine = {k.removeprefix(f"{component}."): v for k, v in state.items() if k.startswith(f"{component}.")}
        if component == "unet":
            mine = convert_unet_state_dict_to_peft(mine)
        else:
            mine = convert_state_dict_to_peft(convert_state_dict_to_diffusers(mine))
            if not hasattr(model, "text_model"):
                mine = {k.removeprefix("text_model."): v for k, v in mine.items()}
        for key, tensor in mine.items():
            name, part = key.removesuffix(".weight").rsplit(".", 1)
            model.get_submodule(name)
            written = getattr(adapter.modules[keys.canonical_module(component, name)], part)
            assert torch.equal(tensor, written.half()), key
        assert len(mine) == 2 * len(adapter.of_component(component))
        found += len(mine)
    assert found == len(state)


@pytest.mark.parametrize("targets", [("attention",), ALL_TARGETS])
def test_the_file_changes_all_three_models_alike(tiny: Any, tmp_path: Path, targets: tuple[str, ...]) -> None:
    path = tmp_path / "subject.safetensors"
    adapter = synthetic({name: tiny.components[name] for name in COMPONENTS}, 4, targets)
    write_adapter(path, adapter, dtype=torch.float32)
    verify(path, adapter)
    read = read_adapter(path)
    assert read.metadata["dbadapter.layers_per_block"] == str(tiny.unet.config.layers_per_block)

    plain, merged, applied = fresh(tiny), fresh(tiny), fresh(tiny)
    plain.load_lora_weights(tmp_path, weight_name=path.name)
    lora.merge_into(merged, read)
    lora.apply(applied, {path: 1.0})
    before, after = outputs(tiny), outputs(plain)
    for name, expected in outputs(merged).items():
        assert relative(before[name], expected) > 20 * EXACT, name
        assert relative(after[name], expected) < EXACT, name
    for name, got in outputs(applied).items():
        assert relative(got, after[name]) < EXACT, name


def test_files_that_diffusers_saves_are_read(tiny: Any, tmp_path: Path) -> None:
    """Its SDXL script's way: PEFT's names, converted by itself, for the UNet and both text encoders."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = fresh(tiny)
    torch.manual_seed(1)
    layers = {}
    for component in COMPONENTS:
        endings = ["to_q", "to_k", "to_v", "to_out.0"] if component == "unet" else ["q_proj", "out_proj"]
        model = getattr(pipeline, component)
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=endings))
        layers[component] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    type(pipeline).save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        text_encoder_2_lora_layers=layers["text_encoder_2"],
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    merged = fresh(tiny)
    adapter = read_adapter(path)
    assert adapter.family == "sdxl"
    assert len(adapter.modules) == sum(len(layer) for layer in layers.values()) // 2
    lora.merge_into(merged, adapter)
    before = outputs(tiny)
    for name, got in outputs(merged).items():
        assert relative(got, outputs(pipeline)[name]) < EXACT, name
        assert relative(got, before[name]) > 20 * EXACT, name
