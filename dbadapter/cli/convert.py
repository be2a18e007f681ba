"""`dbadapter convert` and `dbadapter metadata`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dbadapter.cli.group import warn
from dbadapter.cli.options import FilePath, overwrite_option
from dbadapter.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["convert", "metadata"]


@click.command()
@click.argument("adapter", type=FilePath(), metavar="FILE|FOLDER")
@click.option("--to", "kind", required=True,
              type=click.Choice(["kohya", "diffusers", "peft", "onnx-adapter"]),
              help="kohya: one file, for every tool. diffusers: one file, for load_lora_weights. peft: a "
              "folder per model. onnx-adapter: ONNX Runtime's own files, one per model.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["keep", "float32", "float16", "bfloat16"]),
              help="Of the factors; for onnx-adapter what the graphs were exported in (int8 takes float32).  "
              "[default: keep; for onnx-adapter float32]")  # fmt: skip
@click.option("--family", type=click.Choice(["sd1", "sd2", "sdxl"]),
              help="Of the base, where the file does not tell.")  # fmt: skip
@click.option("--output", required=True, type=FilePath(), metavar="PATH",
              help="The .safetensors file; for peft and onnx-adapter the folder.")  # fmt: skip
@overwrite_option
def convert(
    adapter: Path, kind: str, dtype: str | None, family: str | None, output: Path, overwrite: bool
) -> None:
    """Write an adapter in another format.

    FILE is a .safetensors adapter in kohya's, diffusers' (also the older one) or PEFT's names, LyCORIS
    LoCon included; FOLDER is PEFT's. What is written is read back and must be the same, alpha included. The
    files of onnx-adapter are for a swappable export, and for any program that has ONNX Runtime.

    \b
    Example:
      dbadapter convert pytorch_lora_weights.safetensors --to kohya --output my-dog.safetensors
      dbadapter convert my-dog/my-dog.safetensors --to peft --output my-dog-peft
      dbadapter convert my-dog/my-dog.safetensors --to onnx-adapter --output my-dog-onnx-adapter
    """
    if kind == "onnx-adapter":
        _to_onnx(adapter, dtype, family, output, overwrite)
        return
    import torch

    from dbadapter import formats

    kept = None if dtype in (None, "keep") else getattr(torch, str(dtype))
    done = formats.convert(adapter, kind, output, dtype=kept, family=family, overwrite=overwrite)
    for note in done.notes:
        warn(note)
    click.echo(f"Written and read back: {', '.join(map(str, done.paths))}")


def _to_onnx(adapter: Path, dtype: str | None, family: str | None, output: Path, overwrite: bool) -> None:
    if dtype not in (None, "float32", "float16"):
        raise UsageError(f"--to onnx-adapter takes --dtype float32 or float16, got {dtype}")
    if family is not None:
        raise UsageError("--family is for the other formats: leave it out with --to onnx-adapter")
    from dbadapter.adapter_file import read_adapter
    from dbadapter.export.adapters import write_onnx_adapter

    written = write_onnx_adapter(read_adapter(adapter), output, dtype=dtype or "float32", overwrite=overwrite)
    click.echo(f"{', '.join(path.name for path in written)} in {output}")


@click.command()
@click.argument("adapter", type=FilePath(), metavar="FILE")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE",
              help="Set an entry, e.g. modelspec.author=Me; may be given several times.")  # fmt: skip
@click.option("--remove", multiple=True, metavar="KEY",
              help="Take an entry out; may be given several times.")  # fmt: skip
@click.option("--thumbnail", type=FilePath(), metavar="IMAGE",
              help="Show this picture: 256 pixels of it go into the file.")  # fmt: skip
@click.option("--output", type=FilePath(), metavar="PATH",
              help="Another file.  [default: FILE itself, with --overwrite]")  # fmt: skip
@overwrite_option
def metadata(
    adapter: Path,
    changes: tuple[str, ...],
    remove: tuple[str, ...],
    thumbnail: Path | None,
    output: Path | None,
    overwrite: bool,
) -> None:
    """Edit what an adapter says about itself.

    Title, author, trigger words and the like, which other programs show. The tensors stay as they are, byte
    for byte, and so do the files beside it; hashes in the file are brought up to date.

    \b
    Example:
      dbadapter metadata my-dog/my-dog.safetensors --set modelspec.author=Me --overwrite
      dbadapter metadata my-dog/my-dog.safetensors --thumbnail dog.jpg --output shared.safetensors
    """
    wanted: dict[str, str] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"--set must be KEY=VALUE, got {change!r}")
        if key in wanted or key in remove:
            raise UsageError(f"{key} is given twice: set or remove it once")
        wanted[key] = value
    from dbadapter.metadata_edit import edit_metadata

    preview = None if thumbnail is None else _picture(thumbnail)
    edit_metadata(adapter, wanted, remove=remove, preview=preview, output=output, overwrite=overwrite)
    click.echo(f"Written: {output or adapter}")


def _picture(path: Path) -> Image:
    from PIL import Image, ImageOps

    from dbadapter.errors import DataError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(f"Cannot read the picture {path} ({reason}): pass a JPEG or PNG") from None
