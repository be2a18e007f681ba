"""Where a single file in LDM's layout holds each parameter of a diffusers model; pure functions of names.

A diffusers name goes in, a key of the file comes out: the model's own list of parameters then tells what
is missing, and nothing is left to chance. The UNet's names are those of `ldm_names`, but that an upsampler
comes second in its block, not third, where the block has no attention.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from dbadapter.ldm_names import find_ldm_name

__all__ = [
    "Source",
    "clip_source",
    "open_clip_source",
    "unet_source",
    "vae_source",
]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_VAE_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass(frozen=True)
class Source:
    """A key of the file, and how the parameter is cut from the tensor there.

    Attributes:
        key: with its prefix.
        third: 0, 1 or 2 for the first, second or last third of the rows: q, k and v lie in one tensor.
        transposed: the file holds (in, out), the parameter (out, in).
        squeezed: the file may hold a linear weight as a 1x1 convolution, (out, in, 1, 1).
    """

    key: str
    third: int | None = None
    transposed: bool = False
    squeezed: bool = False

    def shape_of(self, stored: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Return the parameter's shape that a tensor stored with this shape gives."""
        if self.third is not None and stored[0] % 3 == 0:
            return (stored[0] // 3, *stored[1:])
        if self.transposed:
            return stored[::-1]
        if self.squeezed and set(stored[len(wanted) :]) == {1}:
            return stored[: len(wanted)]
        return stored

    def shape_in_file(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the file's tensor that gives a parameter of the wanted shape."""
        if self.third is not None:
            return (3 * wanted[0], *wanted[1:])
        return wanted[::-1] if self.transposed else wanted


def unet_source(name: str, layers_per_block: int, attention: Collection[int]) -> Source | None:
    """Return where a UNet2DConditionModel's parameter lies, None where LDM has no such parameter.

    Args:
        name: as in the model's state dict.
        layers_per_block: resnets in a down block; an up block has one more.
        attention: which up blocks have attention.
    """
    module, _, leaf = name.rpartition(".")
    path = find_ldm_name(module, layers_per_block)
    if path is None:
        return None
    match = re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", module)
    if match is not None and int(match[1]) not in attention:  # second in its block, not third
        path = path.removesuffix(".2.conv") + ".1.conv"
    return Source(f"{UNET_PREFIX}{path}.{leaf}")


def vae_source(name: str, levels: int) -> Source | None:
    """Return where an AutoencoderKL's parameter lies, None where LDM has no such parameter.

    Args:
        name: as in the model's state dict.
        levels: how many `block_out_channels` there are: LDM counts the decoder's levels from the other end.
    """
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return Source(VAE_PREFIX + name)
    coder, _, inner = name.partition(".")
    prefix = f"{VAE_PREFIX}{coder}."
    module, _, leaf = inner.rpartition(".")
    if module in _VAE_ENDS:
        return Source(f"{prefix}{_VAE_ENDS[module]}.{leaf}")
    if match := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", inner):
        return Source(f"{prefix}mid.block_{int(match[1]) + 1}.{_vae_resnet(match[2])}")
    if inner.startswith("mid_block.attentions.0."):
        part = _VAE_ATTENTION.get(module.removeprefix("mid_block.attentions.0."))
        return Source(f"{prefix}mid.attn_1.{part}.{leaf}", squeezed=True) if part else None
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets\.\d+|\w+samplers\.0\.conv)\.(.+)", inner)
    if match is None:
        return None
    way, level = match[1], int(match[2])
    stem = f"{prefix}{way}.{level if way == 'down' else levels - 1 - level}"
    if match[3].startswith("resnets."):
        return Source(f"{stem}.block.{match[3].removeprefix('resnets.')}.{_vae_resnet(match[4])}")
    return Source(f"{stem}.{way}sample.conv.{leaf}")


def clip_source(name: str, prefix: str) -> Source:
    """Return where a CLIPTextModel's parameter lies behind the prefix: there it is stored as it is.

    Args:
        name: as in the model's state dict, with or without `text_model.`.
        prefix: ends with `text_model.` in all but the oldest files.
    """
    return Source(prefix + name.removeprefix("text_model."))


def open_clip_source(name: str, prefix: str, keys: Collection[str]) -> Source | None:
    """Return where OpenCLIP's layout holds a CLIP text model's parameter, None where it has no such.

    Args:
        name: as in the state dict of CLIPTextModel or CLIPTextModelWithProjection.
        prefix: ends in `.model.`.
        keys: of the file, which may hold the projection as a matrix or as a linear layer's weight.
    """
    name = name.removeprefix("text_model.")
    if name == "text_projection.weight":
        linear = f"{prefix}text_projection.weight"
        return Source(linear) if linear in keys else Source(f"{prefix}text_projection", transposed=True)
    if name in _OPEN_CLIP_ENDS:
        return Source(prefix + _OPEN_CLIP_ENDS[name])
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return None
    stem = f"{prefix}transformer.resblocks.{match[1]}"
    if third := re.fullmatch(r"self_attn\.([qkv])_proj", match[2]):
        return Source(f"{stem}.attn.in_proj_{match[3]}", third="qkv".index(third[1]))
    module = _OPEN_CLIP_LAYER.get(match[2])
    return Source(f"{stem}.{module}.{match[3]}") if module else None


def _vae_resnet(rest: str) -> str:
    return rest.replace("conv_shortcut.", "nin_shortcut.")
