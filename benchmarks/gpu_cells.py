"""Cells of `benchmarks.gpu`: one figure each, written to the record as soon as it is there.

The record says which cell runs; a process that dies in one loses no more than that. A cell that needs a
package which is not there is `not_measured`, one that fails is `failed`, each with its reason in one line.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import save
from benchmarks.training_runs import TRUE_SIZES

__all__ = [
    "SIZES",
    "TINY",
    "Cell",
    "NotMeasuredError",
    "Settings",
    "base_of",
    "do_cells",
    "free_memory",
    "one_line",
    "rate",
    "seconds_of",
    "synchronise",
    "timed_base",
]

# Pixels a side, UNet's cells a side, training steps that count, calls that count.
SIZES = {"sd15": (512, 64, 20, 30), "sdxl": (1024, 128, 10, 15)}
TINY = (32, 8, 1, 2)


class NotMeasuredError(Exception):
    """A cell cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Cell:
    """One figure, or a few that belong together.

    Args:
        name: in the JSON.
        seconds: about what it takes; where less is left it is not begun.
        measure: returns the figures.
        again: whether it is done though an earlier run did it: what it made is not here.
    """

    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]
    again: bool = False


@dataclass(frozen=True)
class Settings:
    """What a part is told.

    Args:
        work: folder of bases, exports and runs.
        tiny: tiny random bases, as few calls as there are.
        seconds: that the part has.
        threads: of each process.
        script: diffusers' training script, or None.
        done: cells of an earlier run.
    """

    work: Path
    tiny: bool
    seconds: float
    threads: int
    script: Path | None
    done: frozenset[str] = frozenset()

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return torch.cuda.is_available()


def do_cells(
    cells: Iterable[Cell],
    done: Mapping[str, Any],
    seconds: float,
    record: Path,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure cells that are not done yet while time is left; the record is written before and after each.

    Args:
        cells: in order of worth.
        done: cells of an earlier run, by name; they are kept.
        seconds: that are left.
        record: a JSON file with `cells`, `running`, and `left`: what is neither done nor running.
    """
    began = clock()
    found: dict[str, Any] = {"cells": dict(done), "left": [], "running": None}
    plan = [cell for cell in cells if cell.again or cell.name not in done]
    skipped: list[str] = []
    for number, cell in enumerate(plan, 1):
        if seconds - (clock() - began) < cell.seconds:
            skipped.append(cell.name)
            continue
        found |= {"running": cell.name, "left": [*skipped, *(later.name for later in plan[number:])]}
        save(found, record)
        at = clock()
        try:
            figures = cell.measure()
        except (NotMeasuredError, ImportError) as error:
            figures = {"not_measured": one_line(error)}
        except Exception as error:  # the other cells may go well
            figures = {"failed": one_line(error)}
        found["cells"][cell.name] = figures | {"seconds_in_all": round(clock() - at, 2)}
        found["running"] = None
        free_memory()
        save(found, record)
    found["left"] = skipped
    save(found, record)
    return found


def one_line(error: BaseException) -> str:
    """Return an error's first line that says something, after its kind unless it is one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no reason given"
    known = type(error).__module__.startswith(("dbadapter", "benchmarks", "click"))
    return text if known else f"{type(error).__name__}: {text}"


def free_memory() -> None:
    """Give back what a cell has left on the device, and begin its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronise() -> None:
    """Wait until the device has done all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], calls: int, warmup: int = 2) -> list[float]:
    """Return the seconds of each of so many calls, computed to the end, after some that do not count."""
    for _ in range(warmup):
        call()
    synchronise()
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        synchronise()
        found.append(time.perf_counter() - began)
    return found


# --- what training and inference share


def base_of(name: str, settings: Settings) -> Path:
    """Return the base's folder, written once: the true size, drawn on the device, or a tiny one."""
    family = TRUE_SIZES[name]
    if settings.tiny:
        from tests.tiny_bases import write_tiny_base

        folder = settings.work / f"{name}-tiny"
        if not (folder / "model_index.json").exists():
            write_tiny_base(folder, "sdxl" if name == "sdxl" else "sd1", shallow=True)
        return folder
    from benchmarks.true_size import write_base

    # SDXL in half the bytes: it is read again for each cell, and cast to what the run takes.
    dtype = torch.float16 if name == "sdxl" else torch.float32
    folder = settings.work / (f"{name}-random-half" if name == "sdxl" else f"{name}-random")
    write_base(folder, family, dtype, device="cuda" if settings.on_gpu else "cpu")
    free_memory()
    return folder


def timed_base(name: str, settings: Settings) -> dict[str, Any]:
    """Write the base and return its bytes."""
    from benchmarks.cost_peer import bytes_of

    return {"bytes": bytes_of(base_of(name, settings))}


def rate(count: int, seconds: float, precision: str) -> dict[str, Any]:
    """Return the operations of a call or a step, and how many of them were done in a second."""
    return {
        "flops": count,
        "tera_flops": float(f"{count / max(seconds, 1e-9) / 1e12:.4g}"),
        "precision": precision,
    }
