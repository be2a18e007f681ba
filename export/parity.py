"""The gate of an export: torch against ONNX Runtime, component by component and over a whole picture.

A comparison that could not see the adapter would prove nothing, and exports without effect are a known
complaint: so each one also measures by how much the adapter changes the very numbers that are compared.
What torch gave is kept in the export (`Record`), so that the gate can run again on another machine, without
the base: `dbadapter export --verify FOLDER`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbadapter import lora
from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.base import Base
from dbadapter.errors import ExportError
from dbadapter.export.graphs import Sizes, component_graphs, example_inputs
from dbadapter.export.pipeline import load_onnx_pipeline, runners_of

__all__ = [
    "EFFECT_OVER_TOLERANCE",
    "PICTURE_TOLERANCE",
    "RECORD_NAME",
    "TOLERANCE",
    "Record",
    "adapted_components",
    "check",
    "compare",
    "gate_sizes",
    "observe",
    "picture_settings",
    "relative_error",
    "synthetic_adapter",
]

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "int8": 1e-2}  # relative, per component
# Of 255, per pixel and channel. In half precision a sampler may take another way to as good a picture.
PICTURE_TOLERANCE: dict[str, float | None] = {"float32": 3.0, "float16": None, "int8": None}
EFFECT_OVER_TOLERANCE = 20.0
RECORD_NAME = "parity.safetensors"
GUIDANCE = 5.0
STEPS, LARGEST_PICTURE = 20, 256  # a CPU has to draw it three times
LARGE = 2**28  # bytes of a UNet's weights, from where two steps at 16 x 16 latents must do
STATES = ("off", "on")  # without and with the adapter

Outputs = dict[tuple[str, int], dict[str, Tensor]]  # (component, number of the case) -> output -> value


@dataclass
class Record:
    """What torch gives on the gate's inputs, without and with an adapter.

    Attributes:
        inputs: (component, number of the case) -> input -> value.
        outputs: state ("off", "on") -> (component, case) -> output -> value.
        pictures: state -> float32 (height, width, 3) in [0, 1].
        factors: what a swappable graph is fed for "on"; empty for a merged one.
        compared: the states that the export can be in: both if it is swappable.
        settings: of the picture, and the shapes of the cases.
    """

    inputs: Outputs
    outputs: dict[str, Outputs]
    pictures: dict[str, Tensor]
    factors: dict[str, Tensor]
    compared: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it as one safetensors file."""
        from safetensors.torch import save

        tensors = {
            f"in/{name}/{case}/{key}": v for (name, case), vs in self.inputs.items() for key, v in vs.items()
        }
        for state, outputs in self.outputs.items():
            for (name, case), values in outputs.items():
                tensors |= {f"out/{state}/{name}/{case}/{key}": value for key, value in values.items()}
        tensors |= {f"picture/{state}": value for state, value in self.pictures.items()}
        tensors |= {f"factor/{name}": value for name, value in self.factors.items()}
        whole = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
        about = {"compared": ",".join(self.compared), "settings": json.dumps(self.settings)}
        path.write_bytes(save(whole, about))  # its own writer lets no other user read the file

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote.

        Raises:
            ExportError: it is missing or broken.
        """
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                compared, settings = about["compared"].split(","), dict(json.loads(about["settings"]))
                found = cls({}, {state: {} for state in STATES}, {}, {}, tuple(compared), settings)
                for key in file.keys():  # noqa: SIM118 (a file of safetensors is no mapping)
                    kind, _, rest = key.partition("/")
                    words, value = rest.split("/"), file.get_tensor(key)
                    if kind == "in":
                        found.inputs.setdefault((words[0], int(words[1])), {})[words[2]] = value
                    elif kind == "out":
                        of_state = found.outputs[words[0]]
                        of_state.setdefault((words[1], int(words[2])), {})[words[3]] = value
                    elif kind == "picture":
                        found.pictures[rest] = value
                    else:
                        found.factors[rest] = value
            found._check()
        except Exception as error:  # safetensors has exceptions of its own
            reason = str(error).strip() or type(error).__name__
            raise ExportError(f"{path} cannot be read ({reason}); export the model again") from None
        return found

    def _check(self) -> None:
        """Raise ValueError unless everything is there that the gate compares."""
        kinds: dict[str, Any] = dict.fromkeys(("num_inference_steps", "height", "width", "seed"), int)
        kinds |= {"prompt": str, "guidance_scale": (int, float), "adapted": list}
        for name, kind in kinds.items():
            if not isinstance(self.settings.get(name), kind):
                raise ValueError(f"its setting {name} is missing or broken")
        if not self.compared or not set(self.compared) <= set(STATES):
            raise ValueError(f"it compares {','.join(self.compared) or 'nothing'}")
        for state in STATES:
            if self.pictures.get(state, torch.empty(0)).ndim != 3:
                raise ValueError(f"its picture {state!r} is missing or broken")
            adapted = self.settings["adapted"]
            needed = [key for key in self.inputs if state in self.compared or key[0] in adapted]
            if missing := [key for key in needed if not self.outputs[state].get(key)]:
                raise ValueError(f"it lacks what torch gave for {missing[0][0]}, {state!r}")


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
    lengths = [int(tokenizer.model_max_length) for tokenizer in base.tokenizers]
    longest = min(*lengths, int(base.text_encoder.config.max_position_embeddings))
    return [
        Sizes(1, side, side, longest),
        Sizes(2, half, side + step, longest),
        Sizes(3, 2 * step, step, max(2, longest // 3)),
    ]


def picture_settings(base: Base, prompt: str) -> dict[str, Any]:
    """Return the settings of the compared picture: a pipeline's own names, and the seed."""
    side = _picture_side(base)
    return {
        "prompt": prompt,
        "num_inference_steps": 2 if _is_large(base) else STEPS,
        "guidance_scale": GUIDANCE,
        "height": side,
        "width": side,
        "seed": 0,
    }


