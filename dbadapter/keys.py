"""Names of adapted layers: kohya, diffusers, PEFT and ours (canonical). Pure string work, no torch.

Canonical names are the diffusers paths with the component in front, e.g.
`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q` and
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. The `text_model.` is always there, although
transformers 5 drops it from CLIPTextModel's own names: ComfyUI and stable-diffusion.cpp silently ignore
text-encoder keys without it.

kohya's SDXL files have other names than its SD1 and SD2 files: LDM's in the UNet, and numbered text encoders.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

from dbadapter import adapter_kinds, ldm_names
from dbadapter.errors import AdapterError

__all__ = [
    "COMPONENTS",
    "PEFT_PREFIX",
    "Part",
    "canonical_module",
    "component_of",
    "component_of_paths",
    "from_kohya",
    "split_key",
    "split_peft_key",
    "to_diffusers",
    "to_kohya",
    "to_peft",
    "to_raw_peft",
]

# lora_mid is LoCon's Tucker core, which is read and never written.
Part = Literal["lora_A", "lora_B", "lora_mid", "alpha"]

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

LAYERS_PER_BLOCK = ldm_names.LAYERS_PER_BLOCK

# The first prefix of a component is written for SD1 and SD2, the last for SDXL; all are read in any file.
# diffusers' own converter writes `lora_te1_` for every family.
_KOHYA_PREFIXES: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}

# kohya writes `_` for `.`, and diffusers' own names hold `_` too, so going back needs the words.
_COMPOUND_WORDS = (
    "add_embedding",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "down_blocks",
    "emb_layers",
    "in_layers",
    "input_blocks",
    "k_proj",
    "label_emb",
    "linear_1",
    "linear_2",
    "mid_block",
    "middle_block",
    "out_layers",
    "out_proj",
    "output_blocks",
    "proj_in",
    "proj_out",
    "q_proj",
    "self_attn",
    "skip_connection",
    "text_model",
    "text_projection",
    "time_emb_proj",
    "time_embed",
    "time_embedding",
    "to_k",
    "to_out",
    "to_q",
    "to_v",
    "transformer_blocks",
    "up_blocks",
    "v_proj",
)
_SIMPLE_WORDS = (
    "attentions",
    "attn1",
    "attn2",
    "conv",
    "conv1",
    "conv2",
    "downsamplers",
    "encoder",
    "fc1",
    "fc2",
    "ff",
    "layers",
    "mlp",
    "net",
    "op",
    "out",
    "proj",
    "resnets",
    "upsamplers",
)
# Longest first, so that `proj_in` wins over `proj`; the lookahead makes every word end at `_` or the end.
_ALTERNATIVES = sorted(_COMPOUND_WORDS + _SIMPLE_WORDS, key=len, reverse=True)
_WORD = re.compile(f"(?:{'|'.join(_ALTERNATIVES)}|[0-9]+)(?=_|$)")

_KOHYA_PARTS: dict[str, Part] = {
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".lora_mid.weight": "lora_mid",
    ".alpha": "alpha",
}
# What PEFT's own files have in front; the model is said by the folder.
PEFT_PREFIX = "base_model.model."
_UNET_ROOTS = (
    "down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding",
)  # fmt: skip
_TEXT_ROOTS = ("text_model", "encoder", "text_projection")

# diffusers' script writes three spellings into one file; raw PEFT writes the first.
_DIFFUSERS_PARTS: dict[str, Part] = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".lora_linear_layer.down.weight": "lora_A",
    ".lora_linear_layer.up.weight": "lora_B",
    "_lora.down.weight": "lora_A",
    "_lora.up.weight": "lora_B",
    ".alpha": "alpha",
}
_OLD_TEXT_LEAVES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def component_of(module: str) -> str:
    """Return the component in front of a canonical name: `unet`, `text_encoder` or `text_encoder_2`.

    Raises:
        AdapterError: the name begins with none of them.
    """
    component = module.partition(".")[0]
    if component not in COMPONENTS or "." not in module:
        raise AdapterError(
            f"Layer name {module!r} must begin with one of {', '.join(c + '.' for c in COMPONENTS)}"
        )
    return component


def canonical_module(component: str, path: str) -> str:
    """Return the canonical name of the layer at `path` inside a component.

    Args:
        component: one of `COMPONENTS`.
        path: as in the component's `named_modules()`; for text encoders with or without `text_model.`.
    """
    if component == "unet" or path.startswith(("text_model.", "text_projection")):
        return f"{component}.{path}"
    return f"{component}.text_model.{path}"


def to_kohya(module: str, *, sdxl: bool = False, layers_per_block: int = LAYERS_PER_BLOCK) -> str:
    """Return kohya's name of a canonical one: `unet.mid_block.x` -> `lora_unet_mid_block_x`.

    Args:
        module: a canonical name.
        sdxl: True gives the name as in SDXL files: `lora_unet_middle_block_x`, `lora_te1_`, `lora_te2_`.
        layers_per_block: the UNet's, for SDXL.
    Raises:
        AdapterError: the component is unknown, or SDXL has no name for the layer.
    """
    component = component_of(module)
    path = module[len(component) + 1 :]
    if sdxl and component == "unet":
        path = ldm_names.diffusers_to_ldm(path, layers_per_block)
    return _KOHYA_PREFIXES[component][-1 if sdxl else 0] + path.replace(".", "_")


def from_kohya(
    prefix: str,
    known_modules: Collection[str] | None = None,
    *,
    layers_per_block: int = LAYERS_PER_BLOCK,
) -> str:
    """Return the canonical name of a kohya one, the inverse of `to_kohya` with or without `sdxl`.

    Args:
        prefix: e.g. `lora_unet_mid_block_attentions_0_proj_in` (a key up to its first dot).
        known_modules: canonical names of the base's layers; without them diffusers' own words decide.
        layers_per_block: the UNet's, for LDM names.
    Raises:
        AdapterError: not a kohya name, or one of a layer that is not known.
    """
    component, rest = _split_kohya_prefix(prefix)
    words = _words(rest)
    path = ".".join(words or ())
    if component == "unet" and ldm_names.is_ldm(path):
        path = ldm_names.ldm_to_diffusers(path, layers_per_block)
        rest = path.replace(".", "_")
    if known_modules is not None:
        beginning = f"{component}."
        for module in known_modules:
            known = module.removeprefix(beginning)
            if known != module and known.replace(".", "_") == rest:
                return module
        raise AdapterError(f"Layer {prefix!r} names no layer of the base")
    if words is None:
        raise AdapterError(f"Layer {prefix!r} is none of a Stable Diffusion UNet or CLIP text encoder")
    return f"{component}.{path}"


def to_raw_peft(module: str, part: Part) -> str:
    """Return the key that diffusers' raw PEFT format uses, e.g. `unet.mid_block.x.lora_A.weight`."""
    component_of(module)
    return f"{module}.alpha" if part == "alpha" else f"{module}.{part}.weight"


