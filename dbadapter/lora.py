"""Low-rank adapters on a live model: which layers, injection through PEFT, reading out, applying, merging."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dbadapter import keys
from dbadapter.adapter import Adapter, LoraWeights, adaptable_layers, check_fits, delta, fitted
from dbadapter.adapter_file import read_adapter as load_adapter
from dbadapter.adapter_metadata import prediction_of
from dbadapter.base_folder import family_of_unet
from dbadapter.errors import AdapterError, ConfigError

__all__ = [
    "ADAPTER_NAME",
    "TARGETS",
    "TEXT_ENCODER_TARGETS",
    "TrainableParameters",
    "adapters_off",
    "apply",
    "check_fits_pipeline",
    "collect",
    "inject",
    "load_adapter",
    "merge_into",
    "remove",
    "target_layers",
]

# The name of our one PEFT adapter on a model. Several files are applied as one, joined along the rank.
ADAPTER_NAME = "dbadapter"

# Ends of the UNet's layer names. `conv_in`, `conv_out` and the time embedding are left out: sd-scripts,
# stable-diffusion.cpp and others drop them from a file, and the subject would come out differently there.
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": tuple(f".{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")),
    "feed-forward": (".ff.net.0.proj", ".ff.net.2"),
    "proj": (".proj_in", ".proj_out"),
    "conv": (
        ".conv1",
        ".conv2",
        ".conv_shortcut",
        ".time_emb_proj",
        ".downsamplers.0.conv",
        ".upsamplers.0.conv",
    ),
}

# The text encoder is always adapted in its attention, whatever the UNet's targets: that is what was measured,
# and diffusers cannot read a kohya file whose text-encoder part has no `out_proj`.
TEXT_ENCODER_TARGETS: tuple[str, ...] = tuple(f".self_attn.{p}_proj" for p in ("q", "k", "v", "out"))


class TrainableParameters(NamedTuple):
    """The float32 factors to optimise, apart because UNet and text encoders have their own learning rates."""

    unet: list[nn.Parameter]
    text_encoder: list[nn.Parameter]


def target_layers(model: nn.Module, component: str, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers to adapt by canonical name.

    Args:
        model: a UNet or a CLIP text encoder.
        component: `unet`, `text_encoder` or `text_encoder_2`.
        targets: names of `TARGETS`; text encoders have `TEXT_ENCODER_TARGETS` whatever is said here.
    Raises:
        ConfigError: an unknown target, or none of the model's layers is one.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        raise ConfigError(f"Targets must be among {', '.join(TARGETS)}: got {', '.join(unknown) or 'none'}")
    endings = tuple(e for t in targets for e in TARGETS[t]) if component == "unet" else TEXT_ENCODER_TARGETS
    every = adaptable_layers(model, component)
    layers = {name: layer for name, layer in every.items() if name.endswith(endings)}
    if not layers:
        raise ConfigError(f"No layer of the {component} belongs to the targets {', '.join(targets)}")
    return layers


def inject(
    unet: nn.Module,
    text_encoder: nn.Module | None,
    text_encoder_2: nn.Module | None = None,
    *,
    rank: int,
    alpha: float | None = None,
    text_encoder_rank: int | None = None,
    text_encoder_alpha: float | None = None,
    targets: Sequence[str] = ("attention",),
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> TrainableParameters:
    """Put a trainable adapter on the models in place and freeze everything else.

    lora_A is uniform within +-1/sqrt(fan_in), lora_B zero (Hu et al. 2021; PEFT's default), so the model's
    output is unchanged at first. The factors are float32 whatever the model's dtype: in bfloat16, updates of
    1e-4 vanish.

    Args:
        unet, text_encoder, text_encoder_2: models without adapters; None leaves a text encoder alone.
        rank, text_encoder_rank: inner dimensions, at least 1; the latter is `rank` by default.
        alpha, text_encoder_alpha: numerators of the scale alpha / rank; the rank by default.
        targets: names of `TARGETS`, for the UNet.
        seed: of lora_A, if no CPU `generator` is given. The UNet's do not depend on the text encoder.
    Returns:
        The parameters to optimise.
    Raises:
        ConfigError: a rank below 1, an alpha that is not positive, an unknown target.
        AdapterError: a model has adapters already.
    """
    text_rank = rank if text_encoder_rank is None else text_encoder_rank
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    parts = [
        ("unet", unet, rank, alpha),
        ("text_encoder", text_encoder, text_rank, text_encoder_alpha),
        ("text_encoder_2", text_encoder_2, text_rank, text_encoder_alpha),
    ]
    plans: dict[str, dict[str, LoraWeights]] = {}
    for component, model, r, a in parts:
        if model is not None:
            scale = float(r if a is None else a)
            _check_rank(r, scale)
            _check_bare(model, component)
            layers = target_layers(model, component, targets)
            plans[component] = {
                n: _initial_factors(layer, r, scale, generator) for n, layer in layers.items()
            }
    parameters: dict[str, list[nn.Parameter]] = {component: [] for component, *_ in parts}
    for component, model, _, _ in parts:
        if model is not None:
            model.requires_grad_(False)
            parameters[component] = _wrap(model, component, plans[component], trainable=True)
    texts = [*parameters["text_encoder"], *parameters["text_encoder_2"]]
    return TrainableParameters(parameters["unet"], texts)


@contextmanager
def adapters_off(*models: nn.Module | None) -> Iterator[None]:
    """Run the very same models without any adapter inside the block; nests, and survives exceptions."""
    layers = [module for model in models if model is not None for module in _lora_layers(model).values()]
    before = [layer.disable_adapters for layer in layers]
    # PEFT's public enable_adapters() also flips requires_grad of every factor: slow in every training step,
    # and it would leave the frozen factors of `apply` trainable.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def collect(
    unet: nn.Module,
    text_encoder: nn.Module | None,
    family: str,
    metadata: Mapping[str, str] | None = None,
    *,
    text_encoder_2: nn.Module | None = None,
) -> Adapter:
    """Return a float32 CPU copy of the adapter that `inject` put on the models.

    Args:
        unet, text_encoder, text_encoder_2: as given to `inject`.
        family: the base's.
        metadata: what the file's header shall say besides.
    Raises:
        AdapterError: the models have no adapter.
    """
    modules: dict[str, LoraWeights] = {}
    models = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    for component, model in models.items():
        for path, layer in _lora_layers(model).items() if model is not None else ():
            if ADAPTER_NAME in layer.lora_A:
                modules[keys.canonical_module(component, path)] = LoraWeights(
                    lora_A=_copy(layer.lora_A[ADAPTER_NAME].weight),
                    lora_B=_copy(layer.lora_B[ADAPTER_NAME].weight),
                    alpha=float(layer.lora_alpha[ADAPTER_NAME]),
                )
    if not modules:
        raise AdapterError("The models carry no adapter of dbadapter: call lora.inject first")
    said = dict(metadata or {})
    if family == "sdxl":  # its names in files count layers through the blocks
        said["dbadapter.layers_per_block"] = str(getattr(unet, "config", {}).get("layers_per_block", 2))
    return Adapter(family=family, modules=modules, metadata=said)


def remove(*models: nn.Module | None) -> None:
    """Take our adapter off again; every weight of the base is the same tensor as before."""
    for model in models:
        if model is None:
            continue
        for path, layer in _lora_layers(model).items():
            layer.delete_adapter(ADAPTER_NAME)
            if not layer.lora_A:
                model.set_submodule(path, layer.get_base_layer())
        configs = getattr(model, "peft_config", {})
        configs.pop(ADAPTER_NAME, None)
        if not configs and hasattr(model, "peft_config"):
            # PEFT sets it; diffusers and transformers take its presence for a loaded adapter.
            del model.peft_config


def apply(pipeline: Any, adapters: Mapping[str | PathLike[str] | Adapter, float]) -> None:
    """Put adapters on a diffusers pipeline, each with its weight, in place of those applied before.

    Several are joined along the rank, which is their exact weighted sum:
    A = [A1; A2], B = [w1 s1 B1, w2 s2 B2], s = alpha / rank.

    Args:
        pipeline: e.g. a StableDiffusionPipeline. `apply(pipeline, {})` restores it bit for bit.
        adapters: file or Adapter -> weight; 1.0 is the strength it was trained at.
    Raises:
        AdapterError: a file is broken or does not fit, or was trained for a base that predicts something
            else; the pipeline is then as it was.
    """
    models = _models(pipeline)
    loaded = [(_loaded(adapter), weight) for adapter, weight in adapters.items()]
    for adapter, weight in loaded:
        if not math.isfinite(weight):
            raise AdapterError(f"An adapter's weight must be a finite number, got {weight}")
        check_fits_pipeline(adapter, pipeline)
    for component, model in models.items():
        _check_bare(model, component, ours_too=False)
    remove(*models.values())
    for component, model in models.items():
        layers = adaptable_layers(model, component)
        joined = {
            name: _joined([(a.modules[name], w) for a, w in loaded if name in a.modules], layer)
            for name, layer in layers.items()
            if any(name in a.modules for a, _ in loaded)
        }
        if joined:
            _wrap(model, component, joined, trainable=False)


def merge_into(pipeline: Any, adapter: str | PathLike[str] | Adapter, weight: float = 1.0) -> None:
    """Add an adapter to the pipeline's own weights in place: W += weight * (alpha / rank) * B A.

    The sum is formed in float32 and rounded once to the dtype of W. There is no way back: keep a copy.

    Raises:
        AdapterError: it does not fit (nothing was changed then), or adapters are applied to the pipeline.
    """
    adapter = _loaded(adapter)
    check_fits_pipeline(adapter, pipeline)
    models = _models(pipeline)
    for component, model in models.items():
        _check_bare(model, component)
        layers = adaptable_layers(model, component)
        for name, factors in adapter.of_component(component).items():
            parameter = layers[name].get_parameter("weight")
            with torch.no_grad():
                parameter.copy_(parameter.float() + weight * delta(factors, layers[name]))


def check_fits_pipeline(adapter: Adapter, pipeline: Any) -> None:
    """Check that an adapter was made for such a base: family, layers, shapes, and what the base predicts.

    Raises:
        AdapterError: it was not; the message gives the reason and the cure.
    """
    models = _models(pipeline)
    if "unet" not in models:
        raise AdapterError("The pipeline has no UNet of torch that an adapter could change")
    unet, text_encoder_2 = models["unet"], models.get("text_encoder_2")
    family = family_of_unet(getattr(unet, "config", {}), two_encoders=text_encoder_2 is not None)
    check_fits(adapter, unet, models.get("text_encoder"), text_encoder_2, base_family=family)
    recorded = prediction_of(adapter.metadata)
    scheduler = getattr(pipeline, "scheduler", None)
    predicts = scheduler.config.get("prediction_type") if scheduler is not None else None
    if recorded and predicts and recorded != predicts:
        raise AdapterError(
            f"The adapter was trained for a base that predicts {recorded}, this base says {predicts}: pass "
            f"the base that it was trained on, or --prediction-type {recorded} where its scheduler is wrong"
        )


def _loaded(adapter: str | PathLike[str] | Adapter) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else load_adapter(adapter)


def _models(pipeline: Any) -> dict[str, nn.Module]:
    found = {component: getattr(pipeline, component, None) for component in keys.COMPONENTS}
    return {component: model for component, model in found.items() if isinstance(model, nn.Module)}


def _check_rank(rank: int, alpha: float) -> None:
    if rank < 1:
        raise ConfigError(f"The rank must be at least 1, got {rank}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha must be a positive number, got {alpha}")


def _check_bare(model: nn.Module, component: str, *, ours_too: bool = True) -> None:
    names = {name for layer in _lora_layers(model).values() for name in layer.lora_A}
    foreign = sorted(names if ours_too else names - {ADAPTER_NAME})
    if foreign:
        raise AdapterError(
            f"The {component} carries adapters already ({', '.join(foreign)}): take them off first "
            "(pipeline.unload_lora_weights(), or dbadapter.apply(pipeline, {}))"
        )


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _initial_factors(layer: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> LoraWeights:
    shape = layer.get_parameter("weight").shape
    lora_A = torch.empty(rank, *shape[1:])
    # a=sqrt(5) is uniform within +-1/sqrt(fan_in), as nn.Linear and PEFT do.
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
    return LoraWeights(lora_A, torch.zeros(shape[0], rank, *[1] * (len(shape) - 2)), alpha)


def _joined(factors: list[tuple[LoraWeights, float]], layer: nn.Module) -> LoraWeights:
    """Return one LoRA of scale 1 that equals the weighted sum, in the layer's dtype."""
    weight = layer.get_parameter("weight")
    downs, ups = [], []
    for lora, strength in factors:
        a, b = fitted(lora, layer)
        downs.append(a.float())
        ups.append(b.float() * (strength * lora.scaling))
    lora_A, lora_B = torch.cat(downs).to(weight), torch.cat(ups, dim=1).to(weight)
    return LoraWeights(lora_A, lora_B, float(lora_A.shape[0]))


def _wrap(
    model: nn.Module, component: str, factors: Mapping[str, LoraWeights], *, trainable: bool
) -> list[nn.Parameter]:
    """Wrap the layers through PEFT and give them these factors; return their parameters in a fixed order."""
    paths = {keys.canonical_module(component, path): path for path, _ in model.named_modules()}
    ranks = {paths[name]: weights.rank for name, weights in factors.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=common,
        # PEFT matches these as patterns from the end of a name; the caret pins the whole name.
        rank_pattern={f"^{path.replace('.', '[.]')}": r for path, r in ranks.items() if r != common},
        target_modules=list(ranks),
        inference_mode=not trainable,
    )
    # Meta tensors, because the factors are given below: nothing is drawn from torch's global generator.
    inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)
    layers = _lora_layers(model)
    if set(layers) != set(ranks):
        odd = sorted(set(layers) ^ set(ranks))
        raise AdapterError(f"PEFT wrapped other layers of the {component} than asked, e.g. {odd[0]}")
    parameters = [_set_factors(layers[paths[name]], factors[name], trainable) for name in sorted(factors)]
    return [parameter for pair in parameters for parameter in pair]


def _set_factors(layer: LoraLayer, factors: LoraWeights, trainable: bool) -> list[nn.Parameter]:
    device = layer.get_base_layer().weight.device
    parameters = []
    for part, value in ((layer.lora_A, factors.lora_A), (layer.lora_B, factors.lora_B)):
        # contiguous copies: the file's tensors and the parameters must never share memory
        parameter = nn.Parameter(value.detach().to(device, copy=True).contiguous(), requires_grad=trainable)
        part[ADAPTER_NAME].weight = parameter
        parameters.append(parameter)
    layer.lora_alpha[ADAPTER_NAME] = factors.alpha
    layer.scaling[ADAPTER_NAME] = factors.scaling
    return parameters


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
