"""The names and shapes of adapter files in every layout, for the true sizes of bases; no weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import dbadapter
from dbadapter import keys

Shape = tuple[int, ...]
RANK = 4
_OLD_LEAVES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@cache
def true_layers(family: str) -> dict[str, Shape]:
    """Return canonical name -> shape of every layer of the true-size base, but the text projection."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from dbadapter.adapter import adaptable_layers

    folder = Path(dbadapter.__file__).parent / "configs" / family
    with torch.device("meta"):
        config = json.loads((folder / "unet" / "config.json").read_text())
        models = {"unet": UNet2DConditionModel.from_config(config)}
        models["text_encoder"] = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        if family == "sdxl":
            second = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
            models["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return {
        name: tuple(layer.weight.shape)
        for component, model in models.items()
        for name, layer in adaptable_layers(model, component).items()
        if not name.endswith("text_projection")
    }


def factors(shape: Shape) -> tuple[Shape, Shape]:
    return (RANK, *shape[1:]), (shape[0], RANK, *[1] * (len(shape) - 2))


def kohya(
    layers: Mapping[str, Shape], *, sdxl: bool = False, text: str = "", more: str = ""
) -> dict[str, Shape]:
    """Return kohya's keys; `text` replaces `lora_te_`, `more` is a further tensor of each layer."""
    found: dict[str, Shape] = {}
    for name, shape in layers.items():
        prefix = keys.to_kohya(name, sdxl=sdxl)
        prefix = prefix.replace("lora_te_", text or "lora_te_", 1)
        down, up = factors(shape)
        found |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.alpha": ()}
        if more:
            found[f"{prefix}.{more}"] = (1, shape[1], *[1] * (len(shape) - 2))
    return found


def other_algorithm(
    layers: Mapping[str, Shape], parts: Callable[[Shape], dict[str, Shape]], *, sdxl: bool
) -> dict[str, Shape]:
    """Return kohya's keys of another algorithm, alpha included."""
    found: dict[str, Shape] = {}
    for name, shape in layers.items():
        prefix = keys.to_kohya(name, sdxl=sdxl)
        found |= {f"{prefix}.{part}": size for part, size in parts(shape).items()} | {f"{prefix}.alpha": ()}
    return found


def loha(shape: Shape) -> dict[str, Shape]:
    width = shape[1] if len(shape) == 2 else shape[1] * shape[2] * shape[3]
    up, down = (shape[0], RANK), (RANK, width)
    return {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}


def lokr(shape: Shape) -> dict[str, Shape]:
    return {"lokr_w1": (4, 4), "lokr_w2": (shape[0] // 4, max(shape[1] // 4, 1), *shape[2:])}


def oft(shape: Shape) -> dict[str, Shape]:
    return {"oft_blocks": (4, shape[0] // 4, shape[0] // 4)}


def script(layers: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the keys that diffusers' training script writes: three spellings in one file."""
    found: dict[str, Shape] = {}
    for name, shape in layers.items():
        ends = ("lora_A", "lora_B")
        if ".attn1.to_" in name or ".attn2.to_" in name:
            ends = ("lora.down", "lora.up")
        elif ".self_attn." in name:
            ends = ("lora_linear_layer.down", "lora_linear_layer.up")
        found |= {f"{name}.{end}.weight": size for end, size in zip(ends, factors(shape), strict=True)}
    return found


def raw_peft(layers: Mapping[str, Shape]) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name, shape in layers.items():
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = factors(shape)
    return found


def old_diffusers(layers: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the keys of diffusers' attention processors; it had none for other layers."""
    found: dict[str, Shape] = {}
    for name, shape in layers.items():
        parent, _, leaf = name.removesuffix(".0").rpartition(".")
        if ".attn1.to_" in name or ".attn2.to_" in name:
            module = f"{parent}.processor.{leaf}_lora"
        elif ".self_attn." in name:
            module = f"{parent}.{_OLD_LEAVES[leaf]}_lora"
        else:
            continue
        found[f"{module}.down.weight"], found[f"{module}.up.weight"] = factors(shape)
    return found


def peft_folder(layers: Mapping[str, Shape], component: str) -> dict[str, Shape]:
    own = {name: shape for name, shape in layers.items() if name.startswith(f"{component}.")}
    return {f"base_model.model.{k.removeprefix(component + '.')}": s for k, s in raw_peft(own).items()}


def write_file(
    path: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None, alpha: float = RANK
) -> Path:
    """Write a file of zeros with these names and shapes; alphas have a value."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {})}
    data = b""
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        blob = struct.pack("<e", alpha) if name.endswith(".alpha") else bytes(size)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
        data += blob
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
