"""The command line: parse, call, print. Heavy modules are imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dbadapter import __version__
from dbadapter.cli.convert import convert, metadata
from dbadapter.cli.evaluate import evaluate
from dbadapter.cli.group import Group, progress_bars
from dbadapter.cli.inspect import inspect
from dbadapter.cli.merging import extract, merge
from dbadapter.cli.onnx import export
from dbadapter.cli.options import (
    BASE_HELP,
    FilePath,
    adapter_option,
    output_option,
    overwrite_option,
    parse_adapters,
    prediction_option,
)
from dbadapter.cli.train import train
from dbadapter.config import TrainConfig
from dbadapter.errors import UsageError
from dbadapter.presets import PRESETS

if TYPE_CHECKING:
    from dbadapter.base import Base

__all__ = ["main"]

_GUIDANCE = {family: preset.guidance_scale for family, preset in PRESETS.items()}


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dbadapter")
def main() -> None:
    """Teach a diffusion model one subject from a handful of photographs.

    The result, an adapter of a few megabytes, works in dbadapter, in diffusers and in the usual web UIs,
    and can be exported to ONNX together with its base.

    Try `dbadapter demo` first: it does the whole job on an example.
    """


main.add_command(train)


def _load(spec: str, **options: Any) -> Base:
    from dbadapter.base import load_base

    return load_base(spec, **options)


def _onnx_pipeline(folder: Path, weights: dict[Any, float]) -> Any:
    """Return an exported folder's pipeline with these adapters on."""
    from dbadapter.export import OnnxPipeline

    pipe = OnnxPipeline(folder)
    for path in weights:
        pipe.load_adapter(str(path), path)
    pipe.set_adapters({str(path): weight for path, weight in weights.items()})
    return pipe.pipeline


@main.command()
@click.option("--base", metavar="BASE", help=f"{BASE_HELP}  [default: toybox]")
@prediction_option
@click.option("--onnx", type=FilePath(), metavar="FOLDER",
              help="An exported folder instead; adapters need one made with --swappable.")  # fmt: skip
@adapter_option
@click.option("--prompt", "prompts", multiple=True, required=True, metavar="TEXT",
              help="May be given several times.")  # fmt: skip
@click.option("--negative-prompt", metavar="TEXT", help="What the pictures shall not show.")
@click.option("--num-images-per-prompt", type=int, default=1, show_default=True, metavar="N",
              help="Pictures of each prompt.")  # fmt: skip
@click.option("--num-inference-steps", type=int, default=25, show_default=True, metavar="N",
              help="Denoising steps.")  # fmt: skip
@click.option("--guidance-scale", type=float, metavar="X",
              help="How strictly to follow the prompt.  "
              f"[default: {_GUIDANCE['toybox']:g} on toybox, else {_GUIDANCE['sd1']:g}]")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, metavar="N",
              help="Picture i uses seed + i.")  # fmt: skip
@output_option
@overwrite_option
def generate(
    base: str | None,
    prediction_type: str | None,
    onnx: Path | None,
    adapters: tuple[str, ...],
    output_dir: Path,
    overwrite: bool,
    **request: Any,
) -> None:
    """Generate pictures with adapters or from ONNX.

    From a base with any number of adapters, or from an exported ONNX folder. Writes 0000.png, 0001.png, ...
    with their parameters inside, and grid.png, into OUT.

    \b
    Example:
      dbadapter generate --adapter my-dog/my-dog.safetensors=0.8 \\
          --prompt "a photo of sks dog on the beach" --output-dir pictures
    """
    weights = parse_adapters(adapters)
    if onnx is not None and (base is not None or prediction_type is not None):
        raise UsageError("--onnx FOLDER holds the base already: leave out --base and --prediction-type")
    from dbadapter.sampling import check_pictures_folder, generate_pictures, lora_tags, save_pictures

    check_pictures_folder(output_dir, overwrite)
    with progress_bars() as progress:
        if onnx is not None:
            pipeline = _onnx_pipeline(onnx, weights)
        else:
            pipeline = _load(base or TrainConfig.base, prediction_type=prediction_type).pipeline
            if weights:
                from dbadapter.lora import apply

                apply(pipeline, weights)
        pictures = generate_pictures(
            pipeline,
            request.pop("prompts"),
            **request,
            adapters_text=lora_tags(weights),
            progress=progress.of("generating"),
        )
    paths = save_pictures(pictures, output_dir, overwrite)
    number = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
    click.echo(f"{number} in {output_dir}, together in {paths[-1]}")


main.add_command(export)
main.add_command(convert)
main.add_command(inspect)
main.add_command(metadata)
main.add_command(merge)
main.add_command(extract)
main.add_command(evaluate)


@main.command()
@click.option("--base", default=TrainConfig.base, show_default=True, metavar="BASE", help=BASE_HELP)
@click.option("--count", type=click.IntRange(min=1), default=20, show_default=True, metavar="N",
              help="How many to list.")  # fmt: skip
@click.option("--class-noun", default="", metavar="NOUN", help="Leave out tokens that are part of it.")
def tokens(base: str, count: int, class_noun: str) -> None:
    """List rare tokens for --identifier.

    Each with its id in the base's tokenizer. A rare token is tied to nothing, so that it can stand for the
    subject.

    \b
    Example:
      dbadapter tokens --count 5
    """
    from dbadapter.base import load_tokenizers_of
    from dbadapter.tokens import rare_tokens

    for token in rare_tokens(load_tokenizers_of(base)[0], count, class_noun):
        click.echo(f"{token.token}\t{token.id}")


@main.command()
@click.option("--output-dir", default="dbadapter-demo", show_default=True, type=FilePath(),
              metavar="OUT", help="Replaced where it holds an earlier demo.")  # fmt: skip
@click.option("--quick", is_flag=True, help="A few steps only, to see that everything works.")
def demo(output_dir: Path, quick: bool) -> None:
    """Do the whole job on an example subject.

    Train, generate, export to ONNX, generate from that. Leaves demo.png, adapter/subject.safetensors, onnx/
    and summary.json in OUT.

    \b
    Example:
      dbadapter demo
    """
    from dbadapter.demo import next_commands, run_demo

    with progress_bars() as progress:
        summary = run_demo(output_dir, quick=quick, progress=progress)
    seconds = summary["seconds"]
    click.echo(", ".join(f"{stage} {time:.0f} s" for stage, time in seconds.items()))
    click.echo(
        f"Look at {output_dir / 'demo.png'}; times, sizes and figures are in {output_dir / 'summary.json'}"
    )
    click.echo(next_commands(output_dir, summary))
