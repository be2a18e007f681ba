"""Does `train --select best` choose well? `python -m benchmarks.select --json OUT [--quick]`.

Runs that overfit (a constant rate, twice the steps) and runs at the defaults, each with `--select best` and
with the last checkpoint, from the same seed: until one ends early both take the very same steps. Both files
are scored with other seeds, and with more pictures, than the choice was made by (the judges are the same, and
the six test places are among the ten that the choice saw). Finished runs are lines of
`--runs`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import quality_plan, report
from benchmarks.quality_figures import difference_of
from benchmarks.quality_plan import PRECISIONS, QUICK, SETTINGS, SUBJECTS, part_of, share
from benchmarks.toybox_runs import (
    FIGURES,
    Bench,
    attempt,
    check_log,
    complain,
    finished,
    keep_sheet,
    read_runs,
    train,
)
from dbadapter.adapter_file import read_adapter
from dbadapter.base import pick_device, pick_precision
from dbadapter.cli.group import Command
from dbadapter.selection import FIRST, PATIENCE
from dbadapter.toybox.subjects import Subject

RUNS = Path("benchmarks/results/select.jsonl")
KINDS = {
    "overfitting": ("--lr-scheduler", "constant", "--max-train-steps", "600"),
    "default": (),
}
COMPARED = ("score", "likeness", "obedience", "class_kept", "class_spread", "class_obedience", *FIGURES)
_NUMBERS = (*COMPARED, "step", "seconds", "cpu_seconds")  # of either side


def run(bench: Bench, kind: str, subject: Subject, *, quick: bool) -> dict[str, Any]:
    """Train twice and score both files; return the line of the run."""
    folder, evaluator, before = bench.subject(subject)
    few = ["--max-train-steps", "3", "--checkpointing-steps", "3", "--num-class-images", "2"]
    options = [*KINDS[kind], *(few if quick else ())]
    found, drawn = {}, {}
    for select in ("best", "last"):
        output = bench.work / subject.name / f"{kind}-{select}"
        try:
            cost = train(folder, output, subject.noun, [*options, "--select", select])
            file = output / "subject.safetensors"
            drawn[select], figures = bench.score(subject, file)
            step = int(read_adapter(file).metadata["ss_max_train_steps"])
            found[select] = {"step": step, **figures, **asdict(cost)}
            if (curve := output / "selection.png").exists():
                curve.replace(bench.work / subject.name / f"{kind}-selection.png")
        finally:
            shutil.rmtree(output, ignore_errors=True)
    keep_sheet(evaluator, before, drawn, bench.work / subject.name / f"{kind}.png")
    return {
        "key": _key(kind, subject, quick=quick),
        "kind": kind,
        "subject": subject.name,
        "precision": PRECISIONS[pick_precision(pick_device())],
        "quick": quick,
        "recipe": recipe(kind, quick=quick),
        "threads": torch.get_num_threads(),
        "machine": report.machine(),
        **found,
    }


def _key(kind: str, subject: Subject, *, quick: bool) -> str:
    return f"{'quick/' if quick else ''}{kind}/{subject.name}"


def recipe(kind: str, *, quick: bool = False) -> str:
    """Return a short hash of what a kind's runs have in common: as `quality`'s, and how it is chosen."""
    told = [KINDS[kind], quality_plan.recipe("adapter", quick=quick), PATIENCE, FIRST]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def fresh(runs: Sequence[dict[str, Any]], *, quick: bool = False) -> list[dict[str, Any]]:
    """Return the runs that were made as their kind's are made now."""
    recipes = {kind: recipe(kind, quick=quick) for kind in KINDS}
    whole = [run for run in runs if _is_whole(run) and run.get("quick") is quick]
    return [run for run in whole if recipes.get(run["kind"]) == run["recipe"]]


def _is_whole(run: dict[str, Any]) -> bool:
    """Return whether a line read from a file has what a run has, in its kind."""
    if not all(isinstance(run.get(name), str) for name in ("key", "kind", "subject", "precision", "recipe")):
        return False
    sides = [run.get(select) for select in ("best", "last")]
    return all(
        isinstance(side, dict) and all(report.is_number(side.get(name)) for name in _NUMBERS)
        for side in sides
    )


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return each kind's means over the subjects, and the paired differences with their intervals."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        rows = [each for each in runs if each["kind"] == kind]
        if not rows:
            continue

        def of(select: str, name: str, rows: Sequence[dict[str, Any]] = rows) -> torch.Tensor:
            return torch.tensor([[float(row[select][name])] for row in rows])

        found[kind] = {
            "subjects": len(rows),
            "precisions": sorted({row["precision"] for row in rows}),
            **{
                select: {name: round(float(of(select, name).mean()), 4) for name in _NUMBERS}
                for select in ("best", "last")
            },
            "best_minus_last": {
                name: difference_of(of("best", name), of("last", name), name) for name in COMPARED
            },
        }
    return found


@click.command(cls=Command)
@click.option("--json", "json_path", type=report.A_JSON, help="Where the summary goes.")
@click.option("--runs", "runs_path", type=report.A_LOG, default=RUNS, show_default=True,
              help="Finished runs, one a line; they are not run again.")  # fmt: skip
@click.option("--work-dir", type=report.A_FOLDER, help="Keeps sheets and curves.  [temporary]")
@click.option(
    "--part", default="1/1", show_default=True, help="Which share of the subjects, for two processes."
)
@click.option("--seconds", type=report.SECONDS, default=math.inf, help="Start no run after so long.")
@click.option("--quick", is_flag=True, help="One subject, three steps: measures nothing.")
def main(
    json_path: Path | None,
    runs_path: Path,
    work_dir: Path | None,
    part: str,
    seconds: float,
    quick: bool,
) -> None:
    """Compare the chosen checkpoint with the last and print JSON."""
    if quick and runs_path.resolve() == RUNS.resolve():
        raise click.UsageError("--quick would put its lines beside the real ones: pass --runs as well")
    check_log(runs_path)
    subjects = share(SUBJECTS[:1] if quick else SUBJECTS, part_of(part))
    start, made, failed = time.perf_counter(), None, list[str]()
    for kind in list(KINDS)[:1] if quick else KINDS:
        for subject in subjects:
            there = {each["key"] for each in fresh(read_runs(runs_path), quick=quick)}
            if _key(kind, subject, quick=quick) in there:
                continue
            if time.perf_counter() - start > seconds:
                break
            if made is None:
                folder = report.work_folder(work_dir, "select")
                made = Bench(folder, QUICK if quick else SETTINGS)
            job = functools.partial(run, made, kind, subject, quick=quick)
            found = attempt(_key(kind, subject, quick=quick), job, runs_path)
            if found is None:
                failed.append(_key(kind, subject, quick=quick))
                continue
            scores = ", ".join(f"{name} {found[name]['score']:.3f}" for name in ("best", "last"))
            click.echo(f"{found['key']}: {scores}", err=True)
    runs = finished(runs_path, lambda lines: fresh(lines, quick=quick), failed)
    report.write({"benchmark": "select", "quick": quick, **summary(runs), **report.of_runs(runs)}, json_path)
    complain(failed)


if __name__ == "__main__":
    main()
