"""Every layer of SD1.5, SD2.1 and SDXL at their true size, on the meta device, in every format and back."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dbadapter import formats, keys
from dbadapter.adapter import Adapter, LoraWeights, adaptable_layers, check_fits
from dbadapter.adapter_file import read_adapter
from dbadapter.lora import TARGETS, target_layers

CONFIGS = Path(__file__).parents[1] / "dbadapter" / "configs"
# Every Linear and Conv2d, and those that can be trained: in the UNet, then in each text encoder.
LAYERS = {"sd1": 354, "sd2": 420, "sdxl": 1059}
TARGETED = {"sd1": 278 + 48, "sd2": 278 + 92, "sdxl": 788 + 48 + 128}


@cache
def models(family: str) -> dict[str, Any]:
    """Return the family's models without values."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    found: dict[str, Any] = {}
    with torch.device("meta"):
        for component in keys.COMPONENTS:
            path = CONFIGS / family / component / "config.json"
            if not path.exists():
                continue
            config = json.loads(path.read_text())
            if component == "unet":
                found[component] = UNet2DConditionModel.from_config(config)
            else:
                kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
                found[component] = kind(CLIPTextConfig(**config))
    return found


def rank_one(family: str) -> Adapter:
    layers = {}
    for component, model in models(family).items():
        for index, (name, layer) in enumerate(adaptable_layers(model, component).items()):
            out, inner, *kernel = layer.get_parameter("weight").shape
            a = torch.full((1, inner, *kernel), index / 1024, dtype=torch.float16)
            b = torch.full((out, 1, *(1 for _ in kernel)), 0.5, dtype=torch.float16)
            layers[name] = LoraWeights(a, b, 0.5 if ".conv" in name else 1.0)
    return Adapter(family, layers)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_layer_in_every_format(family: str, tmp_path: Path) -> None:
    adapter = rank_one(family)
    path = tmp_path / "start.safetensors"
    formats.write_diffusers(path, adapter)
    for kind in ("kohya", "peft", "diffusers"):
        # What comes out has every factor and alpha: `convert` compares them.
        done = formats.convert(path, kind, tmp_path / ("peft" if kind == "peft" else f"{kind}.safetensors"))
        path = done.paths[0]
        path = path.parents[1] if kind == "peft" else path
        found = read_adapter(path)
        assert found.family == family
        assert found.modules.keys() == adapter.modules.keys()
        assert all(found.modules[n].alpha == w.alpha for n, w in adapter.modules.items())
        check_fits(found, models(family)["unet"], *(models(family).get(c) for c in keys.COMPONENTS[1:]))
    targeted = [n for c, m in models(family).items() for n in target_layers(m, c, tuple(TARGETS))]
    assert len(adapter.modules) == LAYERS[family]
    assert len(targeted) == TARGETED[family]
    assert set(targeted) <= set(adapter.modules)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_names_of_kohya_are_one_to_one(family: str) -> None:
    names = [n for c, m in models(family).items() for n in adaptable_layers(m, c)]
    there = {keys.to_kohya(name, sdxl=family == "sdxl"): name for name in names}
    assert len(there) == len(names)
    assert {keys.from_kohya(prefix) for prefix in there} == set(names)
    assert all(keys.from_kohya(prefix) == name for prefix, name in there.items())
