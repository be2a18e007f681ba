"""What every benchmark's JSON says of the machine, and how it is written."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch

__all__ = ["A_FILE", "A_FOLDER", "SECONDS", "check_apart", "command", "machine", "of_runs", "save", "write"]


class _Place(click.Path):
    """Where something will be written, which is tried before the first run and not after the last."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        path = Path(os.fspath(super().convert(value, param, ctx)))
        if not self.dir_okay and os.fspath(value).endswith(tuple(filter(None, (os.sep, os.altsep)))):
            self.fail(f"{value} ends as a folder does: give the name of a file", param, ctx)
        if not self.dir_okay and os.path.lexists(path) and not path.is_file():
            self.fail(f"{path} is a device or a broken link: give the name of a file", param, ctx)
        folder = path if self.dir_okay else path.parent
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent
        try:
            with tempfile.TemporaryFile(dir=folder):  # what the system allows, it alone knows
                return path
        except OSError as error:
            self.fail(f"{path}: nothing can be written in {folder} ({error.strerror})", param, ctx)


class _Seconds(click.FloatRange):
    """Any number from 0 up, infinity with them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail("nan is no number of seconds", param, ctx)
        return seconds


#: Types of the commands' options.
A_FILE = _Place(dir_okay=False, path_type=Path)
A_FOLDER = _Place(file_okay=False, path_type=Path)
SECONDS = _Seconds(0)
#: That decide which kernels torch takes, and whether bfloat16 is multiplied in hardware.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "onnx", "onnxruntime-gpu", "onnxruntime")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Return the kind of machine, never its name: processor, cores, accelerator, versions, date.

    `instructions` tells processors of one name apart, where the system says them (Linux on x86).
    """
    cpuinfo = Path("/proc/cpuinfo")
    model, flags = platform.processor() or platform.machine(), set[str]()
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
        flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    found = {package: _version(package) for package in _PACKAGES}
    return {
        "processor": model,
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {package: version for package, version in found.items() if version},
        "date": datetime.date.today().isoformat(),
    }


def command(words: Sequence[str] | None = None) -> str | None:
    """Return the command line that runs this benchmark, without the places of its files on this machine.

    Args:
        words: of the process; by default its own. None comes back where that is no benchmark's.
    """
    program, *words = list(sys.argv if words is None else words)
    path = Path(program)
    if path.parent.name != "benchmarks" or path.suffix != ".py":
        return None
    shown = ["python", "-m", f"benchmarks.{path.stem}"]
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option == "--work-dir":
            if not equals:
                next(rest, None)
            continue
        # A path of this machine by its last name, but results as they lie in the project.
        place = value if equals else word
        if Path(place).is_absolute() or place.startswith((".", "~")):
            place = Path(place).name
        shown.append(f"{option}={place}" if equals else place)
    return shlex.join(shown)


def of_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the machine and the threads that finished runs tell, in place of those that sum them up.

    Args:
        runs: lines of a benchmark's file; nothing comes back where none tells a machine.
    Returns:
        `machine`: the last one's, with every processor, the last `date`, and the first as `since`; `threads`,
        where it was one number.
    """
    told = sorted((run["machine"] for run in runs if "machine" in run), key=lambda about: str(about["date"]))
    if not told:
        return {}
    processors = " and ".join(sorted({about["processor"] for about in told}))
    found: dict[str, Any] = {"machine": {**told[-1], "processor": processors, "since": told[0]["date"]}}
    threads = {run.get("threads") for run in runs}
    return found | ({"threads": threads.pop()} if len(threads) == 1 and None not in threads else {})


def check_apart(**places: Path | None) -> None:
    """Pass if the files of a command's options are different ones.

    Args:
        places: name of an option -> its file; None where it is not given.
    Raises:
        UsageError: two are one, of which the later written would replace the other.
    """
    given = [(name, path.resolve()) for name, path in places.items() if path is not None]
    for (one, path), (other, same) in itertools.combinations(given, 2):
        if path == same:
            raise click.UsageError(f"--{one} and --{other} are both {places[one]}: give each its own name")


def save(figures: dict[str, Any], path: Path) -> None:
    """Write figures as JSON under a temporary name, and rename it.

    Raises:
        ClickException: it cannot be written.
    """
    half_written = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half_written.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        half_written.replace(path)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written ({error.strerror})") from error


def write(figures: dict[str, Any], path: Path | None) -> None:
    """Print figures as JSON, and write them to a file if one is named.

    Args:
        figures: with `machine` where they are of another than this one, or of another day.
        path: of the file.
    """
    whole = {**figures, "command": command(), "machine": figures.get("machine") or machine()}
    click.echo(json.dumps(whole, indent=2))
    if path is not None:
        save(whole, path)
