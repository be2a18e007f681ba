"""How fast does an exported model run beside torch, and what does a swappable one cost?

`python -m benchmarks.inference --json OUT [--plot OUT.png] [--quick]` measures one UNet call with guidance
by torch, `torch.compile` and ONNX Runtime, by turns in one process; then loading, memory, swaps and pictures.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import report
from benchmarks.inference_figures import bars, chart, figures, ratios, rounded
from benchmarks.inference_gpu import GPU_VARIANTS
from benchmarks.inference_variants import CPU_VARIANTS
from dbadapter import toybox
from dbadapter.cli.group import Command

ROOT = Path(__file__).resolve().parent.parent
BASES = ("toybox", "sd15")
FAMILIES = {"toybox": "toybox", "sd15": "sd1"}
TABLES = ("step", "alone", "swap", "picture", "export")
USUAL = TABLES[:-1]  # the whole export of SD1.5's size takes minutes and 10 GB
# Rounds, and calls of a variant in each; what comes before them that does not count.
EFFORT = {"toybox": (60, 5, 1), "sd15": (8, 1, 0)}
STEPS, PICTURES, SWAPS = 25, 8, 40


@dataclass(frozen=True)
class Plan:
    """How one base is measured.

    Args:
        name: of `BASES`.
        base: its folder in diffusers' layout.
        work: where exports and records go.
        latents: cells a side.
        variants: of the UNet's call.
        threads: of each process.
        quick: as little as there is.
    """

    name: str
    base: Path
    work: Path
    latents: int
    variants: tuple[str, ...]
    threads: int
    quick: bool

    @property
    def exports(self) -> Path:
        """Where this base's exports lie."""
        return self.work / "exports" / self.name

    @property
    def settings(self) -> dict[str, Any]:
        """What every task is told."""
        return {
            "base": str(self.base),
            "exports": str(self.exports),
            "family": FAMILIES[self.name],
            "latents": self.latents,
            "variants": list(self.variants),
        }


