"""`dbadapter train`: flags and a file become one configuration."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dbadapter.cli.group import progress_bars, warn
from dbadapter.cli.options import train_options
from dbadapter.config import AUTO, TrainConfig, read_toml
from dbadapter.errors import UsageError
from dbadapter.run_folder import read_metrics

if TYPE_CHECKING:
    from dbadapter.finishing import TrainResult

__all__ = ["train"]

TOYBOX_WARNING = (
    "no --base given, so this trains toybox, a model of 64-pixel pictures of toys: fine for a trial, but the "
    "likeness to real photographs stays poor; for those pass --base with Stable Diffusion 1.x, 2.x or SDXL: "
    "a folder, a .safetensors file or a hub id"
)


@click.command()
@train_options
def train(config_file: Path | None, dry_run: bool, **flags: Any) -> None:
    """Train an adapter on a folder of photographs.

    Leaves NAME.safetensors (the file to share) in OUT, and beside it what other programs show with it,
    sample pictures, metrics, checkpoints and the configuration. [preset] is a value that fits the base.

    \b
    Example:
      dbadapter train --instance-data-dir photos/ --class-noun dog --output-dir my-dog
    """
    config = _train_config(config_file, flags)
    config.validate()
    warned = "base" in _given(config_file, flags) or _is_example(config.instance_data_dir)
    if dry_run:
        printed = _dry_run(config)
        if not warned:
            warn(TOYBOX_WARNING)
        click.echo(printed, nl=False)
        return
    from dbadapter.training import train as run

    begun = False
    with progress_bars() as progress:

        def report(stage: str, done: int, total: int) -> None:
            nonlocal begun
            if not begun:  # the first report comes when all checks are through: an error stands alone
                begun = True
                if not warned:
                    warn(TOYBOX_WARNING)
                if config.class_noun == AUTO:
                    _say_noun(config.output_dir / "config.toml")
            progress(stage, done, total)

        result = run(config, progress=report, on_log=progress.show)
    _say(result)


def _say(result: TrainResult) -> None:
    """Print what the run left and the command to try next; the first of several processes only."""
    from dbadapter.processes import processes

    if not processes().is_main:
        return
    config, path = result.config, shlex.quote(str(result.adapter_path))
    word, noun = config.identifier, config.class_noun
    if result.finished_before:
        click.echo(f"Finished already, nothing was changed: {result.steps} steps; to go on pass more "
                   "--max-train-steps")  # fmt: skip
    else:
        click.echo(
            f"{result.steps} steps, {result.seconds:.0f} s in all, {result.peak_memory_mb:.0f} MB at the peak"
        )
    base = "" if config.base == TrainConfig.base else f" --base {shlex.quote(config.base)}"
    if config.prediction_type is not None:
        base += f" --prediction-type {config.prediction_type}"
    if config.full:
        click.echo(f"Model: {result.adapter_path}")
        call = f"--base {path}"
    else:
        click.echo(f"Adapter: {result.adapter_path}")
        call = f"{base} --adapter {path}".strip()
    if result.chosen_step is not None:
        click.echo(f"Best score: step {result.chosen_step} of {result.steps}{_score_of(result)}")
        if not result.finished_before and result.steps < int(config.max_train_steps or 0):
            click.echo(
                f"Ended before step {config.max_train_steps}: no checkpoint after step {result.chosen_step} "
                "scored better; --resume with another --max-train-steps goes on"
            )
    if result.last_path is not None:
        click.echo(f"The last step's adapter: {result.last_path}")
    if result.best_path is not None:
        click.echo(f"Lowest validation loss before the end: {result.best_path}")
    click.echo(
        f'Try it: dbadapter generate {call} --prompt "a photo of {word} {noun} on the beach" '
        "--output-dir pictures"
    )


def _score_of(result: TrainResult) -> str:
    """Return the score that chose the file, and what to do where it says that nothing was learned."""
    chosen = [line for line in read_metrics(result.metrics_path) if line["step"] == result.chosen_step]
    score = chosen[-1].get("score") if chosen else None
    if score is None:
        return ""
    hint = ""
    if score <= 0 and (chosen[-1].get("likeness") or 0) <= 0:
        hint = "; no checkpoint shows the subject yet: pass more --max-train-steps"
    elif score <= 0:
        hint = "; it shows the subject, but by this score prompts or class are lost: look at the pictures"
    return f", {score:.3f} of 1{hint}"


def _say_noun(resolved: Path) -> None:
    """Print what the class noun was found to be, out of the run's own record."""
    values = read_toml(resolved)
    told = values.get("class_noun_vote", "as the run before was told")
    click.echo(f"Class noun: {values['class_noun']} ({told})")


def _given(config_file: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the file or a flag sets; a flag wins."""
    values = read_toml(config_file) if config_file else {}
    flags = {name: value for name, value in flags.items() if value is not None and value != ()}
    if {"class_noun", "instance_data_dir"} & set(flags):
        values.pop("class_noun_vote", None)  # the record of another noun, or of other photographs
    values |= flags
    if isinstance(targets := values.get("targets"), str):
        values["targets"] = tuple(part.strip() for part in targets.split(",") if part.strip())
    if isinstance(nouns := values.get("class_nouns"), str):
        values["class_nouns"] = _listed(nouns)
    return values


def _listed(nouns: str) -> tuple[str, ...]:
    """Return the nouns of a file, one a line, or of a comma-separated list."""
    lines = nouns.split(",")
    if Path(nouns).is_file():
        try:
            lines = Path(nouns).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--class-nouns {nouns} cannot be read as UTF-8 text: {error}") from None
    elif len(lines) == 1:
        raise UsageError(
            f"--class-nouns {nouns} is neither a file nor a list: pass a file with one noun a line, or "
            "two or more nouns with commas between"
        )
    return tuple(noun.strip() for noun in lines if noun.strip())


def _train_config(config_file: Path | None, flags: dict[str, Any]) -> TrainConfig:
    values = _given(config_file, flags)
    required = [f.name for f in dataclasses.fields(TrainConfig) if f.default is dataclasses.MISSING]
    missing = [f"--{name.replace('_', '-')}" for name in required if name not in values]
    if missing:
        raise UsageError(
            f"missing {', '.join(missing)}, e.g. dbadapter train --instance-data-dir photos --class-noun dog "
            "--output-dir my-dog"
        )
    return TrainConfig(**values)


def _is_example(folder: Path) -> bool:
    from dbadapter import toybox

    return folder.resolve() == toybox.example_subject().folder.resolve()


def _dry_run(config: TrainConfig) -> str:
    from dbadapter.dry_run import dry_run

    return dry_run(config)
