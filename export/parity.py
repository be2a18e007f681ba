"""The gate of an export: torch against ONNX Runtime, component by component and over a whole picture.

A comparison that could not see the adapter would prove nothing, and exports without effect are a known
complaint: so each one also measures by how much the adapter changes the very numbers that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbadapter import lora
from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.base import Base
from dbadapter.errors import ExportError
from dbadapter.export.graphs import Sizes, component_graphs, example_inputs
from dbadapter.export.runtime import load_onnx_pipeline, run_session

__all__ = [
    "EFFECT_OVER_TOLERANCE",
    "PICTURE_TOLERANCE",
    "TOLERANCE",
    "Observation",
    "adapted_components",
    "check",
    "compare",
    "gate_sizes",
    "observe",
    "relative_error",
    "synthetic_adapter",
]

TOLERANCE = {"float32": 1e-4, "float16": 1e-2}  # relative, per component
PICTURE_TOLERANCE: dict[str, float | None] = {
    "float32": 3.0,
    "float16": None,
}  # of 255, per pixel and channel
EFFECT_OVER_TOLERANCE = 20.0
PICTURE_STEPS = 20
PICTURE_GUIDANCE = 5.0
LARGEST_PICTURE = 256  # pixels; enough to tell, and a CPU has to draw it three times
ADAPTED = ("text_encoder", "unet")

# (component, number of the case) -> output name -> value
Outputs = dict[tuple[str, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Observation:
    """What a model gives on the gate's inputs.

    Attributes:
        outputs: of each component in each case.
        picture: float (height, width, 3) in [0, 1].
    """

    outputs: Outputs
    picture: np.ndarray[Any, Any]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return max |actual - expected| / max |expected|; infinity where a value is not finite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    difference = float((actual - expected).abs().max())
    scale = float(expected.abs().max())
    if not (math.isfinite(difference) and math.isfinite(scale)):
        return math.inf
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)


def gate_sizes(base: Base) -> list[Sizes]:
    """Return three shapes: the trained one or a smaller, a flat one of two, a small one of three."""
    side = _picture_side(base) // base.vae_scale_factor
    step = base.latent_multiple
    half = max(step, side // 2 // step * step)
    longest = min(int(base.tokenizer.model_max_length), int(base.text_encoder.config.max_position_embeddings))
    return [
        Sizes(1, side, side, longest),
        Sizes(2, half, side + step, longest),
        Sizes(3, 2 * step, step, max(2, longest // 3)),
    ]


def observe(base: Base, prompt: str, components: tuple[str, ...] | None = None) -> Observation:
    """Return what torch gives on the gate's inputs, with the weights as they are.

    Args:
        prompt: of the picture; seed 0.
        components: those to run; None means all.
    """
    graphs = component_graphs(base)
    outputs: Outputs = {}
    with torch.no_grad():
        for name in tuple(graphs) if components is None else components:
            for case, inputs in _cases(base, name):
                values = graphs[name].module.eval()(*inputs.values())
                values = values if isinstance(values, tuple) else (values,)
                outputs[name, case] = dict(zip(graphs[name].outputs, values, strict=True))
    return Observation(outputs, _picture(base.pipeline, base, prompt))


def check(
    base: Base,
    folder: Path,
    *,
    prompt: str,
    expected: Observation,
    without: Observation,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run the exported folder on the gate's inputs and return the report.

    Args:
        base: for shapes and configurations only.
        folder: the export; run on the CPU provider, whose float32 is float32 (CUDA's default is TF32).
        expected: torch's outputs with the weights that were exported.
        without: torch's outputs that must be told apart: without the adapter, or with a synthetic one.
        dtype: of the export.
        progress: called with (parts done, of how many).
    Raises:
        ExportError: it differs from torch by more than the tolerance, or nothing compared shows the adapter.
    """
    pipeline = load_onnx_pipeline(folder, ["CPUExecutionProvider"])
    sessions = {
        "text_encoder": pipeline.text_encoder.session,
        "unet": pipeline.unet.session,
        "vae_decoder": pipeline.vae.session,
        "vae_encoder": pipeline.vae.encoder_session,
    }
    components: dict[str, Any] = {}
    for number, (name, session) in enumerate(sessions.items()):
        actual = {
            (name, case): run_session(
                session,
                inputs,
                {key: tuple(value.shape) for key, value in expected.outputs[name, case].items()},
            )
            for case, inputs in _cases(base, name)
        }
        components[name] = compare(name, actual, expected.outputs, without.outputs, TOLERANCE[dtype])
        components[name]["shapes"] = [asdict(sizes) for sizes in gate_sizes(base)]
        if progress:
            progress(number + 1, len(sessions) + 1)
    picture = _compare_pictures(_picture(pipeline, base, prompt), expected, without, PICTURE_TOLERANCE[dtype])
    picture |= {"prompt": prompt, "seed": 0, "steps": PICTURE_STEPS, "pixels": _picture_side(base)}
    if progress:
        progress(len(sessions) + 1, len(sessions) + 1)
    return {"components": components, "picture": picture}


