"""An adapter in memory: its low-rank factors by canonical layer name, and whether it fits a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dbadapter import keys
from dbadapter.errors import AdapterError

__all__ = ["Adapter", "LoraWeights", "adaptable_layers", "check_fits", "delta", "fitted", "same_family"]


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """The factors of one layer: dW = (alpha / rank) * B A (Hu et al. 2021, section 4.1).

    Attributes:
        lora_A: shape (rank, in_features), or (rank, in_channels, kh, kw) for a convolution.
        lora_B: shape (out_features, rank), or (out_channels, rank, 1, 1).
        alpha: the scale's numerator.
    Raises:
        AdapterError: the shapes are none of a LoRA layer; the message states them.
    """

    lora_A: Tensor  # noqa: N815 (the papers' name)
    lora_B: Tensor  # noqa: N815
    alpha: float

    def __post_init__(self) -> None:
        a, b = tuple(self.lora_A.shape), tuple(self.lora_B.shape)
        if len(a) not in (2, 4) or len(a) != len(b) or b[2:] not in ((), (1, 1)) or 0 in a + b:
            raise AdapterError(
                "LoRA factors must be (rank, in) and (out, rank), or (rank, in, kh, kw) and "
                f"(out, rank, 1, 1): got {a} and {b}"
            )
        if a[0] != b[1]:
            raise AdapterError(f"lora_A {a} has rank {a[0]} but lora_B {b} has rank {b[1]}")

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass(eq=False)
class Adapter:
    """A subject's adapter. Compared and hashed by identity, so that it can be a key of `lora.apply`.

    Attributes:
        family: the base's family: "toybox", "sd1", "sd2", "sdxl", or "unknown" for a file that does not say.
        modules: canonical layer name (see `keys`) -> factors.
        metadata: the file's header, str -> str.
    """

    family: str
    modules: dict[str, LoraWeights]
    metadata: dict[str, str] = field(default_factory=dict)

    def of_component(self, component: str) -> dict[str, LoraWeights]:
        """Return the layers of `unet`, `text_encoder` or `text_encoder_2`."""
        return {m: w for m, w in self.modules.items() if keys.component_of(m) == component}


def delta(weights: LoraWeights, layer: nn.Module) -> Tensor:
    """Return the weight change of one adapted layer, in float32 on the layer's device.

        dW = (alpha / rank) * B A        (Hu et al. 2021, section 4.1)

    Args:
        weights: factors that fit the layer (else see Raises).
        layer: a Linear or Conv2d.
    Returns:
        The shape of `layer.weight`.
    Raises:
        AdapterError: the factors do not fit the layer.
    """
    weight = _weight(layer)
    a, b = fitted(weights, layer)
    a, b = a.to(weight.device, torch.float32), b.to(weight.device, torch.float32)
    return (b.flatten(1) @ a.flatten(1)).reshape(weight.shape) * weights.scaling


def fitted(weights: LoraWeights, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (lora_A, lora_B) in the number of dimensions that the layer has.

    A 1x1 convolution and a linear layer are the same map, and tools differ on which of both shapes they
    write for SD1's `proj_in` and `proj_out`.

    Raises:
        AdapterError: the factors do not fit the layer; both shapes are stated.
    """
    a, b, weight = weights.lora_A, weights.lora_B, _weight(layer)
    if weight.ndim == 4 and a.ndim == 2:
        a, b = a[:, :, None, None], b[:, :, None, None]
    elif weight.ndim == 2 and a.ndim == 4 and a.shape[2:] == (1, 1):
        a, b = a.flatten(1), b.flatten(1)
    if (b.shape[0], *a.shape[1:]) != tuple(weight.shape):
        raise AdapterError(
            f"the adapter changes weights of shape {(b.shape[0], *a.shape[1:])}, "
            f"the base's are {tuple(weight.shape)}"
        )
    return a, b


def adaptable_layers(model: nn.Module, component: str) -> dict[str, nn.Module]:
    """Return every Linear and Conv2d of a component by canonical name, in the model's order.

    Layers that PEFT has wrapped are found too, under their own name.
    """
    return dict(_layers(model, component))


def check_fits(
    adapter: Adapter,
    unet: nn.Module,
    text_encoder: nn.Module | None,
    text_encoder_2: nn.Module | None = None,
    *,
    base_family: str | None = None,
) -> None:
    """Check that every layer of the adapter exists in the base with the same shape.

    Family, names and shapes decide; another checkpoint of the same family is welcome.

    Raises:
        AdapterError: it does not fit; the message gives the reason and the first layer concerned.
    """
    if base_family is not None and not same_family(adapter.family, base_family):
        raise AdapterError(
            f"The adapter is for a base of family {adapter.family}, this base is {base_family}: "
            f"use it with a {adapter.family} base"
        )
    models = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    present = {component: model for component, model in models.items() if model is not None}
    layers = {name: layer for c, model in present.items() for name, layer in _layers(model, c)}
    _check_layers(adapter.modules, layers)


def same_family(one: str, other: str) -> bool:
    """Tell whether two families are one, so that names and shapes decide.

    toybox is a small SD1, so a copy of it counts as sd1; "unknown" may be any.
    """
    similar = {"toybox": "sd1"}
    return "unknown" in (one, other) or similar.get(one, one) == similar.get(other, other)


def _check_layers(modules: Mapping[str, LoraWeights], layers: Mapping[str, nn.Module]) -> None:
    missing = [name for name in modules if name not in layers]
    if missing:
        raise AdapterError(
            f"The adapter does not fit this base: {len(missing)} of its {len(modules)} layers are missing "
            f"there, e.g. {missing[0]}; use it with the base that it was trained on"
        )
    for name, weights in modules.items():
        try:
            fitted(weights, layers[name])
        except AdapterError as error:
            raise AdapterError(
                f"The adapter does not fit this base: at {name} {error}; "
                "use it with the base that it was trained on"
            ) from None


def _layers(model: nn.Module, component: str) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in path:
            yield keys.canonical_module(component, path.removesuffix(".base_layer")), module


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise AdapterError(f"layer {type(layer).__name__} has no weight that an adapter could change")
    return weight