def run(plan: Plan, task: str, **settings: Any) -> dict[str, Any]:
    """Do one task of `benchmarks.inference_peer` in a process of its own and return its record.

    Raises:
        ClickException: it failed; the message has its last line, and the place of all of them.
    """
    plan.work.mkdir(parents=True, exist_ok=True)
    record = plan.work / f"{plan.name}-{task}.json"
    record.unlink(missing_ok=True)
    words = ["--task", task, "--record", str(record), "--settings", json.dumps(plan.settings | settings)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(plan.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "TORCHINDUCTOR_CACHE_DIR": str(plan.work / "compiled"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.inference_peer", *words],
        cwd=plan.work,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode or not record.exists():
        log = record.with_suffix(".log")
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        said = report.last_word(done.stderr, f"it ended with {done.returncode}")
        raise click.ClickException(f"{plan.name} {task} failed: {said} (all of it: {log})")
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def export(plan: Plan, kind: str, *, whole: bool, again: bool) -> dict[str, Any]:
    """Export a base unless it is there, and return seconds and memory that it took when it was made.

    Args:
        kind: of `inference_peer.EXPORTS`.
        whole: with all components and the gate; else the UNet alone.
        again: make it in any case.
    """
    folder = plan.exports / kind
    note = folder.with_name(f"{kind}.json")
    there = (folder / ("model_index.json" if whole else "unet/model.onnx")).is_file() and note.is_file()
    if again or not there:
        click.echo(f"exporting {plan.name}, {kind}", err=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        found = run(plan, "export", kind=kind, folder=str(folder), whole=whole)
        note.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    about: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    for key in ("seconds", "seconds_of_loading", "peak_memory_mb"):
        about[key] = rounded(about[key])
    return about


def step(plan: Plan, rounds: int | None) -> dict[str, Any]:
    """Return the table of one UNet call by every variant: figures and ratios."""
    usual, calls, lead_in = EFFORT[plan.name]
    if plan.quick:
        usual, calls = 2, 1
    shutil.rmtree(plan.work / "compiled", ignore_errors=True)  # the first call's seconds are a compiler's
    found = run(plan, "step", rounds=rounds or usual, calls=calls, lead_in=lead_in)
    out = {
        "rounds": rounds or usual,
        "calls_a_round": calls,
        "threads": found["threads"],
        "calls": figures(found["calls"]),
        "ratios": ratios(found["calls"]),
        "first_call_seconds": {name: rounded(value) for name, value in found["first"].items()},
        "difference_from_torch": {name: float(f"{v:.2g}") for name, v in found["difference"].items()},
        "left_out": found["left_out"],
    }
    for name, about in out["calls"].items():
        click.echo(f"{plan.name} step {name}: {about['seconds'] * 1000:.4g} ms", err=True)
    return out


def alone(plan: Plan) -> dict[str, Any]:
    """Return the table of each variant in a process of its own: loading, first call, memory above imports."""
    out = {}
    for name in plan.variants:
        try:
            found = run(plan, "alone", variant=name)
        except click.ClickException as error:
            if name in CPU_VARIANTS:
                raise
            out[name] = {"left_out": error.message.partition(" (all of it")[0]}
            continue
        out[name] = {key: rounded(value) for key, value in found.items() if key != "threads"}
        click.echo(f"{plan.name} alone {name}: {out[name]}", err=True)
    return out


def swap(plan: Plan) -> dict[str, Any]:
    """Return the table of swaps between two loaded adapters."""
    found = run(plan, "swap", swaps=4 if plan.quick else SWAPS)
    return {key: rounded(found[key]) for key in ("seconds", "seconds_all")} | {"what": found["what"]}


def picture(plan: Plan) -> dict[str, Any]:
    """Return the table of whole pictures."""
    steps, rounds = (2, 1) if plan.quick else (STEPS, PICTURES)
    found = run(plan, "picture", steps=steps, rounds=rounds)
    return {
        "steps": steps,
        "rounds": rounds,
        "calls": figures(found["calls"]),
        "ratios": ratios(found["calls"]),
    }


def plan_for(name: str, work: Path, *, compiled: bool, threads: int, quick: bool) -> Plan:
    """Return how a base is measured on this machine: on a GPU SD1.5 by the GPU's variants, at 512 pixels."""
    on_gpu = name == "sd15" and torch.cuda.is_available()
    variants = [
        each
        for each in (GPU_VARIANTS if on_gpu else CPU_VARIANTS)
        if compiled or not each.endswith("compile")
    ]
    if name == "toybox":
        folder, latents = toybox.folder(), 16
    else:
        from benchmarks.true_size import write_base

        folder, latents = work / "sd15-random", 64 if on_gpu else 32
        if not (folder / "model_index.json").exists():
            click.echo("writing a base of SD1.5's size with random weights (4 GB), once", err=True)
        write_base(folder, "sd1")
    return Plan(name, folder, work, latents, tuple(variants), threads, quick)


def measure(plan: Plan, tables: Sequence[str], rounds: int | None, again: bool) -> dict[str, Any]:
    """Return the tables of one base, by name, with what was exported for them."""
    on_gpu = plan.variants[0].startswith("cuda")
    kinds = ("cuda-merged", "cuda-swappable", "half-merged") if on_gpu else ("merged", "swappable")
    whole = "export" in tables or (plan.name == "toybox" and "picture" in tables)
    made = {kind: export(plan, kind, whole=whole, again=again) for kind in kinds}
    out: dict[str, Any] = {"latents": plan.latents, "exports": made}
    makers: Mapping[str, Any] = {
        "step": lambda: step(plan, rounds),
        "alone": lambda: alone(plan),
        "swap": lambda: swap(plan),
        "picture": lambda: picture(plan),
        "export": lambda: made,
    }
    for table in tables:
        # Swaps and pictures are of the CPU's exports.
        if (table == "picture" and plan.name == "sd15") or (on_gpu and table in ("swap", "picture")):
            continue
        out[table] = makers[table]()
    if "export" in out:
        del out["exports"]
    return out


@click.command(cls=Command)
@click.option("--base", "base_names", multiple=True, type=click.Choice(BASES), help="[default: toybox]")
@click.option(
    "--tables",
    default=",".join(USUAL),
    show_default=True,
    help="Which to measure; export too: a whole export with its gate.",
)
@click.option("--rounds", type=click.IntRange(1), help="Of the table step.  [default: toybox 60, sd15 8]")
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out.")
@click.option("--threads", type=click.IntRange(1), help="Of each process.  [default: the machine's cores]")
@click.option("--export-again", is_flag=True, help="Do not use exports of an earlier run.")
@click.option("--json", "json_path", type=report.A_JSON, help="Where the figures go.")
@click.option("--plot", "plot_path", type=report.AN_IMAGE, help="A PNG with bars.")
@click.option(
    "--work-dir",
    type=report.A_FOLDER,
    default=ROOT / "benchmarks/.cache/inference",
    help="Keeps exports and the base of SD1.5's size.  [default: benchmarks/.cache]",
)
@click.option("--quick", is_flag=True, help="Two rounds, no compiler: checks the machinery only.")
def main(
    base_names: tuple[str, ...],
    tables: str,
    rounds: int | None,
    no_compile: bool,
    threads: int | None,
    export_again: bool,
    json_path: Path | None,
    plot_path: Path | None,
    work_dir: Path,
    quick: bool,
) -> None:
    """Measure exported models beside torch's and print JSON."""
    chosen = report.chosen(tables, TABLES, "tables")
    if plot_path is not None and "step" not in chosen:
        raise click.UsageError("--plot draws the table step: add step to --tables, or leave --plot out")
    threads = report.threads_of(threads)
    measured = {}
    for name in base_names or BASES[:1]:
        plan = plan_for(
            name, work_dir.resolve(), compiled=not (no_compile or quick), threads=threads, quick=quick
        )
        measured[name] = measure(plan, chosen, rounds, export_again)
    report.write(
        {
            "benchmark": "inference",
            "quick": quick,
            "threads": threads,
            "bars": bars(measured),
            "bases": measured,
        },
        json_path,
    )
    if plot_path is not None:
        report.save_image(chart(measured), plot_path)


if __name__ == "__main__":
    main()
