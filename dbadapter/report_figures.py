"""The numbers of an evaluation as HTML: the table, a plot for every figure, the differences. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbadapter.metrics import is_known
from dbadapter.report_html import Html, bytes_text, element, join, number, signed, user_text
from dbadapter.svg import Axis, Mark, Point, Rule, axis_of, axis_strip, key_mark, mark_style, scatter, strip

__all__ = [
    "BASE",
    "FIGURES",
    "Kind",
    "candidates_of",
    "differences_table",
    "figure_plots",
    "figures_of",
    "forgetting_plot",
    "label_of",
    "legend",
    "prompt_tables",
    "style_of",
    "summary_table",
]

BASE = "base"
NOT_MEASURED = "not measured"
_FORGETTING, _FIDELITY = "prior_preservation", "subject_fidelity"


@dataclass(frozen=True)
class Kind:
    """What a figure is called, what it says, and whether more of it is better (None: neither)."""

    label: str
    meaning: str
    more_is_better: bool | None
    has_ceiling: bool = False


# In the order in which they are shown; what is not here goes last, under its own name.
FIGURES: dict[str, Kind] = {
    _FIDELITY: Kind(
        "Subject fidelity",
        "How much the pictures of the subject are like its photographs: the mean cosine of their embeddings.",
        True,
        has_ceiling=True,
    ),
    "prompt_fidelity": Kind(
        "Prompt fidelity", "How well the pictures show what their prompts ask for.", True
    ),
    "noun_agreement": Kind("Right noun", "The share of pictures that show the noun of their prompt.", True),
    "context_agreement": Kind(
        "Right place", "The share of pictures that show the place of their prompt.", True
    ),
    "class_fidelity": Kind(
        "Class fidelity",
        "How well pictures of the plain class show it. Broken ones are not like the subject, and unlike each "
        "other: only this tells them.",
        True,
    ),
    _FORGETTING: Kind(
        "Class is subject",
        "Prior preservation: how much pictures of the plain class are like the subject's photographs. Much "
        "above the base, everything of the class turns into the subject.",
        False,
        has_ceiling=True,
    ),
    "diversity": Kind(
        "Class diversity",
        "How unlike pictures of the plain class are to each other. Below the base, they have grown alike.",
        True,
    ),
    "drift": Kind(
        "Drift",
        "How far unrelated pictures have moved from those that the base draws for the same seed.",
        False,
    ),
    "unrelated_fidelity": Kind(
        "Unrelated fidelity", "How well unrelated pictures still show what their prompts ask for.", True
    ),
    "nearest_photograph": Kind(
        "Nearest photograph",
        "The largest cosine of any picture and any photograph. Above that of any two photographs, look below "
        "whether one was copied.",
        None,
    ),
}
_BESIDE = ("bytes", "nearest", "per_prompt")


def candidates_of(report: Mapping[str, Any]) -> list[str]:
    """Return the candidates' names in their order, without the base."""
    return [name for name in report["figures"] if name != BASE]


def figures_of(report: Mapping[str, Any]) -> list[str]:
    """Return the keys of all figures that a report holds: those of `FIGURES` first, in that order."""
    found = {key for of in report["figures"].values() for key in of if key not in _BESIDE}
    found |= {entry["figure"] for entry in report["differences"]}
    return [key for key in FIGURES if key in found] + sorted(found - FIGURES.keys())


def label_of(key: str) -> str:
    """Return what people call a figure."""
    return FIGURES[key].label if key in FIGURES else key.replace("_", " ").capitalize()


def style_of(report: Mapping[str, Any], name: str) -> str:
    """Return the classes of a candidate's marks; the base has its own."""
    return BASE if name == BASE else mark_style(candidates_of(report).index(name))


def legend(report: Mapping[str, Any], *, ceiling: bool) -> Html:
    """Return which mark is whose."""
    entries = [
        element("li", key_mark(style_of(report, name)), user_text(name) if name != BASE else BASE)
        for name in report["figures"]
    ]
    if ceiling:
        entries.append(element("li", element("span", cls="key-line"), "photographs among themselves"))
    return element("ul", *entries, cls="legend")


