"""`dbadapter export`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from dbadapter.cli.group import progress_bars
from dbadapter.cli.options import (
    BASE_HELP,
    FilePath,
    adapter_option,
    overwrite_option,
    parse_adapters,
    prediction_option,
)
from dbadapter.config import TARGETS, TrainConfig
from dbadapter.errors import UsageError

__all__ = ["export"]


@click.command()
@click.option("--onnx", is_flag=True, default=True, help="The format; the only one so far.")
@click.option("--base", metavar="BASE", help=f"{BASE_HELP}  [default: toybox]")
@prediction_option
@adapter_option
@click.option("--swappable", is_flag=True,
              help="Adapters become inputs of the graphs: one export, many subjects.")  # fmt: skip
@click.option("--targets", metavar="NAMES",
              help=f"With --swappable: which layers of the UNet: {', '.join(TARGETS)}, with commas between."
              "  [default: attention,feed-forward and what the adapters change]")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "float16", "int8"]), default="float32",
              show_default=True, help="Of the exported weights; int8 is for the CPU.")  # fmt: skip
@click.option("--target", type=click.Choice(["portable", "cuda"]), default="portable", show_default=True,
              help="Standard operators, or ONNX Runtime's fused ones for a GPU.")  # fmt: skip
@click.option("--verify", type=FilePath(), metavar="FOLDER",
              help="Compare an exported folder with torch's figures once more, on this machine; nothing is "
              "exported.")  # fmt: skip
@click.option("--output-dir", type=FilePath(), metavar="OUT", help="Folder for what is written.")
@overwrite_option
def export(
    onnx: bool,
    base: str | None,
    prediction_type: str | None,
    adapters: tuple[str, ...],
    swappable: bool,
    targets: str | None,
    dtype: str,
    target: str,
    verify: Path | None,
    output_dir: Path | None,
    overwrite: bool,
) -> None:
    """Export base and adapters to ONNX.

    Merged, or with --swappable as one graph that takes any adapter at run time. Every part is compared with
    torch, with and without adapter, and so is a whole picture; an export that differs is refused.

    \b
    Example:
      dbadapter export --onnx --adapter my-dog/my-dog.safetensors --output-dir my-dog-onnx
      dbadapter export --onnx --swappable --output-dir base-onnx
      dbadapter export --verify base-onnx
    """
    weights = parse_adapters(adapters)
    if verify is not None:
        context = click.get_current_context()
        given = [
            name
            for name in context.params
            if name not in ("verify", "onnx")
            and context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        ]
        if given:
            raise UsageError("--verify FOLDER stands alone: the folder holds all that is compared")
        _verify(verify)
        return
    if output_dir is None:
        raise UsageError("--output-dir OUT is missing, or --verify FOLDER")
    from dbadapter.base import load_base
    from dbadapter.export import export_onnx

    with progress_bars() as progress:
        export_onnx(
            load_base(base or TrainConfig.base, prediction_type=prediction_type),
            weights,
            output_dir,
            dtype=dtype,
            swappable=swappable,
            layers=_targets(targets),
            target=target,
            overwrite=overwrite,
            progress=progress,
        )
    click.echo(
        f"Exported to {output_dir}; the comparison with torch is in {output_dir / 'export_report.json'}"
    )
    folder = shlex.quote(str(output_dir))
    with_adapter = " --adapter FILE.safetensors=0.8" if swappable else ""
    click.echo(
        f'Try it: dbadapter generate --onnx {folder}{with_adapter} --prompt "..." --output-dir pictures'
    )


def _targets(words: str | None) -> list[str]:
    if words is None:
        return []
    names = [name.strip() for name in words.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--targets must name layers, of {', '.join(TARGETS)}, got {words!r}")
    return names


def _verify(folder: Path) -> None:
    from dbadapter.export import verify

    with progress_bars() as progress:
        report = verify(folder, progress=progress)
    for name, entry in report["components"].items():
        click.echo(f"{name}: relative error {entry['relative_error']:.2g}, allowed {entry['tolerance']:g}")
    click.echo(f"picture: {report['picture']['max_difference']:.2g} of 255 at most")
