"""Likeness against forgetting of every method, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.quality_plan import METHODS

__all__ = ["pareto"]

SIZE = (1100, 720)
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 40, 56, 70
_ADAPTER, _FULL, _GREY = "#0072b2", "#d55e00", "#555555"  # Okabe and Ito's


def pareto(methods: Mapping[str, Any]) -> Image.Image:
    """Return a picture of the methods' means with their intervals: up and left is better.

    Args:
        methods: of the benchmark's JSON; "likeness" and "forgotten" of each are drawn.
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
        return _LEFT + width * x / right, _TOP + height * (high - y) / (high - low)

    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    for tick in (tenth / 10 for tenth in range(11)):
        if tick <= right:
            x = at(tick, low)[0]
            draw.line([(x, _TOP), (x, _TOP + height)], fill="#e4e4e4")
            draw.text((x, _TOP + height + 8), f"{tick:.1f}", fill=_GREY, font=small, anchor="ma")
        if low <= tick <= high:
            y = at(0, tick)[1]
            draw.line([(_LEFT, y), (_LEFT + width, y)], fill="#e4e4e4")
            draw.text((_LEFT - 8, y), f"{tick:.1f}", fill=_GREY, font=small, anchor="rm")
    title = "Likeness (up: better) against what was forgotten (left: better); means and 95 % intervals"
    draw.text((_LEFT, 20), title, fill="black", font=font)
    draw.text((_LEFT + width / 2, SIZE[1] - 14), "forgotten", fill="black", font=font, anchor="ms")
    draw.text((12, _TOP - 8), "likeness", fill="black", font=font, anchor="ls")
    for name, about in methods.items():
        x, y, color = about["forgotten"], about["likeness"], _FULL if METHODS[name].full else _ADAPTER
        draw.line([at(x["low"], y["value"]), at(x["high"], y["value"])], fill=color)
        draw.line([at(x["value"], y["low"]), at(x["value"], y["high"])], fill=color)
        (cx, cy), r = at(x["value"], y["value"]), 5
        if METHODS[name].full:
            draw.rectangle([cx - r, cy - r, cx + r, cy + r], fill=color)
        else:
            draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=color)
        draw.text((cx + 8, cy - 8), name, fill=color, font=small, anchor="ls")
    for number, (word, color) in enumerate((("adapters", _ADAPTER), ("full fine-tuning", _FULL))):
        draw.text((SIZE[0] - _RIGHT - 240 + 90 * number, 20), word, fill=color, font=font)
    return picture
