"""The pictures of an evaluation as HTML: grids beside the photographs, the class, what else drifted."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dbadapter.report_figures import BASE, candidates_of, style_of
from dbadapter.report_html import Html, element, join, number, user_text
from dbadapter.svg import key_mark

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ReportPictures",
    "Tile",
    "class_panels",
    "encode_picture",
    "nearest_lists",
    "photograph_strip",
    "subject_grids",
    "unrelated_table",
]

LARGEST = 256  # pixels a side
_PIXELATED = 96  # up to here a picture is enlarged, and shown with its pixels
_QUALITY = 88
MOST_SEEDS = 4
MOST_CLASS = 24
MOST_NEAREST = 12
MOST_PHOTOGRAPHS = 24
_NONE = "No pictures were kept."


@dataclass(frozen=True)
class Tile:
    """One picture, as an address that holds it whole, and its size in pixels there."""

    address: str
    width: int
    height: int


@dataclass
class ReportPictures:
    """Collects the pictures of one evaluation, small, while it draws them.

    Attributes:
        photographs: of the subject.
        drawn: "base" and each candidate's name -> "subject", "class", "unrelated" -> pictures in the order
            prompts x seeds, the seed running fastest.
    """

    photographs: list[Tile] = field(default_factory=list)
    drawn: dict[str, dict[str, list[Tile]]] = field(default_factory=dict)

    def add_photographs(self, photographs: Sequence[Image]) -> None:
        """Take the subject's photographs."""
        self.photographs = [encode_picture(photograph) for photograph in photographs]

    def add(self, name: str, drawn: Mapping[str, Sequence[Image]]) -> None:
        """Take what one candidate drew; made for `evaluate(on_pictures=...)`."""
        self.drawn[name] = {part: [encode_picture(each) for each in of] for part, of in drawn.items()}

    def of(self, name: str, part: str) -> list[Tile]:
        """Return a candidate's pictures, none where it has none."""
        return self.drawn.get(name, {}).get(part, [])


def encode_picture(picture: Image) -> Tile:
    """Return a picture as a tile of at most 256 pixels a side: PNG where it is tiny, else JPEG."""
    small = picture.convert("RGB")
    small.thumbnail((LARGEST, LARGEST))
    written = io.BytesIO()
    if max(small.size) <= _PIXELATED:
        small.save(written, "PNG", optimize=True)
        kind = "png"
    else:
        small.save(written, "JPEG", quality=_QUALITY, optimize=True)
        kind = "jpeg"
    data = base64.b64encode(written.getvalue()).decode("ascii")
    return Tile(f"data:image/{kind};base64,{data}", *small.size)


def photograph_strip(pictures: ReportPictures) -> Html:
    """Return the photographs in a strip that stays in sight while one looks through the pictures."""
    shown = pictures.photographs[:MOST_PHOTOGRAPHS]
    more = len(pictures.photographs) - len(shown)
    tiles = [_image(tile, f"Photograph {number_} of the subject") for number_, tile in enumerate(shown, 1)]
    told = element("figcaption", "Photographs", f" (and {more} more)" if more else None)
    return element("figure", told, element("div", *tiles, cls="film"), cls="photographs")


def subject_grids(report: Mapping[str, Any], pictures: ReportPictures) -> Html:
    """Return a grid for every candidate, prompts as rows and seeds as columns; the base's last, folded."""
    noun = report["class_noun"]
    grids = [
        element(
            "section",
            element("h3", key_mark(style_of(report, name)), user_text(name)),
            _subject_grid(report, pictures.of(name, "subject"), name),
            cls="model",
        )
        for name in candidates_of(report)
    ]
    base = element(
        "details",
        element("summary", "What the base draws for the plain ", user_text(noun), " in the same prompts"),
        _subject_grid(report, pictures.of(BASE, "subject"), BASE),
    )
    return join(element("div", *grids, cls="models"), base if pictures.of(BASE, "subject") else None)


def class_panels(report: Mapping[str, Any], pictures: ReportPictures) -> Html:
    """Return pictures of the plain class, base and candidates side by side, seed by seed."""
    prompt = report["settings"]["class_prompt"]
    panels = []
    for name, figures in report["figures"].items():
        tiles = pictures.of(name, "class")[:MOST_CLASS]
        shown = (
            element("div", *(_image(tile, f"{prompt}, {name}") for tile in tiles), cls="tiles")
            if tiles
            else element("p", _NONE, cls="note")
        )
        told = element(
            "figcaption",
            element("strong", key_mark(style_of(report, name)), BASE if name == BASE else user_text(name)),
            *_said(figures, "prior_preservation", "class is subject"),
            *_said(figures, "diversity", "diversity"),
        )
        panels.append(element("figure", told, shown, cls="panel"))
    return element("div", *panels, cls="panels")


