"""Adapters against full fine-tuning. `python -m benchmarks.quality --json OUT [--plot PNG] [--quick]`.

On toybox, held-out subjects times seeds: each method at its own best learning rate (searched on other
subjects first), scored by `dbadapter evaluate`'s figures with toybox's judges in six places that no
photograph shows. Every finished run is one line of `--runs`; what is there is not run again, so it may be
stopped and gone on with, and two processes may share the work (`--part 1/2`, `--part 2/2`).
"""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import report
from benchmarks.quality_figures import summary
from benchmarks.quality_plan import (
    METHODS,
    PRECISIONS,
    QUICK,
    SEEDS,
    SETTINGS,
    SUBJECTS,
    Work,
    part_of,
    recipe,
    share,
    works,
)
from benchmarks.quality_plot import pareto
from benchmarks.quality_runs import SCORES, best_rates, fresh, main_precision, searched
from benchmarks.quality_table import ENOUGH
from benchmarks.toybox_runs import (
    Bench,
    attempt,
    check_log,
    complain,
    finished,
    keep_sheet,
    read_runs,
    train,
)
from dbadapter.base import pick_device, pick_precision
from dbadapter.cli.group import Command
from dbadapter.errors import DbadapterError

RUNS = Path("benchmarks/results/quality.jsonl")
PATIENCE = 3600.0  # seconds without a run, of which one takes minutes
#: What `train` says, and scoring, where the rate was too high.
DIVERGED = (
    *("the loss is not finite", "the gradients overflow in fp16", "the training diverged"),
    "gave values that are not finite",
)


class DivergedError(click.ClickException):
    """Training came to nothing at its rate; the message says where."""


def run(bench: Bench, work: Work) -> dict[str, Any]:
    """Train and score; return the run's line. That a rate of the search diverges is a result too."""
    try:
        found = trained(bench, work)
    except DivergedError as error:
        if work.stage != "search":
            raise
        click.echo(f"{work.key}: {error.message}", err=True)
        found = {"diverged": error.message, **dict.fromkeys(SCORES, 0.0)}
    return {
        "key": work.key,
        "stage": work.stage,
        "method": work.method,
        "subject": work.subject.name,
        "seed": work.seed,
        "rate": work.rate,
        "precision": PRECISIONS[work.precision],
        "quick": work.quick,
        "recipe": recipe(work.method, quick=work.quick),
        **found,
        "threads": torch.get_num_threads(),
        "machine": report.machine(),
    }


def trained(bench: Bench, work: Work) -> dict[str, Any]:
    """Train and score; return the figures, and what it took.

    Raises:
        DivergedError: the loss, the weights or the pictures are not finite.
        ClickException: training failed.
    """
    folder, evaluator, before = bench.subject(work.subject)
    precision = PRECISIONS[work.precision]
    output = bench.work / work.subject.name / f"{work.method}-{work.seed}-{work.rate:g}-{precision}"
    rates = ("--learning-rate", str(work.rate), "--text-encoder-learning-rate", str(work.rate))
    options = ["--seed", str(work.seed), *rates, "--mixed-precision", work.precision]
    options += ["--checkpointing-steps", "0", *METHODS[work.method].options]
    options += ["--max-train-steps", "2", "--num-class-images", "2"] if work.quick else []
    try:
        cost = train(folder, output, work.subject.noun, options)
        made = output / ("model" if METHODS[work.method].full else "subject.safetensors")
        scores, figures = bench.score(work.subject, made)
    except (DbadapterError, click.ClickException) as error:
        if any(words in str(error) for words in DIVERGED):
            raise DivergedError(str(error)) from error
        raise
    finally:
        shutil.rmtree(output, ignore_errors=True)  # a whole model a run fills a disk
    keep_sheet(evaluator, before, {work.method: scores}, output.with_name(f"{output.name}.png"))
    return {"guidance_scale": evaluator.settings.guidance_scale, **figures, **asdict(cost)}


def _done(work: Work, path: Path, *, in_any: bool) -> bool:
    """Return whether a run is there already, in its own precision or in any."""
    keys = {run["key"] for run in fresh(read_runs(path), quick=work.quick)}
    wanted = PRECISIONS if in_any else (work.precision,)
    return any(replace(work, precision=precision).key in keys for precision in wanted)


def _wait_for_search(path: Path, methods: Sequence[str], seconds: float, *, quick: bool) -> None:
    """Wait until the other processes have done their share of the search, or so many `seconds` are over.

    Raises:
        ClickException: no run came for so long that no other process can be at work.
    """
    begun = last = time.perf_counter()
    size = -1
    while True:
        if (now := path.stat().st_size if path.exists() else 0) != size:
            done = searched(fresh(read_runs(path), quick=quick))
            missing = ", ".join(name for name in methods if name not in done)
            if missing and size < 0:
                click.echo(f"waiting for the other parts to search the rate of {missing}", err=True)
            size, last = now, time.perf_counter()
        if not missing or time.perf_counter() - begun > seconds:
            return
        if time.perf_counter() - last > PATIENCE:
            raise click.ClickException(
                f"no run came into {path} for {PATIENCE / 60:.0f} minutes: no other part seems to be at "
                f"work; without --part this one searches the rate of {missing} itself"
            )
        time.sleep(5)


