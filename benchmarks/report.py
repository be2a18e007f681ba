"""What every benchmark's JSON says of the machine, and how it is written."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch

__all__ = ["machine", "write"]

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


def write(figures: dict[str, Any], path: Path | None) -> None:
    """Print figures as JSON, and write them to a file if one is named."""
    text = json.dumps({**figures, "machine": machine()}, indent=2)
    click.echo(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
