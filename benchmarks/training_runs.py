"""One run of `dbadapter train` or of diffusers' script for a benchmark, and what both are given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.report import last_word
from benchmarks.true_size import write_base
from dbadapter import toybox

__all__ = ["IDENTIFIER", "RANK", "ROOT", "SEED", "TRUE_SIZES", "Job", "base_folder", "pictures", "run"]

ROOT = Path(__file__).resolve().parent.parent
RANK, IDENTIFIER, SEED = 8, "sks", 0
# Base -> family of the published size that it is written with.
TRUE_SIZES = {"sd15": "sd1", "sdxl": "sdxl"}


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
        work: where runs and records go.
        threads: of each process.
        script: theirs, if it takes part.
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
    work: Path
    threads: int
    script: Path = Path()

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


def run(
    job: Job,
    side: str,
    name: str,
    arguments: list[str],
    steps: int,
    program: str = "benchmarks.training_peer",
) -> dict[str, Any]:
    """Run one side in a process of its own and return its record, with the command in it.

    Args:
        side: "peer" or "ours".
        name: of the run's folder and record.
        arguments: of the script or the command, without the number of steps and the output folder.
        steps: optimizer steps; 0 stops where the first would begin.
        program: the module that runs one side and leaves the record.
    Raises:
        ClickException: it failed; the message has its last line, and the place of all of them.
    """
    output, record = job.work / "runs" / name, job.work / "records" / f"{name}.json"
    shutil.rmtree(output, ignore_errors=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    names = ("--max_train_steps", "--output_dir") if side == "peer" else ("--max-train-steps", "--output-dir")
    arguments = [*arguments, names[0], str(max(steps, 1)), names[1], str(output)]
    command = [sys.executable, "-m", program, "--side", side, "--script", str(job.script)]
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
        said = last_word(done.stderr, "no output")
        if done.returncode < 0:  # it said nothing of it then
            said = f"ended by signal {-done.returncode}; 9 is the system's where memory runs out"
        raise click.ClickException(f"{name} failed: {said} (all of it: {record.with_suffix('.log')})")
    shown = ["python", job.script.name] if side == "peer" else ["dbadapter"]
    places = {str(job.folder): "BASE", str(job.work): "WORK"}
    return json.loads(record.read_text(encoding="utf-8")) | {
        "command": " ".join([*shown, *(_without_places(word, places) for word in arguments)])
    }


def base_folder(name: str, work: Path) -> Path:
    """Return a base's folder, every file of it read once, so that no side waits for the disk."""
    if name == "toybox":
        folder = toybox.folder()
    else:
        folder = work / f"{name}-random"
        if not (folder / "model_index.json").exists():
            click.echo(f"writing a base of the true size of {name} with random weights, once", err=True)
        write_base(folder, TRUE_SIZES[name])
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(2**24):
                    pass
    return folder


def pictures(work: Path, source: Path, count: int, resolution: int, batch: int) -> tuple[Path, Path]:
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


def _without_places(word: str, places: Mapping[str, str]) -> str:
    """Return a command's word with folders by their role, and quoted if it has spaces."""
    for place, name in places.items():
        word = word.replace(place, name)
    return f'"{word}"' if " " in word else word
