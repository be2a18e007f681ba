"""What each tensor's name in an adapter's file says, of any layout and kind. Pure string work, no torch.

`keys` reads the names that dbadapter understands and refuses all others; here every name gets a description,
so that a file can be described, and what other programs do with it be told, without being read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dbadapter import keys
from dbadapter.errors import AdapterError

__all__ = ["Entry", "describe_key", "describe_keys"]

# Suffix -> (spelling, algorithm, part); the first that fits counts. Sources: LyCORIS' `weight_list`s of its
# modules, ComfyUI's weight_adapter, diffusers' state_dict_utils.
_SUFFIXES: tuple[tuple[str, str, str, str], ...] = (
    (".lora_down.weight", "kohya", "lora", "down"),
    (".lora_up.weight", "kohya", "lora", "up"),
    (".lora_mid.weight", "kohya", "lora", "mid"),
    (".lora_linear_layer.down.weight", "diffusers", "lora", "down"),
    (".lora_linear_layer.up.weight", "diffusers", "lora", "up"),
    (".lora.down.weight", "diffusers", "lora", "down"),
    (".lora.up.weight", "diffusers", "lora", "up"),
    ("_lora.down.weight", "old-diffusers", "lora", "down"),
    ("_lora.up.weight", "old-diffusers", "lora", "up"),
    (".lora_A.weight", "peft", "lora", "down"),
    (".lora_B.weight", "peft", "lora", "up"),
    (".lora_A.default.weight", "peft", "lora", "down"),
    (".lora_B.default.weight", "peft", "lora", "up"),
    (".lora_B.bias", "peft", "lora", "bias"),
    (".lora_magnitude_vector.weight", "peft", "dora", "magnitude"),
    (".lora_magnitude_vector", "peft", "dora", "magnitude"),
    (".dora_scale", "kohya", "dora", "magnitude"),
    *((f".hada_{p}", "kohya", "loha", p) for p in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *((f".lokr_{p}", "kohya", "lokr", p) for p in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")),
    (".oft_diag", "kohya", "oft", "diag"),
    (".oft_blocks", "kohya", "oft", "blocks"),
    (".oft_R.weight", "peft", "oft", "R"),
    (".rescale", "kohya", "oft", "rescale"),
    *((f".{p}.weight", "kohya", "glora", p) for p in ("a1", "a2", "b1", "b2")),
    (".on_input", "kohya", "ia3", "on_input"),
    (".w_norm", "kohya", "norm", "w_norm"),
    (".b_norm", "kohya", "norm", "b_norm"),
    (".diff_b", "kohya", "diff", "diff_b"),
    (".diff", "kohya", "diff", "diff"),
    (".set_weight", "kohya", "diff", "set"),
    (".alpha", "", "", "alpha"),  # the layer's other tensors tell the rest
    (".scale", "", "", "scale"),
)

# Prefix -> (layout without the suffix's say, component).
_PREFIXES: tuple[tuple[str, str, str], ...] = (
    ("lora_unet_", "kohya", "unet"),
    ("oft_unet_", "kohya", "unet"),
    ("lora_te_", "kohya", "text_encoder"),
    ("lora_te1_", "kohya", "text_encoder"),
    ("lora_te2_", "kohya", "text_encoder_2"),
    ("lora_te3_", "kohya", "text_encoder_3"),
    ("lora_transformer_", "kohya", "transformer"),
    ("lycoris_", "lycoris", "unet"),
    ("base_model.model.", "peft-folder", ""),
    ("unet.", "diffusers", "unet"),
    ("text_encoder.", "diffusers", "text_encoder"),
    ("text_encoder_2.", "diffusers", "text_encoder_2"),
    ("transformer.", "diffusers", "transformer"),
    ("diffusion_model.", "diffusers", "transformer"),
    ("bundle_emb.", "embedding", "embedding"),
)
_CHECKPOINT = ("model.diffusion_model.", "cond_stage_model.", "conditioner.", "first_stage_model.")

# Ends of canonical names -> kind of layer; `time_emb_proj` is in a resnet, so that it counts as conv, as in
# `--targets`.
_KINDS: tuple[tuple[str, str], ...] = (
    (r"text_model\..*\.self_attn\.[qkv]_proj|text_model\..*\.self_attn\.out_proj", "text attention"),
    (r"text_model\..*\.mlp\.fc[12]", "text feed-forward"),
    (r"(text_model\.)?text_projection", "text projection"),
    (r".*\.attn[12]\.to_(q|k|v|out\.0)", "attention"),
    (r".*\.ff\.net\.(0\.proj|2)", "feed-forward"),
    (r".*\.proj_(in|out)", "proj"),
    (r".*\.resnets\..*|.*\.(downsamplers|upsamplers)\.0\.conv", "conv"),
    (r"conv_in|conv_out", "conv in and out"),
    (r"time_embedding\.linear_[12]", "time embedding"),
    (r"add_embedding\.linear_[12]", "add embedding"),
)
_KIND_PATTERNS = tuple((re.compile(pattern), kind) for pattern, kind in _KINDS)
_UNET_ROOTS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.")
_LDM = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed_[02]|label_emb|out_2)")


@dataclass(frozen=True)
class Entry:
    """One tensor's name.

    Attributes:
        key: the name.
        layout: "kohya", "diffusers" (its script's), "raw-peft", "old-diffusers", "peft-folder", "lycoris",
            "embedding", "checkpoint" or "unknown".
        prefix: what the name begins with, e.g. "lora_te1_"; "" if nothing known.
        component: "unet", "text_encoder", "text_encoder_2", "transformer", "embedding" or "".
        module: the layer's name as the file has it, prefix included.
        layer: its canonical name (see `keys`), None where it is none of SD's.
        kind: of the layer, e.g. "attention"; "other" for one that is none of SD's.
        names: "ldm" for LDM's names in a UNet, "diffusers" for diffusers', "" where it does not matter.
        algorithm: "lora", "dora", "loha", "lokr", "oft", "glora", "ia3", "norm", "diff" or "".
        part: "down", "up", "alpha", ...; "" for a tensor that is no adapter's.
    """

    key: str
    layout: str
    prefix: str
    component: str
    module: str
    layer: str | None
    kind: str
    names: str
    algorithm: str
    part: str


def describe_keys(names: Iterable[str], layers_per_block: int = keys.LAYERS_PER_BLOCK) -> list[Entry]:
    """Return the description of every tensor's name, in their order.

    Args:
        names: of a file's tensors.
        layers_per_block: the UNet's, for LDM's names.
    """
    return [describe_key(name, layers_per_block) for name in names]


def describe_key(key: str, layers_per_block: int = keys.LAYERS_PER_BLOCK) -> Entry:
    """Return what a tensor's name says; a name of no known layout has layout "unknown"."""
    if key.startswith(_CHECKPOINT):
        return Entry(key, "checkpoint", "", "", key, None, "other", "", "", "")
    suffix, spelling, algorithm, part = next(
        (row for row in _SUFFIXES if key.endswith(row[0])), ("", "", "", "")
    )
    module = key.removesuffix(suffix)
    prefix, layout, component = next((row for row in _PREFIXES if module.startswith(row[0])), ("", "", ""))
    if layout == "embedding":
        return Entry(key, "embedding", prefix, component, module, None, "other", "", "", "")
    if not part:
        return Entry(key, "unknown", prefix, component, module, None, "other", "", "", "")
    path = module.removeprefix(prefix)
    if layout == "diffusers":
        layout = {"peft": "raw-peft", "old-diffusers": "old-diffusers"}.get(spelling, "diffusers")
    if layout == "peft-folder" or not prefix:
        component = _component_of_path(path)
        layout = layout or ("bare" if component else "unknown")
    layer = _canonical(layout, prefix, component, path, spelling, layers_per_block)
    names = ""
    if layout == "kohya" and component == "unet":
        names = "ldm" if _LDM.match(path) else "diffusers"
    return Entry(key, layout, prefix, component, module, layer, _kind(layer), names, algorithm, part)


def _component_of_path(path: str) -> str:
    if path.startswith(_UNET_ROOTS):
        return "unet"
    return "text_encoder" if re.match(r"(text_model\.)?encoder\.layers\.", path) else ""


def _canonical(
    layout: str, prefix: str, component: str, path: str, spelling: str, layers_per_block: int
) -> str | None:
    """Return the canonical name of the layer, None where it is none of SD's."""
    if component not in keys.COMPONENTS:
        return None
    read: Callable[[], str]
    if layout in ("kohya", "lycoris"):
        kohya = prefix if prefix.startswith("lora_") else "lora_unet_"
        read = lambda: keys.from_kohya(kohya + path, layers_per_block=layers_per_block)  # noqa: E731
    else:
        ending = "_lora.down.weight" if spelling == "old-diffusers" else ".lora_A.weight"
        read = lambda: keys.split_key(f"{component}.{path}{ending}")[0]  # noqa: E731
    try:
        name = read()
    except AdapterError:
        return None
    return name if _kind(name) != "other" else None


def _kind(layer: str | None) -> str:
    if layer is None:
        return "other"
    path = layer.partition(".")[2]
    return next((kind for pattern, kind in _KIND_PATTERNS if pattern.fullmatch(path)), "other")
