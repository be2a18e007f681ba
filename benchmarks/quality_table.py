"""Tables of `quality` and `select` in benchmarks/README.md, from their JSON; `make benchmarks-readme`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.findings import RESULTS

__all__ = ["apart", "chosen", "compared", "means", "others", "precisions", "rates", "searched"]

ENOUGH = 3  # subjects: of fewer nothing is known, and no row is shown
SELECT = RESULTS / "select.json"
FILE = RESULTS / "quality.json"
MEANS = {
    "likeness": "likeness",
    "context_agreement": "place shown",
    "prior_preservation": "class like the subject (PRES)",
    "diversity": "class diversity",
    "class_fidelity": "class is class",
    "forgotten": "forgotten of its class",
    "drift": "drift",
    "unrelated_fidelity": "others as asked",
    "score": "score",
}
_HEAD = ("method", "rate", "runs", *MEANS.values(), "CPU s", "peak MB", "file")
DIFFERENCES = (
    "score",
    "likeness",
    "context_agreement",
    "prior_preservation",
    "diversity",
    "forgotten",
    "drift",
    "unrelated_fidelity",
)


def means(path: Path = FILE) -> str:
    """Return every method's means as a Markdown table, in the plan's order, the base's row first."""
    found = json.loads(path.read_text(encoding="utf-8"))
    before = found["before"]
    base = [_value(before[name]) if name in before else "" for name in MEANS]
    rows = [["the base, untrained", "", "", *base, "", "", ""]]
    for name, about in found["methods"].items():
        if about["subjects"] >= ENOUGH:
            rows.append([f"`{name}`: {about['about']}", *_means_row(about, found["precision"])])
    return _table(_HEAD, rows)


def others(path: Path = FILE) -> str:
    """Return the means of runs at other rates than the search's best as a Markdown table."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [f"`{about['method']}`", *_means_row(about, found["precision"])]
        for about in found["other_rates"]
        if about["subjects"] >= ENOUGH
    ]
    return _table(_HEAD, rows)


def _means_row(about: Mapping[str, Any], main: str) -> list[str]:
    shown = [_with_interval(about[figure]) for figure in MEANS]
    costs = ("cpu_seconds", "peak_memory_mb")  # in another precision, on another processor, they'd be others
    cost = [_with_interval(about[figure], places=0) if figure in about else "" for figure in costs]
    if "costs_at_rate" in about:
        cost = [f"{each} at {about['costs_at_rate']:g}" for each in cost]
    runs = f"{about['subjects']} x {about['seeds']}" + _elsewhere(about, main)
    return [f"{about['learning_rate']:g}", runs, *shown, *cost, _size(about["bytes"]["value"])]


def _elsewhere(about: Mapping[str, Any], main: str) -> str:
    """Say how many of a method's runs are in another precision than the main one."""
    return "".join(f", {count} in {name}" for name, count in about["runs_in"].items() if name != main)


def compared(against: str = "adapter", path: Path = FILE) -> str:
    """Return each method's differences from `against` with their intervals as a Markdown table.

    Bold: the interval does not hold 0. Only subjects and seeds that both have are compared; beside `full`
    only its own variants.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for name, about in found["methods"].items():
        if against == "full" and not name.startswith("full-"):
            continue
        pairs = about.get(f"minus_{against}")
        if pairs and about["subjects"] >= ENOUGH:
            rows.append([f"`{name}`", str(pairs["score"]["count"]), *_differences(pairs)])
    return _table([f"minus `{against}`", "subjects", *(MEANS[name] for name in DIFFERENCES)], rows)


def rates(path: Path = FILE) -> str:
    """Return what another rate than the search's best changes, of the same seeds, as a Markdown table."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for about in found["other_rates"]:
        pairs = about.get("minus_own_rate")
        if pairs and about["subjects"] >= ENOUGH:
            own = found["methods"][about["method"]]["learning_rate"]
            label = f"`{about['method']}`: {about['learning_rate']:g} - {own:g}"
            rows.append([label, str(pairs["score"]["count"]), *_differences(pairs)])
    return _table(["", "subjects", *(MEANS[name] for name in DIFFERENCES)], rows)


def precisions(path: Path = FILE) -> str:
    """Return what another precision of training changes, over subjects and seeds of both, as a table."""
    found = json.loads(path.read_text(encoding="utf-8"))
    main, rows = found["precision"], []
    for precision, methods in found["other_precisions"].items():
        for name, about in methods.items():
            for key, label in (
                ("minus_main_precision", f"`{name}`: {precision} - {main}"),
                ("minus_adapter", f"{precision}: `{name}` - `adapter`"),
            ):
                if about["subjects"] >= ENOUGH and (pairs := about.get(key)):
                    runs = f"{about['subjects']} x {about['seeds']}"
                    rows.append([label, runs, *_differences(pairs)])
    return _table(["", "runs", *(MEANS[name] for name in DIFFERENCES)], rows)


def apart(path: Path = FILE) -> str:
    """Return how far two runs lie apart that differ in precision or in seed alone, as a Markdown table."""
    found = json.loads(path.read_text(encoding="utf-8"))["apart"]
    rows = [
        [f"another {name}", str(about["pairs"]), *(_value(about[figure], places=4) for figure in DIFFERENCES)]
        for name, about in found.items()
        if about["pairs"]
    ]
    return _table(["", "pairs", *(MEANS[name] for name in DIFFERENCES)], rows)


def searched(path: Path = FILE) -> str:
    """Return the search's means as a Markdown table, the best score of each method bold."""
    found = json.loads(path.read_text(encoding="utf-8"))["search"]
    rows = []
    for name, rates in found.items():
        best = max((about["score"] for about in rates.values() if "diverged" not in about), default=None)
        for rate, about in rates.items():
            score = _value(about["score"])
            if diverged := about.get("diverged", 0):
                score += f" ({diverged} diverged)"
            rows.append(
                [
                    f"`{name}`",
                    rate,
                    f"**{score}**" if about["score"] == best and not diverged else score,
                    _value(about["likeness"]),
                    _value(about["forgotten"]),
                ]
            )
    return _table(["method", "rate", "score", "likeness", "forgotten of its class"], rows)


def chosen(path: Path = SELECT) -> str:
    """Return what the chosen checkpoints reach beside the last ones, a figure a line."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for kind, about in found.items():
        if not (isinstance(about, dict) and "best_minus_last" in about):
            continue
        for name, difference in about["best_minus_last"].items():
            cells = [_value(about[side][name]) for side in ("best", "last")]
            rows.append([kind, name.replace("_", " "), *cells, _difference(difference)])
        for name in ("step", "seconds"):
            rows.append([kind, name, *(f"{about[side][name]:.0f}" for side in ("best", "last")), ""])
    return _table(["runs", "", "chosen", "last", "chosen - last"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(value: float, sign: str = "", places: int = 2) -> str:
    # + 0.0: no minus before nothing; but of differences -.000 is one that is below 0.
    rounded = (value if sign else round(value, places)) + 0.0
    text = f"{rounded:{sign}.{places}f}"
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text


def _with_interval(figure: Mapping[str, float], places: int = 2) -> str:
    value, low, high = (_value(figure[part], places=places) for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _differences(pairs: Mapping[str, Any]) -> list[str]:
    return [_difference(pairs[figure]) for figure in DIFFERENCES]


def _difference(figure: Mapping[str, float]) -> str:
    value, low, high = (_value(figure[part], "+", 3) for part in ("value", "low", "high"))
    text = f"{value} [{low}, {high}]"
    return f"**{text}**" if figure["low"] > 0 or figure["high"] < 0 else text


def _size(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
