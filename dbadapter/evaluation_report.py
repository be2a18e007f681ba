"""An evaluation as one HTML file without outside references, which also holds all its numbers as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from dbadapter.errors import DataError
from dbadapter.report_figures import (
    candidates_of,
    differences_table,
    figure_plots,
    forgetting_plot,
    legend,
    prompt_tables,
    summary_table,
)
from dbadapter.report_html import Html, element, join, number, user_text
from dbadapter.report_pictures import (
    ReportPictures,
    class_panels,
    nearest_lists,
    photograph_strip,
    subject_grids,
    unrelated_table,
)
from dbadapter.report_style import STYLE

__all__ = ["ReportPictures", "finite", "read_report", "report_page"]

# Nothing may be loaded and nothing runs, whatever slipped into the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_DATA = "report"
_MOST_NAMES = 4  # in the heading
_LABELS = {
    "base": "base",
    "class_noun": "class noun",
    "photographs": "photographs",
    "image_encoder": "image encoder",
    "text_image_encoder": "judge of prompts",
}
_SECTIONS = {
    "summary": "Summary",
    "figures": "Every figure",
    "forgetting": "Fidelity against forgetting",
    "prompts": "Prompt by prompt",
    "differences": "Differences",
    "pictures": "Pictures of the subject",
    "class": "Pictures of the class",
    "unrelated": "Unrelated pictures",
    "nearest": "Nearest photographs",
    "settings": "Settings",
}


def report_page(report: Mapping[str, Any], pictures: ReportPictures) -> str:
    """Return a whole HTML page: tables, plots, pictures, settings, and the report itself as JSON.

    Args:
        report: as `evaluate` gives it, with "base" and "photographs" as the command adds them, and perhaps
            "versions" and "date".
        pictures: what `evaluate` drew; a page without pictures says that it has none.
    """
    noun, names = report["class_noun"], candidates_of(report)
    title = f"{', '.join(names) or 'base'}: {noun} on {report.get('base', 'its base')}"
    parts: dict[str, Html] = {
        "summary": join(
            element(
                "p",
                "Means, in brackets their intervals of 95 % (over prompts and seeds; of shares Wilson's).",
            ),
            summary_table(report),
            _left_out(report),
        ),
        "figures": join(
            element("p", "Dots are means, bars their intervals. The line and its band are the base's."),
            figure_plots(report),
        ),
        "forgetting": forgetting_plot(report),
        "prompts": join(
            element("p", "Each candidate's lowest prompt is in bold."),
            legend(report, ceiling=False),
            prompt_tables(report),
        ),
        "differences": differences_table(report),
        "pictures": join(
            element(
                "p",
                "The noun in each prompt stands for the candidate's own words for the subject (Settings).",
            ),
            photograph_strip(pictures),
            subject_grids(report, pictures),
        ),
        "class": join(
            element(
                "p", "Prompt: ", user_text(report["settings"]["class_prompt"]), ". The same seeds for all. "
            ),
            element(
                "p",
                "If a candidate's look like the subject, the class has become it; if they look like each "
                "other, diversity is lost.",
            ),
            class_panels(report, pictures),
        ),
        "unrelated": join(
            element(
                "p", "What else an adapter changed: the same prompts and seeds, from base and candidates."
            ),
            unrelated_table(report, pictures),
        ),
        "nearest": join(
            element(
                "p",
                "Left the picture, right its nearest photograph, and the cosine of their embeddings; the "
                "nearest first. Where pose and background are the photograph's too, it was memorised.",
            ),
            nearest_lists(report, pictures),
        ),
        "settings": _settings(report),
    }
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    sections = (
        element(
            "section",
            element("h2", _SECTIONS[key], id=f"{key}-title"),
            part,
            id=key,
            aria_labelledby=f"{key}-title",
        )
        for key, part in parts.items()
    )
    body = element(
        "body",
        element("header", _heading(report), _contents()),
        element("main", *sections),
        # type= makes it data, which no browser runs.
        element("script", _json(report), type="application/json", id=_DATA),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def read_report(path: str | Path) -> dict[str, Any]:
    """Return the report that an HTML file of `report_page` holds.

    Raises:
        DataError: the file cannot be read or holds none.
    """
    try:
        found = _Data()
        found.feed(Path(path).read_text(encoding="utf-8"))
        report = json.loads("".join(found.text))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} holds no report ({error}); give a file that `dbadapter evaluate --report` wrote"
        ) from error
    if not isinstance(report, dict):
        raise DataError(f"{path} holds no report; give a file that `dbadapter evaluate --report` wrote")
    return report


class _Data(HTMLParser):
    """Keeps the text of the element that holds the report."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script" and ("id", _DATA) in attrs

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.text.append(data)


