"""Load a base: toybox, or Stable Diffusion 1.x, 2.x or SDXL from a folder, a single file or the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dbadapter.base_folder import TOYBOX, detect_family, find_base, is_toybox, load_pipeline, load_tokenizers
from dbadapter.errors import BaseError, DataError, UsageError
from dbadapter.single_file import inspect_single_file, load_single_file, load_single_file_tokenizer

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

__all__ = [
    "Base",
    "Precision",
    "check_prompt",
    "load_base",
    "load_tokenizers_of",
    "pick_device",
    "pick_precision",
    "tokenize",
]

Precision = Literal["no", "bf16", "fp16"]

PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass
class Base:
    """A loaded base model: a diffusers pipeline and what training needs to know about it.

    `family` is "toybox" for the embedded base and copies of it, else "sd1", "sd2" or "sdxl", told from
    configs or keys, never from a name. The pipeline is a StableDiffusionPipeline, or a
    StableDiffusionXLPipeline.
    """

    name: str
    family: str
    pipeline: Any
    path: Path | None = None

    @property
    def unet(self) -> Any:
        """The UNet2DConditionModel."""
        return self.pipeline.unet

    @property
    def text_encoder(self) -> Any:
        """The CLIPTextModel; SDXL has a second encoder, see `text_encoders`."""
        return self.pipeline.text_encoder

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Component -> model: `text_encoder`, and SDXL's `text_encoder_2`, a CLIPTextModelWithProjection."""
        names = ("text_encoder", "text_encoder_2") if self.family == "sdxl" else ("text_encoder",)
        return {name: getattr(self.pipeline, name) for name in names}

    @property
    def vae(self) -> Any:
        """The AutoencoderKL."""
        return self.pipeline.vae

    @property
    def tokenizer(self) -> Any:
        """The CLIPTokenizer, the first of SDXL's two."""
        return self.pipeline.tokenizer

    @property
    def tokenizers(self) -> list[Any]:
        """One for each text encoder; SDXL's two share a vocabulary and differ in the padding."""
        if self.family == "sdxl":
            return [self.pipeline.tokenizer, self.pipeline.tokenizer_2]
        return [self.pipeline.tokenizer]

    @property
    def scheduler(self) -> Any:
        """The sampler that the base came with."""
        return self.pipeline.scheduler

    @cached_property  # the VAE may leave memory while a run trains
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
        """16 hex digits of the UNet's first and last layer: tells a base from another in its place.

        In bfloat16, so that a base loaded in it is the same one.
        """
        ends = (self.unet.conv_in.weight, self.unet.conv_out.weight)
        data = b"".join(
            weight.detach().cpu().bfloat16().view(torch.uint16).numpy().tobytes() for weight in ends
        )
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
    unet_dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
) -> Base:
    """Return the base that `spec` names, in evaluation mode, with no weight asking for a gradient.

    Args:
        spec: "toybox"; a folder in diffusers' layout (with model_index.json and safetensors weights); a
            single .safetensors checkpoint in LDM layout; or the id of a repository on the hub.
        device: where to put it; None picks CUDA where it is, else the CPU.
        dtype: of all weights.
        unet_dtype: of the UNet's, where that shall be another; it never is in memory in more than that.
        prediction_type: what the UNet predicts, where the base does not say it, or wrongly.
    Raises:
        BaseError: there is no such base, a part is missing or broken, or the family is not supported.
        UsageError: an unknown prediction type.
    """
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise UsageError(f"prediction type must be epsilon or v_prediction, got {prediction_type!r}")
    path, target = find_base(spec), pick_device() if device is None else torch.device(device)
    if path.is_file():
        file = inspect_single_file(path, prediction_type)
        family, pipeline = file.family, load_single_file(file, target, dtype, unet_dtype)
    else:
        family = TOYBOX if spec == TOYBOX else detect_family(path)
        pipeline = load_pipeline(path, target, dtype, unet_dtype)
    if family == "sd1" and is_toybox(pipeline.unet.config):
        family = TOYBOX
    if prediction_type is not None:
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    if pipeline.scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise BaseError(
            f"base {path}: its scheduler predicts {pipeline.scheduler.config.prediction_type!r}; "
            "only epsilon and v_prediction are supported"
        )
    if family == "sdxl" and dtype == torch.float16:
        # SDXL's VAE overflows in fp16 (diffusers#4038): diffusers then decodes in float32, config or not.
        pipeline.vae.register_to_config(force_upcast=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.family = family  # `generate_pictures` takes its guidance scale by it
    name = TOYBOX if spec == TOYBOX else _name(spec, path)
    base = Base(name, family, pipeline, path)
    for part in (base.unet, base.vae, *base.text_encoders.values()):
        part.requires_grad_(False)
        part.eval()
    return base


def load_tokenizers_of(spec: str) -> list[Any]:
    """Return a base's tokenizers alone, in a fraction of the base's time.

    Raises:
        BaseError: as `load_base`.
    """
    path = find_base(spec)
    if path.is_file():
        # What the UNet predicts does not matter here, and a single SD2 file need not say it.
        file = inspect_single_file(path, PREDICTION_TYPES[0])
        parts = ("tokenizer", "tokenizer_2") if file.family == "sdxl" else ("tokenizer",)
        return [load_single_file_tokenizer(file, part) for part in parts]
    return load_tokenizers(path)


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


def _name(spec: str, path: Path) -> str:
    """Return a file's stem, a folder's name, or the id of a repository on the hub."""
    if path.is_file():
        return path.stem
    return path.resolve().name if path == Path(spec).expanduser() else spec


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
