"""Adapters as inputs of a swappable graph: files that any ONNX Runtime reads, fitting, exact mixing.

An input's name is the layer's, with `.lora_A` (rank, in, ...) or `.lora_B` (out, rank, ...) behind it. The
scale alpha / rank is in lora_B, so that the graph adds B A x and knows no alpha.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbadapter import keys, lora
from dbadapter.adapter import Adapter, same_family
from dbadapter.errors import AdapterError, OutputError, UsageError

__all__ = [
    "ADAPTER_DTYPES",
    "OnnxAdapter",
    "fitted_factors",
    "mixed",
    "onnx_adapter",
    "read_onnx_adapter",
    "write_onnx_adapter",
]

ADAPTER_DTYPES = {"float32": torch.float32, "float16": torch.float16}
SUFFIX = ".onnx_adapter"
ABOUT = "adapter.json"
# ONNX Runtime asks for both and checks neither.
_VERSION = 1


@dataclass(frozen=True, eq=False)
class OnnxAdapter:
    """An adapter by the names of a graph's inputs.

    Attributes:
        family: of the base it was trained on, or "unknown".
        factors: input name -> value.
        about: what is known of it besides: trigger, base.
    """

    family: str
    factors: Mapping[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)

    def of_component(self, component: str) -> dict[str, Tensor]:
        """Return the factors of one component."""
        return {name: value for name, value in self.factors.items() if keys.component_of(name) == component}


def onnx_adapter(adapter: Adapter) -> OnnxAdapter:
    """Return an adapter's factors, float32 on the CPU, with alpha / rank in lora_B."""
    factors: dict[str, Tensor] = {}
    for name, layer in adapter.modules.items():
        factors[f"{name}.lora_A"] = layer.lora_A.float()
        factors[f"{name}.lora_B"] = layer.lora_B.float() * layer.scaling
    said = {
        "trigger": adapter.metadata.get("modelspec.trigger_phrase"),
        "base": adapter.metadata.get("ss_sd_model_name"),
    }
    return OnnxAdapter(adapter.family, factors, {name: value for name, value in said.items() if value})


