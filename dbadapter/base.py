"""Load a base: the embedded toybox, or a diffusers folder that is built like Stable Diffusion 1.x."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dbadapter.base_folder import TOYBOX, detect_family, find_folder, load_pipeline
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

PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")
PREDICTION_TYPES = ("epsilon", "v_prediction")


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
    folder = find_folder(spec)
    family = TOYBOX if spec == TOYBOX else detect_family(folder)
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise UsageError(f"prediction type must be epsilon or v_prediction, got {prediction_type!r}")
    pipeline = load_pipeline(folder, pick_device() if device is None else torch.device(device), dtype)
    if prediction_type is not None:
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    if pipeline.scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise BaseError(
            f"base {folder}: its scheduler predicts {pipeline.scheduler.config.prediction_type!r}; "
            "only epsilon and v_prediction are supported"
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.family = family  # `generate_pictures` takes its guidance scale by it
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
        part.eval()
    return Base(TOYBOX if spec == TOYBOX else folder.resolve().name, family, pipeline, folder)


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
