"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dbadapter.errors import OutputError

__all__ = ["only_run"]

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep other runs off the folder inside the block; it need not exist.

    The operating system holds the lock, so that of a killed process is gone with it, whatever file it left.
    The file is `.NAME.lock` beside the folder, because a run may delete or replace the folder. Where nothing
    can be written beside it (an output volume mounted in a container) it is `.dbadapter.lock` in the folder.
    File systems without locks (some network ones) get none: the mistake that the lock is against is too rare
    to refuse every run there.

    Args:
        folder: an output folder; two spellings of one folder are one.
    Raises:
        OutputError: another process holds it, or neither place can be written.
    """
    path = folder.resolve()
    if not path.name:
        raise OutputError(f"{folder} is the file system's root; pass another --output-dir")
    made = _make_parents(path, folder)
    try:
        lock = _acquired(path.with_name(f".{path.name}.lock"), folder)
        if lock is None and path.is_dir():
            lock = _acquired(path / ".dbadapter.lock", folder)
        if lock is None:
            raise OutputError(f"{folder} cannot be written; pass another --output-dir")
        try:
            yield
        finally:
            _release(lock)
    finally:
        for parent in made:
            with suppress(OSError):  # not empty: the run wrote its folder
                parent.rmdir()


def _make_parents(path: Path, folder: Path) -> list[Path]:
    """Make the folder's missing parents; return them, the deepest first."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(
            f"{folder} cannot be written, it lies in a file; pass another --output-dir"
        ) from error
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}; pass another --output-dir"
        ) from error
    return missing


def _acquired(path: Path, folder: Path) -> FileLock | None:
    """Return the lock, held where the file system has locks; None if the file cannot be written there."""
    # No soft lock where there are no real ones: its file would outlive a killed run and shut the folder.
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"{folder} is being written by another run of dbadapter; wait for it or pass another --output-dir"
        ) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            with suppress(OSError):
                path.unlink()
            return lock
        return None
    return lock


def _release(lock: FileLock) -> None:
    """Remove the file and let go."""
    if not lock.is_locked:
        return
    # While it is held: whoever opened the file before sees after locking it that it has no name any more
    # (filelock looks), and cannot take it beside somebody who made a new one.
    with suppress(OSError):  # Windows removes no open file
        Path(lock.lock_file).unlink()
    lock.release()
    if os.name == "nt":
        with suppress(OSError):  # somebody else has opened it
            Path(lock.lock_file).unlink()