def read_onnx_adapter(path: str | os.PathLike[str]) -> OnnxAdapter:
    """Return an adapter from a .safetensors file, or from a folder that `write_onnx_adapter` wrote.

    Raises:
        AdapterError: it is neither, or it is broken; the message names the file.
    """
    path = Path(path)
    if path.suffix == SUFFIX:
        raise AdapterError(f"{path} is one component's file: give its folder, {path.parent}")
    if not path.is_dir():
        return onnx_adapter(lora.load_adapter(path))
    files = [path / f"{component}{SUFFIX}" for component in keys.COMPONENTS]
    present = [file for file in files if file.is_file()]
    if not present:
        raise AdapterError(f"{path} holds no adapter: expected one of {', '.join(f.name for f in files)}")
    about: dict[str, Any] = {}
    if (path / ABOUT).is_file():
        try:
            about = dict(json.loads((path / ABOUT).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise AdapterError(
                f"{path / ABOUT} cannot be read ({error}); convert the adapter again"
            ) from None
    factors: dict[str, Tensor] = {}
    for file in present:
        factors |= _read_file(file)
    return OnnxAdapter(str(about.pop("family", None) or "unknown"), factors, about)


def write_onnx_adapter(
    adapter: Adapter, folder: str | Path, *, dtype: str = "float32", overwrite: bool = False
) -> list[Path]:
    """Write an adapter in ONNX Runtime's own format, one file a component, and return the files.

    A program in any language loads one with ONNX Runtime's LoraAdapter and activates it for a call. Beside
    them adapter.json tells the family and the trigger.

    Args:
        folder: to be made; it appears whole or not at all.
        dtype: what the graph was exported in: "float32" (also for int8), or "float16".
        overwrite: replace an earlier one.
    Raises:
        UsageError: an unknown dtype.
        OutputError: the folder exists, or cannot be written.
    """
    from onnxruntime import AdapterFormat, OrtValue

    folder = Path(folder)
    if dtype not in ADAPTER_DTYPES:
        raise UsageError(f"dtype must be {' or '.join(ADAPTER_DTYPES)}, got {dtype!r}")
    _check_folder(folder, overwrite)
    given = onnx_adapter(adapter)
    temporary = folder.resolve().with_name(f".{folder.resolve().name}.{os.getpid()}.tmp")
    names = []
    try:
        temporary.mkdir(parents=True)
        for component in keys.COMPONENTS:
            factors = given.of_component(component)
            if not factors:
                continue
            values = {
                name: OrtValue.ortvalue_from_numpy(_cast(name, value, dtype).numpy())
                for name, value in factors.items()
            }
            form = AdapterFormat()
            form.set_adapter_version(_VERSION)
            form.set_model_version(_VERSION)
            form.set_parameters(values)
            form.export_adapter(str(temporary / f"{component}{SUFFIX}"))
            names.append(f"{component}{SUFFIX}")
        about = {"family": given.family, "dtype": dtype, **given.about}
        (temporary / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if folder.exists():  # aside first: the new one may fail to take its place
            old = temporary.with_suffix(".old")
            folder.resolve().rename(old)
            temporary.rename(folder.resolve())
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(folder.resolve())
    except (OSError, RuntimeError) as error:  # ONNX Runtime's of a full disk is the latter
        raise OutputError(f"{folder} cannot be written: {error}; pass another --output") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [folder / name for name in names]


def fitted_factors(
    adapter: OnnxAdapter, shapes: Mapping[str, Sequence[str | int]], family: str, name: str
) -> dict[str, Tensor]:
    """Return the factors in the shapes that the graphs take.

    A 1x1 convolution and a linear layer are the same map, and files differ in which of both they hold.

    Args:
        shapes: of all factor inputs of all graphs; a word stands for the rank.
        family: of the exported base; "" if it is not known.
        name: of the adapter, for messages.
    Raises:
        AdapterError: it is of another family, or has layers or shapes that the graphs have not.
    """
    if family and not same_family(adapter.family, family):
        raise AdapterError(
            f"adapter {name} is for a base of family {adapter.family}, this export is {family}: use it with "
            f"an export of a {adapter.family} base"
        )
    if not shapes:
        raise AdapterError(
            f"adapter {name} cannot be swapped in: this export has its adapters merged; export the base with "
            "--swappable"
        )
    unknown = [key for key in adapter.factors if key not in shapes]
    if unknown:
        layer = unknown[0].rpartition(".")[0]
        layers = len({key.rpartition(".")[0] for key in unknown})
        raise AdapterError(
            f"adapter {name} changes {layers} layers that this export has no input for, e.g. "
            f"{layer}; export with the --targets that it was trained with"
        )
    ranks: dict[str, int] = {}
    found = {}
    for key, value in adapter.factors.items():
        layer, _, part = key.rpartition(".")
        wanted = shapes[key]
        fits = value
        if len(wanted) == 4 and value.ndim == 2:
            fits = value[:, :, None, None]
        elif len(wanted) == 2 and value.ndim == 4 and value.shape[2:] == (1, 1):
            fits = value.flatten(1)
        rank = fits.shape[0 if part == "lora_A" else 1] if fits.ndim == len(wanted) else -1
        if (
            rank < 0
            or any(isinstance(w, int) and w != have for have, w in zip(fits.shape, wanted, strict=True))
            or ranks.setdefault(layer, rank) != rank
        ):
            raise AdapterError(
                f"adapter {name} does not fit this export: {key} is {tuple(value.shape)}, expected "
                f"{tuple('rank' if isinstance(w, str) else w for w in wanted)}; use it with the base that it "
                "was trained on"
            )
        found[key] = fits
    lone = [key for key in found if _partner(key) not in found]
    if lone:
        raise AdapterError(f"adapter {name} is broken: it has {lone[0]} but not {_partner(lone[0])}")
    return found


def mixed(adapters: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """Return one adapter that is exactly the weighted sum of several, by joining them along the rank.

        sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]

    Args:
        adapters: (fitted factors, weight); one of weight 0 is left out.
    """
    used = [(factors, weight) for factors, weight in adapters if weight != 0]
    found = {}
    for key in dict.fromkeys(key for factors, _ in used for key in factors):
        parts = [(factors[key], weight) for factors, weight in used if key in factors]
        if key.endswith(".lora_A"):
            found[key] = torch.cat([value for value, _ in parts], dim=0)
        else:
            found[key] = torch.cat([value * weight for value, weight in parts], dim=1)
    return found


def _cast(name: str, value: Tensor, dtype: str) -> Tensor:
    cast = value.to(ADAPTER_DTYPES[dtype]).contiguous()
    if not torch.isfinite(cast).all():
        raise AdapterError(f"{name} with its alpha is too large for {dtype}: pass --dtype float32")
    return cast


def _read_file(file: Path) -> dict[str, Tensor]:
    from onnxruntime import AdapterFormat

    try:
        parameters = AdapterFormat.read_adapter(str(file)).get_parameters()
        values = {name: torch.from_numpy(value.numpy().copy()).float() for name, value in parameters.items()}
    except Exception as error:  # its exception classes share no base of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(f"{file} is no .onnx_adapter file ({reason}); convert the adapter again") from None
    for name, value in values.items():
        if not name.endswith((".lora_A", ".lora_B")) or name.partition(".")[0] not in keys.COMPONENTS:
            raise AdapterError(f"{file} has a parameter {name!r}, which is no factor of a layer")
        if not torch.isfinite(value).all():
            raise AdapterError(f"{file}: {name} is not finite; train it again with a lower learning rate")
    return values


def _partner(key: str) -> str:
    layer, _, part = key.rpartition(".")
    return f"{layer}.{'lora_B' if part == 'lora_A' else 'lora_A'}"


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raise OutputError unless the folder is absent, or an earlier adapter that may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder to write: pass another --output")
    if not overwrite and any(folder.iterdir()):
        raise OutputError(f"{folder} exists already: pass --overwrite or another --output")
    if foreign := [path.name for path in folder.iterdir() if path.suffix != SUFFIX and path.name != ABOUT]:
        raise OutputError(f"{folder} holds something else, {foreign[0]}: pass another --output")
