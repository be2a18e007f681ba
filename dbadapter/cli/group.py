"""What all commands share: failures and warnings of one line, and the progress bar."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

from dbadapter.errors import DbadapterError, is_out_of_memory

__all__ = ["Command", "Group", "Progress", "progress_bars", "warn"]


class Command(click.Command):
    """A command whose every failure is one line on standard error and an exit code, never a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; exit 0 (done), 1 (bad data), 2 (bad usage), 130 (Ctrl-C) or 143 (SIGTERM)."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            with _quiet_libraries():
                code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "dbadapter"
            message = error.format_message()
            stop = "" if message.endswith((".", "?", "!")) else "."
            _fail(f"{message}{stop} See '{command} --help'.", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except click.Abort:
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Turn what the library raises on purpose, and what a machine runs out of, into one line."""
        try:
            with terminable():
                return super().invoke(ctx)
        except DbadapterError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt as error:
            # Here, because click would print an empty line and forget the exit code of SIGINT.
            cure = f"; {error}" if str(error) else ""
            terminated = isinstance(error, _Terminated)
            cause = "terminated by SIGTERM" if terminated else "interrupted from the keyboard"
            click.echo(f"Aborted: {cause}{cure}", err=True)
            sys.exit(143 if terminated else 130)
        except BrokenPipeError:
            # The reader of our output went away, e.g. `| head`; Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            _fail(f"the system refused: {error.strerror or error}{where}")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _fail(f"out of memory: {_MEMORY_CURES.get(str(ctx.invoked_subcommand), _MEMORY_CURE)}")


class Group(Command, click.Group):
    """A group whose every failure is one line, as a `Command`'s."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what is finished is saved, the rest taken away."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise what Ctrl-C does, so that what is finished can be kept; in the main thread alone."""

    def terminate(number: int, frame: Any) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_MEMORY_CURE = "close other programs, or use a machine with more memory"
_MEMORY_CURES = {
    "train": "lower --train-batch-size or --resolution, or add --gradient-checkpointing",
    "generate": "give fewer prompts or a lower --num-images-per-prompt at a time, or close other programs",
}


def _fail(message: str, code: int = 1) -> NoReturn:
    click.echo("Error: " + " ".join(message.split()), err=True)
    sys.exit(code)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Show our own warnings as one line each, and keep the libraries' talk off standard error."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        # Other categories, such as FutureWarning, are for developers, and most are not about our code.
        if issubclass(category, UserWarning) and Path(filename).resolve().parent in _OWN_FOLDERS:
            warn(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("default")
        yield


_PACKAGE = Path(__file__).resolve().parents[1]
_OWN_FOLDERS = (_PACKAGE, _PACKAGE / "cli", _PACKAGE / "toybox", (_PACKAGE / "export").resolve())


def warn(message: str) -> None:
    click.secho("Warning: " + " ".join(message.split()), err=True, fg="yellow")


class Progress:
    """A progress bar on standard error, a new one for each stage; silent where that is no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of the stage are done."""
        from tqdm import tqdm

        if stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=stage, disable=None, file=sys.stderr, dynamic_ncols=True)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def show(self, figures: Mapping[str, float | int | None]) -> None:
        """Show both losses and the memory behind the bar, which has the step, its time and the time left."""
        if self._bar is None:
            return
        shown = {"instance": "instance_loss", "prior": "prior_loss"}
        texts = {
            name: f"{value:.4f}" for name, key in shown.items() if (value := figures.get(key)) is not None
        }
        if memory := figures.get("memory_mb"):
            texts["MB"] = f"{memory:.0f}"
        self._bar.set_postfix(texts, refresh=False)

    def of(self, stage: str) -> Callable[[int, int], None]:
        """Return the callback of one stage."""
        return lambda done, total: self(stage, done, total)

    def close(self) -> None:
        """End the bar on a line of its own, so that what is printed next starts a new one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._stage = ""


@contextmanager
def progress_bars() -> Iterator[Progress]:
    progress = Progress()
    try:
        yield progress
    finally:
        progress.close()