def summary_table(report: Mapping[str, Any]) -> Html:
    """Return all figures of the base and of every candidate with their intervals, the ceiling, the bytes."""
    keys = figures_of(report)
    heads = [element("th", label_of(key), _direction(key), scope="col") for key in keys]
    rows = []
    for name, figures in report["figures"].items():
        mark = key_mark(style_of(report, name))
        head = join(mark, BASE if name == BASE else user_text(name))
        size = figures.get("bytes")
        rows.append(
            element(
                "tr",
                element("th", head, scope="row"),
                *(element("td", _figure_text(figures.get(key, NOT_MEASURED))) for key in keys),
                element("td", "\N{EM DASH}" if size is None else bytes_text(size)),
            )
        )
    ceiling = number(report["subject_ceiling"])
    rows.append(
        element(
            "tr",
            element("th", element("span", cls="key-line"), "photographs", scope="row"),
            *(element("td", ceiling if key == _FIDELITY else "\N{EM DASH}") for key in keys),
            element("td", "\N{EM DASH}"),
            cls="ceiling-row",
        )
    )
    return _scrolling(
        "All figures",
        element("thead", element("tr", element("th", "Model", scope="col"), *heads, _bytes_head())),
        element("tbody", *rows),
    )


def figure_plots(report: Mapping[str, Any]) -> Html:
    """Return a plot for every figure: candidates below one another, base and ceiling as lines."""
    return element("div", *(_figure_plot(report, key) for key in figures_of(report)), cls="cards")


def forgetting_plot(report: Mapping[str, Any]) -> Html:
    """Return subject fidelity against forgetting, with the intervals of both as crosses."""
    points = []
    for name, figures in report["figures"].items():
        x, y = _triple(figures.get(_FORGETTING)), _triple(figures.get(_FIDELITY))
        if x and y:
            said = f"{name}: class is subject {x[1]:.3f}, subject fidelity {y[1]:.3f}"
            points.append(Point(x, y, style_of(report, name), said))
    if not points:
        return element("p", "Not measured.", cls="note")
    before = _triple(report["figures"].get(BASE, {}).get(_FORGETTING))
    ceiling = report["subject_ceiling"]
    plot = scatter(
        points,
        "class is subject (less is better)",
        "subject fidelity (more is better)",
        x_rules=[Rule(before[1], BASE)] if before else [],
        y_rules=[Rule(ceiling, "ceiling")] if math.isfinite(ceiling) else [],
        label="; ".join(point.title for point in points) + f"; photographs among themselves {ceiling:.3f}",
    )
    told = element(
        "figcaption",
        element(
            "p", "Best is at the top, as far left as the base: the subject is there, the class still its own."
        ),
        element("p", "At the top and to the right, every picture of the class has become the subject."),
        legend(report, ceiling=True),
    )
    return element("figure", plot, told, cls="card split")


def prompt_tables(report: Mapping[str, Any]) -> Html:
    """Return, for subject and prompt fidelity, what every prompt reached: one sees which of them fails."""
    noun, prompts = report["class_noun"], report["settings"]["prompts"]
    tables = []
    for key in (_FIDELITY, "prompt_fidelity"):
        means = {
            name: of["per_prompt"][key]
            for name, of in report["figures"].items()
            if len(of.get("per_prompt", {}).get(key, ())) == len(prompts)
        }
        if means:
            tables.append(_prompt_table(report, key, means, [text.replace("{}", noun) for text in prompts]))
    return join(*tables) if tables else element("p", "Not measured.", cls="note")


