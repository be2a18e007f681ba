"""A base in a single `.safetensors` file in LDM's layout: tell what it is from its header, load it offline.

The configurations of SD1.x, SD2.x and SDXL lie in `configs/`; a folder of the file's own name beside it
(`model/` beside `model.safetensors`) takes their place where the architecture is small or altered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbadapter import file_kinds, single_file_keys
from dbadapter.base_folder import TENSORS_AT_ONCE, TOYBOX, find_base, load_tokenizer, quiet_libraries
from dbadapter.errors import BaseError, UsageError, reason
from dbadapter.single_file_keys import Source

if TYPE_CHECKING:
    import torch

__all__ = [
    "SingleFile",
    "check_single_file",
    "inspect_single_file",
    "load_single_file",
    "load_single_file_tokenizer",
]

CONFIGS = Path(__file__).parent / "configs"
# Latent cells along a side, for SD2.x by what it predicts: 512 or 768 px.
_SD2_SAMPLE_SIZE = {"epsilon": 64, "v_prediction": 96}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SingleFile:
    """What a single file is.

    Attributes:
        path: the file.
        family: "sd1", "sd2" or "sdxl", told from its keys.
        prediction_type: "epsilon" or "v_prediction".
        configs: the folder of diffusers configs that describe it: ours, or the one beside the file.
        zero_snr: it was trained with betas rescaled to no signal at the last step.
    """

    path: Path
    family: str
    prediction_type: str
    configs: Path
    zero_snr: bool = False

    @property
    def own_configs(self) -> bool:
        """Whether the configs lie beside the file."""
        return self.configs.parent != CONFIGS


def inspect_single_file(path: Path, prediction_type: str | None = None) -> SingleFile:
    """Return what the file is, read from its header alone.

    What it predicts is said, the first that does counting, by `prediction_type`; the marker keys `v_pred`
    and `ztsnr`; `modelspec.prediction_type` in the header; the scheduler config in a folder beside the
    file; and for SD1.x and SDXL it is else epsilon.

    Raises:
        BaseError: it is no checkpoint of SD1.x, SD2.x or SDXL, or for SD2.x nothing says what it predicts.
        UsageError: prediction_type is neither epsilon nor v_prediction.
    """
    if prediction_type not in (None, *file_kinds.PREDICTIONS.values()):
        raise UsageError(f"prediction type must be epsilon or v_prediction, got {prediction_type!r}")
    file_kinds.refuse_bytes(path)
    shapes, metadata = _read_header(path)
    file_kinds.refuse_keys(path, shapes)
    family = file_kinds.tell_family(path, shapes)
    if not any(key.startswith(single_file_keys.VAE_PREFIX) for key in shapes):
        raise BaseError(
            f"base {path}: it has no VAE ({single_file_keys.VAE_PREFIX}*); pass the version with a VAE in it"
        )
    beside = _configs_beside(path, family)
    configs = beside or CONFIGS / family
    in_channels = shapes[file_kinds.FIRST_LAYER][1] if len(shapes[file_kinds.FIRST_LAYER]) == 4 else 0
    file_kinds.refuse_unet(path, in_channels, _read_config(configs, "vae").get("latent_channels", 4))
    said = prediction_type or file_kinds.stated_prediction(shapes, metadata)
    if said is None and beside is not None:
        said = _read_config(beside, "scheduler").get("prediction_type")
        if said not in (None, *file_kinds.PREDICTIONS.values()):
            raise BaseError(f"base {path}: {beside}/scheduler predicts {said!r}, not epsilon or v_prediction")
    if said is None and family == "sd2":
        raise BaseError(
            f"base {path}: an SD2.x file does not say what it predicts; pass --prediction-type epsilon "
            "(512 px, as stable-diffusion-2-1-base) or v_prediction (768 px, as stable-diffusion-2-1)"
        )
    return SingleFile(path, family, said or "epsilon", configs, zero_snr="ztsnr" in shapes)


def check_single_file(file: SingleFile) -> None:
    """Pass if the file holds every parameter of its configs' models in the right shape, and no other layer.

    Reads no weight and takes about a second.

    Raises:
        BaseError: a key is missing, of another shape, or left over; the message names the first.
    """
    shapes, _ = _read_header(file.path)
    with quiet_libraries():
        for part in _models(file.family):
            _match(file, part, _empty_model(file, part), shapes)


def load_single_file(
    file: SingleFile, device: torch.device, dtype: torch.dtype, unet_dtype: torch.dtype | None = None
) -> Any:
    """Return the file's StableDiffusionPipeline or StableDiffusionXLPipeline, every weight of the dtype.

    Tensors go one by one from the file to the device; nothing is fetched from anywhere.

    Args:
        unet_dtype: of the UNet's weights; None is `dtype`.
    Raises:
        BaseError: the file does not fit its configs, or cannot be read.
    """
    with quiet_libraries():
        shapes, _ = _read_header(file.path)
        models = {part: _empty_model(file, part) for part in _models(file.family)}
        sources = {part: _match(file, part, model, shapes) for part, model in models.items()}
        for part, model in models.items():
            wanted = dtype if part != "unet" or unet_dtype is None else unet_dtype
            _fill(file.path, model, sources[part], device, wanted)
        return _pipeline(file, models)


def load_single_file_tokenizer(file: SingleFile, part: str = "tokenizer") -> Any:
    """Return the file's CLIPTokenizer: from the folder beside the file, else CLIP's, as all families have.

    Args:
        file: as `inspect_single_file` gives it.
        part: "tokenizer", or "tokenizer_2" for SDXL's second encoder.
    Raises:
        BaseError: the folder's tokenizer is broken, or the text encoder has another vocabulary than CLIP's.
    """
    folder = file.configs / part
    try:
        if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            return load_tokenizer(folder)
        text = _read_config(file.configs, part.replace("tokenizer", "text_encoder"))
        settings = _read_json(CONFIGS / file.family / part / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokenizer = load_tokenizer(
            find_base(TOYBOX) / "tokenizer",
            model_max_length=int(text.get("max_position_embeddings", settings["model_max_length"])),
            **{name: settings[name] for name in names},
        )
        if text.get("vocab_size", len(tokenizer)) < len(tokenizer):
            raise BaseError(
                f"base {file.path}: its text encoder knows {text['vocab_size']} tokens, "
                f"CLIP's vocabulary has {len(tokenizer)}; put its tokenizer in {folder}"
            )
    except BaseError:
        raise
    except Exception as error:  # third-party loaders raise anything on a broken file
        raise _unusable(file, error) from error
    return tokenizer


def _read_header(path: Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """Return each tensor's shape, and the metadata; whole and in bounds, as safetensors checks."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            for key, part in slices.items():
                if key.startswith(single_file_keys.UNET_PREFIX) and not re.match("B?F", part.get_dtype()):
                    raise BaseError(
                        f"base {path}: {key} holds {part.get_dtype()} numbers: a quantised checkpoint; "
                        "pass the fp16 file"
                    )
            return {key: tuple(part.get_shape()) for key, part in slices.items()}, tensors.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _configs_beside(path: Path, family: str) -> Path | None:
    """Return the folder of the file's own name if it holds diffusers configs."""
    folder = path.with_suffix("")
    if folder == path or not any(
        (folder / name).is_file() for name in ("model_index.json", "unet/config.json")
    ):
        return None
    for part in (*_models(family), "scheduler"):
        _read_config(folder, part)  # raises where it is missing
    return folder


