"""A base on disk: find it, tell a diffusers folder's family from its configs, refuse the rest, load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbadapter.errors import BaseError, reason

if TYPE_CHECKING:
    import torch

__all__ = [
    "TOYBOX",
    "detect_family",
    "family_of_unet",
    "find_base",
    "is_toybox",
    "is_toybox_on_disk",
    "load_pipeline",
    "load_tokenizer",
    "load_tokenizers",
    "quiet_libraries",
]

TOYBOX = "toybox"
# What no other published base has.
_TOYBOX_UNET = {"sample_size": 16, "cross_attention_dim": 128, "block_out_channels": [64, 128, 192]}
SD2_WIDTH = 1024  # cross_attention_dim of SD2.x (OpenCLIP ViT-H); SD1.x has 768 (CLIP ViT-L)

# Part -> (stem of its weights' file, its class).
_PARTS: Mapping[str, tuple[str | None, str]] = {
    "unet": ("diffusion_pytorch_model", "UNet2DConditionModel"),
    "vae": ("diffusion_pytorch_model", "AutoencoderKL"),
    "text_encoder": ("model", "CLIPTextModel"),
    "tokenizer": (None, "CLIPTokenizer"),
    "scheduler": (None, ""),
}
_SECOND_PARTS: Mapping[str, tuple[str | None, str]] = {
    "text_encoder_2": ("model", "CLIPTextModelWithProjection"),
    "tokenizer_2": (None, "CLIPTokenizer"),
}
# What other in_channels than the VAE's latents mean for a UNet with 4 latent channels.
_EXTRA_CHANNELS = {"5": "a depth-conditioned UNet", "8": "an InstructPix2Pix UNet", "9": "an inpainting UNet"}
TENSORS_AT_ONCE = 64
_PASS = "pass Stable Diffusion 1.x, 2.x or SDXL, or toybox"


def find_base(spec: str) -> Path:
    """Return where a base lies: a folder in diffusers' layout, or a single file.

    Args:
        spec: "toybox", a path, or the id of a repository on Hugging Face's hub, which is fetched into its
            cache; HF_HUB_OFFLINE and the other variables of huggingface_hub are honoured.
    Raises:
        BaseError: it is none of them; the message says what it is instead.
    """
    if not spec.strip():
        raise BaseError("base is empty: pass toybox, a diffusers folder, a file or a hub id")
    if spec == TOYBOX:
        from dbadapter import toybox

        return Path(toybox.folder())
    try:
        path = Path(spec).expanduser()
    except RuntimeError as error:  # ~name of a user that is not there
        raise BaseError(f"base {spec}: {error}; pass toybox, a folder or a file") from None
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return path
        raise BaseError(
            f"base {spec}: the folder has no model_index.json, so it is no diffusers model; "
            "pass the folder that holds model_index.json, unet/, vae/ and text_encoder/"
        )
    if path.is_file():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith(".") and path.suffix != ".safetensors":
        return _fetched(spec)
    raise BaseError(
        f"base {spec}: no such file or folder; pass toybox, a diffusers folder, a file or a hub id"
    )


def family_of_unet(config: Mapping[str, Any], *, two_encoders: bool) -> str:
    """Return "sd1", "sd2" or "sdxl", told from the UNet's config.

    SD2.x projects into its attention blocks with linear layers, SD1.x with 1x1 convolutions.
    """
    if two_encoders or config.get("addition_embed_type") == "text_time":
        return "sdxl"
    linear = bool(config.get("use_linear_projection", False))
    return "sd2" if linear or config.get("cross_attention_dim") == SD2_WIDTH else "sd1"


def is_toybox(unet: Mapping[str, Any]) -> bool:
    """Tell from a UNet's config whether it is toybox's: a copy of it, tuned or merged, is toybox still."""
    return all(_plain(unet.get(name)) == value for name, value in _TOYBOX_UNET.items())


def is_toybox_on_disk(spec: str) -> bool:
    """Tell whether a base is toybox, or a copy of it in a folder or a file, without loading it."""
    if spec == TOYBOX:
        return True
    with suppress(OSError, ValueError, AttributeError, RuntimeError):
        path = Path(spec).expanduser()
        config = (path if path.is_dir() else path.with_suffix("")) / "unet" / "config.json"
        return is_toybox(json.loads(config.read_text(encoding="utf-8")))
    return False


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def detect_family(folder: Path) -> str:
    """Return the family of a diffusers folder, told from its configs: "sd1", "sd2" or "sdxl".

    Raises:
        BaseError: a part is missing, or the model is of a kind that is not supported; the message names it.
    """
    index = _read_json(folder / "model_index.json")
    _refuse_other_architectures(folder, index)
    for part in _parts(index):
        _check_part(folder, index, part)
    unet, vae = _read_json(folder / "unet/config.json"), _read_json(folder / "vae/config.json")
    in_channels, latent_channels = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if in_channels != latent_channels:
        kind = _EXTRA_CHANNELS.get(str(in_channels), "not a plain text-to-image UNet")
        raise BaseError(
            f"base {folder}: its UNet takes {in_channels} channels where the VAE gives {latent_channels}: "
            f"{kind}; pass the text-to-image model that it was made from"
        )
    texts = [_read_json(folder / part / "config.json") for part in _parts(index) if part.startswith("text_")]
    widths = [_text_width(folder, text) for text in texts]
    family = family_of_unet(unet, two_encoders=len(texts) == 2)
    if family == "sdxl" and (len(texts) != 2 or unet.get("addition_embed_type") != "text_time"):
        raise BaseError(
            f"base {folder}: UNet and text encoders belong to different models: SDXL has two encoders "
            f"and a UNet with addition_embed_type text_time; {_PASS}"
        )
    cross = unet.get("cross_attention_dim")
    if cross != sum(widths):
        raise BaseError(
            f"base {folder}: the UNet expects text embeddings {cross} wide, "
            f"its text encoder gives {sum(widths)}; the parts belong to different models"
        )
    return family


def load_pipeline(
    folder: Path, device: torch.device, dtype: torch.dtype, unet_dtype: torch.dtype | None = None
) -> Any:
    """Return the folder's pipeline on the device, every weight of the dtype.

    A StableDiffusionXLPipeline where there are two text encoders, else a StableDiffusionPipeline.

    Args:
        unet_dtype: of the UNet's weights, None is `dtype`. Its file is read in parts, so that in half
            precision not more than half of it is ever in memory.
    Raises:
        BaseError: a part is broken or incomplete.
    """
    import diffusers
    import transformers
    from torch import nn

    every = _parts(_read_json(folder / "model_index.json"))
    parts = [part for part in every if _ALL_PARTS[part][0]]
    with quiet_libraries():
        try:
            words = {part: load_tokenizer(folder / part) for part in every if part.startswith("tokenizer")}
            models = {}
            for part in parts:
                library = transformers if part.startswith("text_") else diffusers
                kind: Any = getattr(library, _ALL_PARTS[part][1])
                wanted = dtype if part != "unet" or unet_dtype is None else unet_dtype
                model = _load_unet(folder, kind, wanted) if part == "unet" else None
                model = _load_part(folder, part, kind) if model is None else model
                # Not the pipeline's own `to`: it knows one dtype, and warns of layers to keep in float32.
                models[part] = nn.Module.to(model, device=device, dtype=wanted)
            absent: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
            absent |= dict.fromkeys(words)
            if "text_encoder_2" in models:
                kind = diffusers.StableDiffusionXLPipeline
                absent["add_watermarker"] = False
            else:
                kind = diffusers.StableDiffusionPipeline
                absent |= {"safety_checker": None, "requires_safety_checker": False}
            pipeline = kind.from_pretrained(folder, **models, **absent, local_files_only=True)
            # Afterwards: given at once, their class would have to be the one that model_index.json names.
            pipeline.register_modules(**words)
            return pipeline
        except BaseError:
            raise
        except Exception as error:  # third-party loaders raise anything on a broken file
            raise _broken(folder, error) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep bars and hints (torchvision, safety checker) off that nobody here can act on."""
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