def differences_table(report: Mapping[str, Any]) -> Html:
    """Return every candidate minus the first, and whether the interval leaves out zero."""
    entries = report["differences"]
    if not entries:
        return element("p", "There is one candidate only, so nothing to compare.", cls="note")
    axes = {
        key: axis_of([0.0, *(part for e in entries if e["figure"] == key for part in _triple(e) or ())])
        for key in {entry["figure"] for entry in entries}
    }
    rows = [
        _difference_row(entry, axes[entry["figure"]], style_of(report, entry["of"]))
        for key in figures_of(report)
        for entry in entries
        if entry["figure"] == key
    ]
    numbers, words = ("Difference", "Interval of 95 %"), ("Below or above zero", "Reading")
    heads = [
        *(element("th", text, scope="col", cls="words") for text in ("Figure", "Candidate")),
        *(element("th", text, scope="col") for text in numbers),
        *(element("th", text, scope="col", cls="words") for text in words),
    ]
    return join(
        element("p", "Each candidate minus ", user_text(entries[0]["minus"]), ", paired by prompt and seed."),
        _scrolling(
            "Differences",
            element("thead", element("tr", *heads)),
            element("tbody", *rows),
        ),
        element(
            "p",
            "Where the interval holds zero, nothing was shown. One interval in twenty misses by chance.",
            cls="note",
        ),
    )


def _difference_row(entry: Mapping[str, Any], axis: Axis, style: str) -> Html:
    value, low, high, key = entry["value"], entry["low"], entry["high"], entry["figure"]
    shown = low > 0 or high < 0
    known = is_known(low, high)
    mark = Mark(value, style, low, high) if known else Mark(value, style)
    said = f"interval from {low:+.3f} to {high:+.3f}" if known else "interval unknown"
    plot = strip(
        axis,
        [mark],
        [Rule(0.0, "zero")],
        f"{value:+.3f}, {said}, against zero",
    )
    interval = (signed(low), " to ", signed(high)) if known else ("unknown: too few",)
    return element(
        "tr",
        element("th", label_of(key), scope="row"),
        element("td", key_mark(style), user_text(entry["of"]), cls="words"),
        element("td", signed(value)),
        element("td", *interval, cls="range"),
        element("td", plot, cls="plot"),
        element("td", _verdict(key, value, shown) if known else "not known", cls="words"),
        cls="shown" if shown else None,
    )


def _verdict(key: str, value: float, shown: bool) -> Html:
    if not shown:
        return element("span", "no difference shown", cls="verdict")
    better = FIGURES[key].more_is_better if key in FIGURES else None
    if better is None:
        return element("span", "more" if value > 0 else "less", cls="verdict")
    good = (value > 0) == better
    return element(
        "span", "\u25b2 better" if good else "\u25bc worse", cls=f"verdict {'good' if good else 'bad'}"
    )


def _figure_plot(report: Mapping[str, Any], key: str) -> Html:
    kind = FIGURES.get(key)
    values = {name: _triple(of.get(key)) for name, of in report["figures"].items()}
    rules, lines = [], []
    before = values.get(BASE)
    if before:
        rules.append(Rule(before[1], BASE, before[0], before[2]))
        lines.append(element("span", element("span", cls="key-line base"), "base ", number(before[1])))
    ceiling = report["subject_ceiling"]
    if kind and kind.has_ceiling and math.isfinite(ceiling):
        rules.append(Rule(ceiling, "ceiling"))
        lines.append(
            element("span", element("span", cls="key-line"), "photographs among themselves ", number(ceiling))
        )
    nearest = report.get("photographs_nearest", math.nan)
    if key == "nearest_photograph" and math.isfinite(nearest):
        rules.append(Rule(nearest, "ceiling"))
        among = "the nearest photographs among themselves "
        lines.append(element("span", element("span", cls="key-line"), among, number(nearest)))
    numbers = [part for value in values.values() if value for part in value]
    axis = axis_of([*numbers, *(rule.value for rule in rules)])
    rows = []
    for name in candidates_of(report):
        value, style = values[name], style_of(report, name)
        head = element("span", key_mark(style), user_text(name), cls="name")
        figure = report["figures"][name].get(key, NOT_MEASURED)
        plot = None
        if value:
            low, at, high = value
            plot = strip(axis, [Mark(at, style, low, high)], rules, f"{name}: {at:.3f}{_ends_said(figure)}")
        rows.append(element("li", element("div", head, _figure_text(figure), cls="row-head"), plot))
    return element(
        "figure",
        element("h3", label_of(key)),
        element("p", kind.meaning if kind else "", " " if kind else "", _direction_words(key), cls="meaning"),
        element("ul", *rows, cls="rows"),
        axis_strip(axis) if numbers else None,
        element("figcaption", *lines, cls="lines") if lines else None,
        cls="card",
    )


