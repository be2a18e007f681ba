"""What an adapter's file says about itself: kohya's `ss_*`, `modelspec.*`, thumbnail, hashes, sidecars.

Sources: kohya's sd-scripts (`train_network.py`, `train_util.py`), Stability-AI's ModelSpec 1.0.1, and the
AUTOMATIC1111 and Forge loaders, which choose the model family from these entries and hide files of another.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dbadapter import keys, ldm_names
from dbadapter.adapter import Adapter
from dbadapter.errors import AdapterError
from dbadapter.file_kinds import PREDICTIONS
from dbadapter.folding import FOLDED
from dbadapter.peft_config import HEADER_KEY
from dbadapter.safetensors_file import Chunks, serialise, window

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "AdapterDescription",
    "family_of",
    "file_metadata",
    "is_derived",
    "layers_per_block",
    "legacy_hash",
    "prediction_of",
    "sidecar",
    "tensor_hashes",
    "thumbnail",
    "with_hashes",
]

_THUMBNAIL_PIXELS = 256

# Of the UNet; the numbers in SDXL files' layer names cannot be understood without it.
_LAYERS_PER_BLOCK = "dbadapter.layers_per_block"

# (ss_base_model_version, ss_v2, modelspec.architecture, "sd version" of the sidecar).
# toybox has SD1's architecture, so its files say SD1; `dbadapter.base` tells them apart.
# SD2 is two families to others, by what the base predicts; `_SD2_V` is written for v_prediction.
_SD1 = ("sd_v1", "False", "stable-diffusion-v1/lora", "SD1")
_SD2 = ("sd_v2", "True", "stable-diffusion-v2-512/lora", "SD2")
_SD2_V = ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "SD2")
_SDXL = ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "SDXL")
_FAMILIES = {"toybox": _SD1, "sd1": _SD1, "sd2": _SD2, "sdxl": _SDXL}

# Width of the text embeddings that cross-attention reads.
_FAMILY_OF_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass(frozen=True)
class AdapterDescription:
    """What other programs shall show about an adapter; empty and None fields are left out of the file.

    Attributes:
        base: name of the base model, e.g. "toybox" or a folder's name.
        title: shown name; the file's own name by default.
        trigger: the words that call the subject, e.g. "sks mug".
        prediction_type: "epsilon" or "v_prediction".
        resolution: side of the training pictures, in pixels.
        num_train_images: photographs of the subject.
        max_train_steps: optimiser steps.
        seed: of the training.
        started_at, finished_at: of the training; aware datetimes.
        author, license, description, usage_hint: free text.
        preferred_weight: the strength that user interfaces offer.
    """

    base: str = ""
    title: str = ""
    trigger: str = ""
    prediction_type: str = ""
    resolution: int | None = None
    num_train_images: int | None = None
    max_train_steps: int | None = None
    seed: int | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    author: str = ""
    license: str = ""
    description: str = ""
    usage_hint: str = ""
    preferred_weight: float = 1.0


def file_metadata(adapter: Adapter, name: str, description: AdapterDescription) -> dict[str, str]:
    """Return the header's entries but thumbnail and hashes; `adapter.metadata` fills in what is not said.

    Args:
        adapter: its family, ranks and alphas are stated.
        name: of the file, without suffix.
        description: the rest.
    Raises:
        AdapterError: no family that a file can state, e.g. "unknown".
    """
    if adapter.family not in _FAMILIES:
        raise AdapterError(f"Family must be one of {', '.join(_FAMILIES)}: got {adapter.family!r}")
    stated = _kohya_entries(adapter, name, description)
    stated |= _modelspec_entries(adapter, name, description)
    stated |= {"dbadapter.base": description.base, "dbadapter.family": adapter.family}
    if adapter.family == "sdxl":
        stated[_LAYERS_PER_BLOCK] = str(layers_per_block(adapter.metadata, adapter.modules))
    kept = {key: value for key, value in adapter.metadata.items() if not is_derived(key)}
    return kept | {key: value for key, value in stated.items() if value != ""}


def family_of(metadata: Mapping[str, str], text_width: int | None, two_text_encoders: bool = False) -> str:
    """Return the family of a file that was read, "unknown" if neither header nor shapes tell.

    Args:
        metadata: the header's entries.
        text_width: in_features of a cross-attention key projection, None if there is none.
        two_text_encoders: the second has layers in the file, which only SDXL has.
    """
    ours = metadata.get("dbadapter.family", "")
    if ours in _FAMILIES:
        return ours
    version = metadata.get("ss_base_model_version", "")
    for beginning, family in (("sdxl", "sdxl"), ("sd_v2", "sd2"), ("sd_v1", "sd1")):
        if version.startswith(beginning):
            return family
    return _FAMILY_OF_WIDTH.get(text_width or 0, "sdxl" if two_text_encoders else "unknown")


def layers_per_block(metadata: Mapping[str, str], modules: Iterable[str] = ()) -> int:
    """Return layers_per_block of the UNet: as `metadata` says, else as the layers' names tell, else 2.

    Args:
        metadata: an adapter's; a file of another program does not say.
        modules: canonical layer names of an adapter that is to be written.
    Raises:
        AdapterError: what is said is no such number.
    """
    text = metadata.get(_LAYERS_PER_BLOCK)
    if text is None:
        unet = (name.removeprefix("unet.") for name in modules if keys.component_of(name) == "unet")
        return ldm_names.guess_layers_per_block(unet)
    most = ldm_names.MAX_LAYERS_PER_BLOCK
    if text not in map(str, range(1, most + 1)):
        raise AdapterError(f"{_LAYERS_PER_BLOCK} in the header must be 1 to {most}, got {text[:40]!r}")
    return int(text)


def sidecar(metadata: Mapping[str, str], family: str, description: AdapterDescription) -> dict[str, Any]:
    """Return the JSON object that AUTOMATIC1111 and Forge show beside the file."""
    return {
        "description": metadata.get("modelspec.description", ""),
        "sd version": _FAMILIES[family][3],
        "activation text": metadata.get("modelspec.trigger_phrase", ""),
        "preferred weight": description.preferred_weight,
        "negative text": "",
        "notes": metadata.get("modelspec.usage_hint", ""),
    }


def thumbnail(preview: Image) -> str:
    """Return the picture as a JPEG data URL of at most 256 pixels a side, as ModelSpec asks."""
    picture = preview.convert("RGB")
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Chunks:
    """Return the bytes of a file with its hashes in the header.

    Args:
        tensors: contiguous, on the CPU.
        metadata: str -> str.
    """
    plain = serialise(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    hashes = tensor_hashes(*plain[1:]) | {"sshs_legacy_hash": legacy_hash(*plain)}
    return serialise(tensors, {**metadata, **hashes})


def prediction_of(metadata: Mapping[str, str]) -> str:
    """Return what an adapter's base predicts, "epsilon" or "v_prediction"; "" where the file does not say.

    Files of sd-scripts say it of SD2 in their base's version alone.
    """
    stated = PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""), "")
    return stated or {"sd_v2": "epsilon", "sd_v2_v": "v_prediction"}.get(
        metadata.get("ss_base_model_version", ""), ""
    )


def tensor_hashes(*tensor_bytes: bytes | memoryview) -> dict[str, str]:
    """Return the hashes over everything behind the header: kohya's and ModelSpec's."""
    digest = _sha256(tensor_bytes)
    return {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}


def legacy_hash(*file_bytes: bytes | memoryview) -> str:
    """Return the short hash of old user interfaces: 64 KiB from offset 1 MiB (sd-scripts, train_util.py).

    Args:
        file_bytes: the file serialised with its `ss_*` entries only, in one piece or several. Smaller files
            all have the same hash.
    """
    return _sha256(window(file_bytes, 0x100000, 0x110000))[:8]


def _sha256(chunks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _kohya_entries(adapter: Adapter, name: str, description: AdapterDescription) -> dict[str, str]:
    version, v2, _, _ = _family_entries(adapter, description)
    entries = {
        "ss_v2": v2,
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": _most_common([w.rank for w in adapter.modules.values()]),
        "ss_network_alpha": _most_common([w.alpha for w in adapter.modules.values()]),
        "ss_network_args": json.dumps(_conv_args(adapter)),
        "ss_output_name": name,
        "ss_sd_model_name": description.base,
        "ss_clip_skip": "None",
        "ss_seed": _text(description.seed),
        "ss_max_train_steps": _text(description.max_train_steps),
        "ss_num_train_images": _text(description.num_train_images),
        "ss_training_started_at": _seconds(description.started_at),
        "ss_training_finished_at": _seconds(description.finished_at),
    }
    if description.resolution is not None:
        entries["ss_resolution"] = f"({description.resolution}, {description.resolution})"
    if description.trigger:
        # Shown as training tags: {folder: {words: how many pictures}}.
        count = description.num_train_images or 1
        entries["ss_tag_frequency"] = json.dumps({name: {description.trigger: count}})
        entries["ss_dataset_dirs"] = json.dumps({name: {"n_repeats": 1, "img_count": count}})
    return entries


def _modelspec_entries(adapter: Adapter, name: str, description: AdapterDescription) -> dict[str, str]:
    side = description.resolution
    when = description.finished_at or description.started_at
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _family_entries(adapter, description)[2],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": description.title or name,
        "modelspec.resolution": "" if side is None else f"{side}x{side}",
        "modelspec.date": "" if when is None else when.astimezone(UTC).replace(microsecond=0).isoformat(),
        "modelspec.author": description.author,
        "modelspec.license": description.license,
        "modelspec.description": description.description,
        "modelspec.usage_hint": description.usage_hint,
        "modelspec.trigger_phrase": description.trigger,
        "modelspec.prediction_type": _modelspec_prediction(description.prediction_type),
    }


def _family_entries(adapter: Adapter, description: AdapterDescription) -> tuple[str, str, str, str]:
    # What was read from a file may say so in its metadata only.
    stated = description.prediction_type or adapter.metadata.get("modelspec.prediction_type", "")
    stated = stated or adapter.metadata.get("ss_base_model_version", "").rpartition("_")[2]
    if adapter.family == "sd2" and stated in ("v_prediction", "v"):
        return _SD2_V
    return _FAMILIES[adapter.family]


def _modelspec_prediction(prediction_type: str) -> str:
    """ModelSpec knows `epsilon` and `v`."""
    return "v" if prediction_type == "v_prediction" else prediction_type


def _conv_args(adapter: Adapter) -> dict[str, str]:
    """Return kohya's arguments for 3x3 convolutions, which stand for their own rank and alpha there."""
    convs = [w for w in adapter.modules.values() if w.lora_A.shape[2:] not in ((), (1, 1))]
    if not convs:
        return {}
    return {
        "conv_dim": _most_common([w.rank for w in convs]),
        "conv_alpha": _most_common([w.alpha for w in convs]),
    }


def is_derived(key: str) -> bool:
    """Tell whether an entry belongs to one file's bytes, or would make diffusers refuse a kohya file."""
    return key.startswith("sshs_") or key in (
        "modelspec.hash_sha256",
        "modelspec.thumbnail",
        HEADER_KEY,
        FOLDED,
        "format",
    )


def _most_common(values: list[int] | list[float]) -> str:
    value = Counter(values).most_common(1)[0][0]
    return str(int(value)) if float(value).is_integer() else str(value)


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def _seconds(moment: datetime | None) -> str:
    return "" if moment is None else str(moment.timestamp())