def to_diffusers(module: str, part: Literal["lora_A", "lora_B"]) -> str:
    """Return the key in a file for diffusers, e.g. `unet.mid_block.x.lora.down.weight`.

    diffusers' own script has this spelling for attention only and `lora_A` elsewhere in the UNet. Its reader
    looks at the first key alone to choose between both, so one spelling is what it always reads.
    """
    direction = "down" if part == "lora_A" else "up"
    return f"{module}.{'lora' if component_of(module) == 'unet' else 'lora_linear_layer'}.{direction}.weight"


def to_peft(module: str, part: Literal["lora_A", "lora_B"]) -> list[str]:
    """Return the keys in a PEFT folder of the layer's component, e.g. `base_model.model.x.lora_A.weight`.

    They are two for CLIPTextModel, with `text_model.` and without: transformers dropped it from the names in
    5.6, and PEFT passes over a key that it does not know, so that either alone does nothing somewhere.
    """
    component = component_of(module)
    path = module[len(component) + 1 :]
    short = path.removeprefix("text_model.") if component == "text_encoder" else path
    return [f"{PEFT_PREFIX}{p}.{part}.weight" for p in dict.fromkeys((path, short))]


def split_key(key: str, *, layers_per_block: int = LAYERS_PER_BLOCK) -> tuple[str, Part]:
    """Return (canonical module, part) of a tensor's key in the kohya, diffusers or raw PEFT layout.

    Args:
        key: of an SD1, SD2 or SDXL file.
        layers_per_block: the UNet's, for LDM names.
    Raises:
        AdapterError: the key is none of a plain LoRA; the message names it.
    """
    if key.startswith("lora_"):
        prefix, dot, suffix = key.partition(".")
        part = _KOHYA_PARTS.get(dot + suffix)
        if part is None:
            raise _foreign(key)
        return from_kohya(prefix, layers_per_block=layers_per_block), part
    return _split_diffusers_key(key)


