"""Checkpoints of a run: adapter, optimizer, gradient scaler and step, as safetensors; no pickles.

The random streams need no saving: everything drawn is keyed by (seed, step, sample), see `data.draw`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dbadapter.base import Base
from dbadapter.config import TrainConfig
from dbadapter.errors import ConfigError, TrainingError

__all__ = ["Snapshot", "capture", "check_same_run", "newest", "read", "restore", "run_identity", "write"]

KEEP = 3  # newest checkpoints that stay
# What may not change when a run is resumed; learning rates, precision, steps and reports may.
_IDENTITY = (
    "base",
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
)

_NAME = re.compile(r"step-(\d{6,})\.safetensors")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of each parameter


@dataclass(frozen=True)
class Snapshot:
    """A moment of a run, on the CPU.

    Args:
        step: optimizer steps done.
        tensors: "parameter.0", "exp_avg.0", "exp_avg_sq.0", "step.0", "parameter.1", ...
        scaler: the gradient scaler's state, empty where there is none.
        identity: what must be the same for a resumed run to be the same run.
    """

    step: int
    tensors: Mapping[str, Tensor]
    scaler: Mapping[str, float]
    identity: Mapping[str, Any]


def run_identity(config: TrainConfig, base: Base, photographs: Sequence[Path]) -> dict[str, Any]:
    """Return what must not change for a resumed run to be the same run.

    Args:
        config: resolved.
        base: as loaded; its weights count, not only its name.
        photographs: their contents count, in their order.
    """
    fields = {name: getattr(config, name) for name in _IDENTITY}
    fields["class_data_dir"] = None if config.class_data_dir is None else str(config.class_data_dir)
    return fields | {
        "prediction_type": base.prediction_type,
        "base_fingerprint": base.fingerprint,
        "photographs": f"{len(photographs)} files {_digest(photographs)}",
    }


def capture(
    step: int,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    identity: Mapping[str, Any],
) -> Snapshot:
    """Return copies of everything that training changes."""
    tensors: dict[str, Tensor] = {}
    for index, parameter in enumerate(parameters):
        tensors[f"parameter.{index}"] = _copy(parameter)
        for moment in _MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}.{index}"] = _copy(optimizer.state[parameter][moment])
    return Snapshot(step, tensors, scaler.state_dict(), identity)


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint beside its target, rename it, and remove all but the newest `KEEP`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{snapshot.step:06d}.safetensors"
    partial = path.with_suffix(".partial")
    metadata = {
        "step": str(snapshot.step),
        "scaler": json.dumps(dict(snapshot.scaler)),
        "identity": json.dumps(dict(snapshot.identity)),
    }
    # Not save_file: it makes the file readable for its owner only.
    partial.write_bytes(save(dict(snapshot.tensors), metadata))
    partial.replace(path)
    for old in _checkpoints(folder)[:-KEEP]:
        old.unlink()
    return path


def newest(folder: Path) -> Path | None:
    """Return the checkpoint with the most steps, None if there is none."""
    return found[-1] if (found := _checkpoints(folder)) else None


def read(path: Path) -> Snapshot:
    """Read a checkpoint.

    Raises:
        TrainingError: it is broken; the cure is to remove it, so that the one before it is used.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return Snapshot(
            int(metadata["step"]), tensors, json.loads(metadata["scaler"]), json.loads(metadata["identity"])
        )
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"checkpoint {path} cannot be read ({error}); remove it to resume from the one before it"
        ) from error


def check_same_run(snapshot: Snapshot, identity: Mapping[str, Any]) -> None:
    """Pass if the checkpoint is of a run with this identity.

    Raises:
        ConfigError: it is not; every difference is listed.
    """
    # Through JSON, as the checkpoint's own went: tuples become lists.
    wanted = json.loads(json.dumps(dict(identity)))
    faults = [
        f"{name} was {snapshot.identity.get(name)!r}, is {wanted.get(name)!r}"
        for name in sorted({*wanted, *snapshot.identity})
        if wanted.get(name) != snapshot.identity.get(name)
    ]
    if faults:
        raise ConfigError(
            f"cannot resume, the checkpoint is of another run: {'; '.join(faults)}; set them back, or start "
            "anew with --overwrite"
        )


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
        state = {
            moment: snapshot.tensors[f"{moment}.{index}"]
            for moment in _MOMENTS
            if f"{moment}.{index}" in snapshot.tensors
        }
        # Not load_state_dict: it would bring back the old learning rates too.
        # Copies: the snapshot is what a run that fails soon after goes back to.
        copies = {name: tensor.to(parameter.device, copy=True) for name, tensor in state.items()}
        optimizer.state[parameter] = copies
    if snapshot.scaler:
        scaler.load_state_dict(dict(snapshot.scaler))


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for path in paths:
        digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
