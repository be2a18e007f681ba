"""A swappable export with what the tests need beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbadapter.adapter import Adapter
from dbadapter.base import Base


@dataclass(frozen=True)
class Exported:
    """A swappable export, the base, and two adapters of different ranks and layers."""

    folder: Path
    base: Base
    report: dict[str, Any]
    layers: tuple[str, ...]
    dog: Adapter
    hat: Adapter
