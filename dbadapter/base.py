"""Load a base: the embedded toybox, or a diffusers folder that is built like Stable Diffusion 1.x."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dbadapter.errors import BaseError, DataError, UsageError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, StableDiffusionPipeline

__all__ = [
    "Base",
    "Precision",
    "check_prompt",
    "detect_family",
    "encode_prompt",
    "load_base",
    "pick_device",
    "pick_precision",
    "tokenize",
]

Precision = Literal["no", "bf16", "fp16"]

TOYBOX = "toybox"
SD2_WIDTH = 1024  # cross_attention_dim of SD2.x (OpenCLIP ViT-H); SD1.x has 768 (CLIP ViT-L)
PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")
PREDICTION_TYPES = ("epsilon", "v_prediction")

_PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "tokenizer": None,
    "scheduler": None,
}
# What other in_channels than the VAE's latents mean for a UNet with 4 latent channels.
_EXTRA_CHANNELS = {"5": "a depth-conditioned UNet", "8": "an InstructPix2Pix UNet", "9": "an inpainting UNet"}


@dataclass
class Base:
    """A loaded base model: a diffusers pipeline and what training needs to know about it.

    `family` is "toybox" for the embedded base and otherwise told from the configs, never from a name.
    """

    name: str
    family: str
    pipeline: StableDiffusionPipeline
    path: Path | None = None

    @property
    def unet(self) -> Any:
        """The UNet2DConditionModel."""
        return self.pipeline.unet

    @property
    def text_encoder(self) -> Any:
        """The CLIPTextModel."""
        return self.pipeline.text_encoder

    @property
    def vae(self) -> Any:
        """The AutoencoderKL."""
        return self.pipeline.vae

    @property
    def tokenizer(self) -> Any:
        """The CLIPTokenizer."""
        return self.pipeline.tokenizer

    @property
    def scheduler(self) -> Any:
        """The sampler that the base came with."""
        return self.pipeline.scheduler

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent cell covers along one side: 8 for SD1.x, 4 for toybox."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """The side in pixels of the square pictures that the base was trained on."""
        return int(self.unet.config.sample_size) * self.vae_scale_factor

    @property
    def latent_multiple(self) -> int:
        """What a latent side must be divisible by, so that down- and upsampling meet: 8 for SD1.x."""
        return int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon" or "v_prediction"."""
        return str(self.scheduler.config.prediction_type)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the UNet's first and last layer: tells a base from another in its place."""
        ends = (self.unet.conv_in.weight, self.unet.conv_out.weight)
        data = b"".join(weight.detach().float().cpu().numpy().tobytes() for weight in ends)
        return hashlib.sha256(data).hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        """Where the UNet's weights lie."""
        device: torch.device = next(iter(self.unet.parameters())).device
        return device

    def noise_scheduler(self) -> DDPMScheduler:
        """Return the noise schedule that training uses, with the betas of the base's own sampler."""
        from diffusers import DDPMScheduler

        wanted = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        config = self.scheduler.config
        known = {key: config[key] for key in wanted if key in config}
        return DDPMScheduler(
            **known,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
            clip_sample=False,
        )


def load_base(
    spec: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    prediction_type: str | None = None,
) -> Base:
    """Return the base that `spec` names, in evaluation mode, with no weight asking for a gradient.

    Args:
        spec: "toybox", or a diffusers folder (one with model_index.json and safetensors weights).
        device: where to put it; None picks CUDA where it is, else the CPU.
        dtype: of all weights.
        prediction_type: what the UNet predicts, where the folder's scheduler says it wrongly.
    Raises:
        BaseError: it is no such folder, a part is missing or broken, or the family is not supported.
    """
    folder = _folder(spec)
    family = TOYBOX if spec == TOYBOX else detect_family(folder)
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise UsageError(f"prediction type must be epsilon or v_prediction, got {prediction_type!r}")
    pipeline = _load_pipeline(folder, pick_device() if device is None else torch.device(device), dtype)
    if prediction_type is not None:
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    if pipeline.scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise BaseError(
            f"base {folder}: its scheduler predicts {pipeline.scheduler.config.prediction_type!r}; "
            "only epsilon and v_prediction are supported"
        )
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
        part.eval()
    return Base(TOYBOX if spec == TOYBOX else folder.resolve().name, family, pipeline, folder)


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


def pick_device(wish: str | None = None) -> torch.device:
    """Return the device asked for, or CUDA where it is, else the CPU."""
    if wish is not None:
        return torch.device(wish)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_precision(device: torch.device, wish: str = "auto") -> Precision:
    """Return the precision to train in: "no" is float32.

    "auto" is bf16 where the device has it natively, CPUs too; else fp16 on CUDA and float32 on a CPU.

    Raises:
        UsageError: fp16 on a CPU, or a wish that is none of auto, no, bf16, fp16.
    """
    if wish == "auto":
        if _has_native_bf16(device):
            return "bf16"
        return "fp16" if device.type == "cuda" else "no"
    if wish == "fp16" and device.type == "cpu":
        raise UsageError("mixed precision fp16 needs a GPU, the device is cpu; use bf16, no or auto")
    for precision in PRECISIONS:
        if wish == precision:
            return precision
    raise UsageError(f"mixed precision must be auto, no, bf16 or fp16, got {wish!r}")


def check_prompt(tokenizer: Any, prompt: str) -> None:
    """Pass if the prompt fits the tokenizer, so that it is never cut silently.

    Raises:
        DataError: it has more tokens than `tokenizer.model_max_length`, start and end included.
    """
    # verbose=False: transformers would warn about the length on its own, beside our error.
    length = len(tokenizer(prompt, verbose=False).input_ids)
    if length > tokenizer.model_max_length:
        raise DataError(
            f"the prompt {_shortened(prompt)!r} is {length - 2} tokens long, this base reads at most "
            f"{tokenizer.model_max_length - 2}; shorten it"
        )


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Return the token ids of the prompts, padded to the tokenizer's length: int64 (batch, length).

    Raises:
        DataError: a prompt is too long.
    """
    for prompt in prompts:
        check_prompt(tokenizer, prompt)
    batch = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    ids: Tensor = batch.input_ids
    return ids


def encode_prompt(text_encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Return the text embeddings of the prompts: (batch, length, hidden_size), on the encoder's device.

    Gradients reach the encoder's adapters unless the caller turns them off.

    Raises:
        DataError: a prompt is too long.
    """
    ids = tokenize(tokenizer, prompts).to(text_encoder.device)
    hidden: Tensor = text_encoder(ids).last_hidden_state
    return hidden


def _folder(spec: str) -> Path:
    """Return the diffusers folder of a spec, or raise BaseError that says what the spec is instead."""
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


def _load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(f"base {folder}: cannot be loaded ({reason}); download it again") from error
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


def _has_native_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 in hardware (emulation is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):  # since torch 2.12
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in tests if hasattr(torch.cpu, name))


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
