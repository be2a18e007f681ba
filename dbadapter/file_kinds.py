"""Tell what a model file is when it is no checkpoint of Stable Diffusion: by its bytes and its keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from dbadapter.errors import BaseError
from dbadapter.single_file_keys import UNET_PREFIX

__all__ = ["refuse_bytes", "refuse_keys", "refuse_unet", "stated_prediction", "tell_family"]

# Where a checkpoint holds its text encoders; the oldest files have no `text_model.`
CLIP = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
OPEN_CLIP = "cond_stage_model.model."
XL_CLIP = ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer.")
XL_OPEN_CLIP = "conditioner.embedders.1.model."
_REFINER = "conditioner.embedders.0.model."
CLIP_EMBEDDING = "embeddings.token_embedding.weight"
OPEN_CLIP_EMBEDDING = "token_embedding.weight"
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"

_FULL = "pass the full checkpoint that it belongs to"
_OTHER = "pass a checkpoint of SD1.x, SD2.x or SDXL"
_FOLDER = "pass the diffusers folder that it is a part of (the one with model_index.json)"

# The first that finds a key decides. What may come inside a full checkpoint comes before it.
_KINDS = (
    (
        r"(^|[._])lora[._]|[._]lora([._]|$)|lora_(up|down|A|B|mid|linear)|hada_w[12]|lokr_w[12]|dora_scale|oft_",
        "an adapter (LoRA or a relative)",
        "pass it with --adapter to generate, and its base with --base",
    ),
    (
        r"^(control_model|input_hint_block|zero_convs|controlnet\w*|control_\w+)\.",
        "a ControlNet",
        "pass the text-to-image checkpoint that it was made for",
    ),
    (r"^(image_proj|ip_adapter|adapter)\.", "an image adapter (IP-Adapter or T2I-Adapter)", _OTHER),
    (
        r"^(emb_params|clip_[gl]|string_to_param\b.*|\*|<[^>]*>)$",
        "a textual inversion embedding",
        "pass the checkpoint that it was made for",
    ),
    (r"time_stack|motion_module|temporal|time_mix", "a video model", _OTHER),
    (r"(^|\.)(clip_txt_mapper|effnet_mapper)\.|\.channelwise\.", "a part of Stable Cascade", _OTHER),
    (r"(^|\.)joint_blocks\.\d", "a diffusion transformer (SD3, a DiT)", _OTHER),
    (
        r"(^|\.)(double_blocks|single_blocks)\.\d",
        "a diffusion transformer (Flux or a relative, a DiT)",
        _OTHER,
    ),
    (r"(^|\.)(adaln_single|cap_embedder|caption_projection)\.", "a diffusion transformer (a DiT)", _OTHER),
    (
        r"^(model\.diffusion_model\.|model\.|transformer\.|net\.)?"
        r"((single_|double_)?(stream_)?(transformer_)?blocks|double_layers|layers)\.\w*\d",
        "a diffusion transformer (a DiT) or a language model",
        _OTHER,
    ),
    (r"^text_encoders\.", "the text encoders of another architecture", _OTHER),
    (r"^edm_|^edm_vpred\.", "a model of the EDM formulation (Playground v2.5, CosXL)", _OTHER),
    (
        r"(^|\.)(scaled_fp8|scale_weight|weight_scale)$|\.(absmax|quant_map)$",
        "scaled or quantised",
        "pass the fp16 file",
    ),
    (
        r"^(unet\.|vae\.)(down_blocks|encoder)\.|^(down_blocks|mid_block|conv_in)\.",
        "a diffusers UNet",
        _FOLDER,
    ),
    (r"^(encoder|decoder)\.(down_blocks|up_blocks|mid_block)\.", "a diffusers VAE", _FOLDER),
    (r"^(text_model\.)?(embeddings|encoder\.layers)\.", "a text encoder alone", _FOLDER),
)
_ALONE = (
    (r"^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid)\.", "a VAE alone"),
    (r"^(conditioner|cond_stage_model|transformer\.resblocks|token_embedding)", "a text encoder alone"),
    (r"^(input_blocks|middle_block)\.", "a UNet alone"),
)
_CHANNELS = {
    5: "a depth-conditioned UNet",
    7: "an upscaler's UNet",
    8: "an InstructPix2Pix UNet",
    9: "an inpainting UNet",
}
_MAGIC = (
    (b"PK\x03\x04", "a pickle, which can run code", "convert it to safetensors"),
    (b"\x80", "a pickle, which can run code", "convert it to safetensors"),
    (b"GGUF", "a GGUF file, quantised for other programs", "pass the .safetensors checkpoint"),
    (b"version https://git-lfs", "a pointer of git LFS, not the model itself", "download the file"),
    (b"<", "a web page: the download went wrong", "download the file again"),
)


def refuse_bytes(path: Path) -> None:
    """Pass if the file may be safetensors, told from its first bytes, whatever its name is.

    Raises:
        BaseError: it is missing, empty, a pickle, GGUF, or what a failed download leaves.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise BaseError(f"base {path}: cannot be read ({reason}); pass a .safetensors checkpoint") from error
    if not head:
        raise BaseError(f"base {path}: the file is empty; download it again")
    for magic, what, cure in _MAGIC:
        # Eight bytes of length precede a safetensors header, which starts with a brace.
        if head.startswith(magic) and head[8:9] != b"{":
            raise BaseError(f"base {path}: this is {what}; {cure}")


