"""The figures of `benchmarks.quality` from its runs: means over subjects and seeds, differences, targets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality_plan import METHODS, SEARCHED, SETTINGS, SUBJECTS
from benchmarks.quality_runs import (
    COSTS,
    DEFAULT,
    FIGURES,
    FULL,
    Run,
    best_rates,
    forgotten,
    fresh,
    has,
    main_precision,
    mean,
    search,
)
from benchmarks.report import is_number
from dbadapter import metrics

__all__ = ["difference_of", "summary", "table"]

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
        "unrelated_fidelity",
        "forgotten",
        "score",
    }
)

#: Shares of a run's pictures.
OF_PICTURES = frozenset(
    {
        *("prompt_fidelity", "context_agreement", "noun_agreement", "obedience"),
        *("class_fidelity", "class_obedience", "unrelated_fidelity"),
    }
)
PICTURES = SETTINGS.num_class_images  # as many as of the subject, and of other things


def _one_each(runs: Sequence[Run], main: str | None) -> list[Run]:
    """Return one run of each method, rate, subject and seed: that in the main precision if there is one."""
    found: dict[tuple[Any, ...], Run] = {}
    for run in sorted(runs, key=lambda run: run["precision"] != main):
        found.setdefault(_what(run), run)
    return list(found.values())


def _with_costs_in(runs: Sequence[Run], main: str | None) -> list[Run]:
    """Return runs of which those in another precision than the main one have no seconds and no memory."""
    return [
        run if run["precision"] == main else {name: of for name, of in run.items() if name not in COSTS}
        for run in runs
    ]


def _what(run: Run, *more: str) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("method", "rate", "subject", "seed", *more))


def _value(run: Run, figure: str) -> float:
    return forgotten(run) if figure == "forgotten" else float(run[figure])


def table(runs: Sequence[Run], method: str, figure: str) -> Tensor:
    """Return a method's figure, shape (subjects, seeds): the seeds that every subject has."""
    found = _shared([run for run in runs if run["method"] == method and has(run, figure)])
    rows = {(run["subject"], run["seed"]): _value(run, figure) for run in found}
    subjects, seeds = sorted({subject for subject, _ in rows}), sorted({seed for _, seed in rows})
    values = [[rows[subject, seed] for seed in seeds] for subject in subjects]
    return torch.tensor(values, dtype=torch.float64).reshape(len(subjects), len(seeds))


