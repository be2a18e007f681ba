"""The folder that a training run leaves: what belongs to it, what is refused, and its metrics."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dbadapter.errors import OutputError

__all__ = ["Finished", "RunFolder", "is_run", "read_metrics", "write_text"]


class Finished(NamedTuple):
    """A complete run.

    Args:
        steps: that were taken.
        identity: what a run must share to be the same, see `checkpoint.run_identity`.
        asked: steps that were asked for, where the run ended before them of itself.
    """

    steps: int
    identity: Mapping[str, Any]
    asked: int | None = None


@dataclass
class RunFolder:
    """The output folder of one run.

    Args:
        path: the folder; made by `start`.
        name: stem of the adapter's file.
    """

    path: Path
    name: str
    made: bool = False

    @property
    def adapter(self) -> Path:
        """The adapter's file; NAME.json and NAME.png lie beside it."""
        return self.path / f"{self.name}.safetensors"

    @property
    def best_adapter(self) -> Path:
        """The adapter at the step with the lowest validation loss, where that is not the last step."""
        return self.path / f"{self.name}-best.safetensors"

    @property
    def last_adapter(self) -> Path:
        """The adapter at the last step, where another step's was chosen (select "best")."""
        return self.path / f"{self.name}-last.safetensors"

    @property
    def curve(self) -> Path:
        """The plot of the checkpoints' scores (select "best")."""
        return self.path / "selection.png"

    @property
    def model(self) -> Path:
        """The whole model of a run with `full`, a diffusers folder."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def samples(self) -> Path:
        """Pictures by the finished adapter, and their grid."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """What `--resume` goes on from."""
        return self.path / "checkpoints"

    @property
    def class_images(self) -> Path:
        """The class pictures of prior `generated`, with the record of what made them."""
        return self.path / "class_images"

    @property
    def finished(self) -> Finished | None:
        """What the last run noted when it was complete; None if it was cut, or there is none."""
        # A run aside is one before that which was cut before it had anything to show.
        results = self.adapter.exists() or (self.model / "model_index.json").exists()
        if self._earlier.is_dir() or not results:
            return None
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            asked = note.get("asked")
            return Finished(int(note["steps"]), dict(note["identity"]), None if asked is None else int(asked))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def finish(self, finished: Finished) -> None:
        """Note that the run is complete."""
        write_text(self._note, json.dumps(finished._asdict()) + "\n")

    @property
    def _note(self) -> Path:
        return self.path / ".finished.json"

    def checkpoint_of(self, step: int) -> Path:
        """The checkpoint of a step, which need not be there."""
        return self.checkpoints / f"step-{step:06d}.safetensors"

    def check(self, instance_data_dir: Path, *, overwrite: bool, resume: bool) -> None:
        """Pass if a run may write here; ask before hours of work, not after.

        Raises:
            OutputError: it is a file, the photographs' own folder, or holds outputs already (unless overwrite
                or resume, and they are a run's).
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; expected a folder: pass another --output-dir")
        if self.path.exists() and self.path.samefile(instance_data_dir):
            raise OutputError(
                f"{self.path} holds the photographs, and the run's pictures would mix with them; "
                "pass another --output-dir"
            )
        source = instance_data_dir.resolve()
        for inside in (self.class_images.resolve(), self.samples.resolve()):
            if source.is_relative_to(inside):
                raise OutputError(
                    f"the photographs lie in {inside}, where the run writes pictures of its own; "
                    "pass another --output-dir"
                )
        self._check_kinds()
        present = [path.name for path in self._outputs() if path.exists()]
        if (overwrite or resume) and present and not self._is_run():
            raise OutputError(
                f"{self.path} holds {present[0]}, but no run of dbadapter, so it is not touched; "
                "pass another --output-dir"
            )
        if present and not (overwrite or resume):
            cure = "pass --overwrite to replace it, or another --output-dir"
            if self._is_run() and not self.finished:
                cure = f"pass --resume to go on with that run, {cure}"
            raise OutputError(f"{self.path} holds {present[0]} already; {cure}")

    def _check_kinds(self) -> None:
        folders = {self.model, self.samples, self.checkpoints, self.class_images}
        for path in self._outputs():
            if path.exists() and path.is_dir() != (path in folders):
                kinds = ("a file", "a folder") if path in folders else ("a folder", "a file")
                raise OutputError(
                    f"{path} is {kinds[0]}, and the run writes {kinds[1]} there; move it elsewhere"
                )

    def drop_other_kind(self, *, full: bool) -> None:
        """Remove what an earlier run of the other kind, adapter or whole model, has left here."""
        if full:
            files = (
                self.adapter,
                self.best_adapter,
                self.last_adapter,
                *map(self.adapter.with_suffix, (".json", ".png")),
            )
            for path in files:
                path.unlink(missing_ok=True)
        elif (self.model / "model_index.json").exists():
            shutil.rmtree(self.model, ignore_errors=True)

    def start(self, config_toml: str, *, resumed_step: int) -> None:
        """Make the folder, write config.toml, and keep of earlier metrics the steps that stay valid.

        A run from the start sets an earlier one's checkpoints, metrics and configuration aside until
        `settle`; an earlier adapter stays until the new one is done.

        Raises:
            OutputError: the folder cannot be written.
        """
        try:
            self.made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._put_back()  # of a run that was killed before it had anything of its own
            if not resumed_step:
                self._set_aside()
            self._note.unlink(missing_ok=True)
            write_text(self.config, config_toml)
            kept = [line for line in self.read_metrics() if int(line["step"] or 0) <= resumed_step]
            write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}; pass another --output-dir"
            ) from error

    def append_metrics(self, lines: Iterable[Mapping[str, float | int | None]]) -> None:
        """Append one JSON object a line.

        Raises:
            OutputError: they cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)  # somebody may have removed it meanwhile
            self._append(lines)
        except OSError as error:
            raise OutputError(
                f"{self.metrics} cannot be written: {error.strerror or error}; what was saved before is as "
                "it was: make room, and add --resume"
            ) from error

    def _append(self, lines: Iterable[Mapping[str, float | int | None]]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(line)) + "\n" for line in lines)

    def read_metrics(self) -> list[dict[str, float | int | None]]:
        """Return the steps so far, those before a resume included, see `read_metrics`."""
        return read_metrics(self.metrics)

    def give_up(self) -> None:
        """Leave the folder so that the next run, or --resume, finds all that this one has saved."""
        if self._own_checkpoints():
            self.settle()
        else:
            self._abandon()

    def _abandon(self) -> None:
        """Take away what a run that never made a checkpoint has left, and put the earlier run back.

        Finished class pictures stay, which may have taken an hour, and the configuration with them: it
        tells the next run that the folder may be replaced.
        """
        pictures = any(self.class_images.glob("*.png"))
        if self.made and not pictures:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for path in (self.metrics,) if pictures else (self.metrics, self.config):
            path.unlink(missing_ok=True)
        for previews in self.samples.glob("step-*"):
            shutil.rmtree(previews, ignore_errors=True)
        self._put_back()

    def settle(self) -> None:
        """Let go of the earlier run: this one has something of its own to show."""
        shutil.rmtree(self._earlier, ignore_errors=True)

    @property
    def _earlier(self) -> Path:
        return self.path / ".earlier-run"

    def _own_checkpoints(self) -> list[Path]:
        # By name: the folder may be somebody's store of base models, also called checkpoints.
        found = self.checkpoints.glob("step-*.safetensors") if self.checkpoints.is_dir() else []
        return [path for path in found if path.stem[5:].isdigit() and len(path.stem) >= 11]

    def _set_aside(self) -> None:
        files = [path for path in (self.config, self.metrics, self._note) if path.exists()]
        present = [*files, *self._own_checkpoints(), *self.samples.glob("step-*")]
        for path in present:
            target = self._earlier / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)

    def _put_back(self) -> None:
        if not self._earlier.is_dir() or self._own_checkpoints():
            self.settle()
            return
        for path in [path for path in self._earlier.rglob("*") if path.is_file()]:
            target = self.path / path.relative_to(self._earlier)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        self.settle()

    def _is_run(self) -> bool:
        """Whether a run of ours made the folder's content, so that --overwrite may replace it."""
        return is_run(self.path) or (not self.config.is_file() and self._earlier.is_dir())

    def _outputs(self) -> list[Path]:
        sidecars = [self.adapter.with_suffix(end) for end in (".json", ".png")]
        sidecars += [self.best_adapter, self.last_adapter, self.curve]
        rest = [
            self.model,
            self.config,
            self.metrics,
            self.card,
            self.samples,
            self.checkpoints,
            self.class_images,
        ]
        return [self.adapter, *sidecars, *rest]


def is_run(folder: Path) -> bool:
    """Return whether a run's configuration lies in a folder."""
    try:
        return "instance_data_dir" in (folder / "config.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def write_text(path: Path, text: str) -> None:
    """Write a file beside its target and rename it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_metrics(path: Path) -> list[dict[str, float | int | None]]:
    """Return the lines of a metrics.jsonl, none where there is no file.

    A crash or a hand may have damaged it: left out is what is no step's line, and what in it is no number.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [line for each in text.splitlines() if (line := _metrics_line(each)) is not None]


def _metrics_line(text: str) -> dict[str, float | int | None] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    return {name: value for name, value in line.items() if value is None or _is_finite(value)}


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False
