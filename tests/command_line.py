"""Commands run in this process, for the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from dbadapter.cli import main


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="dbadapter")


def assert_refused(result: Result, code: int, *parts: str) -> None:
    """One line on standard error that says `parts`, nothing else, and this exit code."""
    assert isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Warning: no --base")]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("Error: "), errors[0]
    for part in parts:
        assert part in errors[0], f"{part!r} is not in: {errors[0]}"
    assert result.exit_code == code
    assert result.stdout == ""


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def raises(error: BaseException) -> Callable[..., Any]:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    return load
