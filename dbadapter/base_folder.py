"""A base on disk: find the diffusers folder, tell its family from its configs, refuse the rest, load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbadapter.errors import BaseError

if TYPE_CHECKING:
    import torch

__all__ = ["TOYBOX", "detect_family", "find_folder", "load_pipeline", "load_tokenizer"]

TOYBOX = "toybox"
SD2_WIDTH = 1024  # cross_attention_dim of SD2.x (OpenCLIP ViT-H); SD1.x has 768 (CLIP ViT-L)

_PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "tokenizer": None,
    "scheduler": None,
}
# What other in_channels than the VAE's latents mean for a UNet with 4 latent channels.
_EXTRA_CHANNELS = {"5": "a depth-conditioned UNet", "8": "an InstructPix2Pix UNet", "9": "an inpainting UNet"}


def find_folder(spec: str) -> Path:
    """Return the diffusers folder of a spec: "toybox" or a path.

    Raises:
        BaseError: it is none; the message says what it is instead.
    """
    if spec == TOYBOX:
        from dbadapter import toybox

        return Path(toybox.folder())
    try:
        path = Path(spec).expanduser()
    except RuntimeError as error:  # ~name of a user that is not there
        raise BaseError(f"base {spec}: {error}; pass toybox or a diffusers folder") from None
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return path
        raise BaseError(
            f"base {spec}: the folder has no model_index.json, so it is no diffusers model; "
            "pass the folder that holds model_index.json, unet/, vae/ and text_encoder/"
        )
    if path.is_file():
        raise BaseError(
            f"base {spec}: single-file checkpoints are not read by this version; turn it into a folder with "
            "diffusers: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")):
        raise BaseError(
            f"base {spec}: no such folder, and this version fetches nothing from a model hub; "
            f"download it first (hf download {spec} --local-dir FOLDER) and pass the folder"
        )
    raise BaseError(f"base {spec}: no such folder; pass toybox or a diffusers folder")


def detect_family(folder: Path) -> str:
    """Return the family of a diffusers folder, told from its configs: "sd1" in this version.

    Raises:
        BaseError: a part is missing, or the model is of a kind that is not supported; the message names it.
    """
    index = _read_json(folder / "model_index.json")
    _refuse_other_architectures(folder, index)
    for part, stem in _PARTS.items():
        _check_part(folder, index, part, stem)
    unet, vae = _read_json(folder / "unet/config.json"), _read_json(folder / "vae/config.json")
    text = _read_json(folder / "text_encoder/config.json")
    nested = text.get("text_config")
    if not (
        width := text.get("hidden_size", nested.get("hidden_size") if isinstance(nested, dict) else None)
    ):
        raise BaseError(f"base {folder}: text_encoder/config.json has no hidden_size; it is no CLIPTextModel")
    in_channels, latent_channels = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if in_channels != latent_channels:
        kind = _EXTRA_CHANNELS.get(str(in_channels), "not a plain text-to-image UNet")
        raise BaseError(
            f"base {folder}: its UNet takes {in_channels} channels where the VAE gives {latent_channels}: "
            f"{kind}; pass the text-to-image model that it was made from"
        )
    cross = unet.get("cross_attention_dim")
    if cross == SD2_WIDTH:
        raise BaseError(
            f"base {folder}: cross_attention_dim {SD2_WIDTH} says SD2.x, which this version cannot train; "
            "pass an SD1.x folder or toybox"
        )
    if cross != width:
        raise BaseError(
            f"base {folder}: the UNet expects text embeddings {cross} wide, "
            f"its text encoder gives {width}; the parts belong to different models"
        )
    return "sd1"


def load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the folder's StableDiffusionPipeline on the device, every weight of the dtype.

    Raises:
        BaseError: a part is broken or incomplete.
    """
    import diffusers
    import transformers

    # Importing and loading draw bars and print hints (torchvision, safety checker) nobody here can act on.
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            folder,
            unet=_load_part(folder, "unet", diffusers.UNet2DConditionModel),
            vae=_load_part(folder, "vae", diffusers.AutoencoderKL),
            text_encoder=_load_part(folder, "text_encoder", transformers.CLIPTextModel),
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
        return pipeline.to(device, dtype)
    except BaseError:
        raise
    except Exception as error:  # third-party loaders raise anything on a broken file
        raise _broken(folder, error) from error
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


def load_tokenizer(spec: str) -> Any:
    """Return a base's tokenizer alone, in a fraction of the base's time.

    Raises:
        BaseError: as `find_folder` and `detect_family`, or the tokenizer is broken.
    """
    from transformers import CLIPTokenizer

    folder = find_folder(spec)
    detect_family(folder)
    try:
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # third-party loaders raise anything on a broken file
        raise _broken(folder, error) from error


def _refuse_other_architectures(folder: Path, index: Mapping[str, Any]) -> None:
    present = {part for part in index if _class_name(index, part) is not None}
    if "transformer" in present:
        raise BaseError(
            f"base {folder}: {index.get('_class_name', 'it')} has a transformer in place of a UNet (DiT), "
            "which is not supported; pass an SD1.x folder or toybox"
        )
    if "text_encoder_2" in present:
        raise BaseError(
            f"base {folder}: two text encoders say SDXL, which this version cannot train; "
            "pass an SD1.x folder or toybox"
        )


def _check_part(folder: Path, index: Mapping[str, Any], part: str, stem: str | None) -> None:
    """Raise BaseError unless the part is there, of the expected class, with safetensors weights."""
    name = _class_name(index, part)
    if name is None or not (folder / part).is_dir():
        raise BaseError(f"base {folder}: the part {part} is missing; download or save the model again, whole")
    if part == "text_encoder" and name != "CLIPTextModel":
        raise BaseError(
            f"base {folder}: its text encoder is a {name}, expected a CLIPTextModel; "
            "pass an SD1.x folder or toybox"
        )
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
    stem = folder / part / str(_PARTS[part])
    plain = any(Path(f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))
    return None if plain or not Path(f"{stem}.fp16.safetensors").is_file() else "fp16"


def _load_part(folder: Path, part: str, kind: Any) -> Any:
    """Return one model; the libraries only log what a file lacks, and give those layers random weights."""
    model, info = kind.from_pretrained(
        folder / part,
        variant=_variant(folder, part),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise BaseError(
            f"base {folder}: the weights of {part} are incomplete: {len(missing)} are missing, "
            f"first {missing[0]}; download or save the model again, whole"
        )
    return model


def _broken(folder: Path, error: Exception) -> BaseError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return BaseError(f"base {folder}: cannot be loaded ({reason}); download it again")
