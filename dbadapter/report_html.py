"""HTML as nested function calls: text is escaped unless it is markup already. Pure."""

from __future__ import annotations

import math
from html import escape
from typing import Any

__all__ = ["Html", "bytes_text", "element", "join", "number", "signed", "user_text"]

_VOID = {"meta", "img", "br"}  # of those used here: HTML forbids their end tags
_MINUS = "\N{MINUS SIGN}"
# What HTML text must not hold; a lone surrogate (a file name that is no UTF-8) cannot be written at all.
_FORBIDDEN = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127), "�")
_FORBIDDEN |= dict.fromkeys(range(55296, 57344), "�")


class Html(str):
    """Markup, as `element` makes it; any other string is text and gets escaped."""

    __slots__ = ()


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return one element of HTML or SVG.

    Args:
        name: e.g. "td".
        children: Html as it is, None left out, anything else as escaped text.
        attributes: `_` stands for `-`, `cls` for class; None and False are left out, True is the bare name.
    """
    written = "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{_escaped(value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    """Return children one after another: Html as it is, None left out, anything else as escaped text."""
    return Html(
        "".join(
            child if isinstance(child, Html) else _escaped(child) for child in children if child is not None
        )
    )


def user_text(text: str) -> Html:
    """Return somebody else's words: escaped, and unable to turn the direction of the words around them."""
    return element("bdi", text)


def number(value: float, digits: int = 3) -> Html:
    """Return a number for people, the exact one beside it for programs."""
    return element("data", _decimal(value, digits), value=repr(float(value)))


def signed(value: float, digits: int = 3) -> Html:
    """Return a difference: like `number`, with its sign."""
    shown = _decimal(value, digits)
    plus = "+" if value > 0 and float(shown.replace(_MINUS, "-")) else ""
    return element("data", plus + shown, value=repr(float(value)))


def bytes_text(count: int) -> Html:
    """Return a size on disk in decimal units, the exact one beside it for programs."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(max(count, 1)) // 3))
    shown = count / 1000**power
    return element("data", f"{shown:.3g} {units[power]}" if power else f"{count} bytes", value=str(count))


def _decimal(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "not a number"
    shown = f"{value:.{digits}f}"
    # No "-0.000": it is the rounding of nothing.
    return shown.replace("-", _MINUS if float(shown) else "")


def _attribute(key: str) -> str:
    # viewBox and its kin keep their capitals.
    return "class" if key == "cls" else key.rstrip("_").replace("_", "-")


def _escaped(value: Any) -> str:
    return escape(str(value).translate(_FORBIDDEN), quote=True)
