"""The options of the commands; a help text for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dbadapter.config import (
    LOGGERS,
    LR_SCHEDULERS,
    OPTIMIZERS,
    PRECISIONS,
    PREDICTION_TYPES,
    PRIOR_SOURCES,
    PRIORS,
    SELECTIONS,
    TARGETS,
    TrainConfig,
)
from dbadapter.errors import UsageError

__all__ = [
    "BASE_HELP",
    "FilePath",
    "adapter_option",
    "output_option",
    "overwrite_option",
    "parse_adapters",
    "prediction_option",
    "train_options",
]

F = TypeVar("F", bound=Callable[..., Any])


def join_options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Join option decorators, so that they read from top to bottom as `--help` shows them."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


class FilePath(click.ParamType):  # type: ignore[type-arg]
    """A path; an empty one is refused, because it would be the current folder."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        if not str(value):
            self.fail("must not be empty", param, ctx)
        return Path(value)


BASE_HELP = (
    "toybox (embedded, 64 pixels), or Stable Diffusion 1.x, 2.x or SDXL: a folder in diffusers' layout, a "
    "single .safetensors checkpoint, or an id on the Hugging Face hub."
)
output_option = click.option(
    "--output-dir",
    required=True,
    type=FilePath(),
    metavar="OUT",
    help="Folder for what is written.",
)
prediction_option = click.option(
    "--prediction-type",
    type=click.Choice(PREDICTION_TYPES),
    help="What the base predicts, as it was trained with.  [default: what it says itself]",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FILE[=WEIGHT]",
    help="An adapter and its weight (default 1); may be given several times.",
)


def parse_adapters(values: tuple[str, ...], said: str = "--adapter") -> dict[Any, float]:
    """Return file -> weight; a `=` inside an existing file's name is part of the name.

    Args:
        values: as given.
        said: what stands before them, for messages.
    """
    adapters: dict[str, float] = {}
    for value in values:
        path, equals, text = value.rpartition("=")
        if not equals or Path(value).exists():
            path, text = value, "1"
        try:
            weight = float(text)
        except ValueError:
            raise UsageError(f"{said} {value}: the weight must be a number, got {text!r}") from None
        if not math.isfinite(weight):
            raise UsageError(f"{said} {value}: the weight must be finite, got {text}")
        if any(Path(path).resolve() == Path(given).resolve() for given in adapters):
            raise UsageError(f"{said} {path} is given twice: give it once, with the sum of the weights")
        adapters[path] = weight
    return adapters


