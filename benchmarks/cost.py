"""What does an adapter save beside full fine-tuning?

`python -m benchmarks.cost --json OUT [--plot PNG] [--base sd15|sdxl|toybox] [--resolution N] [--quick]` runs
`dbadapter train` on the same job with an adapter and with `--full`, by turns, each run in a process of its
own: seconds a step, peak memory, start-up, bytes of what is written. A side whose estimated memory is not
free is told, not tried.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import plot, report
from benchmarks.training_figures import figures, rounded
from benchmarks.training_runs import RANK, ROOT, TRUE_SIZES, Job, base_folder, pictures, run
from dbadapter import toybox
from dbadapter.cli.group import Command

BASES = ("toybox", *TRUE_SIZES)
SIDES: dict[str, list[str]] = {"adapter": [], "full": ["--full"]}
# Table -> the options of both sides. The second asks of full fine-tuning the least that it can take.
TABLES: dict[str, list[str]] = {"defaults": [], "unet_only": ["--prior", "none", "--no-train-text-encoder"]}
# A checkpoint is no matter of the steps.
COMMON = ["--num-class-images", "4", "--checkpointing-steps", "0"]
RESOLUTIONS = {"toybox": (64, 64), "sd15": (256, 512), "sdxl": (1024, 1024)}  # on a CPU, on a GPU
MARGIN_MB = 1024  # beside the estimate, for whatever else runs


def free_mb() -> float | None:
    """Return the memory that is free for a run: the GPU's, or the machine's; None where it cannot be told."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 2**20
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(found[1]) / 1024 if found else None


def read_estimate(text: str) -> dict[str, float]:
    """Return what `train --dry-run` tells of a run: peak_memory_mb, and file_mb of what it would write.

    Raises:
        ClickException: it tells no memory.
    """
    memory = re.search(r"([\d,]+) MB at the peak", text)
    size = re.search(r"(?:file|folder): about ([\d,.]+) MB", text)
    if memory is None or size is None:
        raise click.ClickException("`dbadapter train --dry-run` told no memory; its words have changed")
    peak, file = (float(each[1].replace(",", "")) for each in (memory, size))
    return {"peak_memory_mb": peak, "file_mb": file}


