"""A run before it starts: everything about it that can be wrong is found here, in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbadapter import checkpoint
from dbadapter.base import Base, load_base, pick_precision
from dbadapter.checkpoint import Snapshot
from dbadapter.config import TrainConfig
from dbadapter.data import find_photographs
from dbadapter.errors import UsageError
from dbadapter.prompts import resolve
from dbadapter.run_folder import RunFolder

__all__ = ["Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """A run that nothing stands against.

    Args:
        config: resolved.
        base: as loaded, in float32.
        photographs: in their order.
        folder: where it will write; nothing is written yet.
        identity: what its checkpoints will carry.
        snapshot: the checkpoint that it goes on from, None from the start.
    """

    config: TrainConfig
    base: Base
    photographs: tuple[Path, ...]
    folder: RunFolder
    identity: Mapping[str, Any]
    snapshot: Snapshot | None


def plan(config: TrainConfig) -> Plan:
    """Check a configuration against photographs, folders, base and checkpoints, and write nothing.

    Raises:
        ConfigError, UsageError, DataError, BaseError, OutputError: what is wrong, and the cure.
        TrainingError: the checkpoint to resume from is broken.
    """
    config.validate()
    folder = RunFolder(config.output_dir, config.name or config.output_dir.resolve().name)
    photographs = find_photographs(config.instance_data_dir)
    if config.class_data_dir is not None:
        find_photographs(config.class_data_dir)
    folder.check(config.instance_data_dir, overwrite=config.overwrite, resume=config.resume)
    base = load_base(config.base, prediction_type=config.prediction_type)
    resolved = resolve(config, base, len(photographs))
    pick_precision(base.device, resolved.mixed_precision)
    identity = checkpoint.run_identity(resolved, base, photographs)
    snapshot = _resumed(resolved, folder, identity)
    return Plan(resolved, base, tuple(photographs), folder, identity, snapshot)


def _resumed(config: TrainConfig, folder: RunFolder, identity: Mapping[str, Any]) -> Snapshot | None:
    """Return the newest checkpoint, if the run is to go on from it."""
    if not config.resume or (path := checkpoint.newest(folder.checkpoints)) is None:
        return None
    snapshot = checkpoint.read(path)
    checkpoint.check_same_run(snapshot, identity)
    # A run that was stopped between its last step and its file is finished by --resume.
    beyond = snapshot.step - int(config.max_train_steps or 0)
    if beyond > 0 or (beyond == 0 and folder.finished):
        raise UsageError(
            f"{folder.path} has {snapshot.step} steps already; to go on pass --max-train-steps above that"
        )
    return snapshot
