"""The figures' file and the page of `evaluate`: refused before the work, written whole after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dbadapter.errors import OutputError, UsageError
from dbadapter.run_folder import is_run

__all__ = ["check_outputs", "refuse_input", "write_text"]


def check_outputs(json_path: Path | None, report_path: Path | None, overwrite: bool) -> None:
    """Refuse before anything is drawn what could not be written afterwards.

    Raises:
        OutputError: a path is a folder, a device, a broken link, exists without `overwrite`, or cannot be
            written; the message names the option.
        UsageError: both are one, or one lies in the other.
    """
    for path, option in ((json_path, "--json"), (report_path, "--report")):
        if path is not None:
            _check_writable(path, option)
            _check_place(path, option, overwrite)
    if json_path is not None and report_path is not None:
        one, other = json_path.resolve(), report_path.resolve()
        if one == other:
            raise UsageError(f"--json and --report are both {json_path}: give each a name of its own")
        if one in other.parents or other in one.parents:
            raise UsageError("of --json and --report one lies in the other: give each a name of its own")


def _check_place(path: Path, option: str, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder: give {option} the name of a file")
    if os.path.lexists(path) and not path.is_file():
        raise OutputError(f"{path} is a device or a broken link: give {option} the name of a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already: choose another name or overwrite it (--overwrite)")


def refuse_input(path: Path, files: Sequence[Path], models: Sequence[Path], photographs: Path) -> None:
    """Refuse an output that would replace what the command reads, or would be read the next time.

    Links count as what they lead to and as where they lie: a model from the hub's cache is made of them.

    Args:
        path: of the output, there already or not.
        files: none of which it may be.
        models: their folders, in which nothing is written; those that are not there count for nothing.
        photographs: their folder, in which a page and figures may lie, but no picture, caption or mask.
    Raises:
        UsageError: it is, or would be, one of them, or is what a training run left in its folder.
    """
    if folder := _run_of(path):
        raise UsageError(f"{path} belongs to the training run in {folder}: give the output another name")
    if any(_places(path) & _places(file) for file in files):
        raise UsageError(
            f"{path} is an input of this command, or belongs to one: give the output another name"
        )
    for folder in models:
        if _holds(folder, path):
            raise UsageError(f"{path} belongs to {folder}, a model that is read: put the output elsewhere")
    if path.suffix.lower() not in (".json", ".html") and _holds(photographs, path):
        raise UsageError(
            f"{path} belongs to {photographs}, where it would count as a photograph or its caption: put the "
            "output elsewhere"
        )


def _run_of(path: Path) -> Path | None:
    """Return the folder of the training run that left a file, if one did: pages and figures are no run's."""
    if not os.path.lexists(path):
        return None
    for place in _places(path):
        for folder in place.parents[:3]:  # a model's weights lie deepest
            mine = place.suffix.lower() in (".html", ".json") and not place.name.startswith(".")
            mine = mine and place.parent == folder and not place.with_suffix(".safetensors").exists()
            if not mine and is_run(folder):
                return folder
    return None


def _places(path: Path) -> set[Path]:
    """Return where a path leads and where it lies; links to itself are left as they are."""
    return {Path(os.path.realpath(path)), Path(os.path.realpath(path.parent), path.name)}


def _holds(folder: Path, path: Path) -> bool:
    """Tell whether a path is in a folder, or one of its files, or of its folders' files, leads to it."""
    if not folder.is_dir():
        return False
    end, places = Path(os.path.realpath(folder)), _places(path)
    led_to = {Path(os.path.realpath(each)) for pattern in ("*", "*/*") for each in folder.glob(pattern)}
    return any(end in place.parents for place in places) or bool(places & led_to)


def _check_writable(path: Path, option: str) -> None:
    try:
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        # A real file of that length of name, gone at once: access bits say nothing about read-only disks.
        temporary = nearest / _temporary(path).name
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}): pass another {option}"
        ) from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_text(path: Path, text: str, option: str, failed: list[OutputError]) -> None:
    """Write a file whole or not at all; what stood in the way is added to `failed`."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        failed.append(
            OutputError(f"{path} cannot be written ({error.strerror or error}): pass another {option}")
        )
    finally:  # also when it is interrupted
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
