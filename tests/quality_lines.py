"""Lines of `benchmarks.quality`'s runs, made up, for the tests of its arithmetic and commands."""

from __future__ import annotations

from typing import Any

from benchmarks.quality_plan import PRECISIONS, SEARCH_SUBJECTS, SEARCHED, recipe
from benchmarks.quality_runs import FIGURES
from dbadapter.base import pick_device, pick_precision

PRECISION = PRECISIONS[pick_precision(pick_device())]  # of this machine: the quick runs find their search
OTHER = next(name for name in PRECISIONS.values() if name != PRECISION)
RATES = {name: rates[0] for name, rates in SEARCHED.items()}


def line(
    method: str, subject: str, seed: int, value: float, stage: str = "compare", **more: Any
) -> dict[str, Any]:
    names = ("subject_fidelity", "prompt_fidelity", "noun_agreement")
    rate = RATES[method]
    return {
        "key": f"{'quick/' if more.get('quick') else ''}{stage}/{method}/{subject}/seed-{seed}"
        f"/rate-{more.get('rate', rate):g}/{more.get('precision', PRECISION)}",
        "stage": stage,
        "method": method,
        "subject": subject,
        "seed": seed,
        "rate": rate,
        "precision": PRECISION,
        "quick": False,
        "recipe": recipe(method, quick=more.get("quick", False)),
        "ceiling": 0.9,
        "before": dict.fromkeys(names, 0.1),
        **dict.fromkeys((name for name in FIGURES if name != "forgotten"), value),
        **more,
    }


def searches(**more: Any) -> list[dict[str, Any]]:
    """A complete search of every method, whose first rate is the best."""
    return [
        line(name, subject.name, 0, 0.5, "search", rate=rate, score=0.9 if rate == rates[0] else 0.5, **more)
        for name, rates in SEARCHED.items()
        for rate in rates
        for subject in SEARCH_SUBJECTS
    ]
