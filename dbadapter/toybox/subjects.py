"""Subjects for DreamBooth: held-out instances, photographed in some contexts and scored in others.

`python -m dbadapter.toybox.subjects` draws the example subject again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dbadapter.toybox import world
from dbadapter.toybox.names import CONTEXTS

__all__ = ["HELD_OUT_SEED", "SUBJECTS", "TEST_CONTEXTS", "TRAIN_CONTEXTS", "Subject", "photographs", "views"]

HELD_OUT_SEED = 77_001  # pretraining draws from another stream: these instances are absent from it
TRAIN_CONTEXTS = ("", "on grass", "on a wooden floor", "on bricks", "in the snow")
TEST_CONTEXTS = (
    "on the beach",
    "on a red carpet",
    "at night",
    "in the sky",
    "on water",
    "on a checkered tablecloth",
)


@dataclass(frozen=True)
class Subject:
    """A named instance of the held-out stream."""

    noun: str
    number: int

    @property
    def name(self) -> str:
        """The subject's name in tables and files."""
        return f"{self.noun}-{self.number}"

    @property
    def instance(self) -> world.Instance:
        """The instance itself, the same on every machine."""
        return world.sample_instance(np.random.default_rng((HELD_OUT_SEED, self.number)), self.noun)


def views(subject: Subject, contexts: tuple[str, ...], each: int = 1, stream: int = 0) -> list[world.Scene]:
    """Return `each` random views of a subject in every context, the same for the same stream."""
    rng = np.random.default_rng((HELD_OUT_SEED, subject.number, stream))
    return [
        world.Scene(subject.instance, world.sample_view(rng, CONTEXTS.index(context)))
        for context in contexts
        for _ in range(each)
    ]


def photographs(subject: Subject, folder: Path) -> list[Path]:
    """Draw the subject's five training pictures, one a context, into a folder; return their paths."""
    from dbadapter.toybox.render import render

    folder.mkdir(parents=True, exist_ok=True)
    pictures, _ = render(views(subject, TRAIN_CONTEXTS), samples=4)
    paths = [folder / f"{i:02}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return paths


#: The subjects of `benchmarks.subject`; chosen once for distinct patterns and colours, not by their scores.
SUBJECTS = (
    Subject("mug", 13),
    Subject("teapot", 12),
    Subject("car", 0),
    Subject("snowman", 1),
    Subject("tree", 3),
    Subject("fish", 6),
)
EXAMPLE = SUBJECTS[0]


def main() -> None:
    """Draw the example subject into the package."""
    folder = Path(__file__).parent / "example"
    photographs(EXAMPLE, folder)
    about = {"class_noun": EXAMPLE.noun, "contexts": list(TEST_CONTEXTS)}
    (folder / "example.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
