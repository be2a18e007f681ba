"""What is drawn to score an adapter: DreamBooth's prompts, and those of a file.

The two lists of 25 are the evaluation prompts of DreamBooth's dataset (github.com/google/dreambooth,
`prompts_and_classes.txt`, CC BY 4.0), `{}` in the place of identifier and class noun.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dbadapter.config import indefinite
from dbadapter.config_checks import CONTROL_CHARACTERS
from dbadapter.errors import DataError

__all__ = ["LIVE", "OBJECT", "UNRELATED", "Prompts", "choose_prompts", "read_prompts"]

_BOTH = (
    "a {} in the jungle",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of pink fabric",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} with a mountain in the background",
    "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)
_LAST = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")
OBJECT: tuple[str, ...] = (
    *_BOTH,
    "a {} with a wheat field in the background",
    "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background",
    "a {} floating on top of water",
    "a {} floating in an ocean of milk",
    "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror",
    "a {} on top of the sidewalk in a crowded street",
    "a {} on top of a dirt road",
    "a {} on top of a white rug",
    *_LAST,
)
LIVE: tuple[str, ...] = (
    *_BOTH,
    "a {} wearing a red hat",
    "a {} wearing a santa hat",
    "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle",
    "a {} in a chef outfit",
    "a {} in a firefighter outfit",
    "a {} in a police outfit",
    "a {} wearing pink glasses",
    "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
    *_LAST,
)
# Things that no subject here is; what becomes of them shows what else an adapter changed.
UNRELATED: tuple[str, ...] = (
    "a photo of a city street at night",
    "a bowl of fruit on a table",
    "a mountain lake in the morning",
    "an old sailing ship in a storm",
    "a portrait of a woman with a hat",
    "a red sports car",
    "a forest in autumn",
    "a kitchen with a window",
)
_MOST = 500


@dataclass(frozen=True)
class Prompts:
    """The prompts of one evaluation.

    Attributes:
        subject: templates with `{}` for the subject ("sks dog") or its class ("dog").
        class_prompt: of prior preservation and diversity, e.g. "a photo of a dog".
        unrelated: whole prompts without subject or class.
    """

    subject: tuple[str, ...]
    class_prompt: str
    unrelated: tuple[str, ...]


def choose_prompts(
    class_noun: str, subject: Sequence[str] = OBJECT, unrelated: Sequence[str] = UNRELATED
) -> Prompts:
    """Return the prompts of one evaluation, with the class's own, "a photo of a dog".

    Args:
        class_noun: e.g. "dog".
        subject: templates, `OBJECT`, `LIVE`, or what `read_prompts` gives.
        unrelated: whole prompts.
    """
    return Prompts(tuple(subject), f"a photo of {indefinite(class_noun)}", tuple(unrelated))


def default_prompts(family: str, class_noun: str, kind: str = "object") -> Prompts:
    """Return DreamBooth's prompts; for toybox its contexts, and other things that it can draw.

    Args:
        family: the base's.
        class_noun: e.g. "dog".
        kind: "object" or "live", which of the paper's lists.
    """
    if family != "toybox":
        named = re.compile(rf"\b{re.escape(class_noun.strip())}\b", re.IGNORECASE)
        others = [prompt for prompt in UNRELATED if not named.search(prompt)]  # a car is no stranger to a car
        return choose_prompts(class_noun, LIVE if kind == "live" else OBJECT, others)
    from dbadapter.toybox.names import CONTEXTS, NOUNS

    others = [noun for noun in NOUNS if noun != class_noun.strip().lower()][: len(UNRELATED)]
    return choose_prompts(
        class_noun,
        tuple(f"a photo of {{}} {context}".strip() for context in CONTEXTS),
        tuple(f"a photo of a {noun} {at}".strip() for noun, at in zip(others, CONTEXTS, strict=False)),
    )


def selection_prompts(family: str, class_noun: str) -> Prompts:
    """Return the few prompts that checkpoints are chosen by: places, for things and animals alike."""
    if family == "toybox":
        named = default_prompts(family, class_noun).subject[:-1]  # the last is the plain studio
        return choose_prompts(class_noun, named, ())
    return choose_prompts(class_noun, tuple(each for each in OBJECT if each in LIVE)[:8], ())


def read_prompts(file: Path) -> tuple[str, ...]:
    """Return the templates of a text file: one a line, with `{}` or `{subject}` for the subject.

    Raises:
        DataError: it cannot be read, holds none or too many, or a line has no place for the subject.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); give a text file, one prompt a line") from None
    found: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        template = line.strip().replace("{subject}", "{}")
        if not template or template.startswith("#"):
            continue
        if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
            raise DataError(
                f"{file}, line {number}: a prompt must hold {{}} once, where the subject goes, "
                f"got {line.strip()[:60]!r}"
            )
        if CONTROL_CHARACTERS.search(template):
            raise DataError(f"{file}, line {number}: a prompt must hold no control characters")
        # It would count as another, and make every interval too narrow; tokenizers know no capitals.
        key = " ".join(template.casefold().split())
        if key in seen:
            raise DataError(f"{file}, line {number}: the prompt of line {seen[key]} again: drop one")
        seen[key] = number
        found.append(template)
    if not 1 <= len(found) <= _MOST:
        raise DataError(f"{file} must hold 1 to {_MOST} prompts, one a line, got {len(found)}")
    return tuple(found)