def _heading(report: Mapping[str, Any]) -> Html:
    names, most = candidates_of(report), _MOST_NAMES
    more = [f"{len(names) - most} more"] if len(names) > most else []
    settings = report["settings"]
    facts = {
        "Subject": user_text(report["class_noun"]),
        "Base": user_text(str(report.get("base", "not told"))),
        "Image encoder": user_text(report["image_encoder"]),
        "Judge of prompts": user_text(report["text_image_encoder"]),
        "Prompts \u00d7 seeds": f"{len(settings['prompts'])} \u00d7 {settings['num_images_per_prompt']}",
        "Date": report.get("date"),
    }
    shown = (
        element("div", element("dt", key), element("dd", value)) for key, value in facts.items() if value
    )
    return join(
        element("p", "dbadapter evaluate", cls="kicker"),
        element("h1", _listed([*map(user_text, names[:most]), *more]) or "base"),
        element("dl", *shown, cls="facts"),
    )


def _contents() -> Html:
    links = (element("li", element("a", text, href=f"#{key}")) for key, text in _SECTIONS.items())
    return element("nav", element("ul", *links), aria_label="Contents")


def _settings(report: Mapping[str, Any]) -> Html:
    settings = dict(report["settings"])
    prompts, unrelated = settings.pop("prompts"), settings.pop("unrelated_prompts", [])
    if settings.get("guidance_scale", 0) is None:
        settings["guidance_scale"] = "the base's usual one"
    rows: dict[str, Any] = {label: report[key] for key, label in _LABELS.items() if key in report}
    if words := report.get("words_for_the_subject"):
        scored = {name: said for name, said in words.items() if name in report["figures"]}
        rows["words for the subject"] = _listed(user_text(f"{name}: {said}") for name, said in scored.items())
    if accuracy := report.get("encoder_accuracy"):
        rows["the judges' own accuracy on renders that they never saw"] = _listed(
            join(name, " ", number(value)) for name, value in accuracy.items()
        )
    rows |= {"photographs among themselves": number(report["subject_ceiling"])} | settings
    if versions := report.get("versions"):
        rows["versions"] = _listed(f"{name} {value}" for name, value in versions.items())
    rows |= {"date": report["date"]} if "date" in report else {}
    table = element(
        "table",
        element("caption", "Settings", cls="unseen"),
        element("tbody", *(_setting(key, value) for key, value in rows.items())),
        cls="settings",
    )
    lists = [
        element("div", element("h3", text), element("ol", *(element("li", user_text(each)) for each in of)))
        for text, of in (("Prompts of the subject", prompts), ("Unrelated prompts", unrelated))
        if of
    ]
    return join(
        element("div", table, cls="scroll", tabindex=0, role="region", aria_label="Settings"),
        element("div", *lists, cls="columns"),
        element(
            "p",
            "All of it as JSON is in this file's element with the id ",
            element("code", _DATA),
            "; ",
            element("code", "dbadapter.evaluation_report.read_report(path)"),
            " reads it.",
            cls="note",
        ),
    )


def _left_out(report: Mapping[str, Any]) -> Html | None:
    """Return who is missing and why; differences are then from the first that was scored."""
    left = report.get("left_out", {})
    if not left:
        return None
    items = (element("li", user_text(f"{name}: {reason}")) for name, reason in left.items())
    return join(element("p", "Left out, with the reason:"), element("ul", *items))


def _listed(parts: Iterable[Any]) -> Html:
    """Return parts with commas between them."""
    return join(*(join(", " if index else None, part) for index, part in enumerate(parts)))


def _setting(key: str, value: Any) -> Html:
    shown = value if isinstance(value, Html) else user_text(str(value))
    return element("tr", element("th", key.replace("_", " "), scope="row"), element("td", shown))


def _json(report: Mapping[str, Any]) -> Html:
    """Return a report as JSON that can stand in a script element: no "<" that could end it."""
    text = json.dumps(finite(report), ensure_ascii=True)
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def finite(value: Any) -> Any:
    """Return the same with null in the place of numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
