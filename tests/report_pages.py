"""Reports with hostile words, their pictures, and a reader of the page that they make."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image

from dbadapter.evaluation_report import ReportPictures

HOSTILE = '</script><script>alert("1")</script><img src=http://evil.example/x onerror=alert(2)>'
PROMPTS = [
    "a photo of {} on grass",
    f"{HOSTILE} {{}}",
    "\u202e\u05e2\u05d1\u05e8\u05d9\u05ea {} \U0001f415 'quoted' & \"so\"",
]
UNRELATED = ["a red car", "an <b>old</b> ship"]
SEEDS, CLASS = 2, 5
_VOID = {"meta", "img", "br"}


def figure(value: float, spread: float = 0.05, count: int = 6) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread, "count": count}


def figures(shift: float, size: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt_fidelity": "not measured",
        "subject_fidelity": figure(0.31234567 + shift),
        "drift": figure(0.1 + shift),
        "prior_preservation": figure(0.4 - shift),
        "diversity": figure(0.6 - shift),
        "nearest_photograph": 0.7 + shift,
        "nearest": [
            {"picture": i, "photograph": i % 2, "cosine": 0.3 + shift + (i * 7 % 5) / 20} for i in range(6)
        ],
        "per_prompt": {"subject_fidelity": [0.3 + shift, 0.2 + shift, 0.4 + shift]},
    }
    return found if size is None else found | {"bytes": size}


def difference(name: str, key: str, value: float, spread: float) -> dict[str, Any]:
    return {"of": name, "minus": "dog", "figure": key, **figure(value, spread)}


def make_report(names: tuple[str, ...] = ("dog", "hat", "cat")) -> dict[str, Any]:
    return {
        "base": "toybox",
        "photographs": 3,
        "date": "2026-01-02",
        "versions": {"dbadapter": "1.2.3", "torch": "4.5.6"},
        "class_noun": "dog",
        "image_encoder": "pixels",
        "text_image_encoder": "not measured",
        "settings": {
            "num_images_per_prompt": SEEDS,
            "num_class_images": CLASS,
            "num_inference_steps": 7,
            "guidance_scale": None,
            "seed": 1000,
            "prompts": PROMPTS,
            "class_prompt": "a photo of a dog",
            "unrelated_prompts": UNRELATED,
        },
        "subject_ceiling": 0.8765432,
        "figures": {"base": figures(0.0)}
        | {name: figures(0.1 + i / 50, 460_080 + i) for i, name in enumerate(names)},
        "differences": [
            entry
            for name in names[1:]
            for entry in (
                difference(name, "subject_fidelity", 0.2, 0.1),
                difference(name, "drift", 0.02, 0.1),
                difference(name, "diversity", -0.2, 0.1),
            )
        ],
    }


def make_pictures(report: dict[str, Any], side: int = 64) -> ReportPictures:
    drawn = np.random.default_rng(0)

    def some(count: int) -> list[Image.Image]:
        return [
            Image.fromarray(drawn.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)
        ]

    pictures = ReportPictures()
    pictures.add_photographs(some(3))
    for name in report["figures"]:
        parts = {"subject": len(PROMPTS) * SEEDS, "class": CLASS, "unrelated": len(UNRELATED) * SEEDS}
        pictures.add(name, {part: some(count) for part, count in parts.items()})
    return pictures


class Reader(HTMLParser):
    """The page as a list of (tag, attributes, text inside), and a check that every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(page)
        self.close()
        assert not self._open, [self.elements[index][0] for index in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs), []))
        if tag not in _VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, "".join(text))
            for found, attributes, text in self.elements
            if found == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]