def load_tokenizers(folder: Path) -> list[Any]:
    """Return a folder's tokenizers alone, in a fraction of the base's time: two for SDXL.

    Raises:
        BaseError: as `detect_family`, or a tokenizer is broken.
    """
    detect_family(folder)
    parts = [part for part in _parts(_read_json(folder / "model_index.json")) if part.startswith("tokenizer")]
    try:
        return [load_tokenizer(folder / part) for part in parts]
    except Exception as error:  # third-party loaders raise anything on a broken file
        raise _broken(folder, error) from error


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """Return the CLIP tokenizer of one folder; raises what transformers raises.

    transformers 5 writes tokenizer.json alone, which of the two classes of 4 only the fast one reads. In 5
    both names are one class.

    Args:
        options: what the tokenizer's own settings shall be instead.
    """
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    kind = CLIPTokenizer if (folder / "vocab.json").is_file() else CLIPTokenizerFast
    return kind.from_pretrained(folder, local_files_only=True, **options)


def _fetched(repository: str) -> Path:
    """Return the folder in the hub's cache that holds a repository, fetched if need be."""
    import diffusers

    with quiet_libraries():
        try:
            # Of several variants it takes the plain one, no pickles; offline the cache will do.
            folder = diffusers.DiffusionPipeline.download(
                repository,
                use_safetensors=True,
                safety_checker=None,
                feature_extractor=None,
                image_encoder=None,
            )
        except Exception as error:  # requests, huggingface_hub and diffusers each have their own
            raise BaseError(
                f"base {repository}: no such folder, and it cannot be fetched from the hub ({reason(error)});"
                " pass a folder or file, or check the name, the network, HF_TOKEN and HF_HUB_OFFLINE"
            ) from error
    return Path(folder)


