"""What every benchmark's JSON says of the machine, and how it is written."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

__all__ = [
    "AN_IMAGE",
    "A_FOLDER",
    "A_JSON",
    "A_LOG",
    "PIXELS",
    "SECONDS",
    "chosen",
    "command",
    "is_number",
    "last_word",
    "machine",
    "of_runs",
    "save",
    "save_image",
    "threads_of",
    "work_folder",
    "write",
]


class _Place(click.Path):
    """Where something will be written, which is tried before the first run and not after the last.

    Args:
        suffix: that the name must have, so that no file of another kind is replaced.
        appended: what is there stays, and then its folder is of no matter.
    """

    def __init__(self, suffix: str = "", *, appended: bool = False, **more: Any) -> None:
        super().__init__(path_type=Path, **more)
        self.suffix, self.appended = suffix, appended

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        if not os.fspath(value):
            self.fail("nothing is no name", param, ctx)
        path = Path(os.fspath(super().convert(value, param, ctx)))
        if not self.dir_okay and os.fspath(value).endswith(tuple(filter(None, (os.sep, os.altsep)))):
            self.fail(f"{value} ends as a folder does: give the name of a file", param, ctx)
        if not self.dir_okay and os.path.lexists(path) and not path.is_file():
            self.fail(f"{path} is a device or a broken link: give the name of a file", param, ctx)
        if self.suffix and path.suffix.lower() != self.suffix:
            self.fail(f"{path} must end in {self.suffix}", param, ctx)
        if self.appended and path.exists():
            return path
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


class _Pixels(click.IntRange):
    """A side of a picture: the autoencoders make a cell of eight pixels."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        pixels = int(super().convert(value, param, ctx))
        if pixels % 8:
            self.fail(f"must be a multiple of 8, got {pixels}", param, ctx)
        return pixels


#: Types of the commands' options.
A_JSON = _Place(".json", dir_okay=False)
A_LOG = _Place(".jsonl", dir_okay=False, appended=True)
AN_IMAGE = _Place(".png", dir_okay=False)
A_FOLDER = _Place(file_okay=False)
PIXELS = _Pixels(64)
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
        `machine`: the last one's, with every processor, the `instructions` that any of them has (where all
        tell theirs), the last `date`, and the first as `since`; `threads`, where it was one number.
    """
    told = [run["machine"] for run in runs if _is_machine(run.get("machine"))]
    if not told:
        return {}
    told.sort(key=lambda about: str(about["date"]))
    processors = " and ".join(sorted({about["processor"] for about in told}))
    found: dict[str, Any] = {**told[-1], "processor": processors, "since": told[0]["date"]}
    found.pop("instructions", None)
    if all("instructions" in about for about in told):
        had = {str(name) for about in told for name in about["instructions"]}
        found["instructions"] = [name for name in _INSTRUCTIONS if name in had]
    threads = [run.get("threads") for run in runs]
    same = isinstance(threads[0], int) and all(number == threads[0] for number in threads)
    return {"machine": found} | ({"threads": threads[0]} if same else {})


def _is_machine(found: Any) -> bool:
    """Return whether something read from a file is what `machine` returned once."""
    return (
        isinstance(found, dict)
        and all(isinstance(found.get(name), str) for name in ("date", "processor"))
        and isinstance(found.get("instructions", []), list)
    )


def is_number(value: Any) -> bool:
    """Return whether something read from a file can be counted with."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # more digits than a float has
        return False


def chosen(text: str | None, known: Collection[str], option: str, *, none: bool = False) -> list[str]:
    """Return the words of a comma-separated option, all that are known where it is not given.

    Args:
        option: its name, without the dashes.
        none: nothing at all may be asked for.
    Raises:
        UsageError: one of them is unknown, or there is none.
    """
    if text is None:
        return list(known)
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [word for word in words if word not in known]
    if unknown or not (words or none):
        what = f"unknown {option} {', '.join(unknown)}" if unknown else f"--{option} names none"
        raise click.UsageError(f"{what}; known: {', '.join(known)}")
    return words


def threads_of(given: int | None) -> int:
    """Return the threads of each process: those asked for, OpenMP's own setting, or the machine's cores."""
    # OpenMP takes a list too, a number for each level of nesting.
    told = re.match(r"[1-9]\d*", os.environ.get("OMP_NUM_THREADS", "").strip())
    return given or (int(told[0]) if told else os.cpu_count() or 1)


def work_folder(given: Path | None, name: str) -> Path:
    """Return the folder that was given, or a temporary one that goes when the command ends."""
    if given is not None:
        return given
    made = tempfile.TemporaryDirectory(prefix=f"benchmark-{name}-", ignore_cleanup_errors=True)
    click.get_current_context().call_on_close(made.cleanup)
    return Path(made.name)


def last_word(said: str, otherwise: str) -> str:
    """Return the last line of what a command said on standard error, which is its reason."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else otherwise


def save(figures: dict[str, Any], path: Path) -> None:
    """Write figures as JSON under a temporary name, and rename it.

    Raises:
        ClickException: it cannot be written; what was there stays.
    """
    text = json.dumps(figures, indent=2) + "\n"
    _replace(path, lambda half_written: half_written.write_text(text, encoding="utf-8"))


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image under a temporary name, and rename it.

    Raises:
        ClickException: it cannot be written; what was there stays.
    """
    _replace(path, image.save)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    half_written = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(half_written)
        half_written.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            half_written.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise click.ClickException(f"{path} cannot be written ({error.strerror or error})") from error
        raise


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
