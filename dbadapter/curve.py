"""A plot of values between 0 and 1 over steps, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_curve"]

SIZE = (900, 480)
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 196, 44, 48
# Okabe and Ito's colours, which people who see few colours can tell apart.
_COLORS = ("#000000", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#d55e00")


def draw_curve(lines: Mapping[str, Sequence[tuple[int, float]]], chosen: int | None = None) -> Image.Image:
    """Return a picture of lines, the first one bold and on top, with a mark at the chosen step.

    Args:
        lines: name -> (step, value) by step, values from 0 to 1; at most seven lines.
        chosen: a step.
    Raises:
        ValueError: there is no point, or there are more lines than colours.
    """
    steps = [step for points in lines.values() for step, _ in points]
    if not steps or len(lines) > len(_COLORS):
        raise ValueError(f"a plot needs 1 to {len(_COLORS)} lines with points, got {len(lines)}")
    width, height = SIZE[0] - _LEFT - _RIGHT, SIZE[1] - _TOP - _BOTTOM
    first, last = min(steps), max(steps)

    def at(step: int, value: float) -> tuple[float, float]:
        along = (step - first) / max(last - first, 1)
        return _LEFT + width * along, _TOP + height * (1 - min(max(value, 0.0), 1.0))

    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    for tenth in range(0, 11, 2):
        y = at(first, tenth / 10)[1]
        draw.line([(_LEFT, y), (_LEFT + width, y)], fill="#dddddd")
        draw.text((_LEFT - 20, y), f"{tenth / 10:.1f}", fill="#444444", font=font, anchor="rm")
    shown = sorted(set(steps))
    for step in shown[:: -(-len(shown) // 10)]:
        draw.text((at(step, 0)[0], _TOP + height + 8), str(step), fill="#444444", font=font, anchor="ma")
    draw.text((_LEFT + width / 2, SIZE[1] - 4), "step", fill="#444444", font=font, anchor="ms")
    if chosen is not None:
        x = at(chosen, 0)[0]
        draw.line([(x, _TOP), (x, _TOP + height)], fill="#999999", width=2)
        draw.text((x, _TOP - 20), f"chosen: {chosen}", fill="#444444", font=font, anchor="ms")
    # The first on top, the others' points as rings around it: where lines lie on each other, all are seen.
    for number, (name, points) in reversed(list(enumerate(lines.items()))):
        color, thick = _COLORS[number], 4 if number == 0 else 2
        places = [at(step, value) for step, value in points]
        draw.line(places, fill=color, width=thick, joint="curve")
        radius = 4 + 2 * number
        for x, y in places:
            ring = [x - radius, y - radius, x + radius, y + radius]
            draw.ellipse(ring, fill=color if number == 0 else None, outline=color, width=2)
        y = _TOP + 22 * number + 8
        draw.line([(SIZE[0] - _RIGHT + 32, y), (SIZE[0] - _RIGHT + 56, y)], fill=color, width=thick)
        draw.text((SIZE[0] - _RIGHT + 64, y), name, fill="#222222", font=font, anchor="lm")
    return picture
