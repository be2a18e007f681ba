"""A result of `benchmarks.cost` or `benchmarks.gpu` as bars: `python -m benchmarks.plot JSON PNG`.

The benchmarks draw theirs with `--plot`; this draws a JSON that is there, on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks import report
from benchmarks.inference_figures import bar_chart
from dbadapter.cli.group import Command

__all__ = ["groups_of", "save"]

MB = 2**20
Groups = dict[str, dict[str, float]]
LABELS = {
    "adapter": "adapter",
    "full": "full fine-tuning",
    "adapter_bf16": "adapter, bf16",
    "full_bf16": "full fine-tuning, bf16",
    "adapter_bf16_batch4": "adapter, bf16, batch of 4",
    "full_bf16_batch4": "full fine-tuning, bf16, batch of 4",
    "adapter_fp32": "adapter, fp32",
    "full_fp32": "full fine-tuning, fp32",
    "adapter_bf16_compile": "adapter, bf16, compiled",
    "adapter_fp16": "adapter, fp16",
    "adapter_fp32_batch4": "adapter, fp32, batch of 4",
    "full_bf16_checkpointing": "full fine-tuning, bf16, checkpointing",
    "peer_on_the_scripts_job_bf16": "diffusers' script, bf16",
    "ours_on_the_scripts_job_bf16": "dbadapter on the script's job, bf16",
}
NAMES = {"sd15": "SD1.5's size", "sdxl": "SDXL's size", "toybox": "toybox"}


def groups_of(found: Any) -> Groups:
    """Return a result's bars by title, for `bar_chart`; none if nothing was measured.

    Args:
        found: what `benchmarks.cost` or `benchmarks.gpu` wrote.
    Raises:
        ValueError: it is another benchmark's, or not whole.
    """
    of = {"cost": _cost, "gpu": _gpu}.get(str(found.get("benchmark"))) if isinstance(found, dict) else None
    if of is None:
        raise ValueError("it is no result of benchmarks.cost or benchmarks.gpu")
    try:
        groups = of(found)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("it is no whole result") from error
    note = " (--quick: measures nothing)" if found.get("quick") else ""
    return {f"{title}{note}": values for title, values in groups.items()}


def save(found: Any, path: Path) -> None:
    """Draw a result as PNG.

    Raises:
        ClickException: it cannot be drawn, nothing in it was measured, or the file cannot be written; an
            earlier plot stays.
    """
    try:
        groups = groups_of(found)
    except ValueError as error:
        raise click.ClickException(f"{path} is not written: {error}; measure it again") from None
    if not groups:
        raise click.ClickException(f"{path} is not written: nothing was measured; run the benchmark again")
    report.save_image(bar_chart(groups), path)


def _number(value: Any) -> float:
    if not report.is_number(value):
        raise TypeError(f"not a number: {value!r}")
    return float(value)


def _cost(found: Mapping[str, Any]) -> Groups:
    groups: Groups = {}
    for base, tables in found["bases"].items():
        for table, about in tables.items():
            sides = {
                side: about[side] for side in ("adapter", "full") if isinstance(about, dict) and side in about
            }
            for what, of in (
                ("seconds a step", lambda side: side["step_seconds"]),
                ("peak memory, MB", lambda side: side["peak_memory_mb"]),
                ("start-up, seconds", lambda side: side["startup_seconds"]),
                ("file, MB", lambda side: side["file_bytes"] and side["file_bytes"] / MB),
            ):
                values = {
                    LABELS[name]: _number(value)
                    for name, side in sides.items()
                    if (value := of(side)) is not None
                }
                if values:
                    where = (
                        f"{NAMES.get(base, base)}, {tables['resolution']} pixels, {table.replace('_', ' ')}"
                    )
                    groups[f"{where}: {what}"] = values
    return groups


def _gpu(found: Mapping[str, Any]) -> Groups:
    groups: Groups = {}
    for part, about in found["parts"].items():
        kind, _, base = part.partition("-")
        for figure, factor, what in {
            "train": (
                ("step_seconds", 1000, "a training step, milliseconds"),
                ("peak_memory_mb", 1, "training, peak memory, MB"),
            ),
            "infer": (
                ("call_seconds", 1000, "a UNet call, milliseconds"),
                ("device_memory_mb", 1, "inference, memory of the device, MB"),
            ),
        }.get(kind, ()):
            cells = {
                LABELS.get(name, name): _number(cell[figure]) * factor
                for name, cell in about["cells"].items()
                if figure in cell
            }
            if cells:
                groups[f"{NAMES.get(base, base)}: {what}"] = cells
    return groups


@click.command(cls=Command)
@click.argument("json_path", metavar="JSON", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("plot_path", metavar="PNG", type=report.AN_IMAGE)
def main(json_path: Path, plot_path: Path) -> None:
    """Draw a result of benchmarks.cost or benchmarks.gpu."""
    try:
        found = json.loads(json_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise click.ClickException(f"{json_path} is no JSON ({error}): give a benchmark's") from None
    save(found, plot_path)


if __name__ == "__main__":
    main()
