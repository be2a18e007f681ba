"""Adapters against full fine-tuning. `python -m benchmarks.quality --json OUT [--plot PNG] [--quick]`.

On toybox, held-out subjects times seeds: each method at its own best learning rate (searched on other
subjects first), scored by `dbadapter evaluate`'s figures with toybox's judges in six places that no
photograph shows. Every finished run is one line of `--runs`; what is there is not run again, so it may be
stopped and gone on with, and two processes may share the work (`--part 1/2`, `--part 2/2`).
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks import report
from benchmarks.quality_figures import best_rates, plot, summary
from benchmarks.quality_plan import METHODS, SUBJECTS, Work, works
from dbadapter.base import Base, load_base
from dbadapter.encoders import TOYBOX_JUDGES, load_encoder, load_prompt_judge
from dbadapter.evaluation import Evaluator, Scores, Settings, load_candidate, load_photographs, overall
from dbadapter.evaluation_prompts import Prompts, choose_prompts
from dbadapter.grid import grid
from dbadapter.lora import apply
from dbadapter.toybox import names
from dbadapter.toybox.subjects import TEST_CONTEXTS, Subject, photographs

IDENTIFIER = "sks"
RUNS = Path("benchmarks/results/quality.jsonl")
FIGURES = ("subject_fidelity", "prompt_fidelity", "prior_preservation", "diversity", "drift")
SETTINGS = Settings(num_images_per_prompt=3, num_class_images=18, num_inference_steps=20, batch_size=9)
QUICK = Settings(num_images_per_prompt=1, num_class_images=2, num_inference_steps=2, batch_size=9)


def prompts_of(noun: str) -> Prompts:
    """Return the six places of the test, and as many other things in the same places."""
    others = [other for other in names.NOUNS if other != noun][: len(TEST_CONTEXTS)]
    unrelated = tuple(f"a photo of a {o} {c}" for o, c in zip(others, TEST_CONTEXTS, strict=True))
    return choose_prompts(noun, tuple(f"a photo of {{}} {c}" for c in TEST_CONTEXTS), unrelated)


class Bench:
    """The base, the judges, and what was found of each subject before training."""

    def __init__(self, work: Path, settings: Settings, quick: bool) -> None:
        self.work, self.settings, self.quick = work, settings, quick
        self.base: Base = load_base("toybox")
        self.encoder, self.judge = load_encoder(TOYBOX_JUDGES), load_prompt_judge(TOYBOX_JUDGES)
        self._of: dict[str, tuple[Evaluator, Scores]] = {}

    def subject(self, subject: Subject) -> tuple[Path, Evaluator, Scores]:
        """Return the photographs' folder, the evaluator and the base's scores."""
        folder = self.work / subject.name / "photographs"
        if subject.name not in self._of:
            photographs(subject, folder)
            evaluator = Evaluator(
                load_photographs(folder, 64),
                prompts_of(subject.noun),
                subject.noun,
                self.encoder,
                self.judge,
                self.settings,
            )
            self._of[subject.name] = evaluator, evaluator.score_base(self.base.pipeline)
        return folder, *self._of[subject.name]

    def run(self, work: Work) -> dict[str, Any]:
        """Train and score; return the line of the run."""
        folder, evaluator, before = self.subject(work.subject)
        output = self.work / work.subject.name / f"{work.method}-{work.seed}-{work.rate:g}"
        cost = train(folder, output, work, quick=self.quick)
        made = output / ("model" if METHODS[work.method].full else "subject.safetensors")
        candidate = load_candidate(made, work.subject.noun, IDENTIFIER)
        if candidate.adapter is None:
            scores = evaluator.score(load_base(str(made)).pipeline, candidate.subject)
        else:
            apply(self.base.pipeline, {candidate.adapter: 1.0})
            scores = evaluator.score(self.base.pipeline, candidate.subject)
            apply(self.base.pipeline, {})
        sheet(evaluator, before, scores, output.with_suffix(".png"))
        shutil.rmtree(output)  # a whole model a run fills a disk
        ceiling = evaluator.ceiling()
        named = dict.fromkeys((*FIGURES, "context_agreement", "noun_agreement"))
        return {
            "key": work.key,
            "stage": work.stage,
            "method": work.method,
            "subject": work.subject.name,
            "seed": work.seed,
            "rate": work.rate,
            "quick": self.quick,
            "ceiling": ceiling,
            "before": {name: before.figures[name]["value"] for name in named},
            **{name: scores.figures[name]["value"] for name in named},
            "nearest_photograph": scores.figures["nearest_photograph"],
            **overall(scores.figures, before.figures, ceiling),
            "bytes": candidate.bytes,
            **cost,
            "machine": report.machine(),
        }


def train(folder: Path, output: Path, work: Work, *, quick: bool) -> dict[str, float]:
    """Run `dbadapter train` in a process of its own; return what it took."""
    command = [sys.executable, "-m", "dbadapter", "train", "--instance-data-dir", str(folder)]
    command += ["--class-noun", work.subject.noun, "--output-dir", str(output), "--name", "subject"]
    command += ["--identifier", IDENTIFIER, "--overwrite", "--seed", str(work.seed)]
    command += ["--learning-rate", str(work.rate), "--text-encoder-learning-rate", str(work.rate)]
    command += ["--checkpointing-steps", "0", *METHODS[work.method].options]
    if quick:
        command += ["--max-train-steps", "2", "--num-class-images", "2"]
    start, cpu = time.perf_counter(), _children()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{work.key}: training failed: {done.stderr.strip().splitlines()[-1]}")
    peak = re.search(r"(\d+) MB at the peak", done.stdout)
    if peak is None:
        raise click.ClickException(f"{work.key}: training told no peak memory: {done.stdout.strip()}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(_children() - cpu, 1),
        "peak_memory_mb": float(peak[1]),
    }


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def sheet(evaluator: Evaluator, before: Scores, scores: Scores, path: Path) -> None:
    """Keep a picture of the photographs, the test places (two seeds), the class before and after."""
    seeds, shown = evaluator.settings.num_images_per_prompt, scores.drawn["subject"]
    rows = [list(evaluator.photographs), shown[::seeds], shown[1::seeds] or shown]
    rows += [before.drawn["class"][:6], scores.drawn["class"][:6]]
    notes = ["photographs", "subject", "", "class before", "class after"]
    grid(rows, notes, list(TEST_CONTEXTS)).save(path)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a file; a line cut short by a kill is passed over."""
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                run = json.loads(line)
            except ValueError:
                continue
            found[run["key"]] = run
    return list(found.values())


