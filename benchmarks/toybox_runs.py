"""What the benchmarks on toybox's subjects share: a run of `dbadapter train`, prompts, scores, a sheet."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from benchmarks import report
from dbadapter.base import Base, load_base
from dbadapter.candidates import load_candidate, pipeline_of
from dbadapter.encoders import TOYBOX_JUDGES, load_encoder, load_prompt_judge
from dbadapter.errors import DbadapterError, is_out_of_memory, reason
from dbadapter.evaluation import Evaluator, Scores, Settings, find_references, load_references
from dbadapter.evaluation_prompts import Prompts, choose_prompts
from dbadapter.grid import grid
from dbadapter.score import overall
from dbadapter.toybox import names
from dbadapter.toybox.subjects import TEST_CONTEXTS, Subject, photographs

__all__ = [
    "FIGURES",
    "IDENTIFIER",
    "Bench",
    "Cost",
    "append",
    "attempt",
    "check_log",
    "check_renderer",
    "complain",
    "finished",
    "keep_sheet",
    "read_runs",
    "train",
]

IDENTIFIER = "sks"
FIGURES = (
    "subject_fidelity",
    "prompt_fidelity",
    "noun_agreement",
    "context_agreement",
    "class_fidelity",
    "prior_preservation",
    "diversity",
    "drift",
    "unrelated_fidelity",
)


@dataclass(frozen=True)
class Cost:
    """What a run took: seconds by the clock and of processors, and its own word of its peak memory in MB."""

    seconds: float
    cpu_seconds: float
    peak_memory_mb: float


def train(folder: Path, output: Path, noun: str, options: Sequence[str]) -> Cost:
    """Run `dbadapter train` on photographs in a process of its own; the file is output/subject.safetensors.

    Raises:
        ClickException: it failed; the message is its last line.
    """
    command = [sys.executable, "-m", "dbadapter", "train", "--instance-data-dir", str(folder)]
    command += ["--class-noun", noun, "--output-dir", str(output), "--name", "subject"]
    command += ["--identifier", IDENTIFIER, "--overwrite", *options]
    start, cpu = time.perf_counter(), _children()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        said = report.last_word(done.stderr, "no message")
        raise click.ClickException(f"training failed ({done.returncode}): {said}")
    # Its own word: what the system counts of a child begins at this process's size.
    peak = re.search(r"(\d+) MB at the peak", done.stdout)
    if peak is None:
        raise click.ClickException(f"training told no peak memory: {done.stdout.strip()}")
    return Cost(round(seconds, 1), round(_children() - cpu, 1), float(peak[1]))


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def prompts_of(noun: str) -> Prompts:
    """Return the six places of the test, and as many other things in the same places."""
    others = [other for other in names.NOUNS if other != noun][: len(TEST_CONTEXTS)]
    unrelated = tuple(f"a photo of a {o} {c}" for o, c in zip(others, TEST_CONTEXTS, strict=True))
    return choose_prompts(noun, tuple(f"a photo of {{}} {c}" for c in TEST_CONTEXTS), unrelated)


def check_renderer() -> None:
    """Pass if toybox's pictures can be drawn here.

    Raises:
        ClickException: numba is not installed; the message says what to install.
    """
    if find_spec("numba") is None:
        raise click.ClickException("numba draws the pictures: pip install 'dbadapter[pretrain]'")


class Bench:
    """The base, toybox's judges, and what was found of each subject before training."""

    def __init__(self, work: Path, settings: Settings) -> None:
        check_renderer()
        self.work, self.settings = work, settings
        self.base: Base = load_base("toybox")
        self.encoder, self.judge = load_encoder(TOYBOX_JUDGES), load_prompt_judge(TOYBOX_JUDGES)
        self._of: dict[str, tuple[Evaluator, Scores]] = {}

    def subject(self, subject: Subject) -> tuple[Path, Evaluator, Scores]:
        """Return the photographs' folder, the evaluator and the base's scores."""
        folder = self.work / subject.name / "photographs"
        if subject.name not in self._of:
            photographs(subject, folder)
            evaluator = Evaluator(
                load_references(find_references(folder), 64),
                prompts_of(subject.noun),
                subject.noun,
                self.encoder,
                self.judge,
                self.settings,
            )
            self._of[subject.name] = evaluator, evaluator.score_base(self.base.pipeline)
        return folder, *self._of[subject.name]

    def score(self, subject: Subject, made: Path) -> tuple[Scores, dict[str, Any]]:
        """Score an adapter's file or a tuned model's folder; return the scores, and their values by name."""
        _, evaluator, before = self.subject(subject)
        candidate = load_candidate(made, subject.noun, IDENTIFIER)
        with pipeline_of(self.base, candidate) as pipeline:
            scores = evaluator.score(pipeline, candidate.subject)
        ceiling = evaluator.ceiling()
        return scores, {
            "ceiling": ceiling,
            "before": {name: before.figures[name]["value"] for name in FIGURES},
            **{name: scores.figures[name]["value"] for name in FIGURES},
            "nearest_photograph": scores.figures["nearest_photograph"],
            **overall(scores.figures, before.figures, ceiling),
            "bytes": candidate.bytes,
        }


