"""How fast, and in how much memory, does `dbadapter train` train beside diffusers' own script?

`python -m benchmarks.training --peer-script train_dreambooth_lora.py --json OUT [--quick]` runs both on the
same base, photographs, class pictures and job, by turns, each run in a process of its own
(`benchmarks.training_peer`), and prints figures of both, their ratios and the bars that were set.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import report
from benchmarks.training_figures import bars, figures, ratios, rounded, startup_figures
from benchmarks.training_runs import RANK, ROOT, Job, base_folder, pictures, run
from dbadapter import toybox
from dbadapter.cli.group import Command
from dbadapter.presets import PRESETS

BASES = ("toybox", "sd15")
TABLES = ("fp32", "bf16", "defaults", "startup")
# What a run with our defaults takes; with one picture a step, toybox's are mostly Python.
BATCHES = {"toybox": PRESETS["toybox"].train_batch_size, "sd15": PRESETS["sd1"].train_batch_size}
# Words that only this script has, of all those in diffusers' examples/dreambooth.
_MARKS = ("DreamBoothDataset", "LoraConfig", "pre_compute_text_embeddings", "accelerator.accumulate(unet)")


def like_for_like(job: Job, precision: str) -> tuple[list[str], list[str]]:
    """Return their options and ours for the same method in the same precision.

    Args:
        job: the two sides' common part.
        precision: "no", which is float32, or "bf16".
    """
    ours = [
        *("--prior", "generated", "--class-data-dir", str(job.classes), "--targets", "attention"),
        *("--train-text-encoder", "--no-photo-tokens", "--mixed-precision", precision),
    ]
    return ["--mixed_precision", precision], ours + (["--no-compile"] if _has_option("--no-compile") else [])


def check_script(path: Path) -> dict[str, Any]:
    """Return what a script is: its digest, the release it asks for, its default number of class pictures.

    Raises:
        UsageError: there is no such file, or it is another script.
    """
    cure = "pass the file examples/dreambooth/train_dreambooth_lora.py of the installed diffusers release"
    if not path.is_file():
        raise click.UsageError(f"--peer-script {path}: no such file; {cure}")
    text = path.read_text(encoding="utf-8", errors="replace")
    if missing := [mark for mark in _MARKS if mark not in text]:
        raise click.UsageError(f"--peer-script {path} has no {missing[0]}, so it is another script; {cure}")
    asks = re.search(r'check_min_version\("([^"]+)"\)', text)
    number = re.search(r'"--num_class_images",\s*type=int,\s*default=(\d+)', text)
    return {
        "name": "diffusers/examples/dreambooth/train_dreambooth_lora.py",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "asks_for_diffusers": asks.group(1) if asks else None,
        "installed_diffusers": metadata.version("diffusers"),
        "default_class_pictures": int(number.group(1)) if number else 100,
    }


def compare(
    job: Job, table: str, options: tuple[list[str], list[str]], steps: int, warmup: int, rounds: int
) -> dict[str, Any]:
    """Run both sides by turns and return figures and ratios."""
    records: dict[str, list[dict[str, Any]]] = {"peer": [], "ours": []}
    for number in range(rounds):
        for side in records:
            arguments = job.peer_arguments(options[0]) if side == "peer" else job.our_arguments(options[1])
            record = run(job, side, f"{job.base}-{table}-{side}-{number}", arguments, warmup + steps)
            records[side].append(record)
            shown = figures([record], warmup)
            click.echo(
                f"{job.base} {table} {side}: {shown['step_seconds']} s a step, {shown['peak_memory_mb']} MB, "
                f"start-up {shown['startup_seconds']} s",
                err=True,
            )
    peer, ours = figures(records["peer"], warmup), figures(records["ours"], warmup)
    return {"peer": peer, "ours": ours, "ratios": ratios(peer, ours)}


def startup(job: Job, rounds: int, their_default: int) -> dict[str, Any]:
    """Return the time to the first step where class pictures, or class latents, are yet to be made.

    Each side makes `job.pictures` of them in its own way; a run with none to make gives the time of one.
    """
    number, classes = ["--num-class-images", str(job.pictures)], job.work / "class-pictures-to-make"
    ours = {
        "ours": ["--prior", "distill", *number],
        "ours_prior_source_instance": ["--prior", "distill", "--prior-source", "instance", *number],
    }
    records: dict[str, list[dict[str, Any]]] = {}
    for turn in range(rounds):
        for name in ("peer", "peer_pictures_there", *ours):
            shutil.rmtree(classes, ignore_errors=True)
            if name in ours:
                arguments = job.our_arguments(ours[name])
            else:
                arguments = job.peer_arguments([], classes if name == "peer" else None)
            record = run(job, name[:4], f"{job.base}-startup-{name}-{turn}", arguments, 0)
            records.setdefault(name, []).append(record)
            click.echo(f"{job.base} startup {name}: {rounded(record['begins'][0])} s", err=True)
    shutil.rmtree(classes, ignore_errors=True)
    return startup_figures(records, job.pictures, their_default, _our_default(job))


def _has_option(name: str) -> bool:
    from dbadapter.cli.train import train

    return any(name in (*parameter.opts, *parameter.secondary_opts) for parameter in train.params)


def _our_default(job: Job) -> int:
    """Return how many class latents `--prior distill` makes if not told, as the command says itself."""
    words = [*job.our_arguments(["--prior", "distill"]), "--dry-run", "--output-dir", str(job.work / "none")]
    done = subprocess.run(
        [sys.executable, "-m", "dbadapter", *words], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise click.ClickException(report.last_word(done.stderr, "dbadapter failed"))
    return int(tomllib.loads(done.stdout)["num_class_images"])


@click.command(cls=Command)
@click.option(
    "--peer-script",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="train_dreambooth_lora.py of the installed diffusers release; see benchmarks/README.md.",
)
@click.option("--base", "base_names", multiple=True, type=click.Choice(BASES), help="[default: both]")
@click.option("--tables", default=",".join(TABLES), show_default=True, help="Which to measure.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="That count, in a run.")
@click.option("--warmup", default=3, show_default=True, type=click.IntRange(1), help="Steps before them.")
@click.option(
    "--rounds", default=3, show_default=True, type=click.IntRange(1), help="Runs of each side, by turns."
)
@click.option(
    "--class-pictures", type=click.IntRange(1), help="How many.  [default: 4 for toybox, 1 for sd15]"
)
@click.option(
    "--resolution", type=report.PIXELS, help="Of sd15; toybox has 64.  [default: 256, on a GPU 512]"
)
@click.option(
    "--train-batch-size", "batch", type=click.IntRange(1), help="Of both.  [default: our preset's: 4 and 1]"
)
@click.option("--threads", type=click.IntRange(1), help="Of each process.  [default: the machine's cores]")
@click.option("--instance-data-dir", type=click.Path(path_type=Path), help="[default: the example's mug]")
@click.option("--class-noun", help="What the photographs show.  [default: the example's]")
@click.option("--json", "json_path", type=report.A_JSON, help="Where the figures go.")
@click.option(
    "--work-dir",
    type=report.A_FOLDER,
    default=ROOT / "benchmarks/.cache/training",
    help="Keeps the base of SD1.5's size and each run's record.  [default: benchmarks/.cache]",
)
@click.option("--quick", is_flag=True, help="Two steps, one round: checks the machinery, measures nothing.")
def main(
    peer_script: Path,
    base_names: tuple[str, ...],
    tables: str,
    steps: int,
    warmup: int,
    rounds: int,
    class_pictures: int | None,
    resolution: int | None,
    batch: int | None,
    threads: int | None,
    instance_data_dir: Path | None,
    class_noun: str | None,
    json_path: Path | None,
    work_dir: Path,
    quick: bool,
) -> None:
    """Measure `dbadapter train` beside diffusers' train_dreambooth_lora.py and print JSON."""
    chosen = report.chosen(tables, TABLES, "tables")
    script = check_script(peer_script)
    asked, installed = script["asks_for_diffusers"], script["installed_diffusers"]
    if str(asked).split(".")[:2] != installed.split(".")[:2]:
        click.echo(f"the script is of diffusers {asked}, installed is {installed}", err=True)
    if quick:
        steps, warmup, rounds = 2, 1, 1
    on_gpu, work = torch.cuda.is_available(), work_dir.resolve()
    threads = report.threads_of(threads)
    example, measured = toybox.example_subject(), {}
    for name in base_names or BASES:
        side = 64 if name == "toybox" else resolution or (512 if on_gpu else 256)
        count = class_pictures or (4 if name == "toybox" else 1)
        folder = base_folder(name, work)
        size = batch or BATCHES[name]
        instances, classes = pictures(work, instance_data_dir or example.folder, count, side, size)
        job = Job(
            base=name,
            folder=folder,
            ours="toybox" if name == "toybox" else str(folder),
            instances=instances,
            classes=classes,
            pictures=count,
            noun=class_noun or example.class_noun,
            resolution=side,
            batch=size,
            script=peer_script.resolve(),
            work=work,
            threads=threads,
        )
        options = {
            "fp32": like_for_like(job, "no"),
            "bf16": like_for_like(job, "bf16"),
            "defaults": ([], ["--num-class-images", str(count)]),
        }
        about: dict[str, Any] = {
            "resolution": side,
            "batch": job.batch,
            "rank": RANK,
            "class_pictures": count,
        }
        about["photographs"] = len(list(instances.iterdir()))
        for table in chosen:
            if table == "startup":
                about[table] = startup(job, rounds, script["default_class_pictures"])
            else:
                about[table] = compare(job, table, options[table], steps, warmup, rounds)
        measured[name] = about
    report.write(
        {
            "benchmark": "training",
            "quick": quick,
            "script": script,
            "threads": threads,
            "rounds": rounds,
            "steps": steps,
            "warmup": warmup,
            "bars": bars(measured, on_gpu),
            "bases": measured,
        },
        json_path,
    )


if __name__ == "__main__":
    main()