def gate_inputs(base: Base) -> Outputs:
    """Return the inputs of every case; the timestep comes as a scalar, as (1,) and as (batch,)."""
    found: Outputs = {}
    for name in (*base.text_encoders, "unet", "vae_decoder", "vae_encoder"):
        for case, sizes in enumerate(gate_sizes(base)):
            inputs = example_inputs(base, name, sizes, seed=case)
            if "timestep" in inputs and case:
                inputs["timestep"] = inputs["timestep"].expand(1 if case == 1 else sizes.batch)
            found[name, case] = inputs
    return found


def observe(
    base: Base, inputs: Outputs, picture: Mapping[str, Any], components: Sequence[str] | None = None
) -> tuple[Outputs, Tensor]:
    """Return what torch gives with the weights as they are: every case's outputs, and the picture.

    Args:
        inputs: of `gate_inputs`.
        picture: of `picture_settings`.
        components: those to run; None means all.
    """
    graphs = component_graphs(base)
    outputs: Outputs = {}
    with torch.no_grad():
        for (name, case), values in inputs.items():
            if components is None or name in components:
                found = graphs[name].module.eval()(*values.values())
                found = found if isinstance(found, tuple) else (found,)
                outputs[name, case] = dict(zip(graphs[name].outputs, found, strict=True))
    return outputs, draw(base.pipeline, picture)


def draw(pipeline: Any, settings: Mapping[str, Any]) -> Tensor:
    """Return a picture by torch's pipeline or the ONNX one, float32 (height, width, 3) in [0, 1]."""
    known = {name: value for name, value in settings.items() if name not in ("seed", "adapted")}
    generator = torch.Generator("cpu").manual_seed(int(settings["seed"]))
    pixels = pipeline(**known, generator=generator, output_type="np").images[0]
    return torch.from_numpy(pixels).float()


