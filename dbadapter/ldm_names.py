"""Layer names of a UNet: diffusers' and LDM's (`input_blocks`, `middle_block`, `output_blocks`), both ways.

LDM names are those of the original Stable Diffusion code; kohya's sd-scripts trains SDXL on that UNet, so
SDXL files carry them. Paths here are dotted and without component: `down_blocks.1.attentions.0.proj_in` is
`input_blocks.4.1.proj_in`. Where diffusers counts layers by level, LDM counts them in one row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from dbadapter.errors import AdapterError

__all__ = [
    "LAYERS_PER_BLOCK",
    "MAX_LAYERS_PER_BLOCK",
    "diffusers_to_ldm",
    "find_ldm_name",
    "guess_layers_per_block",
    "is_ldm",
    "ldm_to_diffusers",
]

LAYERS_PER_BLOCK = 2  # every published Stable Diffusion's
MAX_LAYERS_PER_BLOCK = 8  # a bound for what files say
_LEVELS = 8  # more than any UNet has: SD has four levels, SDXL three

# Outside the blocks: diffusers' name -> LDM's.
_BASIC = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# Inside a resnet and so on, the same; inside attentions both agree.
_TAILS = {
    "resnets": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
    "upsamplers": {"conv": "conv"},
}
_ATTENTION = re.compile(r"(norm|proj_in|proj_out|transformer_blocks\..+)")

_LDM_ROOTS = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")
_DIFFUSERS_PATH = re.compile(r"((?:mid_block|(?:down|up)_blocks\.[0-9]+)\.([a-z]+)\.[0-9]+)\.(.+)")
_LDM_PATH = re.compile(r"((?:middle_block|(?:input|output)_blocks\.[0-9]+)\.[0-9]+)\.(.+)")
_COUNTED = re.compile(r"((down|up)_blocks\.[0-9]+)\.(?:resnets|attentions)\.([0-9]{1,4})\.")


def is_ldm(path: str) -> bool:
    """Tell whether a path inside a UNet begins as LDM's names do, and diffusers' do not."""
    return path.partition(".")[0] in _LDM_ROOTS


def diffusers_to_ldm(path: str, layers_per_block: int = LAYERS_PER_BLOCK) -> str:
    """Return LDM's name of diffusers' one.

    Args:
        path: e.g. `up_blocks.0.upsamplers.0.conv`.
        layers_per_block: as in the UNet's configuration; its up blocks have one more.
    Raises:
        AdapterError: LDM knows no such layer, or the blocks have more layers than was said.
    """
    found = find_ldm_name(path, layers_per_block)
    if found is None:
        raise AdapterError(
            f"Layer {path!r} has no LDM name, which SDXL files need, "
            f"in a UNet with {layers_per_block} layers per block"
        )
    return found


def find_ldm_name(path: str, layers_per_block: int = LAYERS_PER_BLOCK) -> str | None:
    """Return LDM's name of diffusers' one as `diffusers_to_ldm`, None where there is none."""
    if path in _BASIC:
        return _BASIC[path]
    match = _DIFFUSERS_PATH.fullmatch(path)
    block = _blocks(layers_per_block).get(match[1]) if match else None
    tail = _tail(match[2], match[3], _TAILS) if match else None
    return f"{block}.{tail}" if block and tail else None


def ldm_to_diffusers(path: str, layers_per_block: int = LAYERS_PER_BLOCK) -> str:
    """Return diffusers' name of LDM's one, the inverse of `diffusers_to_ldm`.

    An upsampler is known at both its places: third in its block, or second behind no attention (SD1).

    Args:
        path: e.g. `input_blocks.4.1.transformer_blocks.0.attn1.to_q`.
        layers_per_block: as in the UNet's configuration.
    Raises:
        AdapterError: not a layer of Stable Diffusion's UNet with so many layers per block.
    """
    if path in _BASIC_BACK:
        return _BASIC_BACK[path]
    if path.startswith("output_blocks.") and path.endswith(".1.conv"):
        path = path.removesuffix(".1.conv") + ".2.conv"
    match = _LDM_PATH.fullmatch(path)
    block = _blocks_back(layers_per_block).get(match[1]) if match else None
    tail = _tail(block.split(".")[-2], match[2], _TAILS_BACK) if match and block else None
    if block is None or tail is None:
        raise AdapterError(
            f"Layer {path!r} is none of Stable Diffusion's UNet in LDM names "
            f"with {layers_per_block} layers per block"
        )
    return f"{block}.{tail}"


def guess_layers_per_block(paths: Iterable[str]) -> int:
    """Return layers_per_block of the UNet that the layers are of, as far as their names tell, else 2.

    One layer per block is believed only of whole blocks: one layer in every down block named, two in every up
    block. For in the file of some of SDXL's layers, counted wrongly, other programs would find other layers.

    Args:
        paths: diffusers' names; those outside the blocks do not matter.
    """
    found: dict[str, dict[str, set[int]]] = {"down": {}, "up": {}}
    for path in paths:
        match = _COUNTED.match(path)
        if match is not None:
            found[match[2]].setdefault(match[1], set()).add(int(match[3]))
    down, up = found["down"].values(), found["up"].values()
    if down and up and all(block == {0} for block in down) and all(block == {0, 1} for block in up):
        return 1
    least = [LAYERS_PER_BLOCK, *(max(block) + 1 for block in down), *(max(block) for block in up)]
    return max(least)


@cache
def _blocks(n: int) -> dict[str, str]:
    """Return the blocks' layers, diffusers' name -> LDM's, for n layers per block.

    Sources: sd-scripts, `make_unet_conversion_map` (n = 2); ComfyUI, `unet_to_diffusers` (any n). Upsamplers
    are third in their block always, as sd-scripts writes them; diffusers' reader expects them there.
    """
    blocks = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for b in range(_LEVELS):
        first = (n + 1) * b
        for place, kind in enumerate(("resnets", "attentions")):
            for j in range(n):
                blocks[f"down_blocks.{b}.{kind}.{j}"] = f"input_blocks.{first + j + 1}.{place}"
            for j in range(n + 1):
                blocks[f"up_blocks.{b}.{kind}.{j}"] = f"output_blocks.{first + j}.{place}"
        blocks[f"down_blocks.{b}.downsamplers.0"] = f"input_blocks.{first + n + 1}.0"
        blocks[f"up_blocks.{b}.upsamplers.0"] = f"output_blocks.{first + n}.2"
    return blocks


@cache
def _blocks_back(n: int) -> dict[str, str]:
    return _turned(_blocks(n))


def _turned(names: dict[str, str]) -> dict[str, str]:
    return {there: here for here, there in names.items()}


_BASIC_BACK = _turned(_BASIC)
_TAILS_BACK = {kind: _turned(names) for kind, names in _TAILS.items()}


def _tail(kind: str, tail: str, tails: dict[str, dict[str, str]]) -> str | None:
    """Return what follows the block's name; None if nothing such is there."""
    if kind == "attentions":
        return tail if _ATTENTION.fullmatch(tail) else None
    return tails.get(kind, {}).get(tail)