def _read_config(folder: Path, part: str) -> dict[str, Any]:
    return _read_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseError(
            f"base: {path} is missing; a folder beside a single file needs the config of every part"
        ) from error
    except (OSError, ValueError) as error:
        raise BaseError(f"base: {path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise BaseError(f"base: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def _models(family: str) -> tuple[str, ...]:
    return ("unet", "vae", "text_encoder", *(("text_encoder_2",) if family == "sdxl" else ()))


def _empty_model(file: SingleFile, part: str) -> Any:
    """Return a model of the part's config without memory for its weights."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    config = _read_config(file.configs, part)
    try:
        with init_empty_weights():
            if part in ("unet", "vae"):
                kind = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
                if part == "unet" and file.family == "sd2" and not file.own_configs:
                    config["sample_size"] = _SD2_SAMPLE_SIZE[file.prediction_type]
                return kind.from_config(config)
            projected = part == "text_encoder_2"
            text_kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
            return text_kind(transformers.CLIPTextConfig.from_dict(config))
    except Exception as error:  # a config that does not fit its class fails anywhere
        raise _unusable(file, error) from error


def _match(file: SingleFile, part: str, model: Any, shapes: Mapping[str, Shape]) -> dict[str, Source]:
    """Return where the file holds each of the model's parameters, all there and of the right shape."""
    sources: dict[str, Source] = {}
    for name, parameter in model.state_dict().items():
        source = _source(file, part, model.config, name, shapes)
        if source is None:
            raise _unusable(file, ValueError(f"{part} has {name}, for which LDM's layout has no place"))
        stored, wanted = shapes.get(source.key), tuple(parameter.shape)
        if stored is None:
            raise BaseError(f"base {file.path}: {source.key} is missing; {_cure(file)}")
        if source.shape_of(stored, wanted) != wanted:
            raise BaseError(
                f"base {file.path}: {source.key} has the shape {stored}, "
                f"the configs of {part} say {source.shape_in_file(wanted)}; {_cure(file)}"
            )
        sources[name] = source
    used = {source.key for source in sources.values()}
    if left := _left_over(file.family, part, model.config, shapes, used):
        raise BaseError(f"base {file.path}: {left} is no part of the {part} of the configs; {_cure(file)}")
    return sources


def _source(file: SingleFile, part: str, config: Any, name: str, keys: Mapping[str, Shape]) -> Source | None:
    if part == "unet":
        if not isinstance(config.layers_per_block, int):
            raise _unusable(file, ValueError("layers_per_block must be one number for all blocks"))
        attention = {index for index, kind in enumerate(config.up_block_types) if "CrossAttn" in kind}
        return single_file_keys.unet_source(name, config.layers_per_block, attention)
    if part == "vae":
        return single_file_keys.vae_source(name, len(config.block_out_channels))
    if part == "text_encoder" and file.family != "sd2":
        prefixes = file_kinds.XL_CLIP if file.family == "sdxl" else file_kinds.CLIP
        return single_file_keys.clip_source(
            name, next(each for each in prefixes if each + file_kinds.CLIP_EMBEDDING in keys)
        )
    return single_file_keys.open_clip_source(
        name, file_kinds.XL_OPEN_CLIP if part == "text_encoder_2" else file_kinds.OPEN_CLIP, keys
    )


def _left_over(family: str, part: str, config: Any, keys: Mapping[str, Shape], used: set[str]) -> str | None:
    """Return the first key of a layer that the model lacks: without it, it would be another model."""
    if part in ("unet", "vae"):
        own = (
            single_file_keys.UNET_PREFIX
            if part == "unet"
            else rf"{single_file_keys.VAE_PREFIX}(encoder|decoder)\."
        )
        return min((key for key in keys if re.match(own, key) and key not in used), default=None)
    # SD2.x takes the last but one layer's output, so its text encoder leaves the file's last layer out.
    layers = config.num_hidden_layers + (family == "sd2")
    number = re.compile(r"\.(?:layers|resblocks)\.(\d+)\.")
    known = {number.sub(".", key) for key in used}  # else the layers of a vision model would count
    for key in sorted(keys):
        match = number.search(key)
        if match and int(match[1]) >= layers and number.sub(".", key) in known:
            return key
    return None


def _fill(
    path: Path, model: Any, sources: Mapping[str, Source], device: torch.device, dtype: torch.dtype
) -> None:
    """Give the model its weights, one tensor of the file at a time."""
    from safetensors import SafetensorError, safe_open

    wanted = model.state_dict()
    try:
        state: dict[str, torch.Tensor] = {}
        for start in range(0, len(names := list(sources)), TENSORS_AT_ONCE):
            # Opened again for each part: pages that were read count as memory until the file is closed.
            with safe_open(path, framework="pt") as tensors:
                for name in names[start : start + TENSORS_AT_ONCE]:
                    shape = tuple(wanted[name].shape)
                    state[name] = _read(tensors, sources[name], shape).to(device, dtype)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    model.load_state_dict(state, strict=True, assign=True)
    model.eval()


def _read(tensors: Any, source: Source, shape: Shape) -> torch.Tensor:
    if source.third is not None:
        rows = slice(source.third * shape[0], (source.third + 1) * shape[0])
        part: torch.Tensor = tensors.get_slice(source.key)[rows]
        return part.clone()
    tensor: torch.Tensor = tensors.get_tensor(source.key)
    return tensor.T.contiguous() if source.transposed else tensor.reshape(shape)


def _pipeline(file: SingleFile, models: Mapping[str, Any]) -> Any:
    import diffusers

    parts: dict[str, Any] = {**models, "scheduler": _scheduler(file)}
    parts["tokenizer"] = load_single_file_tokenizer(file)
    if file.family == "sdxl":
        parts["tokenizer_2"] = load_single_file_tokenizer(file, "tokenizer_2")
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _scheduler(file: SingleFile) -> Any:
    import diffusers

    config = _read_config(file.configs, "scheduler")
    config["prediction_type"] = file.prediction_type
    if file.zero_snr:  # "trailing" because only it samples the last step, the one without signal
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    try:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    except Exception as error:  # a config that does not fit its class fails anywhere
        raise _unusable(file, error) from error


def _cure(file: SingleFile) -> str:
    if file.own_configs:
        return f"correct the configs in {file.configs}, or download the file again"
    return (
        f"if its architecture is altered, put its diffusers configs in {file.path.with_suffix('')} "
        "(unet/, vae/, text_encoder/, scheduler/), else download it again"
    )


def _unusable(file: SingleFile, error: Exception) -> BaseError:
    return BaseError(
        f"base {file.path}: the configs in {file.configs} cannot be used ({reason(error)}); "
        "correct them, or take the folder away"
    )


def _unreadable(path: Path, error: Exception) -> BaseError:
    return BaseError(
        f"base {path}: cannot be read as safetensors ({reason(error)}); download it again, whole"
    )