def unrelated_table(report: Mapping[str, Any], pictures: ReportPictures) -> Html:
    """Return pictures of unrelated prompts, the base's and the candidates' beside each other."""
    settings = report["settings"]
    prompts, seeds = settings.get("unrelated_prompts", []), settings["num_images_per_prompt"]
    names = [name for name in report["figures"] if pictures.of(name, "unrelated")]
    if not names or not prompts:
        return element("p", _NONE, cls="note")
    heads = [
        element(
            "th", key_mark(style_of(report, name)), BASE if name == BASE else user_text(name), scope="col"
        )
        for name in names
    ]
    rows = []
    for index, prompt in enumerate(prompts):
        cells = []
        for name in names:
            tiles = pictures.of(name, "unrelated")[index * seeds : (index + 1) * seeds][:MOST_SEEDS]
            images = [
                _image(tile, f"{prompt}, {name}, seed {settings['seed'] + i}") for i, tile in enumerate(tiles)
            ]
            cells.append(element("td", element("div", *images, cls="run")))
        rows.append(element("tr", element("th", user_text(prompt), scope="row"), *cells))
    head = element("thead", element("tr", element("th", "Prompt", scope="col"), *heads))
    return _grid("Unrelated prompts", head, element("tbody", *rows), cls="compare")


def nearest_lists(report: Mapping[str, Any], pictures: ReportPictures) -> Html:
    """Return each candidate's pictures beside their nearest photographs, the nearest pair first."""
    parts = []
    for name in candidates_of(report):
        entries = sorted(report["figures"][name].get("nearest", []), key=lambda entry: -entry["cosine"])
        pairs = [_pair(report, pictures, name, entry) for entry in entries[:MOST_NEAREST]]
        found = [pair for pair in pairs if pair is not None]
        shown = element("ol", *found, cls="pairs") if found else element("p", _NONE, cls="note")
        parts.append(join(element("h3", key_mark(style_of(report, name)), user_text(name)), shown))
    return join(*parts)


def _subject_grid(report: Mapping[str, Any], tiles: Sequence[Tile], name: str) -> Html:
    settings = report["settings"]
    seeds, first = settings["num_images_per_prompt"], settings["seed"]
    if not tiles:
        return element("p", _NONE, cls="note")
    columns = range(min(seeds, MOST_SEEDS))
    heads = [element("th", f"seed {first + i}", scope="col") for i in columns]
    rows = []
    for index, template in enumerate(settings["prompts"]):
        prompt = template.replace("{}", report["class_noun"])
        row = tiles[index * seeds : (index + 1) * seeds]
        cells = [
            element("td", _image(row[i], f"{prompt}, {name}, seed {first + i}") if i < len(row) else None)
            for i in columns
        ]
        rows.append(element("tr", element("th", user_text(prompt), scope="row"), *cells))
    head = element("thead", element("tr", element("th", "Prompt", scope="col"), *heads))
    return _grid(f"Pictures of {name}", head, element("tbody", *rows))


def _pair(
    report: Mapping[str, Any], pictures: ReportPictures, name: str, entry: Mapping[str, Any]
) -> Html | None:
    drawn, settings = pictures.of(name, "subject"), report["settings"]
    which, photograph = entry["picture"], entry["photograph"]
    if which >= len(drawn) or photograph >= len(pictures.photographs):
        return None
    row, column = divmod(which, settings["num_images_per_prompt"])
    prompts = settings["prompts"]
    prompt = prompts[row].replace("{}", report["class_noun"]) if row < len(prompts) else ""
    return element(
        "li",
        element(
            "figure",
            _image(drawn[which], f"{prompt}, {name}, seed {settings['seed'] + column}"),
            _image(pictures.photographs[photograph], f"Photograph {photograph + 1} of the subject"),
            element(
                "figcaption",
                element("strong", number(entry["cosine"])),
                element("span", user_text(prompt), f", seed {settings['seed'] + column}"),
                element("span", f"photograph {photograph + 1}"),
            ),
            cls="pair",
        ),
    )


def _said(figures: Mapping[str, Any], key: str, label: str) -> list[Html]:
    figure = figures.get(key)
    return [element("span", f"{label} ", number(figure["value"]))] if isinstance(figure, Mapping) else []


def _image(tile: Tile, alt: str) -> Html:
    small = max(tile.width, tile.height) <= _PIXELATED
    return element(
        "img",
        src=tile.address,
        alt=alt,
        width=tile.width,
        height=tile.height,
        decoding="async",
        cls="pixels" if small else None,
    )


def _grid(caption: str, *parts: Html, cls: str = "") -> Html:
    table = element("table", element("caption", caption, cls="unseen"), *parts, cls=f"pictures {cls}".strip())
    return element("div", table, cls="scroll images", tabindex=0, role="region", aria_label=caption)
