"""Checkpoints of a run: all that training changes, as safetensors; no pickles.

Noise, timesteps and the order of the photographs need no saving: they are keyed by (seed, step, sample), see
`data.draw`, and the learning rates follow from the step. The global random states are kept all the same, for
an optimizer or a layer of somebody else's that draws from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dbadapter.base import Base
from dbadapter.config import TrainConfig
from dbadapter.errors import ConfigError, OutputError, TrainingError
from dbadapter.optimizers import load_state, state_tensors
from dbadapter.photographs import Photograph, find_photographs
from dbadapter.safetensors_file import serialise

__all__ = [
    "Best",
    "Snapshot",
    "capture",
    "check_same_run",
    "is_whole",
    "listed",
    "newest",
    "read",
    "restore",
    "run_identity",
    "write",
]

KEEP = 2  # newest checkpoints that stay, and the best besides
# What may not change when a run is resumed; learning rates, precision, steps and reports may.
_IDENTITY = (
    "prediction_type",
    "instance_prompt",
    "photo_tokens",
    "class_prompt",
    "prior",
    "prior_source",
    "prior_loss_weight",
    "rank",
    "alpha",
    "targets",
    "train_text_encoder",
    "text_encoder_rank",
    "train_batch_size",
    "gradient_accumulation_steps",
    "resolution",
    "snr_gamma",
    "seed",
    "random_flip",
    "num_class_images",
    "class_data_dir",
    "aspect_ratio_buckets",
    "masked_loss",
    "optimizer",
    "full",
)

_NAME = re.compile(r"step-(\d{6,})\.safetensors")
_CUDA_RANDOM = "random.cuda"
_TORCH_RANDOM = "random.torch"


class Best(NamedTuple):
    """The step with the lowest validation loss so far; with select "best", with the lowest 1 - score."""

    step: int
    loss: float


@dataclass(frozen=True)
class Snapshot:
    """A moment of a run, on the CPU.

    Args:
        step: optimizer steps done.
        tensors: "parameter.0", "parameter.1", ...; the optimizer's, see `optimizers.state_tensors`;
            torch's random states.
        scaler: the gradient scaler's state, empty where there is none.
        identity: what must be the same for a resumed run to be the same run.
        best: None before the first validation.
        random_states: of Python and numpy, as JSON holds them.
    """

    step: int
    tensors: Mapping[str, Tensor]
    scaler: Mapping[str, float]
    identity: Mapping[str, Any]
    best: Best | None = None
    random_states: Mapping[str, Any] = field(default_factory=dict)


def run_identity(
    config: TrainConfig, base: Base, photographs: Sequence[Photograph], processes: int = 1
) -> dict[str, Any]:
    """Return what must not change for a resumed run to be the same run.

    Args:
        config: resolved.
        base: as loaded; its weights count, not only its name.
        photographs: their contents count, in their order, with captions and masks.
        processes: each takes samples of its own in every step.
    """
    fields = {name: getattr(config, name) for name in _IDENTITY}
    files = [photograph.path for photograph in photographs]
    for photograph in photographs:
        if config.masked_loss and isinstance(photograph.mask, Path):
            files.append(photograph.mask)
    captions = [photograph.caption for photograph in photographs if photograph.caption is not None]
    if config.class_data_dir is not None:
        pictures = [picture.path for picture in find_photographs(config.class_data_dir)]
        fields["class_data_dir"] = f"{len(pictures)} files {_digest(pictures)}"
    if config.select != "last":  # absent in checkpoints of before, and where nothing is chosen
        fields |= {name: getattr(config, name) for name in ("select", "image_encoder", "text_image_encoder")}
    return fields | {
        "prediction_type": base.prediction_type,
        "base_fingerprint": base.fingerprint,
        "photographs": f"{len(files)} files {_digest(files, captions)}",
        "processes": processes,
    }


def capture(
    step: int,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    identity: Mapping[str, Any],
    best: Best | None = None,
    *,
    copies: bool = True,
) -> Snapshot:
    """Return everything that training changes.

    Args:
        copies: False gives the tensors themselves, which the next step changes: to be written at once.
    """
    tensors = {
        f"parameter.{index}": _copy(parameter) if copies else parameter.detach()
        for index, parameter in enumerate(parameters)
    }
    tensors |= state_tensors(optimizer, parameters, copies=copies)
    tensors[_TORCH_RANDOM] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors[_CUDA_RANDOM] = torch.cuda.get_rng_state()
    legacy = np.random.get_state(legacy=False)
    random_states = {
        "python": random.getstate(),
        "numpy": json.loads(json.dumps(legacy, default=lambda array: array.tolist())),
    }
    return Snapshot(step, tensors, scaler.state_dict(), identity, best, random_states)


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint beside its target, rename it, and remove all but the newest `KEEP` and the best.

    Raises:
        OutputError: it cannot be written; those before it are as they were.
    """
    path = folder / f"step-{snapshot.step:06d}.safetensors"
    partial = path.with_suffix(".partial")
    metadata = {
        "step": str(snapshot.step),
        "scaler": json.dumps(dict(snapshot.scaler)),
        "identity": json.dumps(dict(snapshot.identity)),
        "best": json.dumps(snapshot.best),
        "random_states": json.dumps(dict(snapshot.random_states)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.writelines(serialise(snapshot.tensors, metadata))
            file.flush()
            os.fsync(file.fileno())  # a rename may outlive a power cut that the content does not
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError(
            f"the checkpoint of step {snapshot.step} cannot be written to {folder}: {error.strerror or error}"
            "; what was saved before is as it was: make room, and add --resume"
        ) from error
    kept = {step for step, _ in listed(folder)[-KEEP:]} | {snapshot.best.step if snapshot.best else -1}
    for step, old in listed(folder):
        if step not in kept:
            with suppress(OSError):
                old.unlink()
    return path


def listed(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of a run's checkpoints, by step."""
    if not folder.is_dir():
        return []
    return sorted((int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def newest(folder: Path) -> Path | None:
    """Return the checkpoint with the most steps, None if there is none."""
    return found[-1][1] if (found := listed(folder)) else None


def read(path: Path) -> Snapshot:
    """Read a checkpoint.

    Raises:
        TrainingError: it is broken; the cure is to remove it, so that the one before it is used.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        best = json.loads(metadata["best"])
        return Snapshot(
            int(metadata["step"]),
            tensors,
            json.loads(metadata["scaler"]),
            json.loads(metadata["identity"]),
            None if best is None else Best(*best),
            json.loads(metadata["random_states"]),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"checkpoint {path} cannot be read ({error}); remove it to resume from the one before it"
        ) from error


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint is there and nothing of it is missing; its values are not read."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def check_same_run(then: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Pass if the checkpoint is of a run with this identity, or what a finished run has noted is.

    Raises:
        ConfigError: it is not; every difference is listed.
    """
    # Through JSON, as the checkpoint's own went: tuples become lists.
    wanted = json.loads(json.dumps(dict(identity)))
    faults = [
        f"{name} was {_told(then, name)}, is {_told(wanted, name)}"
        for name in sorted({*wanted, *then})
        if wanted.get(name) != then.get(name)
    ]
    if faults:
        raise ConfigError(
            f"cannot resume, the folder holds another run: {'; '.join(faults)}; set them back, or start "
            "anew with --overwrite"
        )


def _told(identity: Mapping[str, Any], name: str) -> str:
    value = identity.get(name)
    return "not set" if value is None else repr(value)


def restore(
    snapshot: Snapshot,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: Any,
) -> None:
    """Put a snapshot's values into the parameters, the optimizer and the scaler.

    Raises:
        TrainingError: numbers or shapes of the parameters differ.
    """
    shapes = [tuple(parameter.shape) for parameter in parameters]
    stored = sum(key.startswith("parameter.") for key in snapshot.tensors)
    cure = "the base has changed since; start anew with --overwrite"
    if stored != len(parameters):
        raise TrainingError(f"the checkpoint has {stored} factors, the model {len(parameters)}: {cure}")
    for index, parameter in enumerate(parameters):
        value = snapshot.tensors[f"parameter.{index}"]
        if tuple(value.shape) != shapes[index]:
            raise TrainingError(
                f"factor {index} is {tuple(value.shape)} in the checkpoint, {shapes[index]} here: {cure}"
            )
        with torch.no_grad():
            parameter.copy_(value)
    trained = {name: value for name, value in snapshot.tensors.items() if not name.startswith("random.")}
    load_state(optimizer, parameters, trained)
    if snapshot.scaler:
        scaler.load_state_dict(dict(snapshot.scaler))
    _restore_random(snapshot)


def _restore_random(snapshot: Snapshot) -> None:
    if _TORCH_RANDOM in snapshot.tensors:
        torch.set_rng_state(snapshot.tensors[_TORCH_RANDOM])
    if _CUDA_RANDOM in snapshot.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(snapshot.tensors[_CUDA_RANDOM])
    if python := snapshot.random_states.get("python"):
        version, numbers, gauss = python
        random.setstate((version, tuple(numbers), gauss))
    if (state := snapshot.random_states.get("numpy")) is not None:
        np.random.set_state(
            {**state, "state": {**state["state"], "key": np.array(state["state"]["key"], "u4")}}
        )


def _digest(paths: Sequence[Path], words: Sequence[str] = ()) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for path in paths:
        digest.update(hashlib.blake2b(path.read_bytes()).digest())
    for word in words:
        digest.update(hashlib.blake2b(word.encode()).digest())
    return digest.hexdigest()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
