"""Adapters against full fine-tuning. `python -m benchmarks.quality --json OUT [--plot PNG] [--quick]`.

On toybox, held-out subjects times seeds: each method at its own best learning rate (searched on other
subjects first), scored by `dbadapter evaluate`'s figures with toybox's judges in six places that no
photograph shows. Every finished run is one line of `--runs`; what is there is not run again, so it may be
stopped and gone on with, and two processes may share the work (`--part 1/2`, `--part 2/2`).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import report
from benchmarks.quality_figures import best_rates, fresh, main_precision, summary
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
from benchmarks.quality_table import ENOUGH
from benchmarks.toybox_runs import Bench, append, read_runs, sheet, train
from dbadapter.base import pick_device, pick_precision

RUNS = Path("benchmarks/results/quality.jsonl")


def run(bench: Bench, work: Work, *, quick: bool) -> dict[str, Any]:
    """Train and score; return the line of the run."""
    folder, evaluator, before = bench.subject(work.subject)
    precision = PRECISIONS[work.precision]
    output = bench.work / work.subject.name / f"{work.method}-{work.seed}-{work.rate:g}-{precision}"
    rates = ("--learning-rate", str(work.rate), "--text-encoder-learning-rate", str(work.rate))
    options = ["--seed", str(work.seed), *rates, "--mixed-precision", work.precision]
    options += ["--checkpointing-steps", "0", *METHODS[work.method].options]
    options += ["--max-train-steps", "2", "--num-class-images", "2"] if quick else []
    cost = train(folder, output, work.subject.noun, options)
    made = output / ("model" if METHODS[work.method].full else "subject.safetensors")
    scores, figures = bench.score(work.subject, made)
    sheet(evaluator, before, {work.method: scores}, output.with_name(f"{output.name}.png"))
    shutil.rmtree(output)  # a whole model a run fills a disk
    return {
        "key": work.key,
        "stage": work.stage,
        "method": work.method,
        "subject": work.subject.name,
        "seed": work.seed,
        "rate": work.rate,
        "precision": precision,
        "quick": quick,
        "recipe": recipe(work.method, quick=quick),
        "guidance_scale": evaluator.settings.guidance_scale,
        **figures,
        **asdict(cost),
        "threads": torch.get_num_threads(),
        "machine": report.machine(),
    }


def _done(work: Work, path: Path, *, in_any: bool) -> bool:
    """Return whether a run is there already, in its own precision or in any."""
    keys = {run["key"] for run in fresh(read_runs(path))}
    wanted = PRECISIONS if in_any else (work.precision,)
    return any(replace(work, precision=precision).key in keys for precision in wanted)


def _wait_for_search(runs: Path, methods: Sequence[str], start: float, seconds: float | None) -> None:
    """Wait until the other processes have done their share of the search, or `seconds` are over."""
    told = False
    while missing := [name for name in methods if name not in best_rates(fresh(read_runs(runs)))]:
        if seconds is not None and time.perf_counter() - start > seconds:
            return
        if not told:
            click.echo(f"waiting for the other parts to search the rate of {', '.join(missing)}", err=True)
        told = True
        time.sleep(5)


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where the summary goes.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Fidelity against forgetting.")
@click.option("--runs", "runs_path", type=click.Path(path_type=Path), default=RUNS, show_default=True,
              help="Finished runs, one a line; they are not run again.")  # fmt: skip
@click.option("--work-dir", type=click.Path(path_type=Path), help="Keeps a sheet of each run.  [temporary]")
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
@click.option("--seconds", type=float, help="Start no run after so long.")
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
    seconds: float | None,
    quick: bool,
) -> None:
    """Compare methods on toybox and print JSON."""
    process = part_of(part)
    if quick and runs_path == RUNS:
        raise click.UsageError("--quick would mix its lines with the real ones: pass --runs as well")
    wanted = methods.split(",") if methods else list(METHODS)
    if unknown := [method for method in wanted if method not in METHODS]:
        raise click.UsageError(f"unknown methods {', '.join(unknown)}; known: {', '.join(METHODS)}")
    if quick:
        wanted = [method for method in wanted if method in ("adapter", "full")]
    chosen = seeds.split(",") if seeds else [str(seed) for seed in SEEDS]
    if unknown := [seed for seed in chosen if seed not in map(str, SEEDS)]:
        raise click.UsageError(f"unknown seeds {', '.join(unknown)}; known: {', '.join(map(str, SEEDS))}")
    precision = pick_precision(pick_device(), mixed_precision)
    label = PRECISIONS[precision]
    if stage != "summary" and label != (of_most := main_precision(fresh(read_runs(runs_path))) or label):
        click.echo(
            f"{runs_path} holds runs in {of_most}; what is missing is run in {label}, its seconds and memory "
            "count nowhere",
            err=True,
        )
    start = time.perf_counter()
    made: Bench | None = None
    for name in ("search", "compare") if stage is None else (stage,):
        if name == "summary":
            break
        if name == "compare" and stage is None and process[1] > 1:
            _wait_for_search(runs_path, wanted, start, seconds)
        if seconds is not None and time.perf_counter() - start > seconds:
            break
        work_list = list(works(name, best_rates(fresh(read_runs(runs_path))), precision, wanted))
        if quick:
            work_list = [w for w in work_list if w.seed == 0]
            work_list = [w for w in work_list if w.stage == "search" or w.subject == SUBJECTS[0]]
        mine = share(list(dict.fromkeys(work.subject for work in work_list)), process)
        for work in work_list:
            if work.subject not in mine or str(work.seed) not in chosen:
                continue
            if _done(work, runs_path, in_any=name == "search" or mixed_precision == "auto"):
                continue
            if seconds is not None and time.perf_counter() - start > seconds:
                break
            if made is None:
                folder = work_dir or Path(tempfile.mkdtemp(prefix="benchmark-quality-"))
                made = Bench(folder, QUICK if quick else SETTINGS)
            found = run(made, work, quick=quick)
            append(runs_path, found)
            click.echo(f"{work.key}: score {found['score']:.3f}, {found['seconds']:.0f} s", err=True)
    figures = summary(read_runs(runs_path))
    shown = {name: of for name, of in figures["methods"].items() if quick or of["subjects"] >= ENOUGH}
    shown |= {
        f"{of['method']} at {of['learning_rate']:g}": of
        for of in figures["other_rates"]
        if of["subjects"] >= ENOUGH
    }
    if plot_path is not None and shown:
        plot_path.parent.mkdir(parents=True, exist_ok=True)
        pareto(shown).save(plot_path)
    report.write({"benchmark": "quality", "quick": quick, **figures}, json_path)


if __name__ == "__main__":
    main()