def _shared(runs: Sequence[Run]) -> list[Run]:
    """Return the runs at the seeds that every subject has."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(run["subject"], set()).add(run["seed"])
    shared = set.intersection(*seeds.values()) if seeds else set()
    return [run for run in runs if run["seed"] in shared]


def summary(runs: Sequence[Run], *, quick: bool = False) -> dict[str, Any]:
    """Return the search, means with intervals over subjects, and differences from both main methods.

    A run counts in the main precision where it was made in it, else in the other, which moves next to nothing
    (`apart`); seconds and memory are of the main precision alone. A method that has none of all its subjects
    at its own rate is given those of another (`costs_at_rate`), which the rate does not change.
    """
    methods: dict[str, Any] = {}
    everything = fresh(runs, quick=quick)
    best, precision = best_rates(everything), main_precision(everything)
    compared = [run for run in everything if run["stage"] == "compare"]
    counted = _with_costs_in(_one_each(compared, precision), precision)
    # A search that went on may have found another rate: runs at the one before it are told apart.
    runs = [run for run in counted if run["rate"] == best.get(run["method"])]
    elsewhere = [run for run in counted if run["rate"] != best.get(run["method"])]
    for name, method in METHODS.items():
        if not (figures := _figures(runs, name)):
            continue
        methods[name] = {"about": method.about, "options": list(method.options), **figures}
        if not figures.keys() >= COSTS:
            methods[name] |= _costs_elsewhere(elsewhere, name, figures["subjects"])
        for other in (DEFAULT, FULL):
            if name != other and (pairs := _pairs(runs, name, other)):
                methods[name][f"minus_{other}"] = pairs
    # Of the base each subject counts once, however many runs it has.
    first_of = list({run["subject"]: run for run in runs if run["precision"] == precision}.values())
    before = {
        name: mean([run["before"][name] for run in first_of])
        for name in (first_of[0]["before"] if first_of else ())
        if all(is_number(run["before"].get(name)) for run in first_of)
    }
    return {
        "compared": sum(about["subjects"] * about["seeds"] for about in methods.values()),
        "before": before | {"ceiling": mean([run["ceiling"] for run in first_of])},
        "search": search(everything),
        # Another rate beyond it may do better still.
        "best_at_the_edge": [
            name for name, rate in best.items() if rate in (min(SEARCHED[name]), max(SEARCHED[name]))
        ],
        "methods": methods,
        "other_rates": _other_rates(elsewhere, runs),
        "precision": precision,
        "other_precisions": {
            other: _in_other_precision([run for run in compared if run["precision"] == other], runs)
            for other in sorted({run["precision"] for run in everything} - {precision})
        },
        "apart": {name: _apart(compared, name) for name in ("precision", "seed")},
        "targets": _targets(runs, elsewhere),
    }


def _figures(runs: Sequence[Run], method: str) -> dict[str, Any]:
    """Return a method's means with intervals, of runs at one rate; nothing if there are none."""
    first = table(runs, method, "score")
    if not first.numel():
        return {}
    of_it = [run for run in runs if run["method"] == method]
    values = {figure: table(of_it, method, figure) for figure in FIGURES}
    return {
        "learning_rate": of_it[0]["rate"],
        "subjects": first.shape[0],
        "seeds": first.shape[1],
        "runs_in": dict(Counter(run["precision"] for run in _shared(of_it))),
        # Seconds of fewer subjects would stand beside figures of all.
        **{
            figure: _mean_of(of_runs, figure)
            for figure, of_runs in values.items()
            if of_runs.numel() and len(of_runs) == len(first)
        },
    }


def _costs_elsewhere(others: Sequence[Run], method: str, subjects: int) -> dict[str, Any]:
    """Return seconds and memory of the rate, of those not chosen, with the most seeds of so many subjects.

    Args:
        others: runs at such rates.
    Returns:
        The two with `costs_at_rate`; nothing where there are none.
    """
    rates = sorted({run["rate"] for run in others if run["method"] == method})
    there = [[run for run in others if run["rate"] == rate and run.keys() >= COSTS] for rate in rates]
    found = [about for runs in there if (about := _figures(runs, method)) and about["subjects"] == subjects]
    if not found:
        return {}
    best = max(found, key=lambda about: about["seeds"])
    return {**{name: best[name] for name in sorted(COSTS)}, "costs_at_rate": best["learning_rate"]}