def append(path: Path, run: dict[str, Any]) -> None:
    """Add a run's line in one write, so that two processes may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(run).encode() + b"\n")


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where the summary goes.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Fidelity against forgetting.")
@click.option("--runs", "runs_path", type=click.Path(path_type=Path), default=RUNS, show_default=True,
              help="Finished runs, one a line; they are not run again.")  # fmt: skip
@click.option("--work-dir", type=click.Path(path_type=Path), help="Keeps a sheet of each run.  [temporary]")
@click.option("--stage", type=click.Choice(("search", "compare", "summary")),
              help="Only this one.  [default: the search, then the comparison]")  # fmt: skip
@click.option("--methods", help=f"Only these, with commas between, of {', '.join(METHODS)}.")
@click.option("--part", default="1/1", show_default=True, help="Which share of the runs, for two processes.")
@click.option("--seconds", type=float, help="Start no run after so long.")
@click.option("--quick", is_flag=True, help="One subject, two methods, few steps: measures nothing.")
def main(
    json_path: Path | None,
    plot_path: Path | None,
    runs_path: Path,
    work_dir: Path | None,
    stage: str | None,
    methods: str | None,
    part: str,
    seconds: float | None,
    quick: bool,
) -> None:
    """Compare methods on toybox and print JSON."""
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise click.UsageError(f"--part must be like 1/2, got {part!r}")
    if quick and runs_path == RUNS:
        raise click.UsageError("--quick would mix its lines with the real ones: pass --runs as well")
    wanted = methods.split(",") if methods else list(METHODS)
    if unknown := [method for method in wanted if method not in METHODS]:
        raise click.UsageError(f"unknown methods {', '.join(unknown)}; known: {', '.join(METHODS)}")
    start = time.perf_counter()
    made: Bench | None = None
    for name in ("search", "compare") if stage is None else (stage,):
        if name == "summary":
            break
        work_list = list(works(name, best_rates(read_runs(runs_path)), wanted))
        if quick:
            work_list = [w for w in work_list if w.method in ("adapter", "full") and w.seed == 0]
            subject = SUBJECTS[0] if name == "compare" else work_list[0].subject
            work_list = [w for w in work_list if w.subject == subject]
        for work in work_list[int(number) - 1 :: int(parts)]:
            if work.key in {run["key"] for run in read_runs(runs_path)}:
                continue
            if seconds is not None and time.perf_counter() - start > seconds:
                break
            made = made or Bench(
                work_dir or Path(tempfile.mkdtemp(prefix="benchmark-quality-")),
                QUICK if quick else SETTINGS,
                quick,
            )
            run = made.run(work)
            append(runs_path, run)
            click.echo(f"{work.key}: score {run['score']:.3f}, {run['seconds']:.0f} s", err=True)
    runs = read_runs(runs_path)
    if plot_path is not None:
        plot(runs, plot_path)
    report.write({"benchmark": "quality", "quick": quick, **summary(runs)}, json_path)


if __name__ == "__main__":
    main()
