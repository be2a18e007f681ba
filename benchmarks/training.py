"""How fast, and in how much memory, does `dbadapter train` train beside diffusers' own script?

`python -m benchmarks.training --peer-script train_dreambooth_lora.py --json OUT [--quick]` runs both on the
same base, photographs, class pictures and job, by turns, each run in a process of its own
(`benchmarks.training_peer`), and prints figures of both, their ratios and the bars that were set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from benchmarks import report
from benchmarks.training_figures import bars, figures, ratios, rounded, startup_figures
from dbadapter import toybox
from dbadapter.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
BASES = ("toybox", "sd15")
TABLES = ("fp32", "bf16", "defaults", "startup")
RANK, IDENTIFIER, SEED = 8, "sks", 0
# What a run with our defaults takes; with one picture a step, toybox's are mostly Python.
BATCHES = {"toybox": PRESETS["toybox"].train_batch_size, "sd15": PRESETS["sd1"].train_batch_size}
# Words that only this script has, of all those in diffusers' examples/dreambooth.
_MARKS = ("DreamBoothDataset", "LoraConfig", "pre_compute_text_embeddings", "accelerator.accumulate(unet)")


@dataclass(frozen=True)
class Job:
    """What both sides train: one base and data, and where the runs lie.

    Args:
        base: "toybox" or a diffusers folder's name, for the figures.
        folder: of the base, in diffusers' layout.
        ours: what `dbadapter train --base` is given.
        instances, classes: folders of pictures, nothing else in them.
        pictures: how many class pictures.
        noun: of the class.
        resolution: pixels a side.
        batch: photographs a step; the prior adds as many.
        script: theirs.
        work: where runs and records go.
        threads: of each process.
    """

    base: str
    folder: Path
    ours: str
    instances: Path
    classes: Path
    pictures: int
    noun: str
    resolution: int
    batch: int
    script: Path
    work: Path
    threads: int

    def peer_arguments(self, options: Sequence[str], classes: Path | None = None) -> list[str]:
        """Return the script's options: the job's, then those of a table."""
        values = {
            "--pretrained_model_name_or_path": self.folder,
            "--instance_data_dir": self.instances,
            "--instance_prompt": f"a photo of {IDENTIFIER} {self.noun}",
            "--class_data_dir": classes or self.classes,
            "--class_prompt": f"a photo of a {self.noun}",
            "--num_class_images": self.pictures,
            "--resolution": self.resolution,
            "--train_batch_size": self.batch,
            "--rank": RANK,
            "--seed": SEED,
        }
        flags = ["--with_prior_preservation", "--train_text_encoder", *options]
        return [str(word) for pair in values.items() for word in pair] + flags

    def our_arguments(self, options: Sequence[str]) -> list[str]:
        """Return the command's words: the job's, then those of a table."""
        values = {
            "--base": self.ours,
            "--instance-data-dir": self.instances,
            "--class-noun": self.noun,
            "--identifier": IDENTIFIER,
            "--resolution": self.resolution,
            "--train-batch-size": self.batch,
            "--rank": RANK,
            "--seed": SEED,
        }
        return ["train", *(str(word) for pair in values.items() for word in pair), *options]


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


def run(job: Job, side: str, name: str, arguments: list[str], steps: int) -> dict[str, Any]:
    """Run one side in a process of its own and return its record, with the command in it.

    Args:
        side: "peer" or "ours".
        name: of the run's folder and record.
        arguments: of the script or the command, without the number of steps and the output folder.
        steps: optimizer steps; 0 stops where the first would begin.
    """
    output, record = job.work / "runs" / name, job.work / "records" / f"{name}.json"
    shutil.rmtree(output, ignore_errors=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    names = ("--max_train_steps", "--output_dir") if side == "peer" else ("--max-train-steps", "--output-dir")
    arguments = [*arguments, names[0], str(max(steps, 1)), names[1], str(output)]
    command = [sys.executable, "-m", "benchmarks.training_peer", "--side", side, "--script", str(job.script)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(job.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    command += ["--record", str(record), "--steps", str(steps), "--spawned", repr(time.perf_counter())]
    done = subprocess.run(
        [*command, "--", *arguments], cwd=job.work, env=environment, capture_output=True, text=True
    )
    shutil.rmtree(output, ignore_errors=True)
    if not record.exists():
        (record.with_suffix(".log")).write_text(done.stdout + done.stderr, encoding="utf-8")
        words = done.stderr.strip().splitlines() or ["no output"]
        raise click.ClickException(f"{name} failed: {words[-1]} (all of it: {record.with_suffix('.log')})")
    program = ["python", job.script.name] if side == "peer" else ["dbadapter"]
    places = {str(job.folder): "BASE", str(job.work): "WORK"}
    return json.loads(record.read_text(encoding="utf-8")) | {
        "command": " ".join([*program, *(_without_places(word, places) for word in arguments)])
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
        raise click.ClickException((done.stderr.strip().splitlines() or ["dbadapter failed"])[-1])
    return int(tomllib.loads(done.stdout)["num_class_images"])


def _without_places(word: str, places: Mapping[str, str]) -> str:
    """Return a command's word with folders by their role, and quoted if it has spaces."""
    for place, name in places.items():
        word = word.replace(place, name)
    return f'"{word}"' if " " in word else word