def _other_rates(others: Sequence[Run], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return what methods reached at rates that their search did not choose, where runs were made there.

    Args:
        others: at such rates.
        runs: of all methods at their own, for the differences.
    """
    found = []
    for name in METHODS:
        for rate in sorted({run["rate"] for run in others if run["method"] == name}):
            there = [run for run in others if (run["method"], run["rate"]) == (name, rate)]
            about = {"method": name, **_figures(there, name)}
            renamed = [{**run, "method": "there"} for run in there]
            for other in (DEFAULT, FULL):
                if pairs := _pairs([*renamed, *runs], "there", other):
                    about[f"minus_{other}"] = pairs
            if pairs := _pairs([*renamed, *runs], "there", name):
                about["minus_own_rate"] = {name: of for name, of in pairs.items() if name not in COSTS}
            found.append(about)
    return found


def _in_other_precision(runs: Sequence[Run], counted: Sequence[Run]) -> dict[str, Any]:
    """Return how what methods reached in a precision differs from the main one, and from adapters.

    Args:
        runs: all in that precision.
        counted: those that count, at every method's own rate: in the main precision where there are any.
    """
    of_main = {_what(run): run for run in counted if runs and run["precision"] != runs[0]["precision"]}
    both = [run for run in runs if _what(run) in of_main]
    found: dict[str, Any] = {}
    for name in METHODS:
        if not (figures := _figures(both, name)):
            continue
        found[name] = figures
        if name != DEFAULT and (pairs := _pairs(both, name, DEFAULT)):
            found[name][f"minus_{DEFAULT}"] = pairs
        same = [{**run, "method": "the same"} for run in of_main.values() if run["method"] == name]
        found[name]["minus_main_precision"] = _pairs([*both, *same], name, "the same")
    return found


def _apart(runs: Sequence[Run], what: str) -> dict[str, Any]:
    """Return how far two runs lie apart that differ in `what` alone: the root mean square over such pairs.

    Of the methods and rates alone that were run in two precisions, so that the two kinds of pairs compare.

    Args:
        what: "precision" or "seed".
    """
    found_in = Counter(_what(run) for run in runs)  # in how many precisions
    in_two = {(run["method"], run["rate"]) for run in runs if found_in[_what(run)] > 1}
    alike: dict[tuple[Any, ...], list[Run]] = {}
    for run in (run for run in runs if (run["method"], run["rate"]) in in_two):
        alike.setdefault(_what({**run, what: None}, "precision"), []).append(run)
    pairs = [pair for each in alike.values() for pair in itertools.combinations(each, 2)]
    found: dict[str, Any] = {"pairs": len(pairs), "of": sorted({method for method, _ in in_two})}
    if pairs:
        for figure in FIGURES:
            if figure not in (*COSTS, "bytes"):
                squares = [(_value(one, figure) - _value(other, figure)) ** 2 for one, other in pairs]
                found[figure] = round((sum(squares) / len(squares)) ** 0.5, 4)
    return found


def _pairs(runs: Sequence[Run], name: str, against: str) -> dict[str, Any]:
    """Return the differences from another method, of subjects' means over the seeds that both have."""
    found = {}
    for figure in FIGURES:
        of_figure = [run for run in runs if has(run, figure)]
        both = _done(of_figure, name) & _done(of_figure, against)
        shared = [run for run in of_figure if (run["subject"], run["seed"]) in both]
        one, other = table(shared, name, figure), table(shared, against, figure)
        if one.shape == other.shape and one.numel():
            found[figure] = difference_of(one, other, figure)
    return found


def _targets(runs: Sequence[Run], others: Sequence[Run]) -> dict[str, Any]:
    """Return what was to be reached, and whether it was, over the subjects and seeds that both sides have.

    Args:
        runs: at every method's own rate.
        others: at other rates; without a prior those at the defaults' rate count first, because its own is
            one at which little is learned.
    """
    ours, full, bare = DEFAULT, FULL, "adapter-no-prior"
    shared = _done(runs, ours) & _done(runs, full)
    if not shared:
        return {}
    rate = next(run["rate"] for run in runs if run["method"] == ours)
    alike = [run for run in (*runs, *others) if run["rate"] == rate]
    runs_of_both = [run for run in runs if (run["subject"], run["seed"]) in shared]

    def of(method: str, figure: str) -> float:
        return float(table(runs_of_both, method, figure).mean())

    theirs, own = (_of_subjects(table(runs_of_both, method, "subject_fidelity")) for method in (full, ours))
    of_full = metrics.estimate(theirs, shares=False)
    difference = metrics.difference(theirs, own, shares=False)
    subjects = {subject for subject, _ in shared}
    return {
        "subjects": len(subjects),
        "runs": table(runs_of_both, ours, "score").numel(),
        "fidelity_at_least_full_minus_interval": {
            "adapter": round(float(own.mean()), 4),
            "full": _rounded(of_full),
            # Few runs have wide intervals, which hold anything.
            "met": float(own.mean()) >= of_full.low and len(subjects) == len(SUBJECTS),
            # Subject by subject is stricter: what makes all of them hard or easy falls out.
            "full_minus_adapter": _rounded(difference),
            "met_in_pairs": difference.low <= 0 and len(subjects) == len(SUBJECTS),
        },
        "forgetting_at_most_half_of_no_prior": _forgetting(alike, ours, bare),
        "the_same_at_its_own_rate": _forgetting(runs, ours, bare),
        "file_50_times_smaller": {
            "ratio": round(of(full, "bytes") / of(ours, "bytes"), 1),
            "met": of(full, "bytes") >= 50 * of(ours, "bytes"),
        },
        "memory_below_full": _memory([run for run in runs if has(run, "peak_memory_mb")], ours, full),
    }


def _memory(runs: Sequence[Run], ours: str, full: str) -> dict[str, Any]:
    """Return the ratio of the two's peaks over subjects and seeds that both have; nothing without any."""
    shared = _done(runs, ours) & _done(runs, full)
    if not shared:
        return {}
    runs = [run for run in runs if (run["subject"], run["seed"]) in shared]
    peaks = [float(table(runs, method, "peak_memory_mb").mean()) for method in (ours, full)]
    return {"ratio": round(peaks[0] / peaks[1], 3), "met": peaks[0] < peaks[1]}


def _forgetting(runs: Sequence[Run], ours: str, bare: str) -> dict[str, Any]:
    """Return what is lost of the class with and without a prior, over subjects and seeds that both have."""
    shared = _done(runs, ours) & _done(runs, bare)
    runs = [run for run in runs if (run["subject"], run["seed"]) in shared]
    if not shared:
        return {}

    def lost(method: str, part: str) -> float:
        value = float(table(runs, method, part).mean())
        return value if part == "forgotten" else 1 - value

    found: dict[str, Any] = {}
    for name, part in (("class_kept",) * 2, ("class_spread",) * 2, ("all", "forgotten")):
        with_it, without = round(lost(ours, part), 4), round(lost(bare, part), 4)
        found[name] = {"with": with_it, "without": without, "met": with_it <= without / 2}
    likeness = {
        key: float(table(runs, method, "likeness").mean())
        for key, method in (("with", ours), ("without", bare))
    }
    return found | {
        "likeness": {key: round(value, 4) for key, value in likeness.items()},
        "runs": table(runs, ours, "forgotten").numel(),
    }


def _done(runs: Sequence[Run], method: str) -> set[tuple[str, int]]:
    return {(run["subject"], run["seed"]) for run in runs if run["method"] == method}


def _of_subjects(values: Tensor) -> Tensor:
    """Return means over training seeds, shape (subjects, 1): a seed is nothing that subjects share."""
    return values.mean(1, keepdim=True)


def _mean_of(values: Tensor, figure: str) -> dict[str, float]:
    found = _unsure(values, figure, lambda of_subjects: metrics.estimate(of_subjects, shares=False))
    if figure in SHARES:
        found = replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
    return _rounded(found)


def difference_of(one: Tensor, other: Tensor, figure: str) -> dict[str, float]:
    """Return the mean paired difference of a figure, one - other, and its interval.

    Args:
        one: shape (subjects, seeds).
        other: the same subjects', with as many seeds or others.
    """
    beside = _of_subjects(other)
    return _rounded(_unsure(one, figure, lambda of_it: metrics.difference(of_it, beside, shares=False)))


def _unsure(values: Tensor, figure: str, estimate: Callable[[Tensor], metrics.Figure]) -> metrics.Figure:
    """Return an estimate of subjects' means; shares of pictures that leave no doubt get that of one picture.

    Every picture right, or each as with the other method, is no surer than with one picture of one run
    otherwise.
    """
    found = estimate(_of_subjects(values))
    if figure in OF_PICTURES and found.high - found.low < 1e-9:
        for otherwise in (-1, 1):
            near = _of_subjects(values)
            near[0] += otherwise / (PICTURES * values.shape[1])
            found = replace(
                found, low=min(found.low, estimate(near).low), high=max(found.high, estimate(near).high)
            )
    return found


def _rounded(figure: metrics.Figure) -> dict[str, float]:
    return {key: round(value, 4) for key, value in asdict(figure).items()}
