"""Tell by its keys what a file is when it is no plain LoRA of Stable Diffusion, and the cure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dbadapter.errors import AdapterError

__all__ = ["kind_of", "refuse_kinds"]

_PLAIN = "train or export it as a plain LoRA"
_EXTRACT = "apply it in the program that made it and extract a plain LoRA there"
_SEPARATE = "save the LoRA without it"
_OTHER = "pass an adapter of SD1.x, SD2.x or SDXL"

# The first that finds a key decides, so what is told by one key in many comes first.
_KINDS: tuple[tuple[str, str, str], ...] = (
    (r"dora_scale$|lora_magnitude_vector", "DoRA", _PLAIN),
    (r"\.hada_", "LoHa (Hadamard products)", _EXTRACT),
    (r"\.lokr_", "LoKr (Kronecker products)", _EXTRACT),
    (r"\.(oft_blocks|oft_diag|oft_R|oft_r|oft_s|boft_|rescale$)", "OFT or BOFT (rotations)", _EXTRACT),
    (r"\.on_input$|ia3_", "IA3 (scaled activations)", _EXTRACT),
    (r"\.[ab][12]\.weight$", "GLoRA", _EXTRACT),
    (r"\.(w_norm|b_norm)$", "weights of norms (LyCORIS, train_norm)", "train it without norms"),
    (r"\.(diff|diff_b|set_weight)$", "a full weight difference", _EXTRACT),
    (r"lora_(A|B|down|up)\.bias$", "a LoRA with biases", "train it without lora_bias"),
    (r"lora_embedding_", "a LoRA of embeddings", "train it without the embeddings"),
    (r"bundle_emb", "a LoRA with a bundled embedding (textual inversion)", _SEPARATE),
    (
        r"^(emb_params|clip_[lg]|string_to_param(\..*)?|string_to_token(\..*)?|\*|<[^>]*>)$",
        "a textual inversion embedding",
        "pass a LoRA; other programs load embeddings beside it",
    ),
    (r"^(lora_unet_|transformer\.|diffusion_model\.)?(double|single)_(transformer_)?blocks",
     "for Flux", _OTHER),
    (r"(^|[._])joint_blocks|joint_transformer_blocks", "for SD3", _OTHER),
    (r"^lora_te3_|^text_encoder_3\.", "for SD3 or Flux", _OTHER),
    (r"^lora_prior_unet_|^lora_te_prior", "for Stable Cascade", _OTHER),
    (r"motion_module|temporal", "for a video model", _OTHER),
    (r"^(lora_)?transformer[._]|^lora_unet_(layers|transformer_blocks|blocks)_",
     "for a transformer model, e.g. SD3 or Flux", _OTHER),
    (r"^lora_controlnet|^control_model\.|input_hint_block", "a ControlNet", _OTHER),
    (r"^lycoris_", "LyCORIS's own names", "export it there in kohya's names"),
    (r"^model\.diffusion_model\.|^cond_stage_model\.|^conditioner\.|^first_stage_model\.",
     "a whole checkpoint", "pass it as --base, and an adapter's file here"),
    (r"^diffusion_model\.", "ComfyUI's own names", "save it in kohya's names"),
    (r"^base_model\.model\.", "a PEFT folder's file", "give the folder, with its adapter_config.json"),
    (r"^image_proj\.|^ip_adapter\.", "an IP-Adapter", _OTHER),
    (r"\.(qweight|qzeros|absmax|quant_map|scale_weight)$", "quantised", "pass the fp16 file"),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), what, cure) for pattern, what, cure in _KINDS)


def kind_of(key: str) -> tuple[str, str]:
    """Return (what a foreign key belongs to, the cure), both in words."""
    for pattern, what, cure in _COMPILED:
        if pattern.search(key):
            return what, cure
    return "an unknown layout", _OTHER


def refuse_kinds(keys: Iterable[str]) -> None:
    """Pass if no key is that of something else than a LoRA of Stable Diffusion's UNet and text encoders.

    Raises:
        AdapterError: one is; the message names the first key of the kind that says most.
    """
    keys = list(keys)
    for pattern, what, cure in _COMPILED:
        for key in keys:
            if pattern.search(key):
                raise AdapterError(f"Key {key!r} is none of a plain LoRA ({what}): {cure}")
