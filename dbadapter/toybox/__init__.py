"""The embedded base: a small Stable Diffusion of our own, its world, and an example subject.

Importing this is light; the renderer (`render`, needs numba) and the training of the base
(`pretrain`) are modules of their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dbadapter.toybox.names import COLORS, CONTEXTS, NOUNS, PATTERNS

__all__ = ["COLORS", "CONTEXTS", "NOUNS", "PATTERNS", "ExampleSubject", "example_subject", "folder"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ExampleSubject:
    """A subject that the base never saw: five renders of it, its noun, and contexts absent from them."""

    folder: Path
    class_noun: str
    contexts: tuple[str, ...]


def folder() -> Path:
    """Return the embedded base's folder, in diffusers' layout."""
    return _HERE / "model"


def example_subject() -> ExampleSubject:
    """Return the subject that `dbadapter demo` learns."""
    about = json.loads((_HERE / "example" / "example.json").read_text(encoding="utf-8"))
    return ExampleSubject(_HERE / "example", about["class_noun"], tuple(about["contexts"]))
