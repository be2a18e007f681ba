"""The lock of an output folder: one run at a time, nothing left, no killed run in the way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dbadapter import lock
from dbadapter.errors import OutputError
from dbadapter.lock import only_run

HOLD = """
import sys
from pathlib import Path
from dbadapter.lock import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def held_elsewhere(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = held_elsewhere(folder)
    try:
        with pytest.raises(OutputError) as caught, only_run(folder):
            pass
        assert str(caught.value) == (
            f"{folder} is being written by another run of dbadapter; wait for it or pass another --output-dir"
        )
        with only_run(tmp_path / "other"):
            pass
    finally:
        process.communicate()
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []
    with only_run(folder):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_is_not_in_the_way(tmp_path: Path) -> None:
    process = held_elsewhere(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    with only_run(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spelling", ["out", "x/../out", "link"])
def test_the_same_folder_by_another_name_is_the_same(spelling: str, tmp_path: Path) -> None:
    for name in ("out", "x"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with (
        only_run(tmp_path / "out"),
        pytest.raises(OutputError, match="another run"),
        only_run(tmp_path / spelling),
    ):
        pass


def test_nothing_shows_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "file").touch()
    with only_run(folder):
        assert [path.name for path in folder.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exception_leaves_nothing_either(tmp_path: Path) -> None:
    def interrupted() -> None:
        with only_run(tmp_path / "a" / "b" / "out"):
            assert (tmp_path / "a" / "b").is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_parents_stay_where_the_run_wrote_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "out"
    with only_run(folder):
        folder.mkdir()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_a_file_opened_before_it_was_removed_gives_no_second_lock(tmp_path: Path) -> None:
    """The race on removal: a lock on a file without a name would guard nothing."""
    real = os.open
    taken: list[Any] = []

    def late(path: Any, *args: Any, **kwargs: Any) -> int:
        fd = real(path, *args, **kwargs)
        if str(path).endswith(".out.lock") and not taken:
            taken.append(fd)
            os.unlink(path)  # noqa: PTH108 (what the holder does on its end, between open and flock)
        return fd

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(os, "open", late)
    try:
        with pytest.raises(OutputError, match="another run"), only_run(tmp_path / "out"):
            pass
    finally:
        monkeypatch.undo()
    assert taken


def refusing(monkeypatch: pytest.MonkeyPatch, code: int, name: str) -> None:
    """Let locks in files of this name fail."""

    class Refusing(lock.FileLock):
        def acquire(self, *args: Any, **kwargs: Any) -> Any:
            if self.lock_file.endswith(name):
                raise OSError(code, os.strerror(code))
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(lock, "FileLock", Refusing)


def test_without_a_writable_parent_the_file_is_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, errno.EACCES, ".out.lock")
    folder = tmp_path / "out"
    with pytest.raises(OutputError, match="cannot be written; pass another --output-dir"), only_run(folder):
        pass
    folder.mkdir()
    with only_run(folder):
        assert [path.name for path in folder.iterdir()] == [".dbadapter.lock"]
        with pytest.raises(OutputError, match="another run"), only_run(folder):
            pass
    assert list(folder.iterdir()) == []


def test_a_file_system_without_locks_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, errno.ENOSYS, ".lock")
    with only_run(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), only_run(tmp_path / "file" / "a" / "out"):
        pass


def test_the_root_of_the_file_system_is_refused() -> None:
    with pytest.raises(OutputError, match="file system's root"), only_run(Path("/")):
        pass
