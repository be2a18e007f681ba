"""Likeness against forgetting of every method, drawn with Pillow: all of them, and the crowd enlarged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFont

from benchmarks.quality_plan import METHODS
from benchmarks.quality_runs import DEFAULT, FULL

__all__ = ["pareto"]

Box = tuple[float, float, float, float]
Point = tuple[float, float]

SIZE = (1500, 760)
_MAIN = (DEFAULT, FULL)
_CROWD = (0.25, 0.5)  # forgotten less, more like the subject: enlarged
_LABEL = 15  # pixels of a label's height
_ADAPTER, _FULL, _GREY, _LIGHT = "#0072b2", "#d55e00", "#555555", "#e4e4e4"  # Okabe and Ito's


@dataclass(frozen=True)
class _Panel:
    """A part of the picture with axes of its own.

    Args:
        area: in pixels.
        right: what was forgotten at its right edge; 0 is at the left one.
        low: likeness at its lower edge.
        high: likeness at its upper edge.
        root: whether what was forgotten goes by its square root.
    """

    area: Box
    right: float
    low: float
    high: float
    root: bool

    def at(self, forgotten: float, likeness: float) -> Point:
        """Return the place of two figures in pixels."""
        left, top, right, bottom = self.area
        share = max(forgotten, 0.0) / self.right
        up = (self.high - likeness) / (self.high - self.low)
        return left + (right - left) * (math.sqrt(share) if self.root else share), top + (bottom - top) * up

    def holds(self, about: Mapping[str, Any]) -> bool:
        """Tell whether a method's means lie in it."""
        inside = self.low <= about["likeness"]["value"] <= self.high
        return inside and about["forgotten"]["value"] <= self.right


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
    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(16)
    draw.text(
        (80, 20),
        "Likeness (up: better) against what was forgotten (left: better); means and 95 % intervals",
        fill="black",
        font=font,
    )
    for x, word, color in ((SIZE[0] - 480, "adapters", _ADAPTER), (SIZE[0] - 390, "full fine-tuning", _FULL)):
        draw.text((x, 20), word, fill=color, font=font)
    draw.text((SIZE[0] - 250, 20), "hollow: at another rate", fill=_GREY, font=font)
    crowd = {
        name: about
        for name, about in methods.items()
        if about["forgotten"]["value"] < _CROWD[0] and about["likeness"]["value"] > _CROWD[1]
    }
    if len(crowd) in (0, len(methods)):
        _draw(draw, _panel(methods, (80, 84, SIZE[0] - 40, SIZE[1] - 70)), methods, methods)
        return picture
    whole = _panel(methods, (80, 84, 560, SIZE[1] - 70))
    near = _panel(crowd, (640, 84, SIZE[0] - 40, SIZE[1] - 70), root=False)
    corners = (*whole.at(0, near.high), *whole.at(near.right, near.low))
    draw.rectangle(corners, outline=_GREY)
    draw.text(
        (corners[2] + 6, corners[3]), "enlarged", fill=_GREY, font=ImageFont.load_default(13), anchor="ls"
    )
    _draw(draw, whole, methods, {name: about for name, about in methods.items() if not near.holds(about)})
    _draw(draw, near, {name: about for name, about in methods.items() if near.holds(about)}, methods)
    return picture


def _panel(methods: Mapping[str, Any], area: Box, *, root: bool = True) -> _Panel:
    """Return a panel in which methods lie, with their intervals."""
    lost = max(about["forgotten"]["high"] for about in methods.values())
    reached = [about["likeness"] for about in methods.values()]
    low, high = min(figure["low"] for figure in reached), max(figure["high"] for figure in reached)
    return _Panel(area, min(1.0, lost * 1.06 + 0.002), low - 0.03, min(1.0, high + 0.05), root)


