"""Which runs of `benchmarks.quality` count, and what its search found of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.quality_plan import METHODS, SEARCH_SUBJECTS, SEARCHED, recipe

__all__ = ["DEFAULT", "FULL", "Run", "best_rates", "forgotten", "fresh", "main_precision", "mean", "search"]

Run = Mapping[str, Any]
DEFAULT, FULL = "adapter", "full"
#: Without which a line is no run.
_NEEDED = frozenset(
    {
        *("stage", "method", "subject", "seed", "rate", "precision", "recipe"),
        *("score", "likeness", "class_kept", "class_spread", "class_obedience"),
    }
)


def fresh(runs: Sequence[Run], *, quick: bool = False) -> list[Run]:
    """Return the runs that were made as their method's are made now, and say in which precision.

    Args:
        runs: lines of the file, in which others may be: of a method that is no more, of before a setting.
        quick: those of `--quick` alone, which measure nothing; else none of them.
    """
    recipes = {method: recipe(method, quick=quick) for method in METHODS}
    whole = [run for run in runs if run.keys() >= _NEEDED and run.get("quick") is quick]
    made_now = list(recipes.items())  # a list: what a damaged line has for a method may have no hash
    return [run for run in whole if (run["method"], run["recipe"]) in made_now]


def search(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, float]]]:
    """Return method -> rate -> mean score, likeness and what was forgotten, over its subjects.

    Runs of every precision count: next to the rate it moves nothing (`other_precisions` in the summary).
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method, rates in SEARCHED.items():
        for rate in rates:
            rows = [
                run for run in runs if (run["stage"], run["method"], run["rate"]) == ("search", method, rate)
            ]
            if {run["subject"] for run in rows} >= {subject.name for subject in SEARCH_SUBJECTS}:
                found.setdefault(method, {})[f"{rate:g}"] = {
                    "score": _mean_over_subjects(rows, lambda run: float(run["score"])),
                    "likeness": _mean_over_subjects(rows, lambda run: float(run["likeness"])),
                    "forgotten": _mean_over_subjects(rows, forgotten),
                }
    return found


def best_rates(runs: Sequence[Run]) -> dict[str, float]:
    """Return method -> the rate with the best mean score, for those whose search is complete."""
    return {
        method: float(max(rates, key=lambda rate: rates[rate]["score"]))
        for method, rates in search(runs).items()
        if len(rates) == len(SEARCHED[method])
    }


def main_precision(runs: Sequence[Run]) -> str | None:
    """Return the precision that most runs of the defaults are in, or of all runs if there is none yet."""
    compared = [run for run in runs if (run["stage"], run["method"]) == ("compare", DEFAULT)]
    counts = Counter(run["precision"] for run in compared or runs)
    return counts.most_common(1)[0][0] if counts else None


def forgotten(run: Run) -> float:
    """Return how much of the class is lost: 1 - (class_kept * class_spread * class_obedience)^(1/3)."""
    return 1 - float(run["class_kept"] * run["class_spread"] * run["class_obedience"]) ** (1 / 3)


def _mean_over_subjects(runs: Sequence[Run], figure: Callable[[Run], float]) -> float:
    values: dict[str, list[float]] = {}
    for run in runs:
        values.setdefault(run["subject"], []).append(figure(run))
    return mean([sum(each) / len(each) for each in values.values()])


def mean(values: Sequence[float]) -> float:
    """Return the mean to four places, 0 of nothing."""
    return round(sum(values) / len(values), 4) if values else 0.0
