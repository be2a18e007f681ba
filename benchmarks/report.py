"""What every benchmark's JSON says of the machine, and how it is written."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch

__all__ = ["command", "machine", "save", "write"]

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "onnx", "onnxruntime-gpu", "onnxruntime")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Return the kind of machine, never its name: processor, cores, accelerator, versions, date."""
    cpuinfo = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    found = {package: _version(package) for package in _PACKAGES}
    return {
        "processor": model,
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
    return " ".join(shown)


def save(figures: dict[str, Any], path: Path) -> None:
    """Write figures as JSON under a temporary name, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_name(f".{path.name}.tmp")
    half_written.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    half_written.replace(path)


def write(figures: dict[str, Any], path: Path | None) -> None:
    """Print figures as JSON, and write them to a file if one is named."""
    whole = {**figures, "command": command(), "machine": machine()}
    click.echo(json.dumps(whole, indent=2))
    if path is not None:
        save(whole, path)
