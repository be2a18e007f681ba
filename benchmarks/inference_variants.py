"""What `benchmarks.inference` measures: one UNet call by torch and by ONNX Runtime, ready to be called."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ADAPTED", "CPU_VARIANTS", "Job", "Variant", "load", "measure", "random_factors", "unet_inputs"]

# The ranks of the adapters that are on, each with weight 1.
ADAPTED: dict[str, tuple[int, ...]] = {
    "swappable": (),
    "swappable_one": (8,),
    "swappable_three": (4, 8, 16),
}
CPU_VARIANTS = ("eager", "compile", "merged", *ADAPTED)
BATCH = 2  # one picture with classifier-free guidance
PAUSE = 0.05  # seconds between variants: worker threads of the last one spin for a while


@dataclass(frozen=True)
class Job:
    """Where the models lie, and what they are called with.

    Args:
        base: folder in diffusers' layout.
        exports: folder of the exports, `merged` and `swappable`, each with `unet/model.onnx`.
        latents: cells a side.
    """

    base: Path
    exports: Path
    latents: int

    def graph(self, kind: str) -> Path:
        """Return the UNet's file of one export."""
        return self.exports / kind / "unet/model.onnx"


@dataclass(frozen=True)
class Variant:
    """One way to call the UNet.

    Args:
        call: returns the output, computed to the end.
        prepare: what is done before a row of calls, and not counted: it turns adapters on.
    """

    call: Callable[[], Tensor]
    prepare: Callable[[], None] = lambda: None


def unet_inputs(base: Path, latents: int) -> dict[str, Tensor]:
    """Return seeded float32 inputs of a base's UNet for one step with guidance, by the graph's names.

    Args:
        base: folder in diffusers' layout; SDXL's UNet takes pooled text and six numbers too.
        latents: cells a side.
    """
    unet = json.loads((base / "unet/config.json").read_text(encoding="utf-8"))
    text = json.loads((base / "text_encoder/config.json").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(0)
    words = (BATCH, int(text["max_position_embeddings"]), int(unet["cross_attention_dim"]))
    inputs = {
        "sample": torch.randn(BATCH, int(unet["in_channels"]), latents, latents, generator=generator),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(words, generator=generator),
    }
    if unet.get("addition_embed_type") == "text_time":
        width = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        side = float(latents * 8)
        inputs["text_embeds"] = torch.randn(BATCH, width, generator=generator)
        inputs["time_ids"] = torch.tensor([[side, side, 0.0, 0.0, side, side]]).expand(BATCH, 6).contiguous()
    return inputs


def random_factors(shapes: Mapping[str, Sequence[str | int]], rank: int, seed: int = 0) -> dict[str, Tensor]:
    """Return factors of an adapter on every layer that a graph lets swap; what it changes is not looked at.

    Args:
        shapes: `Runner.factor_shapes`: a word stands for the rank.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, dims in shapes.items():
        value = torch.randn([rank if isinstance(dim, str) else dim for dim in dims], generator=generator)
        # Of size 1 after A, and a hundredth after B, for an input of size 1.
        found[name] = value * (0.01 * rank**-0.5 if name.endswith(".lora_B") else value[0].numel() ** -0.5)
    return found


def load(name: str, job: Job, opened: dict[str, Any]) -> Variant:
    """Return one variant on the CPU in float32.

    Args:
        name: of `CPU_VARIANTS`.
        opened: models that are there already, by their own name: variants share them. Filled.
    """
    inputs = unet_inputs(job.base, job.latents)
    if name in ("eager", "compile"):
        if "torch" not in opened:
            opened["torch"] = load_unet(job.base)
        return torch_variant(opened["torch"], inputs, compiled=name == "compile")
    # Here, not above: torch's own calls are measured where ONNX Runtime is not installed too.
    from dbadapter.export.adapters import mixed
    from dbadapter.export.runtime import Runner, open_session

    kind = name.partition("_")[0]
    if kind not in opened:
        opened[kind] = Runner(open_session(job.graph(kind), ["CPUExecutionProvider"]))
    runner: Runner = opened[kind]
    shape = {"out_sample": inputs["sample"].shape}
    ranks = ADAPTED.get(name, ())
    factors = mixed([(random_factors(runner.factor_shapes, rank, seed=rank), 1.0) for rank in ranks])

    def prepare() -> None:
        if runner.factor_shapes:
            runner.set_factors(factors)

    return Variant(lambda: runner(inputs, shape)["out_sample"], prepare)


def load_unet(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return torch's UNet as diffusers loads it, in evaluation mode."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=dtype).eval()


def torch_variant(unet: Any, inputs: Mapping[str, Tensor], *, compiled: bool) -> Variant:
    """Return torch's call, without gradients as diffusers' pipelines make it, on the inputs' device."""
    model = torch.compile(unet) if compiled else unet
    device = inputs["sample"].device
    added = {key: inputs[key] for key in ("text_embeds", "time_ids") if key in inputs}

    @torch.no_grad()
    def call() -> Tensor:
        out: Tensor = model(
            inputs["sample"],
            inputs["timestep"],
            inputs["encoder_hidden_states"],
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out

    return Variant(call)


def measure(
    variants: Mapping[str, Variant], rounds: int, calls: int, lead_in: int = 1
) -> dict[str, list[list[float]]]:
    """Return seconds of every call: each round takes all variants by turns, and begins with another one.

    Args:
        rounds: how many.
        calls: that count, of each variant in a round, in a row as in a picture.
        lead_in: calls before them that do not count, where another variant's data is still in the caches.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            variant = variants[name]
            variant.prepare()
            time.sleep(PAUSE)
            values = []
            for _ in range(lead_in + calls):
                began = time.perf_counter()
                variant.call()
                values.append(time.perf_counter() - began)
            seconds[name].append(values[lead_in:])
    return seconds
