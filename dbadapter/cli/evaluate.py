"""`dbadapter evaluate`: does it know the subject, and what did it forget?"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import dbadapter
from dbadapter.cli.group import progress_bars, warn
from dbadapter.cli.options import BASE_HELP, FilePath, overwrite_option, prediction_option
from dbadapter.cli.report_files import check_outputs, refuse_input, write_text
from dbadapter.config_checks import AUTO, noun_faults
from dbadapter.errors import OutputError, UsageError

if TYPE_CHECKING:
    from dbadapter.evaluation_report import ReportPictures

__all__ = ["evaluate"]

_MADE_WITH = ("torch", "diffusers", "transformers")
_KINDS = ("object", "live")
# Figure -> what it is called in the terminal, and what is better.
_ROWS = {
    "subject_fidelity": ("subject like its photographs", "more"),
    "prompt_fidelity": ("prompts obeyed", "more"),
    "class_fidelity": ("class still as asked", "more"),
    "prior_preservation": ("class like the subject", "less"),
    "diversity": ("class diversity", "more"),
    "drift": ("drift of other prompts", "less"),
    "unrelated_fidelity": ("others still as asked", "more"),
    "nearest_photograph": ("nearest photograph", ""),
}
_MOST_IMAGES = 1000  # as sampling.MOST_IMAGES, whose import would bring torch along
_BESIDE = 3  # models side by side in the terminal


@click.command()
@click.option("--base", default="toybox", show_default=True, metavar="BASE", help=BASE_HELP)
@prediction_option
@click.option("--adapter", "adapters", multiple=True, type=FilePath(), metavar="FILE",
              help="An adapter of that base.")  # fmt: skip
@click.option("--tuned", "models", multiple=True, type=FilePath(), metavar="FOLDER",
              help="A fully tuned model in diffusers' layout.")  # fmt: skip
@click.option("--compare", multiple=True, type=FilePath(), metavar="PATH",
              help="Adapters and tuned models; may be given several times, and paths may follow one another. "
              "The first is what the others are compared with.")  # fmt: skip
@click.argument("more", nargs=-1, type=FilePath(), metavar="[PATH]...")
@click.option("--instance-data-dir", required=True, type=FilePath(), metavar="DIR",
              help="The subject's photographs.")  # fmt: skip
@click.option("--class-noun", required=True, metavar="NOUN", help="What the subject is, e.g. dog.")
@click.option("--identifier", metavar="TOKEN",
              help="The word for the subject, of all.  "
              "[default: what each adapter's file, or the run of a tuned model, says]")  # fmt: skip
@click.option("--prompts", "prompts_file", type=FilePath(), metavar="FILE",
              help="One prompt a line, {} for the subject.  "
              "[default: DreamBooth's 25; on toybox its contexts]")  # fmt: skip
@click.option("--kind", type=click.Choice(_KINDS),
              help="Which of DreamBooth's lists: live is for people and animals.  "
              "[default: object]")  # fmt: skip
@click.option("--image-encoder", metavar="ENCODER",
              help="Folder or hub id of a DINO, DINOv2 or CLIP; the paper's is DINO ViT-S/16.  "
              "[default: efficientnet-lite2; on toybox toybox-judges]")  # fmt: skip
@click.option("--text-image-encoder", metavar="ENCODER",
              help="Folder or hub id of a CLIP; without it prompt fidelity is not measured but on toybox, "
              "whose judges know the truth.")  # fmt: skip
@click.option("--num-images-per-prompt", type=click.IntRange(1, _MOST_IMAGES), default=4, show_default=True,
              metavar="N", help="Seeds of every prompt.")  # fmt: skip
@click.option("--num-class-images", type=click.IntRange(2, _MOST_IMAGES), default=24, show_default=True,
              metavar="N", help="Pictures of the class.")  # fmt: skip
@click.option("--num-inference-steps", type=click.IntRange(min=1), default=25, show_default=True,
              metavar="N", help="Denoising steps.")  # fmt: skip
@click.option(
    "--guidance-scale", type=float, metavar="X", help="How strictly to follow the prompt.  [preset]"
)
@click.option("--seed", type=click.IntRange(0, 2**62), default=1000, show_default=True, metavar="N",
              help="Of the first picture of every prompt.")  # fmt: skip
@click.option("--json", "json_path", type=FilePath(), metavar="OUT", help="Where the figures go, as JSON.")
@click.option("--report", "report_path", type=FilePath(), metavar="OUT.html",
              help="Where they go as one page for the browser, with plots and pictures.")  # fmt: skip
@overwrite_option
def evaluate(
    base: str,
    prediction_type: str | None,
    adapters: tuple[Path, ...],
    models: tuple[Path, ...],
    compare: tuple[Path, ...],
    more: tuple[Path, ...],
    instance_data_dir: Path,
    class_noun: str,
    identifier: str | None,
    prompts_file: Path | None,
    kind: str | None,
    image_encoder: str | None,
    text_image_encoder: str | None,
    json_path: Path | None,
    report_path: Path | None,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Score adapters and tuned models.

    Does it show the subject, does it follow the prompt, what became of the class and of everything else? As
    in DreamBooth's paper: prompts times seeds, with intervals of 95 %. Under another encoder than the paper's
    the figures go by its name, and compare with each other only.

    \b
    Example:
      dbadapter evaluate --base BASE --adapter my-dog/my-dog.safetensors \\
          --instance-data-dir photos --class-noun dog --kind live
    """
    for option, given in {"--adapter": adapters, "--tuned": models}.items():
        if len(given) > 1:
            raise UsageError(
                f"{option} was given {len(given)} times: several are scored by --compare PATH PATH..."
            )
    adapter, tuned = (next(iter(given), None) for given in (adapters, models))
    paths = [path for path in (adapter, tuned) if path is not None] + [*compare, *more]
    if class_noun.strip().lower() == AUTO:
        raise UsageError(
            "--class-noun auto is for train: pass the noun that the adapter was trained with, as its "
            "config.toml says"
        )
    if not paths:
        raise UsageError("give what is scored: --adapter FILE, --tuned FOLDER, or --compare PATH PATH...")
    if more and not compare:
        raise UsageError(f"{more[0]}: paths follow --compare; for one adapter pass --adapter FILE")
    words = {"--identifier": identifier, "--image-encoder": image_encoder}
    for option, word in (words | {"--text-image-encoder": text_image_encoder}).items():
        if word is not None and not word.strip():
            raise UsageError(f"{option} is empty: leave it out for the default")
    class_noun, identifier = class_noun.strip(), identifier.strip() if identifier is not None else None
    for option, word in {"--class-noun": class_noun, "--identifier": identifier}.items():
        if word is not None and (fault := next(noun_faults(option, word), None)):
            raise UsageError(fault)
    if kind is not None and prompts_file is not None:
        raise UsageError(
            "--kind chooses one of DreamBooth's lists, and --prompts gives another: leave one out"
        )
    _refuse_peft_folders(paths)
    if adapter is not None and adapter.is_dir():
        from dbadapter.candidates import check_model

        check_model(adapter)  # says which file of it is an adapter
        raise UsageError(f"--adapter {adapter} is a fully tuned model's folder: pass it with --tuned")
    if tuned is not None and not tuned.exists():
        raise UsageError(f"--tuned {tuned} does not exist: give a tuned model's folder")
    if tuned is not None and tuned.is_file():
        raise UsageError(
            f"--tuned {tuned} is a file: a tuned model is a folder in diffusers' layout; pass an adapter's "
            "file with --adapter"
        )
    check_outputs(json_path, report_path, overwrite)
    specs = [Path(spec) for spec in (base, image_encoder, text_image_encoder) if spec and spec != "toybox"]
    read_whole = [*paths, *specs]
    read_whole += [spec.with_suffix("") for spec in specs if spec.is_file()]  # a single file's configurations
    read = [*paths, *specs, *([prompts_file] if prompts_file else []), *_files_of_runs(paths)]
    for path in (json_path, report_path):
        if path is not None:
            refuse_input(path, read, read_whole, instance_data_dir)
    from dbadapter.evaluation_report import ReportPictures

    # What is drawn is kept only where it is shown.
    pictures = ReportPictures() if report_path is not None else None
    files = _Files(json_path, report_path, pictures)
    try:
        report = _report(
            base,
            paths,
            class_noun,
            identifier,
            files,
            prediction_type=prediction_type,
            instance_data_dir=instance_data_dir,
            prompts_file=prompts_file,
            kind=kind,
            image_encoder=image_encoder,
            text_image_encoder=text_image_encoder,
            **settings,
        )
        # Before anything is shown: a pipe that is closed early must not take the files with it.
        failed = files.write(report)
    except BaseException as error:
        if files.latest is None:
            raise
        with suppress(OSError):  # whoever reads the table may be gone
            _show(files.latest)
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(files.kept) from None
        if files.kept:
            warn(files.kept)
        raise
    _show(report)
    if failed:
        raise failed[0]


