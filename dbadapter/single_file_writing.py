"""A base written as one `.safetensors` checkpoint in LDM's layout, the inverse of `single_file`.

What an architecture other than the published ones is cannot be told from its tensors: its configs and
tokenizers then go into a folder of the file's own name beside it, where `single_file` looks for them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dbadapter import file_kinds, single_file_keys
from dbadapter.base import Base
from dbadapter.errors import AdapterError, BaseError, OutputError
from dbadapter.model_folder import write_vocabulary
from dbadapter.safetensors_header import read_header
from dbadapter.single_file import CONFIGS
from dbadapter.single_file_keys import Source

__all__ = ["check_single_file_output", "is_published", "ldm_tensors", "write_single_file"]

# Of a model's configuration: what says where it came from, or by what it was written.
_ABOUT = ("architectures", "dtype", "sample_size", "torch_dtype", "transformers_version", "use_safetensors")
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_SD2_V = "stable-diffusion-v2-768-v"
_BETAS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")


def check_single_file_output(file: Path, overwrite: bool) -> None:
    """Pass if the file, and the folder of its name for configs, may be written.

    Raises:
        OutputError: one exists and may not be replaced, or the folder holds more than configs.
    """
    folder = file.with_suffix("")
    if file.is_dir():
        raise OutputError(f"{file} is a folder; expected a file to write: pass another --output-base")
    if file.is_file() and overwrite and not _is_checkpoint(file):
        raise OutputError(f"{file} is no checkpoint of a whole model: pass another --output-base")
    if folder.is_file() or (folder.is_dir() and not _only_configs(folder)):
        raise OutputError(
            f"{folder} holds more than configs, and a reader of {file.name} would take it for its own: pass "
            "another --output-base"
        )
    for path in (file, folder):
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists already: pass --overwrite or another --output-base")


def write_single_file(
    base: Base, file: Path, *, metadata: Mapping[str, str] | None = None, overwrite: bool = False
) -> Path | None:
    """Write a base as one checkpoint in its models' own dtype; it appears whole or not at all.

    Args:
        base: its models stay as they are.
        file: ends in .safetensors.
        metadata: of the header, beside what the base is.
        overwrite: replace an earlier file, and its configs.
    Returns:
        The folder of configs beside it, None where the architecture is a published one.
    Raises:
        BaseError: LDM's layout has no place for a layer.
        OutputError: it exists already, or cannot be written; nothing half-written stays.
    """
    check_single_file_output(file, overwrite)
    tensors = ldm_tensors(base)
    header = _header(base, file.stem) | dict(metadata or {})
    folder = file.with_suffix("")
    with _replacing(file, folder) as (partial, configs):
        save_file(tensors, partial, header)
        partial.chmod(0o644)  # save_file may make it readable for its owner only
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        if is_published(base):
            return None
        _write_configs(base, configs)
    return folder


def ldm_tensors(base: Base) -> dict[str, Tensor]:
    """Return every parameter of the base under LDM's keys, with what marks its prediction."""
    tensors: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    models = {"unet": base.unet, "vae": base.vae, **base.text_encoders}
    for part, model in models.items():
        for name, value in model.state_dict().items():
            source = _source(base, part, model.config, name)
            if source is None:
                raise BaseError(
                    f"base {base.name}: a single file has no place for {name} of its {part}; pass a folder "
                    "as --output-base"
                )
            if source.third is not None:
                thirds.setdefault(source.key, {})[source.third] = value
            elif source.transposed:
                tensors[source.key] = value.T.contiguous()
            elif source.squeezed and name.endswith(".weight") and value.ndim == 2:
                tensors[source.key] = value[
                    :, :, None, None
                ].contiguous()  # LDM's VAE attends by convolutions
            else:
                tensors[source.key] = value.contiguous()
    for key, parts in thirds.items():
        tensors[key] = torch.cat([parts[index] for index in range(3)])
    # ComfyUI takes what an SDXL file predicts from these keys alone.
    if base.family == "sdxl" and base.prediction_type == "v_prediction":
        tensors["v_pred"] = torch.zeros(0)
    if base.scheduler.config.get("rescale_betas_zero_snr"):
        tensors["ztsnr"] = torch.zeros(0)
    return tensors