def _draw(
    draw: ImageDraw.ImageDraw, panel: _Panel, methods: Mapping[str, Any], named: Mapping[str, Any]
) -> None:
    """Draw a panel's axes and methods, the main ones last and larger; only the `named` have labels."""
    _axes(draw, panel)
    ordered = sorted(methods, key=lambda name: (name in _MAIN, -methods[name]["likeness"]["value"]))
    dots = {
        name: panel.at(about["forgotten"]["value"], about["likeness"]["value"])
        for name, about in methods.items()
    }
    for name in ordered:
        about, color = methods[name], _color(name)
        x, y = about["forgotten"], about["likeness"]
        faint = color if name in _MAIN else _faint(color)
        for one, other in (
            ((x["low"], y["value"]), (x["high"], y["value"])),
            ((x["value"], y["low"]), (x["value"], y["high"])),
        ):
            draw.line([panel.at(*one), panel.at(*other)], fill=faint, width=2 if name in _MAIN else 1)
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in dots.values()]
    for name in reversed(ordered):  # the main ones have the first choice of a place
        if name not in named:
            continue
        font = ImageFont.load_default(16 if name in _MAIN else 13)
        box = _free(dots[name], draw.textlength(name, font=font), taken, panel.area)
        taken.append(box)
        (cx, cy), middle = dots[name], box[1] + _LABEL / 2
        if abs(middle - cy) > _LABEL:
            draw.line([(cx, cy), (box[0] - 2 if box[0] > cx else box[2] + 2, middle)], fill="#b0b0b0")
        draw.text((box[0], box[1]), name, fill=_color(name), font=font)
    for name in ordered:
        (x, y), r = dots[name], 8 if name in _MAIN else 5
        shape = draw.rectangle if _is_full(name) else draw.ellipse
        hollow = " at " in name
        shape([x - r, y - r, x + r, y + r], fill="white" if hollow else _color(name), outline=_color(name))


def _axes(draw: ImageDraw.ImageDraw, panel: _Panel) -> None:
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    left, top, right, bottom = panel.area
    ticks = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    for tick in ticks if panel.root else [step / 50 for step in range(51)]:
        if tick <= panel.right:
            x = panel.at(tick, panel.low)[0]
            draw.line([(x, top), (x, bottom)], fill=_LIGHT)
            draw.text((x, bottom + 8), f"{tick:g}", fill=_GREY, font=small, anchor="ma")
    for tick in (tenth / 10 for tenth in range(11)):
        if panel.low <= tick <= panel.high:
            y = panel.at(0, tick)[1]
            draw.line([(left, y), (right, y)], fill=_LIGHT)
            draw.text((left - 8, y), f"{tick:.1f}", fill=_GREY, font=small, anchor="rm")
    said = "forgotten (square-root scale)" if panel.root else "forgotten"
    draw.text(((left + right) / 2, bottom + 56), said, fill="black", font=font, anchor="ms")
    draw.text((left - 68, top - 8), "likeness", fill="black", font=font, anchor="ls")


def _is_full(name: str) -> bool:
    return METHODS[name.partition(" ")[0]].full


def _color(name: str) -> str:
    return _FULL if _is_full(name) else _ADAPTER


def _faint(color: str) -> tuple[int, int, int]:
    red, green, blue = (255 - (255 - part) * 2 // 5 for part in ImageColor.getrgb(color)[:3])
    return red, green, blue


def _free(dot: Point, width: float, taken: Sequence[Box], area: Box) -> Box:
    """Return the nearest free place for a label: beside its dot, higher or lower."""

    def place(rows: int, *, right: bool) -> Box:
        aside, y = 12 + 6 * min(abs(rows), 4), dot[1] + rows * (_LABEL + 1) - _LABEL / 2
        x = dot[0] + aside if right else dot[0] - aside - width
        return x, y, x + width, y + _LABEL

    order = [(rows, right) for step in range(30) for right in (True, False) for rows in (step, -step)]
    places = [place(rows, right=right) for rows, right in order]
    inside = [
        box
        for box in places
        if box[0] >= area[0] and box[1] >= area[1] and box[2] <= area[2] and box[3] <= area[3]
    ]
    return next((box for box in inside if not any(_meet(box, other) for other in taken)), places[0])


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