def split_peft_key(key: str, component: str) -> tuple[str, Part]:
    """Return (canonical module, part) of a key in a PEFT folder, which holds one component.

    Raises:
        AdapterError: the key is none of a plain LoRA.
    """
    path = key.removeprefix(PEFT_PREFIX)
    for part in ("lora_A", "lora_B"):
        module = path.removesuffix(f".{part}.weight")
        if module and module != path:
            return canonical_module(component, module), part
    raise _foreign(path)


def component_of_paths(paths: Iterable[str]) -> str | None:
    """Return `unet` or `text_encoder` for the layers of one model, None if the names do not tell."""
    roots = {path.removeprefix(PEFT_PREFIX).partition(".")[0] for path in paths}
    if roots and roots <= set(_UNET_ROOTS):
        return "unet"
    return "text_encoder" if roots and roots <= set(_TEXT_ROOTS) else None


def _split_kohya_prefix(prefix: str) -> tuple[str, str]:
    for component, beginnings in _KOHYA_PREFIXES.items():
        for beginning in beginnings:
            if prefix.startswith(beginning) and len(prefix) > len(beginning):
                return component, prefix[len(beginning) :]
    raise AdapterError(f"Layer {prefix!r} must begin with lora_unet_, lora_te_, lora_te1_ or lora_te2_")


def _words(text: str) -> list[str] | None:
    """Split `mid_block_attentions_0` into [`mid_block`, `attentions`, `0`]; None at an unknown word."""
    words: list[str] = []
    position = 0
    while True:
        match = _WORD.match(text, position)
        if match is None:
            return None
        words.append(match.group())
        position = match.end()
        if position == len(text):
            return words
        position += 1  # the underscore that the lookahead saw


def _split_diffusers_key(key: str) -> tuple[str, Part]:
    if key.partition(".")[0] in _UNET_ROOTS:
        key = f"unet.{key}"  # as `unet.save_attn_procs` wrote
    for suffix, part in _DIFFUSERS_PARTS.items():
        if key.endswith(suffix) and key.partition(".")[0] in COMPONENTS:
            component, _, path = key.removesuffix(suffix).partition(".")
            if path:
                return canonical_module(component, _modern_path(component, path)), part
    raise _foreign(key)


def _modern_path(component: str, path: str) -> str:
    """Return today's path of diffusers' old attention-processor names (`...attn1.processor.to_out`)."""
    if component == "unet":
        path = path.replace(".processor.", ".")
        return f"{path}.0" if path.endswith(".to_out") else path
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{_OLD_TEXT_LEAVES[leaf]}" if leaf in _OLD_TEXT_LEAVES else path


def _foreign(key: str) -> AdapterError:
    what, cure = adapter_kinds.kind_of(key)
    return AdapterError(f"Key {key!r} is none of a plain LoRA ({what}): {cure}")
