"""The same file through diffusers' own loader: is what it does to each layer what we read?

A layer's change is dW = (alpha / rank) B A (Hu et al. 2021, section 4.1). Two readings are compared by the
Frobenius norm of their difference, layer by layer, without ever forming dW:

    ||s B A - s' B' A'||^2 = trace((C^T C) (D D^T)),   C = [s B, -s' B'],  D = [A; A']
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbadapter import keys
from dbadapter.adapter import Adapter, LoraWeights, adaptable_layers
from dbadapter.adapter_file import read_adapter
from dbadapter.errors import AdapterError
from dbadapter.lora import check_fits_pipeline

__all__ = ["Comparison", "Skeleton", "check_file", "compare", "compare_in_pipeline", "load_by_diffusers"]

_ADAPTER = "dbadapter_check"


@dataclass(frozen=True)
class Comparison:
    """What diffusers makes of a file, beside our own reading of it.

    Attributes:
        diffusers: its version.
        layers: how many the file has.
        left_out: layers that diffusers did not load.
        added: layers that only diffusers has.
        difference: the largest ||dW' - dW|| / ||dW|| of a layer that both have.
        layer: where that is.
        tolerance: what the rounding of the file's dtype allows.
        effect: ||dW|| / ||W|| over all the layers, W the base's weights; None where no base was given.
    """

    diffusers: str
    layers: int
    left_out: tuple[str, ...]
    added: tuple[str, ...]
    difference: float
    layer: str
    tolerance: float
    effect: float | None

    @property
    def equal(self) -> bool:
        """No layer is missing or added, and none differs by more than the tolerance."""
        return not self.left_out and not self.added and self.difference <= self.tolerance

    def fault(self) -> str:
        """Return in one line how the two differ; "" if they are equal."""
        if self.left_out or self.added:
            odd = self.left_out or self.added
            what = "leaves out" if self.left_out else "adds"
            return f"diffusers {self.diffusers} {what} {len(odd)} of {self.layers} layers, e.g. {odd[0]}"
        if self.difference > self.tolerance:
            return (
                f"diffusers {self.diffusers} changes {self.layer} by {self.difference:.2g} otherwise "
                f"(relative; the file's rounding allows {self.tolerance:.2g})"
            )
        return ""


class Skeleton:
    """A base's models without their weights: names and shapes, in a few megabytes of any size of base."""

    def __init__(self, unet: nn.Module, text_encoders: Mapping[str, nn.Module]) -> None:
        """Keep classes and configurations only, so that the models themselves can go.

        Args:
            unet: a UNet2DConditionModel, adapters may be on it.
            text_encoders: `text_encoder`, `text_encoder_2` -> CLIP models.
        """
        # Any: from_config is diffusers' own, and text encoders take their configuration alone.
        self._unet: tuple[Any, Any] = (type(unet), dict(getattr(unet, "config", {})))
        self._texts: dict[str, tuple[Any, Any]] = {
            name: (type(model), model.config) for name, model in text_encoders.items()
        }

    def models(self) -> dict[str, nn.Module]:
        """Return component -> a model whose parameters share one number each."""
        made: dict[str, nn.Module] = {}
        with torch.device("meta"):
            made["unet"] = self._unet[0].from_config(self._unet[1])
            for name, (kind, config) in self._texts.items():
                made[name] = kind(config)
        for model in made.values():
            _give_weights(model)
        return made


def load_by_diffusers(path: str | PathLike[str], models: Mapping[str, nn.Module]) -> dict[str, LoraWeights]:
    """Return what diffusers' `load_lora_weights` puts on the models, which keep the adapter.

    Args:
        path: a .safetensors file.
        models: `unet`, `text_encoder` and for SDXL `text_encoder_2`.
    Raises:
        AdapterError: diffusers refuses the file; its own words are in the message.
    """
    import diffusers

    try:
        with _no_progress_bar():
            _holder(models).load_lora_weights(
                str(Path(path).absolute().parent),
                weight_name=Path(path).name,
                adapter_name=_ADAPTER,
                local_files_only=True,
            )
    # Its loader raises what comes: ValueError, KeyError, RuntimeError from torch, and PEFT's own.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise AdapterError(f"{path}: diffusers {diffusers.__version__} refuses it ({reason})") from None
    return {
        keys.canonical_module(component, name): LoraWeights(
            layer.lora_A[_ADAPTER].weight.detach(),
            layer.lora_B[_ADAPTER].weight.detach(),
            # LoraWeights divides by the rank again; the scale is what acts.
            float(layer.scaling[_ADAPTER]) * layer.lora_A[_ADAPTER].weight.shape[0],
        )
        for component, model in models.items()
        for name, layer in _lora_layers(model).items()
    }