@dataclass
class _Files:
    """What an evaluation leaves, written anew after every candidate: hours of drawing are in it.

    Attributes:
        json_path, page_path: None where it is not asked for.
        pictures: for the page.
        latest: the report as it was last known.
        written: the files that hold it.
    """

    json_path: Path | None
    page_path: Path | None
    pictures: ReportPictures | None
    latest: dict[str, Any] | None = None
    written: list[Path] = field(default_factory=list)

    def write(self, report: dict[str, Any]) -> list[OutputError]:
        """Write a report; a file that cannot be written takes neither the other nor the table with it."""
        from dbadapter.evaluation_report import finite, report_page

        self.latest = report
        failed: list[OutputError] = []
        if self.json_path is not None:
            self._write(self.json_path, json.dumps(finite(report), indent=2) + "\n", "--json", failed)
        if self.page_path is not None and self.pictures is not None:
            self._write(self.page_path, report_page(report, self.pictures), "--report", failed)
        return failed

    def _write(self, path: Path, text: str, option: str, failed: list[OutputError]) -> None:
        before = len(failed)
        write_text(path, text, option, failed)
        if len(failed) > before and path in self.written:
            self.written.remove(path)
        elif len(failed) == before and path not in self.written:
            self.written.append(path)

    def write_so_far(self, report: dict[str, Any]) -> None:
        """Write a report that is not whole yet; what cannot be written is told at once."""
        for error in self.write(report):
            warn(str(error))

    @property
    def kept(self) -> str:
        """Say which files hold what was scored."""
        names = " and ".join(str(path) for path in self.written)
        return f"what was scored before is in {names}" if names else ""