@click.command(cls=Command)
@click.option("--json", "json_path", type=report.A_JSON, help="Where the summary goes.")
@click.option("--plot", "plot_path", type=report.AN_IMAGE, help="Fidelity against forgetting, as PNG.")
@click.option("--runs", "runs_path", type=report.A_LOG, default=RUNS, show_default=True,
              help="Finished runs, one a line; they are not run again.")  # fmt: skip
@click.option("--work-dir", type=report.A_FOLDER, help="Keeps a sheet of each run.  [temporary]")
@click.option("--stage", type=click.Choice(("search", "compare", "summary")),
              help="Only this one.  [default: the search, then the comparison]")  # fmt: skip
@click.option("--methods", help=f"Only these, with commas between, of {', '.join(METHODS)}.")
@click.option("--seeds", help=f"Only these, with commas between, of {', '.join(map(str, SEEDS))}.")
@click.option(
    "--mixed-precision",
    type=click.Choice(("auto", "no", "bf16")),
    default="auto",
    show_default=True,
    help="Of training, as `train` takes it; auto: what the machine has, and runs in any precision are not "
    "run again.",
)
@click.option("--part", default="1/1", show_default=True, help="Which share of the runs, for two processes.")
@click.option("--seconds", type=report.SECONDS, default=math.inf, help="Start no run after so long.")
@click.option(
    "--quick", is_flag=True, help="Two methods, one subject beside the search's, few steps: measures nothing."
)
def main(
    json_path: Path | None,
    plot_path: Path | None,
    runs_path: Path,
    work_dir: Path | None,
    stage: str | None,
    methods: str | None,
    seeds: str | None,
    mixed_precision: str,
    part: str,
    seconds: float,
    quick: bool,
) -> None:
    """Compare methods on toybox and print JSON."""
    process = part_of(part)
    if quick and runs_path.resolve() == RUNS.resolve():
        raise click.UsageError("--quick would put its lines beside the real ones: pass --runs as well")
    check_log(runs_path, written=stage != "summary")
    wanted = report.chosen(methods, METHODS, "methods")
    if quick:
        wanted = [method for method in wanted if method in ("adapter", "full")]
        if not wanted:
            raise click.UsageError("--quick runs adapter and full alone: name one of them in --methods")
    chosen = report.chosen(seeds, [str(seed) for seed in SEEDS], "seeds")
    precision = pick_precision(pick_device(), mixed_precision)
    label = PRECISIONS[precision]
    there = fresh(read_runs(runs_path), quick=quick)
    if stage != "summary" and label != (of_most := main_precision(there) or label):
        click.echo(
            f"{runs_path} holds runs in {of_most}; what is missing is run in {label}, its seconds and memory "
            "count nowhere",
            err=True,
        )
    start = time.perf_counter()
    made: Bench | None = None
    failed: list[str] = []
    unsearched: list[str] = []
    for name in ("search", "compare") if stage is None else (stage,):
        if name == "summary":
            break
        if name == "compare" and stage is None and process[1] > 1:
            _wait_for_search(runs_path, wanted, seconds - (time.perf_counter() - start), quick=quick)
        if time.perf_counter() - start > seconds:
            break
        rates = best_rates(fresh(read_runs(runs_path), quick=quick))
        work_list = list(works(name, rates, precision, wanted))
        if name == "compare":  # the search has one seed
            work_list = [work for work in work_list if str(work.seed) in chosen]
            unsearched = [method for method in wanted if method not in rates]
        if quick:
            work_list = [replace(work, quick=True) for work in work_list if work.seed == 0]
            work_list = [w for w in work_list if w.stage == "search" or w.subject == SUBJECTS[0]]
        mine = share(list(dict.fromkeys(work.subject for work in work_list)), process)
        for work in work_list:
            if work.subject not in mine:
                continue
            if _done(work, runs_path, in_any=name == "search" or mixed_precision == "auto"):
                continue
            if time.perf_counter() - start > seconds:
                break
            if made is None:
                folder = report.work_folder(work_dir, "quality")
                made = Bench(folder, QUICK if quick else SETTINGS)
            found = attempt(work.key, functools.partial(run, made, work), runs_path)
            if found is None:
                failed.append(work.key)
                continue
            took = f", {found['seconds']:.0f} s" if "seconds" in found else ""
            click.echo(f"{work.key}: score {found['score']:.3f}{took}", err=True)
    runs = finished(runs_path, lambda lines: fresh(lines, quick=quick), failed, unsearched)
    figures = summary(runs, quick=quick)
    shown = {name: of for name, of in figures["methods"].items() if quick or of["subjects"] >= ENOUGH}
    shown |= {
        f"{of['method']} at {of['learning_rate']:g}": of
        for of in figures["other_rates"]
        if of["subjects"] >= ENOUGH
    }
    report.write({"benchmark": "quality", "quick": quick, **figures, **report.of_runs(runs)}, json_path)
    if plot_path is not None and shown:
        report.save_image(pareto(shown), plot_path)
    elif plot_path is not None:
        click.echo(f"{plot_path} is not written: too few subjects to draw anything", err=True)
    complain(failed, unsearched)


if __name__ == "__main__":
    main()
