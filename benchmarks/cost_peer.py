"""One measured run of `benchmarks.cost`: as `training_peer`'s, but what it learned is written and weighed.

Time and memory are taken at the end of the last step; then the file, or the model's folder, is written by the
command's own code, without sample pictures, and its bytes are counted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.training_peer import Clock, import_libraries, note_trained, run_ours

__all__ = ["WeighingClock", "bytes_of"]


def bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


class WeighingClock(Clock):
    """A clock that lets the run go on after the last step, up to the file."""

    def finish(self) -> None:
        """Write what was measured; the run ends itself when it has written its own file, or dies of it."""
        self.take()
        self.save()

    def weigh(self, trained: Any, folder: Any, report: Any) -> None:
        """Write the adapter or the model, note its bytes, end the process; stands in for `write_results`."""
        from dbadapter import finishing
        from dbadapter.adapter_file import write_adapter

        began = time.perf_counter()
        if trained.adapter is None:
            finishing._write_model(trained, folder)
        else:
            about = finishing.describe(trained.made)
            write_adapter(folder.adapter, trained.adapter, description=about, sidecars=False, overwrite=True)
        self.about["writing_seconds"] = time.perf_counter() - began
        self.about["file_bytes"] = bytes_of(folder.model if trained.adapter is None else folder.adapter)
        self.leave()


def main() -> None:
    """Run `dbadapter train` and leave its time stamps and its file's size in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=("ours",), required=True)
    parser.add_argument("--script", type=Path, help="not used")
    parser.add_argument("--record", type=Path, required=True, help="the JSON file")
    parser.add_argument("--spawned", type=float, required=True, help="perf_counter() of the caller")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("arguments", nargs="*", help="of the command, after --")
    given = parser.parse_args()
    clock = WeighingClock(given.record, given.spawned, given.steps)
    import_libraries()
    clock.imported()
    note_trained(clock)
    from dbadapter import training

    training.write_results = clock.weigh
    run_ours(clock, given.arguments)


if __name__ == "__main__":
    main()
