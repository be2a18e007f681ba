"""Which runs of `benchmarks.quality` count, and what its search found of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.quality_plan import METHODS, SEARCH_SUBJECTS, SEARCHED, recipe
from benchmarks.report import is_number

__all__ = [
    "COSTS",
    "DEFAULT",
    "FIGURES",
    "FULL",
    "SCORES",
    "Run",
    "best_rates",
    "forgotten",
    "fresh",
    "has",
    "main_precision",
    "mean",
    "search",
    "searched",
]

Run = Mapping[str, Any]
DEFAULT, FULL = "adapter", "full"
FIGURES = (
    "subject_fidelity",
    "likeness",
    "prompt_fidelity",
    "context_agreement",
    "noun_agreement",
    "prior_preservation",
    "class_kept",
    "diversity",
    "class_spread",
    "class_fidelity",
    "class_obedience",
    "forgotten",
    "drift",
    "unrelated_fidelity",
    "score",
    "nearest_photograph",
    "cpu_seconds",
    "peak_memory_mb",
    "bytes",
)
#: That a precision changes, and the processor.
COSTS = frozenset({"cpu_seconds", "peak_memory_mb"})
#: Without these, a seed, a rate and `SCORES` a line is no run.
_WORDS = ("stage", "method", "subject", "precision", "recipe")
#: What it tells of the base at the least.
_BEFORE = ("subject_fidelity", "prompt_fidelity", "noun_agreement")
#: What a search looks at; from 0, the worst, to 1.
SCORES = ("score", "likeness", "class_kept", "class_spread", "class_obedience")
#: What a comparison needs beside; seconds and memory may be missing.
_COMPARED = tuple(name for name in FIGURES if name != "forgotten" and name not in COSTS)


def fresh(runs: Sequence[Run], *, quick: bool = False) -> list[Run]:
    """Return the runs that were made as their method's are made now, and say in which precision.

    Args:
        runs: lines of the file, in which others may be: of a method that is no more, of before a setting.
        quick: those of `--quick` alone, which measure nothing; else none of them.
    """
    recipes = {method: recipe(method, quick=quick) for method in METHODS}
    whole = [run for run in runs if _is_whole(run) and run.get("quick") is quick]
    return [run for run in whole if recipes.get(run["method"]) == run["recipe"]]


def _is_whole(run: Run) -> bool:
    """Return whether a line read from a file has what a run has, in its kind."""
    if not all(isinstance(run.get(name), str) for name in _WORDS):
        return False
    if not all(is_number(run.get(name)) for name in ("seed", "rate", *SCORES)):
        return False
    if not all(0 <= run[name] <= 1 for name in SCORES):
        return False
    if any(name in run and not is_number(run[name]) for name in FIGURES):
        return False
    if run["stage"] != "compare":
        return True
    before = run.get("before")
    return (
        all(is_number(run.get(name)) for name in (*_COMPARED, "ceiling"))
        and isinstance(before, dict)
        and all(is_number(before.get(name)) for name in _BEFORE)
    )


def has(run: Run, figure: str) -> bool:
    """Return whether a run that counts tells a figure: some have no seconds and no memory."""
    return figure == "forgotten" or figure in run


def search(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, float]]]:
    """Return method -> rate -> mean score, likeness and what was forgotten, over its subjects.

    With `diverged`, the number of its runs that did, where there are any.

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
                if diverged := sum("diverged" in run for run in rows):
                    found[method][f"{rate:g}"]["diverged"] = diverged
    return found


def searched(runs: Sequence[Run]) -> set[str]:
    """Return the methods whose search is complete."""
    return {method for method, rates in search(runs).items() if len(rates) == len(SEARCHED[method])}


def best_rates(runs: Sequence[Run]) -> dict[str, float]:
    """Return method -> the rate with the best mean score, for those whose search is complete.

    No rate at which a run diverged is the best, and a method for which there is no other has none.
    """
    done, best = searched(runs), dict[str, float]()
    for method, rates in search(runs).items():
        scores = {rate: about["score"] for rate, about in rates.items() if "diverged" not in about}
        if method in done and scores:
            best[method] = float(max(scores, key=lambda rate: scores[rate]))
    return best


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