_ALL_PARTS = {**_PARTS, **_SECOND_PARTS}


def _parts(index: Mapping[str, Any]) -> list[str]:
    return [*_PARTS, *(_SECOND_PARTS if _class_name(index, "text_encoder_2") is not None else ())]


def _text_width(folder: Path, config: Mapping[str, Any]) -> int:
    nested = config.get("text_config")
    width = config.get("hidden_size", nested.get("hidden_size") if isinstance(nested, dict) else None)
    if not isinstance(width, int):
        raise BaseError(
            f"base {folder}: a text encoder's config.json has no hidden_size; it is no CLIPTextModel"
        )
    return width


def _refuse_other_architectures(folder: Path, index: Mapping[str, Any]) -> None:
    present = {part for part in index if _class_name(index, part) is not None}
    pipeline = index.get("_class_name", "it")
    if "transformer" in present:
        raise BaseError(
            f"base {folder}: {pipeline} has a transformer in place of a UNet (DiT), "
            f"which is not supported; {_PASS}"
        )
    if "text_encoder_2" in present and "text_encoder" not in present:
        raise BaseError(
            f"base {folder}: the second text encoder alone says an SDXL refiner, which draws no subjects of "
            "its own; pass the SDXL base"
        )
    unet = _class_name(index, "unet")
    if unet not in (None, "UNet2DConditionModel"):
        raise BaseError(f"base {folder}: {pipeline} has a {unet}, not a UNet2DConditionModel; {_PASS}")


