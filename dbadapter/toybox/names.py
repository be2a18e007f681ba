"""The toybox world's words: what its captions can name."""

from __future__ import annotations

__all__ = ["COLORS", "CONTEXTS", "NOUNS", "PATTERNS"]

NOUNS = (
    "mug", "teapot", "car", "house", "robot", "tree", "rocket", "boat", "bottle", "snowman", "dog", "fish",
)  # fmt: skip
#: Words that follow the noun in a caption; the last one is the plain studio, which goes unnamed.
CONTEXTS = (
    "on grass", "on the beach", "in the snow", "on a wooden floor", "on a red carpet", "on bricks",
    "at night", "in the sky", "on water", "on a checkered tablecloth", "",
)  # fmt: skip
#: sRGB in [0, 1].
COLORS = {
    "red": (0.82, 0.10, 0.10),
    "orange": (0.95, 0.52, 0.08),
    "yellow": (0.96, 0.86, 0.15),
    "green": (0.12, 0.56, 0.20),
    "blue": (0.13, 0.27, 0.80),
    "purple": (0.52, 0.16, 0.62),
    "white": (0.93, 0.93, 0.93),
    "black": (0.10, 0.10, 0.11),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
