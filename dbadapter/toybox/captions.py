"""Words for toybox pictures: prompts, and captions in several wordings whose labels are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dbadapter.toybox.names import COLORS, CONTEXTS, NOUNS, PATTERNS
from dbadapter.toybox.world import Scene, labels

__all__ = ["PLAIN_CONTEXT", "UNSAID", "Caption", "article", "caption", "prompt", "rare_words"]

UNSAID = -1
PLAIN_CONTEXT = "on a plain background"
_TEMPLATES = (
    "a photo of {thing} {place}",
    "a photo of {thing} {place}",
    "a picture of {thing} {place}",
    "an image of {thing} {place}",
    "a render of {thing} {place}",
    "{thing} {place}",
)
_COLORS = tuple(COLORS)


@dataclass(frozen=True)
class Caption:
    """A caption and what it says: indices of the world's tuples, UNSAID where it is silent."""

    text: str
    noun: int
    context: int
    color: int
    pattern: int


def article(words: str) -> str:
    """Return `words` behind "a" or "an"."""
    return f"{'an' if words[:1] in 'aeiou' else 'a'} {words}"


def prompt(thing: str, context: str = "") -> str:
    """Return the plain prompt for a thing ("a mug", "sks mug") in a context ("on grass" or "")."""
    return f"a photo of {thing} {context}".strip()


def caption(scene: Scene, rng: np.random.Generator, rare: Sequence[str] = ()) -> Caption:
    """Return a random caption of a scene.

    Three in four name the colour, six in ten a pattern (where there is one), seven in eight the
    context; one in eight puts a random word of `rare` before the noun, as a DreamBooth prompt does,
    so that an unknown word does not change what the noun means.
    """
    noun, context, color, pattern = labels(scene)
    say_rare = bool(rare) and rng.random() < 1 / 8
    say_color = rng.random() < (0.3 if say_rare else 0.75)
    say_pattern = PATTERNS[pattern] != "plain" and rng.random() < (0.3 if say_rare else 0.6)
    say_context = rng.random() < 7 / 8
    words = [PATTERNS[pattern]] * say_pattern + [_COLORS[color]] * say_color + [NOUNS[noun]]
    if say_rare:
        words.insert(0, rare[int(rng.integers(len(rare)))])
    thing = " ".join(words)
    if not (say_rare and rng.random() < 0.6):
        thing = article(thing)
    place = CONTEXTS[context] or (PLAIN_CONTEXT if rng.random() < 0.5 else "")
    template = _TEMPLATES[int(rng.integers(len(_TEMPLATES)))]
    text = template.format(thing=thing, place=place if say_context else "").strip()
    if say_context and place and rng.random() < 0.08:
        text = f"{place}, {template.format(thing=thing, place='').strip()}"
    return Caption(
        text,
        noun,
        context if say_context and place else UNSAID,
        color if say_color else UNSAID,
        pattern if say_pattern else UNSAID,
    )


def rare_words(vocabulary: dict[str, int]) -> list[str]:
    """Return the words of a CLIP vocabulary that a caption may carry as an unknown name, by id."""
    known = {*NOUNS, *COLORS, *PATTERNS, *" ".join(CONTEXTS).split(), "photo", "picture", "image", "render"}
    ends = [(number, token[:-4]) for token, number in vocabulary.items() if token.endswith("</w>")]
    return [w for _, w in sorted(ends) if w.isascii() and w.isalpha() and 2 <= len(w) <= 8 and w not in known]
