"""Small plots as inline SVG, drawn from numbers; colours and fonts are the page's. Pure.

Strips are as wide as the page lets them be: positions along them are per cent, so that neither text nor
marks are stretched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dbadapter.report_html import Html, element

__all__ = [
    "Axis",
    "Mark",
    "Point",
    "Rule",
    "axis_of",
    "axis_strip",
    "key_mark",
    "mark_style",
    "scatter",
    "strip",
]

COLORS = 8
_HEIGHT = 22  # pixels of a strip
_LEAST = 0.05  # that an axis spans
# Around the origin, of about one area; colour alone does not tell them apart for everybody, nor in print.
_SHAPES = (
    "M0-4.6A4.6 4.6 0 1 1 0 4.6A4.6 4.6 0 1 1 0-4.6Z",
    "M-4.1-4.1H4.1V4.1H-4.1Z",
    "M0-5.8L5.8 0L0 5.8L-5.8 0Z",
    "M0-5.4L5.4 4.2H-5.4Z",
)
_WIDE, _HIGH = 420, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 46


@dataclass(frozen=True)
class Axis:
    """Where numbers lie: from `low` to `high`, with ticks at round numbers."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Return where a number lies, 0 at the low end and 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Mark:
    """One value, with its interval where it has one; `style` is as `mark_style` gives it."""

    value: float
    style: str
    low: float | None = None
    high: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Rule:
    """A line to compare with; `style` is "base", "ceiling" or "zero"."""

    value: float
    style: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot, each coordinate as (low, value, high)."""

    x: tuple[float, float, float]
    y: tuple[float, float, float]
    style: str
    title: str


def mark_style(index: int) -> str:
    """Return the classes of candidate `index`: of eight colours and four shapes, 32 pairs differ."""
    return f"color{index % COLORS} shape{(index + index // COLORS) % len(_SHAPES)}"


def axis_of(values: Iterable[float], most_ticks: int = 6) -> Axis:
    """Return an axis that holds all finite values, with a little room at both ends.

    Args:
        values: none at all gives the axis from 0 to 1.
        most_ticks: there are this many at the most; their step is 1, 2 or 5 times a power of ten.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    # Figures here are of the order of 1: a smaller spread than this is not worth a whole plot.
    room = max((high - low) * 0.06, (_LEAST - (high - low)) / 2)
    low, high = low - room, high + room
    step = _step((high - low) / most_ticks)
    first = math.ceil(low / step)
    ticks = tuple(tick * step for tick in range(first, math.floor(high / step) + 1))
    return Axis(low, high, ticks)


def strip(axis: Axis, marks: Sequence[Mark], rules: Sequence[Rule] = (), label: str = "") -> Html:
    """Return marks with their intervals on one line.

    Args:
        axis: of all strips that stand above one another.
        marks: the later ones lie on top.
        rules: lines from edge to edge, so that those of neighbouring strips join.
        label: what the picture says, for those who cannot see it.
    """
    parts = [element("line", x1=0, x2="100%", y1="50%", y2="50%", cls="track")]
    for rule in rules:
        if rule.low is not None and rule.high is not None:
            left, right = axis.share(rule.low), axis.share(rule.high)
            parts.append(
                element(
                    "rect",
                    x=_percent(left),
                    width=_percent(right - left),
                    height="100%",
                    cls=f"band {rule.style}",
                )
            )
        at = _percent(axis.share(rule.value))
        parts.append(element("line", x1=at, x2=at, y1=0, y2="100%", cls=f"rule {rule.style}"))
    for mark in marks:
        if not math.isfinite(mark.value):
            continue
        if mark.low is not None and mark.high is not None:
            ends = {"x1": _percent(axis.share(mark.low)), "x2": _percent(axis.share(mark.high))}
            parts.append(element("line", **ends, y1="50%", y2="50%", cls=f"interval {mark.style}"))
        # A drawing inside: paths know no per cent.
        parts.append(
            element(
                "svg", _shape(mark.style, mark.title), x=_percent(axis.share(mark.value)), y="50%", cls="at"
            )
        )
    return element("svg", *parts, cls="strip", height=_HEIGHT, role="img", aria_label=label)


