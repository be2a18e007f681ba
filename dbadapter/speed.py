"""What makes a training step cheap, each with the measurement it rests on; none changes what is computed.

Measured on toybox, one core of a busy CPU with AVX512-BF16, batch 4 + 4, rank 8, CPU time of one step: 527 ms
with bfloat16 alone, 455 with channels_last (its group norm is slow: now for GPUs only), 410 with freed memory
kept, 343 with plain attention.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbadapter.base import Base, Precision

__all__ = [
    "DTYPES",
    "autocast",
    "checkpoint_layers",
    "enable_gradient_checkpointing",
    "hand_back_freed_memory",
    "keep_freed_memory",
    "keep_vae_exact",
    "peak_memory_mb",
    "prepare_frozen",
    "prepare_whole",
    "shorten_adapters",
    "use_fast_layers",
    "use_tensor_cores",
]

# Up to how many tokens plain attention is taken on a CPU. It keeps one number for each pair of tokens. In
# bfloat16 it takes a quarter off a step of toybox (256 tokens) and a tenth off one of SD1.5's size at 256
# pixels (1024); in float32 the fused one is the quicker, by 7 % on toybox, and keeps none.
PLAIN_ATTENTION_TOKENS: dict[Precision, int] = {"no": 0, "bf16": 1024, "fp16": 256}
DTYPES: dict[Precision, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context of forward passes in a precision; it does nothing for float32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "no")


def prepare_frozen(base: Base, precision: Precision) -> None:
    """Cast the frozen weights of UNet and text encoders once, in place; call it before adapters are injected.

    Autocast would cast them anew in every layer of every step: it caches casts of trainable weights only.
    The VAE stays float32: it overflows in fp16 in some bases, SDXL's above all, and encodes each photograph
    only once.
    """
    prepare_whole(base, precision)
    if precision == "no":
        return
    # nn.Module's own `to`: diffusers' prints a warning about an empty list of layers to keep in float32.
    for model in (base.unet, *base.text_encoders.values()):
        nn.Module.to(model, dtype=DTYPES[precision])


def prepare_whole(base: Base, precision: Precision) -> None:
    """Lay the UNet's weights out as a GPU's convolutions like them.

    On a CPU convolutions take either layout alike, and group norm is 3 to 10 times slower in channels_last.
    """
    if base.device.type == "cuda":
        base.unet.to(memory_format=torch.channels_last)


def keep_vae_exact(vae: Any) -> None:
    """Let the VAE decode in its own precision under autocast too: SDXL's overflows in fp16."""
    decode = vae.decode

    def exact(latents: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *arguments, **options)

    vae.decode = exact


def use_tensor_cores(device: torch.device) -> None:
    """Let a GPU multiply float32 in TF32, for the rest of the process; a CPU is left alone."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def use_fast_layers(base: Base, pixels: int, precision: Precision) -> None:
    """Choose the quicker of equal ways through the layers; call it after adapters were injected.

    torch's fused attention is slow on CPUs in its backward pass; plain takes a third off the step.

    Args:
        pixels: of the largest training picture.
    """
    from diffusers.models.attention_processor import AttnProcessor

    for model in (base.unet, *base.text_encoders.values()):
        if model is not None:
            shorten_adapters(model)
    tokens = pixels // base.vae_scale_factor**2
    if base.device.type == "cpu" and tokens <= PLAIN_ATTENTION_TOKENS[precision]:
        base.unet.set_attn_processor(AttnProcessor())


def shorten_adapters(model: nn.Module) -> None:
    """Let linear layers with an adapter do less for the same result, in place.

    PEFT casts every input to the factors' float32, which autocast undoes at once: 15 % of a step on toybox.
    It scales and adds what the adapter gives in two more passes over the output, each a copy; in one product
    that takes a seventh off a step of SD1.5's size in bfloat16, and 200 MB off its peak in float32.
    """
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
            if isinstance(module.base_layer, nn.Linear):
                module.forward = functools.partial(_adapted, module)


def _adapted(layer: Any, x: Tensor) -> Tensor:
    """Return W x + b + alpha / rank B A x (Hu et al. 2021, section 4.1), for x of shape (..., in)."""
    rows = x.flatten(0, -2)
    out: Tensor = layer.base_layer(rows)
    if not layer.disable_adapters:
        (name,) = layer.active_adapters
        down = layer.lora_A[name](rows)
        up = layer.lora_B[name].weight.to(out.dtype)
        out.addmm_(down, up.T, alpha=layer.scaling[name])
    return out.view(*x.shape[:-1], -1)


def enable_gradient_checkpointing(base: Base) -> None:
    """Trade time for memory: keep few activations, compute the rest again in the backward pass."""
    for model in (base.unet, *base.text_encoders.values()):
        checkpoint_layers(model)


def checkpoint_layers(model: Any) -> None:
    """Let one UNet or text encoder compute its activations again in the backward pass, in place."""
    if hasattr(model, "enable_gradient_checkpointing"):  # diffusers' name
        model.enable_gradient_checkpointing()
    elif hasattr(model, "activation_checkpointing_enable"):  # transformers' since 5
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # They checkpoint in training mode only. SD's parts have no dropout, so nothing else changes.
    model.train()


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep freed memory for the rest of the process instead of handing it back in every step.

    Each step frees and takes the same activations; returned to the kernel, they are zeroed page by page: a
    sixth of a float32 step of SD1.5's size at 256 pixels, a quarter in bfloat16. On toybox it gives nothing
    any more, since adapters' products are added in place.
    """
    if device.type != "cpu" or not _has_glibc():
        return
    libc: Any = ctypes.CDLL(None)
    # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 64 * 2**20)


def hand_back_freed_memory(device: torch.device) -> None:
    """Let glibc hand back what it has kept: what setting up has freed lies scattered over the heap."""
    gc.collect()
    if device.type == "cpu" and _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory taken so far, in units of 2**20 bytes: of the GPU, or of this process.

    0 on Windows without a GPU, which keeps no such figure where Python's own library could read it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage begins at the peak of the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) / 2**10
    if sys.platform == "win32":
        return 0.0
    import resource

    # Bytes on macOS, kilobytes elsewhere (getrusage's manual pages).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