def _prompt_table(
    report: Mapping[str, Any], key: str, means: Mapping[str, Sequence[float]], prompts: Sequence[str]
) -> Html:
    axis = axis_of([value for row in means.values() for value in row], most_ticks=3)
    least = {name: min(row) for name, row in means.items() if name != BASE and min(row) < max(row)}
    rows = []
    for index, prompt in enumerate(prompts):
        marks = [
            Mark(row[index], style_of(report, name), title=f"{name}: {row[index]:.3f}")
            for name, row in means.items()
        ]
        said = "; ".join(mark.title for mark in marks)
        cells = [
            element("td", number(row[index]), cls="least" if row[index] == least.get(name) else None)
            for name, row in means.items()
        ]
        rows.append(
            element(
                "tr",
                element("th", user_text(prompt), scope="row"),
                element("td", strip(axis, marks, label=said), cls="plot"),
                *cells,
            )
        )
    heads = [
        element(
            "th", key_mark(style_of(report, name)), BASE if name == BASE else user_text(name), scope="col"
        )
        for name in means
    ]
    first = element("th", "Prompt", scope="col")
    ticks = element(
        "tr", element("td"), element("td", axis_strip(axis), cls="plot"), *(element("td") for _ in means)
    )
    table = _scrolling(
        f"{label_of(key)} of every prompt",
        element(
            "thead",
            element("tr", first, element("th", "Mean over the seeds", scope="col", cls="words"), *heads),
        ),
        element("tbody", *rows),
        element("tfoot", ticks),
    )
    return join(element("h3", label_of(key)), table)


def _figure_text(figure: Any) -> Html:
    """Return a figure with its interval; "not measured" where there is none."""
    if isinstance(figure, Mapping):
        low, high = figure["low"], figure["high"]
        ends = (number(low), ", ", number(high)) if is_known(low, high) else ("unknown: too few",)
        return element(
            "span", number(figure["value"]), " ", element("span", "[", *ends, "]", cls="range"), cls="figure"
        )
    if isinstance(figure, int | float):
        return element("span", number(figure), cls="figure")
    return element("span", figure, cls="missing")


def _ends_said(figure: Any) -> str:
    if not isinstance(figure, Mapping):
        return ""
    low, high = figure["low"], figure["high"]
    return f", interval from {low:.3f} to {high:.3f}" if is_known(low, high) else ", interval unknown"


def _triple(figure: Any) -> tuple[float, float, float] | None:
    """Return (low, value, high) of a measured figure; all three are one where no interval is known."""
    if isinstance(figure, Mapping):
        value, ends = float(figure["value"]), (float(figure["low"]), float(figure["high"]))
        # Of too few there is a dot without a bar, which would leave no room for the others.
        found = (ends[0], value, ends[1]) if is_known(*ends) else (value,) * 3
        return found if all(map(math.isfinite, found)) else None
    if isinstance(figure, int | float) and math.isfinite(figure):
        return (float(figure),) * 3
    return None


def _direction(key: str) -> Html | None:
    better = FIGURES[key].more_is_better if key in FIGURES else None
    if better is None:
        return None
    return element("span", "\u2191 more is better" if better else "\u2193 less is better", cls="direction")


def _direction_words(key: str) -> Html | None:
    better = FIGURES[key].more_is_better if key in FIGURES else None
    return None if better is None else element("strong", "More is better." if better else "Less is better.")


def _bytes_head() -> Html:
    return element("th", "On disk", element("span", "\u2193 less is better", cls="direction"), scope="col")


def _scrolling(caption: str, *parts: Html) -> Html:
    """Return a table in a box that scrolls by itself, with the keyboard too."""
    table = element("table", element("caption", caption, cls="unseen"), *parts)
    return element("div", table, cls="scroll", tabindex=0, role="region", aria_label=caption)