def axis_strip(axis: Axis) -> Html:
    """Return the ticks of strips, with their numbers."""
    parts = [element("line", x1=0, x2="100%", y1=1, y2=1, cls="axis")]
    for tick, text in zip(axis.ticks, _labels(axis), strict=True):
        at = _percent(axis.share(tick))
        parts.append(element("line", x1=at, x2=at, y1=1, y2=5, cls="axis"))
        parts.append(element("text", text, x=at, y=17, cls="tick middle"))
    return element("svg", *parts, cls="strip axis-strip", height=_HEIGHT, aria_hidden="true")


def key_mark(style: str) -> Html:
    """Return a mark alone, for a legend or beside a name."""
    return element("svg", _shape(style), viewBox="-7 -7 14 14", cls="key", aria_hidden="true")


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    *,
    x_rules: Sequence[Rule] = (),
    y_rules: Sequence[Rule] = (),
    label: str = "",
) -> Html:
    """Return points with their intervals as crosses.

    Args:
        x_label, y_label: what the axes are.
        x_rules: upright lines at values of x.
        y_rules: level lines at values of y.
        label: what the picture says, for those who cannot see it.
    """
    across = axis_of([*(value for point in points for value in point.x), *(rule.value for rule in x_rules)])
    upward = axis_of([*(value for point in points for value in point.y), *(rule.value for rule in y_rules)])

    def x(value: float) -> str:
        return f"{_LEFT + across.share(value) * (_WIDE - _LEFT - _RIGHT):.1f}"

    def y(value: float) -> str:
        return f"{_HIGH - _BOTTOM - upward.share(value) * (_HIGH - _TOP - _BOTTOM):.1f}"

    left, right, bottom, top = x(across.low), x(across.high), y(upward.low), y(upward.high)
    parts = []
    for tick, text in zip(across.ticks, _labels(across), strict=True):
        parts.append(element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, cls="grid"))
        parts.append(element("text", text, x=x(tick), y=_HIGH - _BOTTOM + 16, cls="tick middle"))
    for tick, text in zip(upward.ticks, _labels(upward), strict=True):
        parts.append(element("line", x1=left, x2=right, y1=y(tick), y2=y(tick), cls="grid"))
        parts.append(element("text", text, x=_LEFT - 7, y=y(tick), dy="0.32em", cls="tick end"))
    for rule in x_rules:
        at = x(rule.value)
        parts.append(element("line", x1=at, x2=at, y1=top, y2=bottom, cls=f"rule {rule.style}"))
    for rule in y_rules:
        at = y(rule.value)
        parts.append(element("line", x1=left, x2=right, y1=at, y2=at, cls=f"rule {rule.style}"))
    for point in points:
        (x0, x1, x2), (y0, y1, y2) = point.x, point.y
        cls = f"interval {point.style}"
        parts.append(element("line", x1=x(x0), x2=x(x2), y1=y(y1), y2=y(y1), cls=cls))
        parts.append(element("line", x1=x(x1), x2=x(x1), y1=y(y0), y2=y(y2), cls=cls))
        parts.append(element("g", _shape(point.style, point.title), transform=f"translate({x(x1)} {y(y1)})"))
    middle = _TOP + (_HIGH - _TOP - _BOTTOM) / 2
    parts += [
        element("line", x1=left, x2=right, y1=bottom, y2=bottom, cls="axis"),
        element("line", x1=left, x2=left, y1=top, y2=bottom, cls="axis"),
        element("text", x_label, x=(_LEFT + _WIDE - _RIGHT) / 2, y=_HIGH - 8, cls="axis-label middle"),
        element("text", y_label, transform=f"translate(13 {middle}) rotate(-90)", cls="axis-label middle"),
    ]
    return element("svg", *parts, viewBox=f"0 0 {_WIDE} {_HIGH}", cls="scatter", role="img", aria_label=label)


def _shape(style: str, title: str = "") -> Html:
    """Return the path of a style's "shapeN"; the base has a ring, which no candidate has."""
    numbers = [word.removeprefix("shape") for word in style.split() if word.startswith("shape")]
    path = _SHAPES[int(numbers[0])] if numbers else _SHAPES[0]
    return element("path", element("title", title) if title else None, d=path, cls=f"mark {style}")


def _step(least: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _labels(axis: Axis) -> list[str]:
    """Return the ticks' numbers with as many decimals as tell them apart."""
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    texts = [f"{tick:.{digits}f}" for tick in axis.ticks]
    return [text.replace("-", "\N{MINUS SIGN}" if float(text) else "") for text in texts]


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"
