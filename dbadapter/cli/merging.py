"""`dbadapter merge` and `dbadapter extract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dbadapter.cli.group import progress_bars, warn
from dbadapter.cli.options import (
    BASE_HELP,
    FilePath,
    overwrite_option,
    parse_adapters,
    prediction_option,
)
from dbadapter.config import TrainConfig
from dbadapter.errors import OutputError, UsageError

if TYPE_CHECKING:
    from dbadapter.adapter import Adapter

__all__ = ["extract", "merge"]

dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the numbers that are written.",
)


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="FILE[=WEIGHT]...")
@click.option("--output", type=FilePath(), metavar="OUT.safetensors", help="The merged adapter.")
@click.option("--rank", type=click.IntRange(min=1), metavar="N",
              help="Cut the sum to this rank and tell what that costs.  "
              "[default: exact, the ranks add up]")  # fmt: skip
@click.option("--base", metavar="BASE", help=f"Add the adapters to a base's own weights: {BASE_HELP}")
@prediction_option
@click.option("--output-base", type=FilePath(), metavar="OUT",
              help="With --base: a folder in diffusers' layout, or one checkpoint where OUT ends in "
              ".safetensors.")  # fmt: skip
@dtype_option
@overwrite_option
def merge(
    adapters: tuple[str, ...],
    output: Path | None,
    rank: int | None,
    base: str | None,
    prediction_type: str | None,
    output_base: Path | None,
    dtype: str,
    overwrite: bool,
) -> None:
    """Add adapters up, or into a base.

    FILE is an adapter, WEIGHT its share of the sum, 1 if none is given. The sum is exact; with --rank it is
    the nearest of that rank, and the error of every layer is printed. One file with --rank is resized. With
    --base the sum goes into the base's weights; the same with negative weights takes it out again.

    \b
    Example:
      dbadapter merge dog.safetensors=0.7 hat.safetensors=0.5 --output both.safetensors
      dbadapter merge dog.safetensors --rank 4 --output small.safetensors
      dbadapter merge dog.safetensors --base toybox --output-base dog-model
    """
    weights = parse_adapters(adapters, "merge")
    if (output is None) == (output_base is None):
        raise UsageError("give either --output FILE for an adapter, or --base BASE --output-base OUT")
    if output is not None:
        if base is not None or prediction_type is not None:
            raise UsageError("--base and --prediction-type go with --output-base OUT, not with --output")
        _merge(weights, output, rank, dtype, overwrite)
        return
    if base is None:
        raise UsageError("--output-base OUT needs --base BASE")
    if rank is not None:
        raise UsageError("--rank is for --output FILE: a base takes the whole sum")
    assert output_base is not None
    _bake(weights, base, prediction_type, output_base, dtype, overwrite)


def _merge(weights: dict[Any, float], output: Path, rank: int | None, dtype: str, overwrite: bool) -> None:
    _check_adapter_output(output, overwrite)
    from dbadapter.merging import DTYPES, write_merged
    from dbadapter.merging import merge as merge_adapters

    merged = merge_adapters(weights, rank=rank, dtype=DTYPES[dtype])
    write_merged(output, merged, overwrite=overwrite)
    if rank is not None:
        for name, error in merged.errors.items():
            click.echo(f"{error:.3e}  rank {merged.adapter.modules[name].rank:<4} {name}")
    if rank is None and merged.error > 0.01:  # rounding alone costs a thousandth at the most
        warn(f"the sum is too small for {dtype}, which loses part of it: pass --dtype float32")
    number = "1 adapter" if len(weights) == 1 else f"{len(weights)} adapters"
    what = f"cut to at most rank {rank}" if rank is not None else "exact but for rounding"
    click.echo(
        f"{number} in {output}, {_size(merged.adapter)}; {what}, {dtype}: relative error {merged.error:.3e}"
    )


def _bake(
    weights: dict[Any, float],
    spec: str,
    prediction_type: str | None,
    output: Path,
    dtype: str,
    overwrite: bool,
) -> None:
    from dbadapter.baking import bake, check_base_output, write_base
    from dbadapter.base import load_base
    from dbadapter.merging import DTYPES

    check_base_output(output, overwrite)
    if same := next((path for path in weights if Path(path).resolve() == output.resolve()), None):
        raise UsageError(f"--output-base {output} is the adapter {same} itself: pass another --output-base")
    base = load_base(spec, device="cpu", dtype=DTYPES[dtype], prediction_type=prediction_type)
    record = bake(base, weights)
    beside = write_base(base, output, record=record, overwrite=overwrite)
    number = "1 adapter" if len(record["adapters"]) == 1 else f"{len(record['adapters'])} adapters"
    click.echo(f"{base.name} with {number} inside: {output}, {dtype}")
    if beside is not None:
        click.echo(f"Keep {beside} beside it: it says how this model is built, which the file cannot")


@click.command()
@click.option("--base", default=TrainConfig.base, show_default=True, metavar="BASE",
              help=f"What the fine-tune began with: {BASE_HELP}")  # fmt: skip
@prediction_option
@click.option("--tuned", required=True, metavar="FOLDER", help="The fine-tuned model, as BASE.")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank of every layer.")
@click.option("--energy", type=float, metavar="X",
              help="Or the share of each layer's squared change to keep, e.g. 0.95.")  # fmt: skip
@click.option("--output", required=True, type=FilePath(), metavar="OUT.safetensors", help="The adapter.")
@dtype_option
@overwrite_option
def extract(
    base: str,
    prediction_type: str | None,
    tuned: str,
    rank: int | None,
    energy: float | None,
    output: Path,
    dtype: str,
    overwrite: bool,
) -> None:
    """Make an adapter of a full fine-tune.

    From the difference of two whole models: every linear layer and convolution of UNet and text encoders that
    changed, each cut to a rank. Prints what every layer keeps of its change.

    \b
    Example:
      dbadapter extract --tuned my-dog/model --rank 32 --output my-dog.safetensors
    """
    if (rank is None) == (energy is None):
        raise UsageError("give either --rank N or --energy X")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy must be greater than 0 and at most 1, got {energy:g}")
    _check_adapter_output(output, overwrite)
    from dbadapter.adapter_file import write_adapter
    from dbadapter.base import load_base
    from dbadapter.extraction import extract as extract_adapter
    from dbadapter.merging import DTYPES

    with progress_bars() as progress:
        found = extract_adapter(
            load_base(base, device="cpu", prediction_type=prediction_type),
            load_base(tuned, device="cpu", prediction_type=prediction_type),
            rank=rank,
            energy=energy,
            dtype=DTYPES[dtype],
            progress=progress.of("extracting"),
        )
    write_adapter(output, found.adapter, dtype=DTYPES[dtype], overwrite=overwrite)
    for name, share in found.energy.items():
        click.echo(f"{share:.4f}  rank {found.adapter.modules[name].rank:<4} {name}")
    click.echo(f"{output}, {_size(found.adapter)}: {found.total_energy:.4f} of the change is kept, {dtype}")
    if found.left_out:
        counts = ", ".join(f"{number} {kind}" for kind, number in found.left_out.items())
        warn(f"an adapter cannot hold what else changed: {counts}")


def _size(adapter: Adapter) -> str:
    ranks = [lora.rank for lora in adapter.modules.values()]
    spread = f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
    return f"{len(ranks)} layers, {spread}"


def _check_adapter_output(path: Path, overwrite: bool) -> None:
    """Raise what writing would, before the work is done."""
    if path.suffix != ".safetensors":
        raise OutputError(f"An adapter's file must end in .safetensors, got {path}")
    for each in (path, path.with_suffix(".json")):
        if each.is_dir():
            raise OutputError(f"{each} is a folder; expected a file to write: choose another name")
        if each.exists() and not overwrite:
            raise OutputError(f"{each} exists already: choose another name or overwrite it (--overwrite)")
