"""Where a run's figures and pictures go besides its own folder: TensorBoard, Weights & Biases, or nowhere."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dbadapter.config_checks import LOGGERS
from dbadapter.errors import OutputError, UsageError

__all__ = ["LOGGERS", "Logger", "check_logger", "make_logger"]

WANDB_PROJECT = "dbadapter"  # where the environment variable WANDB_PROJECT says nothing


class Logger(Protocol):
    """What a training run tells; steps count from 1 and may come in any order."""

    def log(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Write the figures of one step; those that are None are left out."""

    def images(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Write sample pictures, each by its prompt."""

    def close(self) -> None:
        """Write what is still held back; nothing may follow."""


def check_logger(name: str) -> None:
    """Pass if the logger is there.

    Raises:
        UsageError: an unknown name, or its package is not installed.
    """
    if name not in LOGGERS:
        raise UsageError(f"logger must be one of {', '.join(LOGGERS)}, got {name!r}")
    if name != "none" and name not in sys.modules and find_spec(name) is None:
        raise UsageError(
            f"logger {name} needs the package {name}, which is not installed: pip install 'dbadapter[{name}]'"
        )


def make_logger(name: str, folder: Path, config: Mapping[str, Any], *, first_step: int = 0) -> Logger:
    """Return a logger that never ends the run: what it raises while training becomes one warning.

    Args:
        name: of `LOGGERS`. `tensorboard` writes into `folder`/logs, `wandb` into `folder`/wandb and, unless
            WANDB_MODE says offline, to its service; a resumed run is a run of its own there.
        folder: of the run, present.
        config: the resolved configuration, shown beside the figures.
        first_step: steps done before this call; TensorBoard forgets what an earlier run logged after them.
    Raises:
        UsageError: as `check_logger`, or the service refuses.
        OutputError: the logs cannot be written.
    """
    check_logger(name)
    if name == "none":
        return _NoLogger()
    shown = {key: _plain(value) for key, value in config.items()}
    if name == "wandb":
        return _Guarded(name, _Wandb(folder, shown, first_step))
    return _Guarded(name, _TensorBoard(folder / "logs", shown, first_step))


class _NoLogger:
    def log(self, step: int, figures: Mapping[str, float | None]) -> None:
        pass

    def images(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        pass

    def close(self) -> None:
        pass


class _Guarded:
    """Another logger, whose failures are one warning: hours of training are worth more than their curve."""

    def __init__(self, name: str, inner: Logger) -> None:
        self._name, self._inner, self._warned = name, inner, False

    def log(self, step: int, figures: Mapping[str, float | None]) -> None:
        known = {key: value for key, value in figures.items() if value is not None}
        self._try(lambda: self._inner.log(step, known))

    def images(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        self._try(lambda: self._inner.images(step, pictures))

    def close(self) -> None:
        self._try(self._inner.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # of any of its libraries; an interrupt goes through
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"logger {self._name} fails, training goes on ({_first_line(error)})",
                    UserWarning,
                    stacklevel=4,
                )


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps of an earlier run that are about to come again (or all, in a run from the start) are hidden.
        purge_step = first_step + 1 if first_step else 0
        try:
            self._writer = SummaryWriter(folder, purge_step=purge_step)
            rows = "".join(f"    {key} = {value}\n" for key, value in config.items())
            self._writer.add_text("config", rows, first_step)
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written: {error.strerror}; pass another --output-dir"
            ) from error

    def log(self, step: int, figures: Mapping[str, float | None]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        for prompt, picture in pictures.items():
            pixels = np.array(picture.convert("RGB"))
            self._writer.add_image(f"samples/{prompt}", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                dir=folder,
                config={**config, "first_step": first_step},
            )
        except Exception as error:
            raise UsageError(
                f"logger wandb cannot start ({_first_line(error)}); run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        # wandb's own step must never go back. Ours does: losses come a few steps late, pictures at once.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float | None]) -> None:
        self._run.log({**figures, "step": step})

    def images(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        samples = [self._wandb.Image(picture, caption=prompt) for prompt, picture in pictures.items()]
        self._run.log({"samples": samples, "step": step})

    def close(self) -> None:
        self._run.finish()


def _plain(value: Any) -> Any:
    """Return the value as JSON knows it."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