def check(
    folder: Path,
    record: Record,
    *,
    dtype: str = "float32",
    providers: Sequence[str] = ("CPUExecutionProvider",),
    models: Mapping[str, Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run an exported folder on the gate's inputs and return the report.

    Args:
        folder: the export.
        record: what torch gave.
        dtype: of the export.
        providers: where it runs: the CPU's float32 is float32, CUDA's default is TF32.
        models: component -> a file in place of the folder's, see `load_onnx_pipeline`.
        progress: called with (parts done, of how many).
    Raises:
        ExportError: it differs from torch by more than the tolerance, or nothing compared shows the adapter.
    """
    pipeline = load_onnx_pipeline(folder, providers, models=models)
    runners, tolerance = runners_of(pipeline), TOLERANCE[dtype]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in runners}
    differences: dict[str, float] = {}
    total, done = len(record.compared) * (len(runners) + 1), 0
    for state in record.compared:
        for name, runner in runners.items():
            fed = record.factors if state == "on" else {}
            runner.set_factors({key: value for key, value in fed.items() if key in runner.factor_shapes})
            for (component, case), inputs in record.inputs.items():
                expected = record.outputs[state].get((component, case))
                if component != name or expected is None:
                    continue
                actual = runner(inputs, {key: tuple(value.shape) for key, value in expected.items()})
                error = max(relative_error(actual[key], value) for key, value in expected.items())
                shapes = {key: list(value.shape) for key, value in inputs.items()}
                rows[name].append({"adapter": state, "inputs": shapes, "relative_error": error})
            done += 1
            if progress:
                progress(done, total)
        found = draw(pipeline, record.settings)
        differences[state] = _largest_difference(found, record.pictures[state])
        done += 1
        if progress:
            progress(done, total)
    if uncompared := [name for name, of_it in rows.items() if not of_it]:
        raise ExportError(f"{folder / RECORD_NAME} has no case of {uncompared[0]}; export the model again")
    effects = {name: _effect(record, name) for name in runners}
    return {
        "components": {
            name: compare(name, [row["relative_error"] for row in rows[name]], effects[name], tolerance)
            | {"cases": rows[name]}
            for name in runners
        },
        "picture": _compare_pictures(differences, record, PICTURE_TOLERANCE[dtype])
        | {name: value for name, value in record.settings.items() if name != "adapted"},
    }


def compare(name: str, errors: Sequence[float], effect: float | None, tolerance: float) -> dict[str, Any]:
    """Return error and adapter's effect of one component, each the largest over its cases and outputs.

    Raises:
        ExportError: the error is above the tolerance, or the effect is too small beside it to be seen.
    """
    error = max(errors)
    _refuse(f"the exported {name}", "relative error", error, tolerance, effect)
    return {"relative_error": error, "tolerance": tolerance, "adapter_effect": effect}


def synthetic_adapter(
    base: Base,
    *,
    rank: int = 4,
    strength: float = 0.5,
    targets: Sequence[str] = ("attention",),
    seed: int = 0,
) -> Adapter:
    """Return a random adapter of the targets and of every text encoder, that visibly changes the model.

    Args:
        strength: size of each layer's change beside its weight, in the Frobenius norm.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for component, model in (("unet", base.unet), *base.text_encoders.items()):
        for name, layer in lora.target_layers(model, component, targets).items():
            weight = layer.get_parameter("weight").detach().float().cpu()
            ones = (1,) * (weight.ndim - 2)
            lora_A = torch.randn(rank, *weight.shape[1:], generator=generator)
            lora_B = torch.randn(weight.shape[0], rank, *ones, generator=generator)
            lora_B *= strength * weight.norm() / (lora_B.flatten(1) @ lora_A.flatten(1)).norm()
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
        for name in ("text_encoder", "text_encoder_2", "unet")
        if any(weight and changes(adapter, name) for adapter, weight in adapters.items())
    )


def _effect(record: Record, name: str) -> float | None:
    """Return by how much the adapter changes a component's outputs; None where it has no layer."""
    if name not in record.settings["adapted"]:
        return None
    return max(
        relative_error(record.outputs["off"][key][output], value)
        for key, values in record.outputs["on"].items()
        if key[0] == name
        for output, value in values.items()
    )


def _is_large(base: Base) -> bool:
    return bool(sum(parameter.nbytes for parameter in base.unet.parameters()) > LARGE)


def _picture_side(base: Base) -> int:
    multiple = base.latent_multiple * base.vae_scale_factor
    largest = 2 * multiple if _is_large(base) else LARGEST_PICTURE
    return int(max(multiple, min(base.resolution, largest) // multiple * multiple))


def _largest_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference of a pixel's channel, in 255ths."""
    value = float((actual.double() - expected.double()).abs().max()) * 255
    return value if math.isfinite(value) else math.inf


def _compare_pictures(
    differences: Mapping[str, float], record: Record, tolerance: float | None
) -> dict[str, Any]:
    error = max(differences.values())
    effect = _largest_difference(record.pictures["off"], record.pictures["on"])
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
            f"{what} differs from torch: {measure} {error:.2g}, allowed is {tolerance:.2g}, so it must not "
            "be used. Export in a wider dtype, or, if it is float32, please report it with the base's configs"
        )
    threshold = 0.0 if tolerance is None else EFFECT_OVER_TOLERANCE * min(error, tolerance)
    if effect is not None and (effect <= 0 or effect < threshold):
        raise ExportError(
            f"the adapter cannot be seen in {what}: its effect is {effect:.2g} ({measure}), the error "
            f"{error:.2g}, so it must not be used. Train it for more steps, give it more weight, or leave "
            "it out"
        )
