"""Each format through its own reader: layers change by what the adapter says, and no others do."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bases import FAMILIES, Family, write_tiny_base
from torch import Tensor

from dbadapter import formats, keys
from dbadapter.adapter import Adapter, LoraWeights, adaptable_layers, delta
from dbadapter.adapter_file import read_adapter, write_adapter
from dbadapter.base import load_base
from dbadapter.lora import TARGETS, target_layers

EXACT = 1e-4  # the change is read off as the difference of two float32 weights


@pytest.fixture(scope="module", params=FAMILIES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    family: Family = request.param
    base = load_base(str(write_tiny_base(folder, family, clip_vocabulary=False)), device="cpu")
    base.pipeline.family = family
    return base.pipeline


def models(pipeline: Any) -> dict[str, Any]:
    found = {component: getattr(pipeline, component, None) for component in keys.COMPONENTS}
    return {component: model for component, model in found.items() if model is not None}


def fresh(pipeline: Any) -> Any:
    own = {name: copy.deepcopy(model) for name, model in models(pipeline).items()}
    return type(pipeline)(**{**pipeline.components, **own})


def synthetic(pipeline: Any, alphas: tuple[float, ...], ranks: tuple[int, ...] = (2, 3)) -> Adapter:
    """Return random factors for every target, with ranks and alphas in turn."""
    generator = torch.Generator().manual_seed(7)
    layers = {}
    for component, model in models(pipeline).items():
        for index, (name, layer) in enumerate(target_layers(model, component, tuple(TARGETS)).items()):
            out, inner, *kernel = layer.get_parameter("weight").shape
            rank = ranks[index % len(ranks)]
            a = torch.randn(rank, inner, *kernel, generator=generator)
            b = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
            layers[name] = LoraWeights(a, b, alphas[index % len(alphas)])
    return Adapter(pipeline.family, layers)


@cache
def weights_of(pipeline: Any) -> dict[str, Tensor]:
    return {
        name: layer.get_parameter("weight").detach().clone()
        for component, model in models(pipeline).items()
        for name, layer in adaptable_layers(model, component).items()
    }


def assert_changed_by(adapter: Adapter, changed: Any, pipeline: Any) -> None:
    after = weights_of(changed)
    for component, model in models(pipeline).items():
        for name, layer in adaptable_layers(model, component).items():
            change = after[name] - weights_of(pipeline)[name]
            if name not in adapter.modules:
                assert not change.any(), name
                continue
            expected = delta(adapter.modules[name], layer)
            assert expected.norm() > 20 * EXACT, name
            assert (change - expected).norm() / expected.norm() < EXACT, name


def fused(pipeline: Any, path: Path) -> Any:
    changed = fresh(pipeline)
    changed.load_lora_weights(path.parent, weight_name=path.name)
    changed.fuse_lora(components=list(models(changed)))
    changed.unload_lora_weights()
    return changed


@pytest.mark.parametrize("alphas", [(2.0,), (1.0, 0.1, 3.0)])
def test_diffusers_format(pipeline: Any, tmp_path: Path, alphas: tuple[float, ...]) -> None:
    adapter = synthetic(pipeline, alphas)
    formats.write_diffusers(tmp_path / "a.safetensors", adapter)
    assert_changed_by(adapter, fused(pipeline, tmp_path / "a.safetensors"), pipeline)


def test_diffusers_format_of_a_text_encoder_without_attention(pipeline: Any, tmp_path: Path) -> None:
    """In kohya's layout diffusers raises for these layers."""
    whole = synthetic(pipeline, (1.0,))
    name = "text_encoder.text_model.encoder.layers.1.mlp.fc2"
    layer = adaptable_layers(pipeline.text_encoder, "text_encoder")[name]
    out, inner = layer.get_parameter("weight").shape
    whole.modules = {n: w for n, w in whole.modules.items() if n.startswith("unet.")}
    whole.modules[name] = LoraWeights(torch.randn(2, inner), torch.randn(out, 2), 1.0)
    formats.write_diffusers(tmp_path / "a.safetensors", whole)
    assert_changed_by(whole, fused(pipeline, tmp_path / "a.safetensors"), pipeline)


def test_kohya_format(pipeline: Any, tmp_path: Path) -> None:
    """With one alpha: attention layers with different ones are mis-scaled by diffusers 0.42."""
    adapter = synthetic(pipeline, (1.5,))
    write_adapter(tmp_path / "source.safetensors", adapter, dtype=torch.float32, sidecars=False)
    formats.convert(tmp_path / "source.safetensors", "diffusers", tmp_path / "d.safetensors")
    formats.convert(tmp_path / "d.safetensors", "kohya", tmp_path / "a.safetensors")
    assert_changed_by(adapter, fused(pipeline, tmp_path / "a.safetensors"), pipeline)


@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_peft_format(pipeline: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = synthetic(pipeline, (1.0, 0.1, 3.0))
    formats.write_peft(tmp_path / "peft", adapter)
    changed = fresh(pipeline)
    for component, model in models(changed).items():
        merged = PeftModel.from_pretrained(model, str(tmp_path / "peft" / component)).merge_and_unload()
        setattr(changed, component, merged)
    assert_changed_by(adapter, changed, pipeline)


def test_what_peft_saves_is_read(pipeline: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    changed, layers = fresh(pipeline), {}
    for component, model in models(changed).items():
        endings = ["to_q", "to_out.0", "conv1"] if component == "unet" else ["q_proj", "fc1"]
        odd = {"to_q": 2, "fc1": 2}, {"to_q": 1.5}
        config = LoraConfig(
            r=3, lora_alpha=5, rank_pattern=odd[0], alpha_pattern=odd[1], init_lora_weights=False,
            target_modules=endings,
        )  # fmt: skip
        wrapped = get_peft_model(model, config)
        wrapped.save_pretrained(str(tmp_path / component))
        setattr(changed, component, wrapped.merge_and_unload())
        layers[component] = endings
    formats.convert(tmp_path, "kohya", tmp_path / "a.safetensors", family=pipeline.family)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert {w.alpha for n, w in adapter.modules.items() if n.endswith("to_q")} == {1.5}
    assert_changed_by(adapter, changed, pipeline)


def test_what_diffusers_saves_is_read(pipeline: Any, tmp_path: Path) -> None:
    """Its script's way, alpha in the header: `save_lora_weights` with the configurations of PEFT."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(4)
    changed = fresh(pipeline)
    states, configs = {}, {}
    for component, model in models(changed).items():
        endings = ["to_q", "to_out.0", "proj_in", "conv1"] if component == "unet" else ["q_proj", "fc1"]
        model.add_adapter(LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=endings))
        states[f"{component}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        configs[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    type(changed).save_lora_weights(tmp_path, **states, **configs)
    changed.fuse_lora(components=list(models(changed)))
    changed.unload_lora_weights()
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert {w.alpha for w in adapter.modules.values()} == {5.0}
    assert_changed_by(adapter, changed, pipeline)