def refuse_keys(path: Path, keys: Collection[str]) -> None:
    """Pass if these are the keys of a checkpoint with a UNet in LDM's layout.

    Raises:
        BaseError: they belong to something else; the message names it.
    """
    lines = "\n".join(sorted(keys))
    for pattern, what, cure in _KINDS:
        if re.search(pattern, lines, re.MULTILINE):
            raise BaseError(f"base {path}: this is {what}, which is no base; {cure}")
    if FIRST_LAYER in keys:
        return
    for pattern, what in _ALONE:
        if re.search(pattern, lines, re.MULTILINE):
            raise BaseError(f"base {path}: this is {what}, not a whole checkpoint; {_FULL}")
    first = min(keys, default=None)
    raise BaseError(
        f"base {path}: no key of a Stable Diffusion checkpoint is in it (first key: {first}); {_OTHER}"
    )


def refuse_unet(path: Path, in_channels: int, latent_channels: object) -> None:
    """Pass if the UNet takes latents alone, as text-to-image does.

    Raises:
        BaseError: it takes something beside them.
    """
    if in_channels != latent_channels:
        kind = _CHANNELS.get(in_channels, "not a plain text-to-image UNet")
        raise BaseError(
            f"base {path}: its UNet takes {in_channels} channels, latents have {latent_channels}: {kind}; "
            "pass the text-to-image model that it was made from"
        )


def tell_family(path: Path, keys: Collection[str]) -> str:
    """Return the family of a checkpoint's keys, "sd1", "sd2" or "sdxl", told by its text encoders.

    Raises:
        BaseError: it is the SDXL refiner, or has no text encoder or one of another kind.
    """
    if _REFINER + OPEN_CLIP_EMBEDDING in keys:
        raise BaseError(f"base {path}: this is the SDXL refiner; pass the SDXL base model")
    clip = any(prefix + CLIP_EMBEDDING in keys for prefix in CLIP)
    xl = [any(prefix + CLIP_EMBEDDING in keys for prefix in XL_CLIP)]
    xl.append(XL_OPEN_CLIP + OPEN_CLIP_EMBEDDING in keys)
    if all(xl):
        return "sdxl"
    if any(xl):
        number = "first" if xl[1] else "second"
        raise BaseError(f"base {path}: SDXL's {number} text encoder is missing; download the file again")
    if not clip and OPEN_CLIP + OPEN_CLIP_EMBEDDING not in keys:
        what = "a text encoder that is not CLIP's"
        if not any(key.startswith(("cond_stage_model.", "conditioner.")) for key in keys):
            what = "a UNet without a text encoder"
        raise BaseError(f"base {path}: this is {what}; pass a whole checkpoint of SD1.x, SD2.x or SDXL")
    if any(key.startswith(f"{UNET_PREFIX}label_emb.") for key in keys):
        raise BaseError(
            f"base {path}: its UNet is conditioned on more than text (label_emb: unCLIP or an upscaler); "
            "pass the text-to-image model that it was made from"
        )
    return "sd1" if clip else "sd2"


def stated_prediction(keys: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """Return "epsilon" or "v_prediction" where a file's marker keys or header say it, else None."""
    if "v_pred" in keys:
        return "v_prediction"
    return PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").strip().lower().replace("-", "_"))