def estimate(arguments: Sequence[str], work: Path) -> dict[str, float]:
    """Return the estimate of one run.

    Raises:
        ClickException: the command refuses these options; the message is its own.
    """
    words = [sys.executable, "-m", "dbadapter", *arguments, "--output-dir", str(work / "none"), "--dry-run"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(report.last_word(done.stderr, "dbadapter failed"))
    return read_estimate(done.stdout)


def refusal(needed_mb: float, free: float | None) -> str | None:
    """Return why a run of so much memory is not tried, or None where it fits."""
    if free is None or needed_mb + MARGIN_MB <= free:
        return None
    return (
        f"not tried: an estimated {needed_mb:,.0f} MB at the peak and {MARGIN_MB:,} of margin do not fit in "
        f"the {free:,.0f} MB that are free"
    )


def side_arguments(job: Job, options: Sequence[str]) -> list[str]:
    """Return the command's words; a rank is an adapter's alone."""
    words = job.our_arguments(options)
    at = words.index("--rank")
    return [*words[:at], *words[at + 2 :]] if "--full" in options else words


def ratios(adapter: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, float]:
    """Return full fine-tuning's figures over the adapter's: above 1 the adapter takes less.

    Args:
        adapter, full: of `side_figures`.
    """
    pairs = {
        "step_seconds": "step_seconds",
        "step_cpu_seconds": "step_cpu_seconds",  # on a busy machine it says more than the clock
        "peak_memory": "peak_memory_mb",
        "startup": "startup_seconds",
        "startup_without_imports": "startup_without_imports_seconds",
        "file": "file_bytes",
    }
    return {
        name: float(f"{full[key] / adapter[key]:.4g}")
        for name, key in pairs.items()
        if full[key] is not None and adapter[key] is not None
    }


def side_figures(records: Sequence[Mapping[str, Any]], warmup: int) -> dict[str, Any]:
    """Return one side's figures: those of `training_figures.figures`, and the size of what it writes.

    Args:
        records: of `benchmarks.cost_peer`; without a size if the process died while it wrote.
        warmup: steps that do not count.
    """
    written = [record for record in records if "file_bytes" in record]
    return figures(records, warmup) | {
        "memory_of": records[0]["memory_of"],
        "file_bytes": written[0]["file_bytes"] if written else None,
        "writing_seconds_all": rounded([record["writing_seconds"] for record in written]),
        "died_while_writing": len(records) - len(written),
    }


def compare(
    job: Job, options: Sequence[str], table: str, steps: int, warmup: int, rounds: int
) -> dict[str, Any]:
    """Run both sides by turns, those that fit, and return estimates, figures and ratios."""
    out: dict[str, Any] = {"options": list(options), "estimates": {}, "not_measured": {}}
    words = {side: side_arguments(job, [*options, *more]) for side, more in SIDES.items()}
    records: dict[str, list[dict[str, Any]]] = {}
    for side, arguments in words.items():
        out["estimates"][side] = estimate(arguments, job.work)
        why = refusal(out["estimates"][side]["peak_memory_mb"], free_mb())
        if why is None:
            records[side] = []
        else:
            out["not_measured"][side] = why
            click.echo(f"{job.base} {table} {side}: {why}", err=True)
    for number in range(rounds):
        for side in list(records):
            name = f"{job.base}-{table}-{side}-{number}"
            try:
                record = run(job, "ours", name, words[side], warmup + steps, program="benchmarks.cost_peer")
            except click.ClickException as error:  # the other side's figures stand for themselves
                out["not_measured"][side] = error.message.partition(" (all of it")[0]
                click.echo(f"{job.base} {table} {side}: {out['not_measured'][side]}", err=True)
                del records[side]
                continue
            records[side].append(record)
            shown = side_figures([record], warmup)
            click.echo(
                f"{job.base} {table} {side}: {shown['step_seconds']} s a step, {shown['peak_memory_mb']} MB, "
                f"start-up {shown['startup_seconds']} s, {shown['file_bytes']} bytes",
                err=True,
            )
    out |= {side: side_figures(found, warmup) for side, found in records.items()}
    if len(records) == len(SIDES):
        out["ratios"] = ratios(out["adapter"], out["full"])
    return out


def job_for(name: str, work: Path, resolution: int | None, threads: int, *, quick: bool) -> Job:
    """Return the job on one base, whose files and photographs lie in the work folder afterwards."""
    example = toybox.example_subject()
    if quick and name != "toybox":
        from tests.tiny_bases import write_tiny_base

        folder, side = work / f"{name}-tiny", 32
        if not folder.exists():
            write_tiny_base(folder, "sdxl" if name == "sdxl" else "sd1")
    else:
        folder = base_folder(name, work)
        side = resolution or RESOLUTIONS[name][torch.cuda.is_available()]
    batch = 4 if name == "toybox" else 1
    instances, classes = pictures(work, example.folder, 1, side, batch)
    return Job(
        base=name,
        folder=folder,
        ours="toybox" if name == "toybox" else str(folder),
        instances=instances,
        classes=classes,
        pictures=1,
        noun=example.class_noun,
        resolution=side,
        batch=batch,
        work=work,
        threads=threads,
    )


@click.command(cls=Command)
@click.option("--base", "base_names", multiple=True, type=click.Choice(BASES), help="[default: toybox]")
@click.option("--tables", default=",".join(TABLES), show_default=True, help="Which jobs to measure.")
@click.option("--resolution", type=report.PIXELS, help="[default: sd15 256, on a GPU 512; sdxl 1024]")
@click.option("--steps", default=10, show_default=True, type=click.IntRange(1), help="That count, in a run.")
@click.option("--warmup", default=2, show_default=True, type=click.IntRange(1), help="Steps before them.")
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1), help="Runs of each side.")
@click.option(
    "--mixed-precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "no", "bf16", "fp16"]),
    help="Of both sides.",
)
@click.option("--threads", type=click.IntRange(1), help="Of each process.  [default: the machine's cores]")
@click.option("--json", "json_path", type=report.A_JSON, help="Where the figures go.")
@click.option("--plot", "plot_path", type=report.AN_IMAGE, help="The figures as bars, as PNG.")
@click.option(
    "--work-dir",
    type=report.A_FOLDER,
    default=ROOT / "benchmarks/.cache/training",
    help="Keeps bases (sd15 4 GB, sdxl 14) and each run's record.  [default: benchmarks/.cache]",
)
@click.option("--quick", is_flag=True, help="A tiny base, two steps: checks the machinery, measures nothing.")
def main(
    base_names: tuple[str, ...],
    tables: str,
    resolution: int | None,
    steps: int,
    warmup: int,
    rounds: int,
    mixed_precision: str,
    threads: int | None,
    json_path: Path | None,
    plot_path: Path | None,
    work_dir: Path,
    quick: bool,
) -> None:
    """Measure what an adapter takes beside full fine-tuning and print JSON."""
    chosen = report.chosen(tables, TABLES, "tables")
    if quick:
        base_names, chosen, steps, warmup, rounds = base_names or ("sd15",), chosen[:1], 1, 1, 1
    work = work_dir.resolve()
    threads = report.threads_of(threads)
    measured: dict[str, Any] = {}
    out = {"benchmark": "cost", "quick": quick, "threads": threads, "rounds": rounds, "steps": steps}
    out |= {"warmup": warmup, "bases": measured}
    for name in base_names or BASES[:1]:
        if name == "sdxl" and not quick and not torch.cuda.is_available():
            measured[name] = {"not_measured": sdxl_on_a_cpu()}
            continue
        job = job_for(name, work, resolution, threads, quick=quick)
        about = measured[name] = {"resolution": job.resolution, "batch": job.batch, "rank": RANK}
        for table in chosen:
            options = [*TABLES[table], *COMMON, "--mixed-precision", mixed_precision]
            about[table] = compare(job, options, table, steps, warmup, rounds)
            if json_path is not None:  # a table of the true size takes many minutes
                report.save({**out, "command": report.command(), "machine": report.machine()}, json_path)
    report.write(out, json_path)
    if plot_path is not None:
        plot.save(out, plot_path)


def sdxl_on_a_cpu() -> str:
    """Return why SDXL is left to GPUs, with what its weights would take."""
    from benchmarks.true_size import build

    unet = sum(parameter.numel() for parameter in build("sdxl", "unet", device="meta").parameters())
    texts = sum(
        parameter.numel()
        for part in ("text_encoder", "text_encoder_2")
        for parameter in build("sdxl", part, device="meta").parameters()
    )
    return (
        f"not tried on a CPU: full fine-tuning's weights, gradients and AdamW's moments in float32 alone are "
        f"{(unet + texts) * 16 / 2**20:,.0f} MB ({unet * 16 / 2**20:,.0f} of the UNet), and the base's files "
        "14 GB"
    )


if __name__ == "__main__":
    main()
