"""The figures of `benchmarks.quality` from its runs: best rates, means over subjects and seeds, the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality_plan import METHODS, SEARCH_SUBJECTS, SEARCHED
from dbadapter import metrics

__all__ = ["best_rates", "forgotten", "search", "summary"]

#: Between 0 and 1 by their definition: so are the ends of their intervals.
SHARES = frozenset(
    {
        "likeness",
        "prompt_fidelity",
        "context_agreement",
        "noun_agreement",
        "class_kept",
        "class_spread",
        "class_fidelity",
        "class_obedience",
        "forgotten",
        "score",
    }
)

Run = Mapping[str, Any]
DEFAULT = "adapter"
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
    "score",
    "nearest_photograph",
    "cpu_seconds",
    "peak_memory_mb",
    "bytes",
)


def search(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return searched method -> rate -> mean score over the search's subjects."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run["stage"] == "search":
            found.setdefault(run["method"], {}).setdefault(f"{run['rate']:g}", []).append(run["score"])
    return {
        method: {rate: round(sum(rates[rate]) / len(rates[rate]), 4) for rate in sorted(rates, key=float)}
        for method, rates in found.items()
    }


def best_rates(runs: Sequence[Run]) -> dict[str, float]:
    """Return searched method -> the rate with the best mean score, for those whose search is complete."""
    done = {(run["method"], run["rate"], run["subject"]) for run in runs if run["stage"] == "search"}
    complete = [
        method
        for method, rates in SEARCHED.items()
        if {(method, rate, subject.name) for rate in rates for subject in SEARCH_SUBJECTS} <= done
    ]
    found = search(runs)
    return {method: float(max(found[method], key=lambda rate: found[method][rate])) for method in complete}


def forgotten(run: Run) -> float:
    """Return how much of the class is lost: 1 - (class_kept * class_spread * class_obedience)^(1/3)."""
    return 1 - float(run["class_kept"] * run["class_spread"] * run["class_obedience"]) ** (1 / 3)


def table(runs: Sequence[Run], method: str, figure: str) -> Tensor:
    """Return a method's figure, shape (subjects, seeds): the seeds that every subject has."""
    rows: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["method"] == method:
            value = forgotten(run) if figure == "forgotten" else run[figure]
            rows.setdefault(run["subject"], {})[run["seed"]] = float(value)
    if not rows:
        return torch.zeros(0, 0)
    shared = sorted(set.intersection(*(set(row) for row in rows.values())))
    return torch.tensor([[rows[subject][seed] for seed in shared] for subject in sorted(rows)])


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the search, means with intervals over subjects and seeds, and differences from the default."""
    methods: dict[str, Any] = {}
    best = best_rates(runs)
    searched = search(runs)
    # A search that went on may have found another rate: runs at the one before it count no more.
    runs = [
        run
        for run in runs
        if run["stage"] == "compare" and run["rate"] == best.get(METHODS[run["method"]].rate_of, run["rate"])
    ]
    for name, method in METHODS.items():
        first = table(runs, name, "score")
        if not first.numel():
            continue
        figures = {figure: _mean_of(table(runs, name, figure), figure) for figure in FIGURES}
        methods[name] = {
            "about": method.about,
            "options": list(method.options),
            "learning_rate": sorted({run["rate"] for run in runs if run["method"] == name}),
            "subjects": first.shape[0],
            "seeds": first.shape[1],
            **figures,
        }
        if name != DEFAULT and (pairs := _pairs(runs, name)):
            methods[name]["minus_default"] = pairs
    before = {
        name: _mean([run["before"][name] for run in runs]) for name in (runs[0]["before"] if runs else ())
    }
    return {
        "compared": len(runs),
        "before": before | {"ceiling": _mean([run["ceiling"] for run in runs])},
        "search": searched,
        # Another rate beyond it may do better still.
        "best_at_the_edge": [
            name for name, rate in best.items() if rate in (min(SEARCHED[name]), max(SEARCHED[name]))
        ],
        "methods": methods,
        "targets": _targets(methods),
    }


def _pairs(runs: Sequence[Run], name: str) -> dict[str, Any]:
    """Return the differences from the default over the subjects and seeds that both have."""

    def of(method: str) -> set[tuple[str, int]]:
        return {(run["subject"], run["seed"]) for run in runs if run["method"] == method}

    both = of(name) & of(DEFAULT)
    shared = [run for run in runs if (run["subject"], run["seed"]) in both]
    if not both:
        return {}
    found = {}
    for figure in FIGURES:
        one, other = table(shared, name, figure), table(shared, DEFAULT, figure)
        if one.shape == other.shape and one.numel():
            found[figure] = _rounded(metrics.difference(one, other))
    return found


def _targets(methods: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was to be reached, and whether it was."""
    if not {"adapter", "full", "adapter-no-prior"} <= methods.keys():
        return {}
    ours, full, bare = (methods[name] for name in ("adapter", "full", "adapter-no-prior"))
    if "minus_default" not in full:
        return {}
    difference = full["minus_default"]["subject_fidelity"]
    kept = {
        part: (1 - ours[part]["value"], 1 - bare[part]["value"]) for part in ("class_kept", "class_spread")
    } | {"all": (ours["forgotten"]["value"], bare["forgotten"]["value"])}
    return {
        "fidelity_at_least_full_minus_interval": {
            "full_minus_adapter": difference,
            "met": difference["low"] <= 0,
        },
        "forgetting_at_most_half_of_no_prior": {
            part: {
                "with": round(ours_lost, 4),
                "without": round(bare_lost, 4),
                "met": ours_lost <= bare_lost / 2,
            }
            for part, (ours_lost, bare_lost) in kept.items()
        },
        "file_50_times_smaller": {
            "ratio": round(full["bytes"]["value"] / ours["bytes"]["value"], 1),
            "met": full["bytes"]["value"] >= 50 * ours["bytes"]["value"],
        },
        "memory_below_full": {
            "ratio": round(ours["peak_memory_mb"]["value"] / full["peak_memory_mb"]["value"], 3),
            "met": ours["peak_memory_mb"]["value"] < full["peak_memory_mb"]["value"],
        },
    }


def _mean_of(values: Tensor, figure: str) -> dict[str, float]:
    found = metrics.estimate(values)
    if figure in SHARES:
        found = replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
    return _rounded(found)


def _rounded(figure: metrics.Figure) -> dict[str, float]:
    return {key: round(value, 4) for key, value in asdict(figure).items()}


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
