"""Many pictures as one, with words that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

__all__ = ["grid", "wrap_words"]

SMALLEST_CELL = 128  # pixels; smaller pictures are enlarged, so that people can see them
MARGIN = 8


def grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: int | None = None,
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Return one picture of all: labels left of rows, above columns, captions under cells, wrapped to fit.

    Args:
        rows: pictures, rows may differ in length.
        row_labels, column_labels: one each, or none at all.
        scale: whole factor of enlargement; None means the smallest that makes cells 128 pixels wide.
        captions: one a picture, or none at all.
    Raises:
        ValueError: no picture, or labels that do not match the pictures in number.
    """
    _check_grid(rows, row_labels, column_labels, captions)
    widest = max(image.width for row in rows for image in row)
    scale = scale or max(1, math.ceil(SMALLEST_CELL / widest))
    cell = widest * scale
    font = ImageFont.load_default(max(12, min(24, cell // 12)))
    notes = captions or [[""] * len(row) for row in rows]
    table = [
        [_captioned(image, scale, _words(note, font, cell)) for image, note in zip(row, line, strict=True)]
        for row, line in zip(rows, notes, strict=True)
    ]
    if column_labels:
        table.insert(0, [_words(text, font, cell) for text in column_labels])
    label_width = _label_width(row_labels, font, cell)
    labels = [_words(text, font, label_width) for text in row_labels]
    if labels and column_labels:
        labels.insert(0, _words("", font, 0))
    left = MARGIN + (label_width + MARGIN if labels else 0)
    cells = [[*row, labels[number]] if labels else row for number, row in enumerate(table)]
    heights = [max((image.height for image in row), default=0) for row in cells]
    width = left + max(len(row) for row in table) * (cell + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + sum(height + MARGIN for height in heights)), "white")
    y = MARGIN
    for number, (row, height) in enumerate(zip(table, heights, strict=True)):
        if labels:
            sheet.paste(labels[number], (MARGIN, y))
        for column, image in enumerate(row):
            sheet.paste(image, (left + column * (cell + MARGIN), y))
        y += height + MARGIN
    return sheet


def wrap_words(text: str, font: Any, width: int) -> list[str]:
    """Return the text as lines of at most `width` pixels; a word that is wider than that is broken."""
    lines: list[str] = []
    current = ""
    for word in text.split():
        joined = f"{current} {word}".strip()
        if font.getlength(joined) <= width:
            current = joined
            continue
        if current:
            lines.append(current)
        while len(word) > 1 and font.getlength(word) > width:
            fits = next((n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width), 1)
            lines.append(word[:fits])
            word = word[fits:]
        current = word
    return [*lines, current] if current else lines


def _words(text: str, font: Any, width: int) -> Image.Image:
    """Return the text drawn in black on white, wrapped to the width in pixels; no text has no height."""
    lines = wrap_words(text, font, width)
    line_height = math.ceil(font.getbbox("Ag|")[3]) + 2
    image = Image.new("RGB", (width, len(lines) * line_height), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((0, number * line_height), line, fill="black", font=font)
    return image


def _captioned(image: Image.Image, scale: int, words: Image.Image) -> Image.Image:
    """Return the enlarged picture with the words under it."""
    enlarged = image.convert("RGB").resize(
        (image.width * scale, image.height * scale), Image.Resampling.LANCZOS
    )
    sheet = Image.new("RGB", (words.width, enlarged.height + words.height), "white")
    sheet.paste(enlarged, (0, 0))
    sheet.paste(words, (0, enlarged.height))
    return sheet


def _label_width(labels: Sequence[str], font: Any, cell: int) -> int:
    """Return the width of the label column: as wide as the words, at most one and a half cells."""
    widest = max((math.ceil(font.getlength(label)) for label in labels), default=0)
    return min(widest, max(SMALLEST_CELL, cell * 3 // 2))


def _check_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    captions: Sequence[Sequence[str]],
) -> None:
    if not any(rows):
        raise ValueError("a grid needs at least one picture, got none")
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(f"expected one label a row, got {len(row_labels)} labels for {len(rows)} rows")
    if column_labels and len(column_labels) != max(len(row) for row in rows):
        raise ValueError(f"expected one label a column, got {len(column_labels)} labels")
    if captions and [len(line) for line in captions] != [len(row) for row in rows]:
        raise ValueError("expected one caption a picture")