def compare(
    name: str, actual: Outputs, expected: Outputs, without: Outputs, tolerance: float
) -> dict[str, Any]:
    """Return error and adapter's effect of one component, each the largest over its cases and outputs.

    Raises:
        ExportError: the error is above the tolerance, or the effect is too small beside it to be seen.
    """
    keys = [(key, output) for key in actual for output in actual[key]]
    errors = [relative_error(actual[key][output], expected[key][output]) for key, output in keys]
    seen = [(key, output) for key, output in keys if key in without]
    effects = [relative_error(without[key][output], expected[key][output]) for key, output in seen]
    error, effect = max(errors), max(effects) if effects else None
    _refuse(f"the exported {name}", "relative error", error, tolerance, effect)
    return {"relative_error": error, "tolerance": tolerance, "adapter_effect": effect}


def synthetic_adapter(base: Base, *, rank: int = 4, strength: float = 0.5, seed: int = 0) -> Adapter:
    """Return a random adapter of the attention layers that visibly changes the model.

    Args:
        strength: size of each layer's change beside its weight, in the Frobenius norm.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for component, model in (("unet", base.unet), ("text_encoder", base.text_encoder)):
        for name, layer in lora.target_layers(model, component, ("attention",)).items():
            weight = layer.get_parameter("weight").detach().float().cpu()
            lora_A = torch.randn(rank, weight.shape[1], generator=generator)
            lora_B = torch.randn(weight.shape[0], rank, generator=generator)
            lora_B *= strength * weight.norm() / (lora_B @ lora_A).norm()
            modules[name] = LoraWeights(lora_A, lora_B, float(rank))
    return Adapter(base.family, modules)


def adapted_components(adapters: Mapping[Adapter, float]) -> tuple[str, ...]:
    """Return the components that the adapters change; a layer whose factors are all zero changes nothing."""

    def changes(adapter: Adapter, name: str) -> bool:
        return any(
            bool(layer.lora_A.any() and layer.lora_B.any()) for layer in adapter.of_component(name).values()
        )

    return tuple(
        name
        for name in ADAPTED
        if any(weight and changes(adapter, name) for adapter, weight in adapters.items())
    )


def _cases(base: Base, name: str) -> list[tuple[int, dict[str, Tensor]]]:
    """Return the numbered inputs of a component; the timestep comes as a scalar, as (1,) and as (batch,)."""
    cases = []
    for case, sizes in enumerate(gate_sizes(base)):
        inputs = example_inputs(base, name, sizes, seed=case)
        if "timestep" in inputs and case:
            inputs["timestep"] = inputs["timestep"].expand(1 if case == 1 else sizes.batch)
        cases.append((case, inputs))
    return cases


def _picture_side(base: Base) -> int:
    multiple = base.latent_multiple * base.vae_scale_factor
    return max(multiple, min(base.resolution, LARGEST_PICTURE) // multiple * multiple)


def _picture(pipeline: Any, base: Base, prompt: str) -> np.ndarray[Any, Any]:
    side = _picture_side(base)
    pixels: np.ndarray[Any, Any] = pipeline(
        prompt=prompt,
        num_inference_steps=PICTURE_STEPS,
        guidance_scale=PICTURE_GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(0),
        height=side,
        width=side,
        output_type="np",
    ).images[0]
    return pixels


def _compare_pictures(
    actual: np.ndarray[Any, Any], expected: Observation, without: Observation, tolerance: float | None
) -> dict[str, Any]:
    """Return the largest difference in a pixel's channel, in 255ths, and the adapter's effect likewise."""

    def difference(one: np.ndarray[Any, Any]) -> float:
        value = float(np.abs(one.astype(np.float64) - expected.picture).max()) * 255
        return value if math.isfinite(value) else math.inf

    error, effect = difference(actual), difference(without.picture)
    _refuse("a picture from the export", "difference in 255ths", error, tolerance, effect)
    return {"max_difference": error, "tolerance": tolerance, "adapter_effect": effect}


def _refuse(what: str, measure: str, error: float, tolerance: float | None, effect: float | None) -> None:
    """Raise ExportError unless error <= tolerance and effect >= 20 times the tolerance or the true error.

    The second way lets a faint adapter pass, whose export is nevertheless proven to hold it.
    """
    if not math.isfinite(error):
        raise ExportError(f"{what} is not finite (NaN or infinity); export in float32")
    if tolerance is not None and error > tolerance:
        raise ExportError(
            f"{what} differs from torch: {measure} {error:.2g}, allowed is {tolerance:.2g}; "
            "nothing was written. Please report it with the base's configs"
        )
    threshold = 0.0 if tolerance is None else EFFECT_OVER_TOLERANCE * min(error, tolerance)
    if effect is not None and (effect <= 0 or effect < threshold):
        raise ExportError(
            f"the adapter cannot be seen in {what}: its effect is {effect:.2g} ({measure}), the error "
            f"{error:.2g}; nothing was written. Train it for more steps, give it more weight, or leave it out"
        )