def _report(
    base: str,
    paths: list[Path],
    class_noun: str,
    identifier: str | None,
    outputs: _Files,
    *,
    prediction_type: str | None,
    instance_data_dir: Path,
    prompts_file: Path | None,
    kind: str | None,
    image_encoder: str | None,
    text_image_encoder: str | None,
    **settings: Any,
) -> dict[str, Any]:
    from dbadapter import evaluation
    from dbadapter.base import load_base, pick_device
    from dbadapter.candidates import load_candidate, told_apart
    from dbadapter.encoders import (
        TOYBOX_JUDGES,
        default_encoder,
        default_prompt_judge,
        load_encoder,
        load_prompt_judge,
    )
    from dbadapter.evaluation_prompts import choose_prompts, default_prompts, read_prompts

    # What can be refused is refused before a model is fetched.
    try:
        how = evaluation.Settings(**settings)
    except UsageError as error:  # by the field's name
        field_name, _, rest = str(error).partition(" ")
        raise UsageError(f"--{field_name.replace('_', '-')} {rest}") from None
    templates = read_prompts(prompts_file) if prompts_file else None
    found = evaluation.find_references(instance_data_dir)
    candidates = told_apart([load_candidate(path, class_noun, identifier) for path in paths])
    names = [candidate.name for candidate in candidates]
    real = [path.resolve() for path in paths]
    if again := next((path for path, own in zip(paths, real, strict=True) if real.count(own) > 1), None):
        raise UsageError(f"{again} is given twice: name each adapter and model once")
    if "base" in names:
        raise UsageError("a candidate is called 'base', as the base itself is in the report: rename it")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(
            f"two candidates are called {twice!r}: the report tells them apart by name and folder; name each "
            "once, or rename one"
        )
    device = pick_device().type
    given = load_encoder(image_encoder, device) if image_encoder else None
    given_judge = load_prompt_judge(text_image_encoder, device) if text_image_encoder else None
    loaded = load_base(base, prediction_type=prediction_type)
    if kind is not None and loaded.family == "toybox":
        warnings.warn("toybox has prompts of its own: --kind does nothing there", UserWarning, stacklevel=2)
    if loaded.family != "toybox" and TOYBOX_JUDGES in (image_encoder, text_image_encoder):
        warnings.warn(
            f"{TOYBOX_JUDGES} know toybox's pictures alone: of another base's their figures mean nothing",
            UserWarning,
            stacklevel=2,
        )
    encoder = given or load_encoder(default_encoder(loaded.family), device)
    judged_by = default_prompt_judge(loaded.family)
    judge = given_judge or (load_prompt_judge(judged_by, device) if judged_by else None)
    photographs = evaluation.load_references(found, max(loaded.resolution, 64))
    pictures = outputs.pictures
    if pictures is not None:
        pictures.add_photographs(photographs)
    prompts = default_prompts(loaded.family, class_noun, kind or "object")
    if templates is not None:
        prompts = choose_prompts(class_noun, templates, prompts.unrelated)
    versions = {"dbadapter": dbadapter.__version__} | {name: version(name) for name in _MADE_WITH}
    made: dict[str, Any] = {"base": loaded.name, "photographs": len(photographs)}
    made |= {"date": date.today().isoformat(), "versions": versions}
    with progress_bars() as progress:
        report = evaluation.evaluate(
            loaded,
            candidates,
            photographs,
            prompts,
            class_noun=class_noun,
            encoder=encoder,
            prompt_judge=judge,
            settings=how,
            progress=progress,
            on_pictures=pictures.add if pictures is not None else None,
            on_report=lambda so_far: outputs.write_so_far(made | so_far),
        )
    return made | report


