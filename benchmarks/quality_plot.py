"""Likeness against forgetting of every method, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.quality_plan import METHODS

__all__ = ["pareto"]

Box = tuple[float, float, float, float]

SIZE = (1100, 720)
_LABEL = 15  # pixels of a label's height
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 40, 56, 70
_ADAPTER, _FULL, _GREY = "#0072b2", "#d55e00", "#555555"  # Okabe and Ito's


def _free(dot: tuple[float, float], width: float, taken: Sequence[Box]) -> Box:
    """Return the nearest free place for a label: beside its dot, higher or lower."""

    def place(rows: int) -> Box:
        aside, y = 12 + 6 * min(abs(rows), 4), dot[1] + rows * (_LABEL + 1) - _LABEL / 2
        x = dot[0] + aside if dot[0] + aside + width < SIZE[0] else dot[0] - aside - width
        return x, y, x + width, y + _LABEL

    places = [place(rows) for step in range(30) for rows in (step, -step)]
    inside = [box for box in places if box[1] >= _TOP and box[3] <= SIZE[1] - _BOTTOM]
    return next((box for box in inside if not any(_meet(box, other) for other in taken)), places[0])


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def pareto(methods: Mapping[str, Any]) -> Image.Image:
    """Return a picture of the methods' means with their intervals: up and left is better.

    Args:
        methods: of the benchmark's JSON; "likeness" and "forgotten" of each are drawn. A name may go on with
            " at RATE".
    Raises:
        ValueError: there is no method.
    """
    if not methods:
        raise ValueError("there is nothing to draw: run the comparison first")
    lost = [about["forgotten"] for about in methods.values()]
    reached = [about["likeness"] for about in methods.values()]
    right = min(1.0, max(figure["high"] for figure in lost) + 0.05)
    low, high = min(f["low"] for f in reached) - 0.03, min(1.0, max(f["high"] for f in reached) + 0.05)
    width, height = SIZE[0] - _LEFT - _RIGHT, SIZE[1] - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + width * math.sqrt(max(x, 0.0) / right), _TOP + height * (high - y) / (high - low)

    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    for tick in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        if tick <= right:
            x = at(tick, low)[0]
            draw.line([(x, _TOP), (x, _TOP + height)], fill="#e4e4e4")
            draw.text((x, _TOP + height + 8), f"{tick:g}", fill=_GREY, font=small, anchor="ma")
    for tick in (tenth / 10 for tenth in range(11)):
        if low <= tick <= high:
            y = at(0, tick)[1]
            draw.line([(_LEFT, y), (_LEFT + width, y)], fill="#e4e4e4")
            draw.text((_LEFT - 8, y), f"{tick:.1f}", fill=_GREY, font=small, anchor="rm")
    title = "Likeness (up: better) against what was forgotten (left: better); means and 95 % intervals"
    draw.text((_LEFT, 20), title, fill="black", font=font)
    draw.text(
        (_LEFT + width / 2, SIZE[1] - 14),
        "forgotten (square-root scale)",
        fill="black",
        font=font,
        anchor="ms",
    )
    draw.text((12, _TOP - 8), "likeness", fill="black", font=font, anchor="ls")
    dots = {
        name: at(about["forgotten"]["value"], about["likeness"]["value"]) for name, about in methods.items()
    }
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots.values()]
    for about in methods.values():
        (left, y), (end, _) = (
            at(about["forgotten"][side], about["likeness"]["value"]) for side in ("low", "high")
        )
        taken.append((left, y - 1, end, y + 1))
    for name, about in sorted(methods.items(), key=lambda item: dots[item[0]][1]):
        full = METHODS[name.partition(" ")[0]].full
        x, y, color = about["forgotten"], about["likeness"], _FULL if full else _ADAPTER
        draw.line([at(x["low"], y["value"]), at(x["high"], y["value"])], fill=color)
        draw.line([at(x["value"], y["low"]), at(x["value"], y["high"])], fill=color)
        (cx, cy), r = dots[name], 5
        if full:
            draw.rectangle([cx - r, cy - r, cx + r, cy + r], fill=color)
        else:
            draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=color)
        box = _free(dots[name], draw.textlength(name, font=small), taken)
        taken.append(box)
        if abs(box[1] + _LABEL / 2 - cy) > _LABEL:
            draw.line(
                [(cx, cy), (box[0] - 2 if box[0] > cx else box[2] + 2, box[1] + _LABEL / 2)], fill="#b0b0b0"
            )
        draw.text((box[0], box[1]), name, fill=color, font=small)
    for number, (word, color) in enumerate((("adapters", _ADAPTER), ("full fine-tuning", _FULL))):
        draw.text((SIZE[0] - _RIGHT - 240 + 90 * number, 20), word, fill=color, font=font)
    return picture
