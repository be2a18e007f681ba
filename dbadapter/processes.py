"""Several processes on one run, through Hugging Face accelerate; one process needs none of it.

Started by `accelerate launch -m dbadapter train ...`. Each process draws its own samples (noise is keyed by
the number of the sample in the whole step), gradients are averaged, and only the first process writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from dbadapter.errors import TrainingError

__all__ = ["Processes", "local_device", "processes"]

# The others wait while the first draws class pictures, which may take hours; torch's default is 10 minutes.
_PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        index: of this one, from 0.
        count: of all.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.count > 1:
            with _others():
                _state().wait_for_everyone()

    def average(self, values: Tensor) -> Tensor:
        """Return the mean over all processes, the same on each."""
        if self.count == 1:
            return values
        from accelerate.utils import reduce

        with _others():
            mean: Tensor = reduce(values, reduction="mean")
        return mean

    def mean(self, value: float) -> float:
        """Return the mean of a number over all processes, the same on each."""
        if self.count == 1:
            return value
        return float(self.average(torch.tensor(float(value), device=_state().device)))

    def agree(self, value: float) -> bool:
        """Return whether the number is the same in all processes."""
        return self.mean(abs(value - self.mean(value))) == 0

    def average_gradients(self, parameters: Sequence[nn.Parameter], bucket: int = 2**25) -> None:
        """Replace every gradient by its mean over all processes.

        Args:
            bucket: most numbers that travel at once: one message for an adapter, several for a whole model.
        """
        if self.count == 1:
            return
        pending: list[Tensor] = []
        numbers = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pending.append(parameter.grad)
            numbers += parameter.numel()
            if numbers > bucket:
                self._average(pending)
                pending, numbers = [], 0
        if pending:
            self._average(pending)

    def _average(self, gradients: Sequence[Tensor]) -> None:
        flat = self.average(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


@contextmanager
def _others() -> Iterator[None]:
    """Say in one line that a process ended which this one was waiting for."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"another process of this run has ended; what it says beside this is the cause ({reason})"
        ) from error


def processes() -> Processes:
    """Return the processes that this one belongs to, connected; alone, if no launcher started it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    state = _state()
    return Processes(index=int(state.process_index), count=int(state.num_processes))


def local_device() -> torch.device | None:
    """Return the device that a launcher means for this process; None without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    device: torch.device = _state().device
    return device


def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