train_options = join_options(
    click.option("--instance-data-dir", type=FilePath(), metavar="DIR",
                 help="Folder of the subject's photographs; 3 to 6 are enough.  [required]"),
    click.option("--class-noun", metavar="NOUN",
                 help="What the subject is, e.g. dog; auto lets a classifier decide, and stops where it is "
                 "unsure.  [required]"),
    click.option("--class-noun-classifier", metavar="CLIP",
                 help="Folder or hub id of the CLIP that decides auto.  [default: EfficientNet-Lite2; on "
                 "toybox its own classifier]"),
    click.option("--class-nouns", metavar="LIST|FILE",
                 help="What that CLIP chooses among: comma-separated, or a file with one a line.  "
                 "[default: the nouns of ImageNet's classes]"),
    click.option("--output-dir", type=FilePath(), metavar="OUT",
                 help="Folder for the adapter and all that belongs to it.  [required]"),
    click.option("--name", help="Stem of the adapter's file name.  [default: OUT's name]"),
    click.option("--overwrite", is_flag=True, default=None, help="Replace what is in OUT."),
    click.option("--base", metavar="BASE", help=f"{BASE_HELP}  [default: {TrainConfig.base}]"),
    click.option("--prediction-type", type=click.Choice(PREDICTION_TYPES),
                 help="What the base predicts; an SD2.x file cannot tell.  [default: what it says itself]"),
    click.option("--identifier", metavar="TOKEN",
                 help="The word for the subject; auto picks a rare token of the base.  [default: auto]"),
    click.option("--instance-prompt", metavar="TEXT",
                 help="Prompt of the photographs; NAME.txt beside NAME.jpg is that photograph's own.  "
                 "[default: a photo of {identifier} {class_noun}]"),
    click.option("--photo-tokens/--no-photo-tokens", default=None,
                 help="In two of three passes, end each photograph's prompt in a rare token of its own, "
                 "which takes its background.  [preset]"),
    click.option("--class-prompt", metavar="TEXT",
                 help="The same without the identifier.  [default: a photo of a {class_noun}]"),
    click.option("--prior", type=click.Choice(PRIORS),
                 help="What keeps the class as it is: the base itself as a teacher (distill), its pictures "
                 f"(generated), or nothing.  [default: {TrainConfig.prior}]"),
    click.option("--prior-source", type=click.Choice(PRIOR_SOURCES),
                 help="Latents that distill compares on: sampled from the base, or those of the instance "
                 "pictures.  [preset]"),
    click.option("--prior-loss-weight", type=float, metavar="X", help="Weight of the prior term.  [preset]"),
    click.option("--class-data-dir", type=FilePath(), metavar="DIR",
                 help="Class pictures to use instead of sampled ones."),
    click.option("--num-class-images", type=int, metavar="N",
                 help="How many to sample from the base.  [preset]"),
    click.option("--rank", type=int, metavar="N",
                 help="Rank of the adapter.  [preset]"),
    click.option("--alpha", type=float, metavar="X",
                 help="The adapter's scale is alpha / rank.  [default: the rank]"),
    click.option("--targets", metavar="LIST",
                 help=f"Layers of the UNet, comma-separated, of {', '.join(TARGETS)}.  [preset]"),
    click.option("--train-text-encoder/--no-train-text-encoder", default=None,
                 help="Adapt the text encoder too, SDXL's both.  [preset]"),
    click.option("--text-encoder-rank", type=int, metavar="N",
                 help="Rank in the text encoder.  [default: the rank]"),
    click.option("--full", is_flag=True, default=None,
                 help="Train the models whole, without an adapter, as a baseline; leaves OUT/model."),
    click.option("--max-train-steps", type=int, metavar="N", help="Optimizer steps.  [preset]"),
    click.option("--learning-rate", type=float, metavar="X", help="Of the UNet's adapter.  [preset]"),
    click.option("--text-encoder-learning-rate", type=float, metavar="X",
                 help="Of the text encoder's adapter.  [preset]"),
    click.option("--lr-scheduler", type=click.Choice(LR_SCHEDULERS),
                 help="How both rates go on: as they are, or down to 0.  [preset]"),
    click.option("--lr-warmup-steps", type=int, metavar="N",
                 help="Steps over which both rates rise first.  [default: 0]"),
    click.option("--optimizer", type=click.Choice(OPTIMIZERS),
                 help="adamw8bit needs bitsandbytes, prodigy needs prodigyopt.  "
                 f"[default: {TrainConfig.optimizer}]"),
    click.option("--train-batch-size", type=int, metavar="N",
                 help="Photographs a forward pass; as many class pictures come with them.  [preset]"),
    click.option("--gradient-accumulation-steps", type=int, metavar="N",
                 help="Forward passes an optimizer step.  [preset]"),
    click.option("--resolution", type=int, metavar="PIXELS",
                 help="Side of the training pictures.  [default: the base's own]"),
    click.option("--aspect-ratio-buckets/--no-aspect-ratio-buckets", default=None,
                 help="Crop photographs to about their own shape, not to squares.  [preset]"),
    click.option("--masked-loss", is_flag=True, default=None,
                 help="Learn what NAME.mask.png beside NAME.jpg, or the photograph's transparency, shows."),
    click.option("--mixed-precision", type=click.Choice(PRECISIONS),
                 help="auto is bf16 where the device has it natively, else fp16 on CUDA and fp32 on a CPU.  "
                 "[default: auto]"),
    click.option("--gradient-checkpointing", is_flag=True, default=None, help="Less memory, slower steps."),
    click.option("--compile", is_flag=True, default=None,
                 help="Compile the UNet; pays on a GPU, after minutes of compiling."),
    click.option("--snr-gamma", type=float, metavar="X",
                 help="Min-SNR weighting, usually 5.  [default: off]"),
    click.option("--seed", type=int, metavar="N",
                 help=f"Of weights, noise and samples.  [default: {TrainConfig.seed}]"),
    click.option("--checkpointing-steps", type=int, metavar="N",
                 help="Steps between two checkpoints; 0 writes none.  [preset]"),
    click.option("--resume", is_flag=True, default=None,
                 help="Go on from the newest checkpoint in OUT; from the start if there is none."),
    click.option("--validation-prompt", multiple=True, metavar="TEXT",
                 help="A prompt of the sample grid; may hold {identifier} and be given several times."),
    click.option("--validation-steps", type=int, metavar="N",
                 help="Steps between two sample grids.  [default: one at the end]"),
    click.option("--select", type=click.Choice(SELECTIONS),
                 help="Which checkpoint becomes the file: the last, or the best by what it draws (likeness, "
                 "obedience, the class kept), and the run ends when none gets better.  "
                 f"[default: {TrainConfig.select}]"),
    click.option("--image-encoder", metavar="ENCODER",
                 help="Folder or hub id of a DINO, DINOv2 or CLIP for --select best.  [default: "
                 "efficientnet-lite2; on toybox toybox-judges]"),
    click.option("--text-image-encoder", metavar="ENCODER",
                 help="Folder or hub id of a CLIP for --select best; without it obedience counts on "
                 "toybox only."),
    click.option("--logger", type=click.Choice(LOGGERS),
                 help="Show figures and samples there too; needs its package.  "
                 f"[default: {TrainConfig.logger}]"),
    click.option("--random-flip", is_flag=True, default=None,
                 help="Mirror half of the photographs; not for subjects with a left and a right."),
    click.option("--config", "config_file", type=FilePath(), metavar="FILE.toml",
                 help="Take what is not given here from a file such as an earlier OUT/config.toml."),
    click.option("--dry-run", is_flag=True,
                 help="Check everything; print configuration, prompts, layers, estimated memory and size."),
)  # fmt: skip
