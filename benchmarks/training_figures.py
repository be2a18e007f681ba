"""The arithmetic of `benchmarks.training`: records of runs in, figures, ratios and bars out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

__all__ = ["bars", "figures", "ratios", "rounded", "startup_figures"]

# What was to be reached: least steps per second (ours / theirs), most memory, least start-up (theirs / ours).
LEAST_SPEED = {"fp32": 1.3, "bf16": 1.3, "defaults": 2.4}
LEAST_SPEED_GPU = 2.0  # of the defaults, on a GPU at 512 pixels or more
MOST_MEMORY = 0.8
LEAST_STARTUP = 10.0


def figures(records: Sequence[Mapping[str, Any]], warmup: int) -> dict[str, Any]:
    """Return one side's figures over its runs: medians, and all values of each run.

    A step lasts from the end of the one before it to its own, loading of pictures and logging included.

    Args:
        records: of `benchmarks.training_peer`; times in seconds since the process was started.
        warmup: steps at the start that do not count, at least 1.
    """
    steps = [_differences(record["ends"])[warmup - 1 :] for record in records]
    startup = [record["begins"][0] for record in records]
    imports = [record["imports_seconds"] for record in records]
    on_gpu = records[0]["memory_of"] == "gpu"
    below = [0.0 if on_gpu else r["imports_memory_mb"] for r in records]
    memory = [r["peak_memory_mb"] - imported for r, imported in zip(records, below, strict=True)]
    before = [r["startup_peak_memory_mb"] - imported for r, imported in zip(records, below, strict=True)]
    first = [r["ends"][0] - r["begins"][0] for r in records if r["ends"]]
    counted = [value for run_steps in steps for value in run_steps]
    about = {
        "command": records[0]["command"],
        "threads": records[0]["threads"],
        "trained": records[0].get("trained"),
        "patches": records[0]["patches"],
        "startup_seconds": rounded(statistics.median(startup)),
        "startup_seconds_all": rounded(startup),
        "startup_without_imports_seconds": rounded(
            statistics.median(a - b for a, b in zip(startup, imports, strict=True))
        ),
        "imports_seconds_all": rounded(imports),
        "peak_memory_mb": rounded(statistics.median(memory)),
        "peak_memory_mb_all": rounded(memory),
        "peak_memory_before_first_step_mb": rounded(statistics.median(before)),
        "imports_memory_mb": rounded(statistics.median(r["imports_memory_mb"] for r in records)),
    }
    if not counted:
        return about
    return about | {
        "step_seconds": rounded(statistics.median(counted)),
        # Of all threads: on a busy machine it says more than the clock.
        "step_cpu_seconds": rounded(
            statistics.median(value for r in records for value in _differences(r["cpu"])[warmup - 1 :])
        ),
        "step_seconds_mean": rounded(statistics.fmean(counted)),
        "step_seconds_by_run": rounded([statistics.median(values) for values in steps]),
        "step_seconds_all": [rounded(values) for values in steps],
        "first_step_seconds_all": rounded(first),
    }


def ratios(peer: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return steps per second ours / theirs, memory ours / theirs and start-up theirs / ours."""
    pairs = zip(peer["step_seconds_by_run"], ours["step_seconds_by_run"], strict=True)
    return {
        "steps_per_second": rounded(peer["step_seconds"] / ours["step_seconds"]),
        "steps_per_second_by_round": rounded([theirs / own for theirs, own in pairs]),
        "steps_per_cpu_second": rounded(peer["step_cpu_seconds"] / ours["step_cpu_seconds"]),
        "peak_memory": rounded(ours["peak_memory_mb"] / peer["peak_memory_mb"]),
        "startup": rounded(peer["startup_seconds"] / ours["startup_seconds"]),
        "startup_without_imports": rounded(
            peer["startup_without_imports_seconds"] / ours["startup_without_imports_seconds"]
        ),
    }


def startup_figures(
    records: Mapping[str, Sequence[Mapping[str, Any]]], pictures: int, their_default: int, our_default: int
) -> dict[str, Any]:
    """Return both sides' start-up as measured, a picture's share of it, and what their defaults come to.

    Args:
        records: of the runs peer, peer_pictures_there, ours and ours_prior_source_instance.
        pictures: how many class pictures (or latents) were made.
        their_default, our_default: how many each side makes if not told.
    """
    sides = {name: figures(each, 1) for name, each in records.items()}
    out: dict[str, Any] = {"class_pictures": pictures, "runs": sides}
    ways = (
        ("peer", "peer_pictures_there", their_default),
        ("ours", "ours_prior_source_instance", our_default),
    )
    for name, without, default in ways:
        fixed = sides[without]["startup_seconds"]
        each = max(sides[name]["startup_seconds"] - fixed, 0.0) / pictures
        out[name] = {
            "seconds": sides[name]["startup_seconds"],
            "seconds_without_pictures": fixed,
            "seconds_a_picture": rounded(each),
            "default_class_pictures": default,
            "seconds_at_the_default": rounded(fixed + each * default),
        }
    out["ratios"] = {
        "startup": rounded(out["peer"]["seconds"] / out["ours"]["seconds"]),
        "startup_prior_source_instance": rounded(
            out["peer"]["seconds"] / out["ours"]["seconds_without_pictures"]
        ),
        # Not measured: the share of one picture times the number.
        "startup_at_the_defaults": rounded(
            out["peer"]["seconds_at_the_default"] / out["ours"]["seconds_at_the_default"]
        ),
        "startup_at_the_defaults_prior_source_instance": rounded(
            out["peer"]["seconds_at_the_default"] / out["ours"]["seconds_without_pictures"]
        ),
    }
    return out


def bars(bases: Mapping[str, Any], on_gpu: bool) -> list[dict[str, Any]]:
    """Return every bar that was measured: what it is about, the value, the limit, and whether it is met."""
    out: list[dict[str, Any]] = []

    def bar(base: str, table: str, ratio: str, value: float, limit: float, at_most: bool = False) -> None:
        met = value <= limit if at_most else value >= limit
        word = "at most" if at_most else "at least"
        about = {"base": base, "table": table, "ratio": ratio, "value": value}
        out.append(about | {"bar": f"{word} {limit}", "met": met})

    for base, tables in bases.items():
        for table, least in LEAST_SPEED.items():
            if table not in tables:
                continue
            found = tables[table]["ratios"]
            if table == "defaults" and on_gpu and tables["resolution"] >= 512:
                least = LEAST_SPEED_GPU
            bar(base, table, "steps_per_second", found["steps_per_second"], least)
            bar(base, table, "peak_memory", found["peak_memory"], MOST_MEMORY, at_most=True)
        if "startup" in tables:
            ratio = "startup_at_the_defaults"
            bar(base, "startup", ratio, tables["startup"]["ratios"][ratio], LEAST_STARTUP)
    return out


def rounded(value: Any) -> Any:
    """Return a number, or each of a list, with four decimals."""
    return [round(each, 4) for each in value] if isinstance(value, list) else round(float(value), 4)


def _differences(stamps: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(stamps)]