def _show(report: dict[str, Any]) -> None:
    if accuracy := report.get("encoder_accuracy"):
        said = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
        click.echo(f"the judges' own accuracy on renders that they never saw: {said}")
    click.echo(
        f"encoder {report['image_encoder']}; photographs among themselves {report['subject_ceiling']:.3f}, "
        f"at most {report['photographs_nearest']:.3f}"
    )
    names = list(report["figures"])
    for start in range(0, len(names), _BESIDE):
        for line in _table({name: report["figures"][name] for name in names[start : start + _BESIDE]}):
            click.echo(line)
    for name, reason in report.get("left_out", {}).items():
        click.echo(f"left out: {name}: {reason}")
    for entry in report["differences"]:
        click.echo(
            f"{entry['of']} minus {entry['minus']}, {entry['figure']}: {_decimal(entry['value'], '+')} "
            f"{_interval(entry, '+')}"
        )


def _table(figures: dict[str, Any]) -> list[str]:
    """Return a line for each figure, a column for each model, with intervals of 95 %."""
    rows = [["mean [95 %]", "better", *figures]]
    rows += [
        [label, better, *(_cell(of[key]) for of in figures.values())]
        for key, (label, better) in _ROWS.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _cell(figure: Any) -> str:
    if isinstance(figure, dict):
        return f"{_decimal(figure['value'])} {_interval(figure)}"
    return f"{figure:.3f}" if isinstance(figure, float) else str(figure)


def _interval(figure: Any, sign: str = "") -> str:
    from dbadapter.metrics import is_known

    if not is_known(figure["low"], figure["high"]):
        return "[unknown: too few]"
    return f"[{_decimal(figure['low'], sign)}, {_decimal(figure['high'], sign)}]"


def _decimal(value: float, sign: str = "") -> str:
    shown = f"{value:{sign}.3f}"
    return shown if float(shown) else f"{0:{sign}.3f}"  # no -0.000


def _files_of_runs(paths: list[Path]) -> Iterator[Path]:
    """Yield what training left beside adapters and tuned models, there or not: notes, picture, settings."""
    for path in paths:
        if path.is_dir():
            yield Path(os.path.realpath(path)).parent / "config.toml"
        else:
            yield from (path.with_suffix(".json"), path.with_suffix(".png"), path.parent / "config.toml")


def _refuse_peft_folders(paths: list[Path]) -> None:
    """Refuse what looks like a tuned model and is an adapter in PEFT's own layout."""
    for path in paths:
        if any(
            (path / part / "adapter_config.json").is_file()
            for part in ("", "unet", "text_encoder", "text_encoder_2")
        ):
            raise UsageError(f"{path} is a PEFT folder: make a file of it with dbadapter convert first")
