"""A run before it starts: everything about it that can be wrong is found here, in seconds."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dbadapter import checkpoint
from dbadapter.advice import advice
from dbadapter.base import Base, load_base, pick_device, pick_precision
from dbadapter.checkpoint import Snapshot
from dbadapter.class_images import check_manifest
from dbadapter.class_noun import decided
from dbadapter.config import TrainConfig
from dbadapter.errors import DataError, OutputError, UsageError
from dbadapter.loggers import check_logger
from dbadapter.optimizers import check_optimizer
from dbadapter.photographs import Photograph, find_photographs
from dbadapter.preparation import picture_sizes
from dbadapter.prior import check_sizes
from dbadapter.prompts import resolve
from dbadapter.run_folder import RunFolder
from dbadapter.selection import check_selection

__all__ = ["Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """A run that nothing stands against.

    Args:
        config: resolved.
        base: as loaded, in float32; the UNet in bfloat16 if it will be trained so.
        photographs: in their order.
        sizes: (width, height) in pixels that they are cropped to.
        folder: where it will write; nothing is written yet.
        identity: what its checkpoints will carry.
        snapshot: the checkpoint that it goes on from, None from the start.
        finished: there is nothing left to do: the run is complete.
    """

    config: TrainConfig
    base: Base
    photographs: tuple[Photograph, ...]
    sizes: tuple[tuple[int, int], ...]
    folder: RunFolder
    identity: Mapping[str, Any]
    snapshot: Snapshot | None
    finished: bool


def plan(config: TrainConfig, device: torch.device | None = None, processes: int = 1) -> Plan:
    """Check a configuration against photographs, folders, base and checkpoints, and write nothing.

    What is possible but unwise becomes a warning, see `advice`.

    Args:
        device: where the base goes; None picks CUDA where it is, else the CPU.
        processes: how many share the run.
    Raises:
        ConfigError, UsageError, DataError, BaseError, OutputError: what is wrong, and the cure.
        TrainingError: the checkpoint to resume from is broken.
    """
    config.validate()
    check_optimizer(config.optimizer)
    check_logger(config.logger)
    folder = RunFolder(config.output_dir, config.name or config.output_dir.resolve().name)
    photographs = find_photographs(config.instance_data_dir)
    if config.masked_loss and all(photograph.mask is None for photograph in photographs):
        raise DataError(
            f"masked loss was asked for, and no photograph in {config.instance_data_dir} has a mask; put "
            "NAME.mask.png beside NAME.jpg (white counts), use pictures with transparency, or leave it out"
        )
    if config.class_data_dir is not None:
        find_photographs(config.class_data_dir)
        if config.class_data_dir.samefile(config.instance_data_dir):
            raise UsageError(
                f"{config.class_data_dir} holds the subject's photographs, which cannot be the class's as "
                "well: pass another --class-data-dir, or leave it out"
            )
    folder.check(config.instance_data_dir, overwrite=config.overwrite, resume=config.resume)
    config = decided(config, photographs)
    target = pick_device() if device is None else device
    in_half = not config.full and pick_precision(target, config.mixed_precision or "auto") == "bf16"
    base = load_base(
        config.base,
        device=target,
        unet_dtype=torch.bfloat16 if in_half else None,  # what training casts it to anyway
        prediction_type=config.prediction_type,
    )
    resolved = resolve(config, base, photographs)
    pick_precision(base.device, str(resolved.mixed_precision))
    check_optimizer(resolved.optimizer, base.device)
    if resolved.compile:
        _check_compiler(base.device)
    if resolved.class_data_dir is not None:
        check_manifest(resolved.class_data_dir, base, resolved)
    if resolved.select == "best":
        check_selection(resolved, base.family)
    sizes = picture_sizes(resolved, base, photographs)
    check_sizes(resolved, sizes)
    identity = checkpoint.run_identity(resolved, base, photographs, processes)
    snapshot, finished = _resumed(resolved, folder, identity)
    if not finished:
        for message in advice(resolved, base.family, photographs, sizes):
            warnings.warn(message, UserWarning, stacklevel=1)
    return Plan(resolved, base, tuple(photographs), tuple(sizes), folder, identity, snapshot, finished)


def _resumed(
    config: TrainConfig, folder: RunFolder, identity: Mapping[str, Any]
) -> tuple[Snapshot | None, bool]:
    """Return the newest checkpoint, if the run is to go on from it, and whether it is finished."""
    if not config.resume:
        return None, False
    total, path = int(config.max_train_steps or 0), checkpoint.newest(folder.checkpoints)
    snapshot = None if path is None else checkpoint.read(path)
    done = folder.finished
    if done is not None:
        checkpoint.check_same_run(done.identity, identity)
    if snapshot is not None:
        checkpoint.check_same_run(snapshot.identity, identity)
    steps = max(done.steps if done else 0, snapshot.step if snapshot else 0)
    if done is not None and (done.asked or done.steps) == total and done.steps == steps:
        return snapshot, True
    if done is not None and snapshot is None:
        raise OutputError(
            f"{folder.path} holds a finished run of {done.steps} steps and no checkpoint to go on "
            "from; pass --overwrite to start anew"
        )
    if steps > total:
        raise UsageError(
            f"{folder.path} has {steps} steps already; to go on pass --max-train-steps above that"
        )
    # A run that was stopped between its last step and its file is finished by --resume.
    return snapshot, False


def _check_compiler(device: torch.device) -> None:
    """Raise UsageError where torch.compile lacks what it compiles with; it would fail in the first step."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise UsageError("--compile needs triton on a GPU, which is not installed: pip install triton")
    compiler = os.environ.get("CXX") or "g++"
    names = (compiler, "clang++", "cl", "icx")
    if device.type == "cpu" and not any(
        shutil.which(Path(name).name) or Path(name).is_file() for name in names
    ):
        raise UsageError(
            "--compile needs a C++ compiler on a CPU, and none was found: install g++, or leave it out"
        )