def _pictures(work: Path, source: Path, count: int, resolution: int, batch: int) -> tuple[Path, Path]:
    """Return a folder of the photographs alone, and one of class pictures: soft blots, of the right size.

    Their script reads every file of a folder; what a picture shows changes neither time nor memory. It ends
    each pass over the photographs with the batch that is left of them, where ours goes on with the next pass:
    of 5 photographs by 4 every second step of theirs would be a step of one. So whole batches are taken.
    """
    from dbadapter.errors import DataError
    from dbadapter.photographs import find_photographs

    try:
        photographs = [photograph.path for photograph in find_photographs(source)]
    except DataError as error:
        raise click.ClickException(str(error)) from None
    instances, classes = work / "photographs", work / f"class-pictures-{resolution}-{count}"
    for folder in (instances, classes):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if len(photographs) < batch:
        raise click.UsageError(
            f"{source} has {len(photographs)} photographs, fewer than --train-batch-size {batch}: pass a "
            "smaller one"
        )
    for photograph in photographs[: len(photographs) // batch * batch]:
        shutil.copyfile(photograph, instances / photograph.name)
    rng = np.random.default_rng(0)
    for number in range(count):
        blots = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        square = blots.resize((resolution, resolution), Image.Resampling.BICUBIC)
        square.save(classes / f"{number:03d}.jpg", quality=95)
    return instances, classes


def _base(name: str, work: Path) -> Path:
    """Return a base's folder, every file of it read once, so that no side waits for the disk."""
    if name == "toybox":
        folder = toybox.folder()
    else:
        from benchmarks.true_size import write_base

        folder = work / "sd15-random"
        if not (folder / "model_index.json").exists():
            click.echo("writing a base of SD1.5's size with random weights (4 GB), once", err=True)
        write_base(folder, "sd1")
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(2**24):
                    pass
    return folder


@click.command()
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
    "--resolution", type=click.IntRange(64), help="Of sd15; toybox has 64.  [default: 256, on a GPU 512]"
)
@click.option(
    "--train-batch-size", "batch", type=click.IntRange(1), help="Of both.  [default: our preset's: 4 and 1]"
)
@click.option("--threads", type=click.IntRange(1), help="Of each process.  [default: the machine's cores]")
@click.option("--instance-data-dir", type=click.Path(path_type=Path), help="[default: the example's mug]")
@click.option("--class-noun", help="What the photographs show.  [default: the example's]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where the figures go.")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
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
    chosen = tables.split(",")
    if unknown := [name for name in chosen if name not in TABLES]:
        raise click.UsageError(f"unknown tables {', '.join(unknown)}; known: {', '.join(TABLES)}")
    script = check_script(peer_script)
    asked, installed = script["asks_for_diffusers"], script["installed_diffusers"]
    if str(asked).split(".")[:2] != installed.split(".")[:2]:
        click.echo(f"the script is of diffusers {asked}, installed is {installed}", err=True)
    if quick:
        steps, warmup, rounds = 2, 1, 1
    on_gpu, work = torch.cuda.is_available(), work_dir.resolve()
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    example, measured = toybox.example_subject(), {}
    for name in base_names or BASES:
        side = 64 if name == "toybox" else resolution or (512 if on_gpu else 256)
        count = class_pictures or (4 if name == "toybox" else 1)
        folder = _base(name, work)
        size = batch or BATCHES[name]
        instances, classes = _pictures(work, instance_data_dir or example.folder, count, side, size)
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