def compare(
    ours: Adapter, theirs: Mapping[str, LoraWeights], layers: Mapping[str, nn.Module] | None = None
) -> Comparison:
    """Return how two readings of one file differ.

    Args:
        ours: as `read_adapter` gives it; its dtype is the file's.
        theirs: as `load_by_diffusers` gives it.
        layers: the base's by canonical name, with real weights, for the size of the effect.
    Raises:
        AdapterError: the adapter changes nothing, so that nothing can be compared.
    """
    import diffusers

    changes = {name: math.sqrt(_square(weights)) for name, weights in ours.modules.items()}
    if not any(changes.values()):
        raise AdapterError(
            "the adapter changes no weight (every lora_A or lora_B is zero): nothing to compare"
        )
    worst, where = 0.0, ""
    for name, weights in ours.modules.items():
        if name not in theirs:
            continue
        apart = _difference(weights, theirs[name])
        relative = apart / changes[name] if changes[name] else (math.inf if apart else 0.0)
        if relative > worst or not where:
            worst, where = relative, name
    dtype = next(iter(ours.modules.values())).lora_A.dtype
    return Comparison(
        diffusers=diffusers.__version__,
        layers=len(ours.modules),
        left_out=tuple(sorted(set(ours.modules) - set(theirs))),
        added=tuple(sorted(set(theirs) - set(ours.modules))),
        difference=worst,
        layer=where,
        # Both readings take the same numbers, so that only sums in float32 are left of a float32 file.
        tolerance=max(torch.finfo(dtype).eps, 1e-6),
        effect=None if layers is None else _effect(changes, layers),
    )


def compare_in_pipeline(path: str | PathLike[str], pipeline: Any) -> Comparison:
    """Return how diffusers' reading of the file differs from ours, on a whole base; its adapter goes again.

    Args:
        path: a .safetensors file.
        pipeline: of diffusers, without adapters.
    Raises:
        AdapterError: the file is broken or does not fit the base, diffusers refuses it, or it changes
            nothing.
    """
    adapter = read_adapter(path)
    check_fits_pipeline(adapter, pipeline)
    models = {
        component: model
        for component in keys.COMPONENTS
        if isinstance(model := getattr(pipeline, component, None), nn.Module)
    }
    layers = {n: layer for c, model in models.items() for n, layer in adaptable_layers(model, c).items()}
    try:
        theirs = load_by_diffusers(path, models)
        return compare(adapter, theirs, {name: layers[name] for name in adapter.modules})
    except AdapterError as error:
        where = "" if str(error).startswith(str(path)) else f"{path}: "
        raise AdapterError(f"{where}{error}") from None
    finally:
        _unload(models)


def check_file(path: str | PathLike[str], skeleton: Skeleton) -> Comparison | None:
    """Check that diffusers makes of the file what it holds; cheap, no base is loaded.

    Returns:
        The comparison; None for an adapter that changes nothing yet.
    Raises:
        AdapterError: diffusers refuses the file, leaves out a layer, or weighs one otherwise.
    """
    adapter = read_adapter(path)
    if not any(_square(weights) for weights in adapter.modules.values()):
        return None
    models = {c: model for c, model in skeleton.models().items() if adapter.of_component(c)}
    found = compare(adapter, load_by_diffusers(path, models))
    if not found.equal:
        raise AdapterError(f"{path}: {found.fault()}: please report this")
    return found


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers shows a bar for every text encoder, also where it takes milliseconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _holder(models: Mapping[str, nn.Module]) -> Any:
    """Return an object that loads adapters as the pipelines do, with these models only."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    xl = "text_encoder_2" in models or _is_xl(models.get("unet"))
    mixin: Any = StableDiffusionXLLoraLoaderMixin if xl else StableDiffusionLoraLoaderMixin

    class Holder(mixin):  # type: ignore[misc]
        hf_device_map = None

        def __init__(self) -> None:
            for component in keys.COMPONENTS:
                setattr(self, component, models.get(component))
            self.components = dict(models)

    return Holder()


def _is_xl(unet: nn.Module | None) -> bool:
    return getattr(unet, "config", {}).get("addition_embed_type") == "text_time"


def _give_weights(model: nn.Module) -> None:
    """Replace meta parameters by CPU ones of the same shape that share one zero, in place.

    PEFT puts adapters where a layer's weight is, and on the meta device they would lose their values.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shared = torch.zeros(1).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(shared, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype), persistent=False)


def _unload(models: Mapping[str, nn.Module]) -> None:
    from peft.tuners.lora import LoraLayer

    for model in models.values():
        for path, layer in list(_lora_layers(model).items()):
            if isinstance(layer, LoraLayer):
                model.set_submodule(path, layer.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and _ADAPTER in module.lora_A
    }


def _factors(weights: LoraWeights) -> tuple[Tensor, Tensor]:
    """Return (A, s B) in float64 as matrices: a convolution's kernel is part of the input."""
    a = weights.lora_A.to("cpu", torch.float64).flatten(1)
    return a, weights.lora_B.to("cpu", torch.float64).flatten(1) * weights.scaling


def _square(weights: LoraWeights) -> float:
    a, b = _factors(weights)
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0))


def _difference(ours: LoraWeights, theirs: LoraWeights) -> float:
    a, b = _factors(ours)
    other_a, other_b = _factors(theirs)
    if a.shape[1] != other_a.shape[1] or b.shape[0] != other_b.shape[0]:
        return math.inf
    if torch.equal(a, other_a) and a.shape == other_a.shape:
        # The usual case, exact to the last bit: the sums below would leave 1e-8 of it.
        b, a = b - other_b, a
        return math.sqrt(float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0)))
    c, d = torch.cat([b, -other_b], 1), torch.cat([a, other_a])
    return math.sqrt(float(((c.T @ c) * (d @ d.T)).sum().clamp(min=0)))


def _effect(changes: Mapping[str, float], layers: Mapping[str, nn.Module]) -> float:
    whole = math.fsum(change**2 for change in changes.values())
    weights = math.fsum(float(layers[n].get_parameter("weight").float().norm()) ** 2 for n in changes)
    return math.sqrt(whole / weights) if weights else math.inf
