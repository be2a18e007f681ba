"""One measured task of `benchmarks.merging`, in a process of its own: ours, PEFT's or diffusers'."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.training_peer import resident_mb

__all__ = ["TASKS", "hollow_unet", "peft_state"]


def hollow_unet(config: dict[str, Any]) -> Any:
    """Return a UNet whose weights take no memory: PEFT changes adapters only, so none is ever read.

    On the meta device PEFT would make its new factors there too.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    for module in unet.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            nothing = torch.zeros(()).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(nothing, requires_grad=False))
    return unet


def peft_state(file: Path) -> dict[str, torch.Tensor]:
    """Return a file's factors by PEFT's keys, in float32, in which PEFT keeps adapters."""
    return {
        key.replace("unet.", "base_model.model.", 1): value.float() for key, value in load_file(file).items()
    }


def peft_model(settings: dict[str, Any]) -> Any:
    """Return a PeftModel with the adapters of both files, and their names."""
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    model: Any = hollow_unet(settings["config"])
    for name, about in settings["peft"].items():
        state = peft_state(Path(about["file"]))
        layers = sorted({key.removeprefix("base_model.model.").split(".lora_")[0] for key in state})
        config = LoraConfig(r=about["rank"], lora_alpha=about["alpha"], target_modules=layers)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        else:
            model = PeftModel(model, config, adapter_name=name, low_cpu_mem_usage=True)
        set_peft_model_state_dict(model, state, adapter_name=name, low_cpu_mem_usage=True)
    return model


def merge_with_peft(settings: dict[str, Any]) -> dict[str, float]:
    """Merge by PEFT's add_weighted_adapter, and write what it gave."""
    from peft import get_peft_model_state_dict

    begin = time.perf_counter()
    model = peft_model(settings)
    loaded = time.perf_counter()
    weights = [about["weight"] for about in settings["peft"].values()]
    options = {"svd_rank": settings["rank"]} if settings["rank"] else {}
    kind = "svd" if settings["rank"] else "cat"
    model.base_model.add_weighted_adapter(list(settings["peft"]), weights, "sum", kind, **options)
    merged = time.perf_counter()
    state = get_peft_model_state_dict(model, adapter_name="sum")
    save_file(
        {
            key.replace("base_model.model.", "unet.", 1): value.half().contiguous()
            for key, value in state.items()
        },
        settings["output"],
    )
    return {"read": loaded - begin, "merge": merged - loaded, "write": time.perf_counter() - merged}


def merge_with_ours(settings: dict[str, Any]) -> dict[str, float]:
    """Merge by `dbadapter.merging`, the measuring of its errors included."""
    from dbadapter.adapter_file import read_adapter
    from dbadapter.merging import merge, write_merged

    begin = time.perf_counter()
    adapters = {read_adapter(about["file"]): about["weight"] for about in settings["ours"].values()}
    loaded = time.perf_counter()
    result = merge(adapters, rank=settings["rank"] or None)
    merged = time.perf_counter()
    del adapters  # as the command, which knows them by their files only
    write_merged(settings["output"], result, overwrite=True)
    return {"read": loaded - begin, "merge": merged - loaded, "write": time.perf_counter() - merged}


def bake_with_diffusers(settings: dict[str, Any]) -> dict[str, float]:
    """Load a pipeline, fuse the adapters, write the pipeline."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind: Any = StableDiffusionXLPipeline if settings["family"] == "sdxl" else StableDiffusionPipeline
    options = {} if settings["family"] == "sdxl" else {"safety_checker": None}
    begin = time.perf_counter()
    pipeline = kind.from_pretrained(
        settings["base"], torch_dtype=torch.float16, local_files_only=True, **options
    )
    loaded = time.perf_counter()
    names = list(settings["ours"])
    for name, about in settings["ours"].items():
        file = Path(about["file"])
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(names, [about["weight"] for about in settings["ours"].values()])
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()
    merged = time.perf_counter()
    pipeline.save_pretrained(settings["output"])
    return {"read": loaded - begin, "merge": merged - loaded, "write": time.perf_counter() - merged}


def bake_with_ours(settings: dict[str, Any]) -> dict[str, float]:
    """The same by `dbadapter.baking`."""
    from dbadapter.baking import bake, write_base
    from dbadapter.base import load_base

    begin = time.perf_counter()
    base = load_base(settings["base"], device="cpu", dtype=torch.float16)
    loaded = time.perf_counter()
    record = bake(base, {about["file"]: about["weight"] for about in settings["ours"].values()})
    merged = time.perf_counter()
    write_base(base, Path(settings["output"]), record=record, overwrite=True)
    return {"read": loaded - begin, "merge": merged - loaded, "write": time.perf_counter() - merged}


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "merge-ours": merge_with_ours,
    "merge-theirs": merge_with_peft,
    "bake-ours": bake_with_ours,
    "bake-theirs": bake_with_diffusers,
}


def import_libraries() -> None:
    """Import what either side uses: none of it is in a figure."""
    import diffusers
    import peft
    import transformers
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from diffusers.loaders import StableDiffusionLoraLoaderMixin  # noqa: F401
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

    import dbadapter.baking
    import dbadapter.merging

    assert all((diffusers, peft, transformers, dbadapter.baking, dbadapter.merging))


def main() -> None:
    """Run one task and write its seconds and its memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--settings", required=True, help="JSON")
    parser.add_argument("--record", type=Path, required=True, help="the JSON file")
    given = parser.parse_args()
    import_libraries()
    torch.set_grad_enabled(False)
    before = resident_mb()[0]
    seconds = TASKS[given.task](json.loads(given.settings))
    figures = {
        "seconds": seconds | {"all": sum(seconds.values())},
        "peak_memory_mb": resident_mb()[1] - before,
        "imports_memory_mb": before,
        "threads": torch.get_num_threads(),
    }
    given.record.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