def _source(base: Base, part: str, config: Any, name: str) -> Source | None:
    if part == "unet":
        attention = {index for index, kind in enumerate(config.up_block_types) if "CrossAttn" in kind}
        return single_file_keys.unet_source(name, config.layers_per_block, attention)
    if part == "vae":
        return single_file_keys.vae_source(name, len(config.block_out_channels))
    if part == "text_encoder" and base.family != "sd2":
        prefixes = file_kinds.XL_CLIP if base.family == "sdxl" else file_kinds.CLIP
        return single_file_keys.clip_source(name, prefixes[0])
    prefix = file_kinds.XL_OPEN_CLIP if part == "text_encoder_2" else file_kinds.OPEN_CLIP
    return single_file_keys.open_clip_source(name, prefix, ())


def _header(base: Base, name: str) -> dict[str, str]:
    v = base.prediction_type == "v_prediction"
    family = "sd1" if base.family == "toybox" else base.family
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _SD2_V if family == "sd2" and v else _ARCHITECTURES[family],
        "modelspec.title": name,
        "modelspec.resolution": f"{base.resolution}x{base.resolution}",
        "modelspec.prediction_type": "v" if v else "epsilon",
    }


def is_published(base: Base) -> bool:
    """Tell whether the configs of the family in `configs/` say of the base what its own do."""
    if base.family not in _ARCHITECTURES:
        return False
    folder = CONFIGS / base.family
    models = {"unet": base.unet, "vae": base.vae, **base.text_encoders}
    for part, model in models.items():
        wanted = _read(folder / part / "config.json")
        own = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
        for key, value in wanted.items():
            if not key.startswith("_") and key not in _ABOUT and _plain(own.get(key)) != _plain(value):
                return False
    wanted, own = _read(folder / "scheduler" / "scheduler_config.json"), dict(base.scheduler.config)
    return all(own.get(key) == wanted.get(key) for key in _BETAS)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: tuples are lists, and one number for all blocks is that number."""
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return items[0] if items and all(item == items[0] for item in items) else items
    return value


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write_configs(base: Base, folder: Path) -> None:
    """Write what a diffusers folder holds but the weights."""
    folder.mkdir()
    base.pipeline.save_config(folder)
    for part in ("unet", "vae"):
        getattr(base, part).save_config(folder / part)
    for part, model in base.text_encoders.items():
        model.config.save_pretrained(folder / part)
    base.scheduler.save_pretrained(folder / "scheduler")
    for part, tokenizer in zip(("tokenizer", "tokenizer_2"), base.tokenizers, strict=False):
        tokenizer.save_pretrained(folder / part)
        write_vocabulary(tokenizer, folder / part)


def _is_checkpoint(file: Path) -> bool:
    try:
        names = read_header(file).entries
    except AdapterError:
        return False
    return any(name.startswith("model.diffusion_model.") for name in names)


def _only_configs(folder: Path) -> bool:
    """Return whether a folder holds what `_write_configs` writes, and nothing else."""
    parts = {"unet", "vae", "text_encoder", "text_encoder_2", "scheduler", "tokenizer", "tokenizer_2"}
    inside = list(folder.rglob("*"))
    return not inside or (
        (folder / "model_index.json").is_file()
        and all(path.name in (*parts, "model_index.json") for path in folder.iterdir())
        and all(path.is_dir() or path.suffix in (".json", ".txt") for path in inside)
    )


@contextmanager
def _replacing(file: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Give temporary names for a file and its folder, and rename both when the block is done."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    configs = folder.with_name(f".{folder.name}.{os.getpid()}.configs.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial, configs
        if folder.is_dir():
            shutil.rmtree(folder)
        if configs.is_dir():
            configs.replace(folder)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{file} cannot be written: {reason}; make room, or pass another --output-base"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
        shutil.rmtree(configs, ignore_errors=True)