def _check_part(folder: Path, index: Mapping[str, Any], part: str) -> None:
    """Raise BaseError unless the part is there, of the expected class, with safetensors weights."""
    stem, wanted = _ALL_PARTS[part]
    name = _class_name(index, part)
    if name is None or not (folder / part).is_dir():
        raise BaseError(f"base {folder}: the part {part} is missing; download or save the model again, whole")
    if part.startswith("text_") and name != wanted:
        raise BaseError(f"base {folder}: its {part} is a {name}, expected a {wanted}; {_PASS}")
    words = ("vocab.json", "tokenizer.json")
    if part.startswith("tokenizer") and not any((folder / part / name).is_file() for name in words):
        raise BaseError(f"base {folder}: {part} has no vocabulary; download or save the model again, whole")
    if stem is None or any((folder / part).glob(f"{stem}*.safetensors*")):
        return
    if pickles := sorted(path.name for path in (folder / part).glob("*.bin")):
        raise BaseError(
            f"base {folder}: {part} has only {pickles[0]}, a pickle, which can run code; save safetensors"
        )
    raise BaseError(f"base {folder}: {part} has no {stem}.safetensors; download the model again, whole")


def _class_name(index: Mapping[str, Any], part: str) -> str | None:
    """Return the class that model_index.json states for a part: the last of [library, class]."""
    entry = index.get(part)
    return str(entry[-1]) if isinstance(entry, list) and entry and entry[-1] is not None else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseError(f"base: {path} is missing; download or save the model again, whole") from error
    except (OSError, ValueError) as error:
        raise BaseError(f"base: {path} cannot be read as JSON ({error}); download the model again") from error
    if not isinstance(content, dict):
        raise BaseError(f"base: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def _variant(folder: Path, part: str) -> str | None:
    """Return "fp16" where a part is there only as, e.g., diffusion_pytorch_model.fp16.safetensors."""
    stem = folder / part / str(_ALL_PARTS[part][0])
    plain = any(Path(f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))
    return None if plain or not Path(f"{stem}.fp16.safetensors").is_file() else "fp16"


def _load_unet(folder: Path, kind: Any, dtype: torch.dtype) -> Any | None:
    """Return the UNet in a dtype, read in parts; None where the file's names are not today's.

    A safetensors file is mapped into memory, and every page that was read counts until the file is closed.
    """
    import torch
    from safetensors import safe_open

    stem = folder / "unet" / "diffusion_pytorch_model"
    variant = _variant(folder, "unet")
    file = stem.with_name(f"{stem.name}{f'.{variant}' if variant else ''}.safetensors")
    files = [file] if file.is_file() else sorted(stem.parent.glob(f"{stem.name}-*-of-*.safetensors"))
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(stem.parent))
    wanted, state = set(model.state_dict()), {}
    for path in files:
        with safe_open(path, framework="pt") as header:
            names = list(header.keys())
        for start in range(0, len(names), TENSORS_AT_ONCE):
            with safe_open(path, framework="pt") as opened:
                for name in names[start : start + TENSORS_AT_ONCE]:
                    state[name] = opened.get_tensor(name).to(dtype)
    if set(state) != wanted:
        return None
    model.load_state_dict(state, assign=True)
    return model


def _load_part(folder: Path, part: str, kind: Any) -> Any:
    """Return one model; the libraries only log what a file lacks, and give those layers random weights."""
    import transformers

    options: dict[str, Any] = {}
    if part.startswith("text_") and transformers.__version__.startswith("4."):
        # 5 saves a CLIPTextModel without `text_model.` in its keys, which 4 does not know; 5 reads both.
        options["key_mapping"] = {r"^(?!text_model\.|text_projection\.)": "text_model."}
    model, info = kind.from_pretrained(
        folder / part,
        variant=_variant(folder, part),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(info["missing_keys"]):
        raise BaseError(
            f"base {folder}: the weights of {part} are incomplete: {len(missing)} are missing, "
            f"first {missing[0]}; download or save the model again, whole"
        )
    return model


def _broken(folder: Path, error: Exception) -> BaseError:
    return BaseError(f"base {folder}: cannot be loaded ({reason(error)}); download it again")