def keep_sheet(evaluator: Evaluator, before: Scores, found: dict[str, Scores], path: Path) -> None:
    """Keep a picture of the photographs, and of the test places and the class by the base and each model.

    One that cannot be written is told, and loses no figures.
    """
    seeds = evaluator.settings.num_images_per_prompt
    rows, notes = [list(evaluator.photographs)], ["photographs"]
    for name, scores in found.items():
        rows += [scores.drawn["subject"][seed::seeds] for seed in range(min(seeds, 2))]
        notes += [name, ""][: min(seeds, 2)]
    for name, scores in {"base": before, **found}.items():
        rows.append(scores.drawn["class"][: len(TEST_CONTEXTS)])
        notes.append(f"class, {name}")
    try:
        report.save_image(grid(rows, notes, list(TEST_CONTEXTS)), path)
    except click.ClickException as error:
        click.echo(error.message, err=True)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a file, of two with one key the later; none where there is no file.

    A line cut short by a kill, and whatever else is no run, is passed over. What a run's line holds beside
    its key is for the caller to check.
    """
    found = {}
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                run = json.loads(line)
            except ValueError:
                continue
            if isinstance(run, dict) and isinstance(run.get("key"), str):
                found[run["key"]] = run
    return list(found.values())


def check_log(path: Path, *, written: bool = True) -> None:
    """Pass if runs may be added to a file: there is none, it is empty, or it holds some, whole or cut.

    Args:
        written: whether any will be; else it is read alone.
    Raises:
        UsageError: it holds something else, or it cannot be written to.
    """
    if not path.exists():
        return
    begin = b'{"key": '
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    if not read_runs(path) and not all(begin.startswith(line[: len(begin)]) for line in lines):
        raise click.UsageError(
            f"--runs {path} holds no line of a run: name the benchmark's own file, or a new one"
        )
    if written:
        try:
            path.open("ab").close()
        except OSError as error:
            raise click.UsageError(f"--runs {path}: nothing can be added to it ({error.strerror})") from None


def finished(
    path: Path,
    fresh: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    failed: Sequence[str],
    unsearched: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the runs of a file that count.

    Args:
        fresh: which of its lines do.
        failed: keys of runs that were tried in vain.
        unsearched: methods without a rate.
    Raises:
        ClickException: there is none, of which nothing can be summed up: no earlier summary is replaced.
    """
    lines = read_runs(path)
    if not (runs := fresh(lines)):
        complain(failed, unsearched)
        what = f"none of its {len(lines)} lines counts" if lines else "it has no line of a run"
        raise click.ClickException(f"--runs {path}: {what}, so there is nothing to sum up or to write")
    return runs


def complain(failed: Sequence[str], unsearched: Sequence[str] = (), cure: str = "") -> None:
    """Pass if no run failed.

    Args:
        failed: keys of runs.
        unsearched: methods that were not compared, because their rate is not known.
        cure: how they are made after all.
    Raises:
        ClickException: there are some; it names them.
    """
    if failed:
        cure = cure or "the same command tries them again"
        raise click.ClickException(f"{len(failed)} failed and are missing: {', '.join(failed)}; {cure}")
    if unsearched:
        raise click.ClickException(
            f"no rate is known for {', '.join(unsearched)}: run --stage search or wait for the other --part; "
            "where training diverged at every rate, add lower ones to SEARCHED in benchmarks/quality_plan.py"
        )


def attempt(key: str, run: Callable[[], dict[str, Any]], path: Path | None = None) -> dict[str, Any] | None:
    """Do a run; one that fails is told and None comes back, so that the others go on.

    Args:
        key: what it is called.
        run: returns its figures.
        path: the file that they are added to as a line.
    Raises:
        ClickException: the line cannot be added. It is on standard error, so that nothing is lost.
    """
    try:
        found = run()
    except (DbadapterError, click.ClickException) as error:
        click.echo(f"{key}: {error}", err=True)
        return None
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        short = "out of memory: close other programs" if is_out_of_memory(error) else reason(error)
        click.echo(f"{key}: {short}", err=True)
        return None
    if path is not None:
        try:
            append(path, found)
        except OSError as error:
            click.echo(json.dumps(found), err=True)
            raise click.ClickException(
                f"{path}: nothing can be added to it ({error.strerror}); the line of {key} is above"
            ) from None
    return found


def append(path: Path, run: dict[str, Any]) -> None:
    """Add a run's line in one write, so that two processes may do so; a line that was cut stays alone.

    Raises:
        OSError: it cannot be written, or not whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        file.seek(max(file.tell() - 1, 0))
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"
        line = begin + json.dumps(run).encode() + b"\n"
        if file.write(line) != len(line):  # a disk that fills up takes a part, and says nothing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
