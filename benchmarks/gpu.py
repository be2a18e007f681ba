"""Everything that wants a GPU, in one command of under ten minutes.

`python -m benchmarks.gpu --json OUT [--plot PNG] [--parts a,b] [--budget-seconds N] [--peer-script FILE]
[--quick]` measures the limits of the device, a smoke test, training (an adapter beside full fine-tuning,
precision, compiled, the script of diffusers) and one UNet call by torch and ONNX Runtime, each beside those
limits. Called again with the same OUT it goes on. Without a GPU all of it is tiny: it checks the machinery
and measures nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import plot, report
from benchmarks.gpu_parts import PARTS
from benchmarks.training import check_script
from benchmarks.training_runs import ROOT
from dbadapter.cli.group import Command

__all__ = ["go_on", "measure", "run_part", "shares", "state_of"]

# With fewer seconds left a part is not begun: its process, and the first of its cells.
LEAST_SECONDS = {
    "limits": 30,
    "smoke": 60,
    "train-sd15": 40,
    "infer-sd15": 40,
    "train-sdxl": 60,
    "infer-sdxl": 60,
}
TINY_SECONDS = 10
START_SECONDS = 15.0  # that a part's process takes before its first cell, and after its last

Record = dict[str, Any]
RunPart = Callable[[str, Mapping[str, Any], float], Record]


def run_part(name: str, settings: Mapping[str, Any], seconds: float) -> Record:
    """Run one part in a process of its own for so many seconds at most, and return its record.

    A cell in which the process died is told as failed, and the part goes on after it.

    Args:
        name: of `gpu_parts.PARTS`.
        settings: of `gpu_parts.Settings`, with `done`: cells by name.
        seconds: after which it and all that it started is ended.
    Returns:
        `cells`, `left` (names of cells that are not done; none is known where no process came to its first),
        `reason` (why, where the process was ended).
    """
    work, until = Path(settings["work"]), time.monotonic() + seconds
    work.mkdir(parents=True, exist_ok=True)
    record, log = _place(name, settings), work / f"gpu-{name}.log"
    done, rest = dict(settings["done"]), list[str]()
    while True:
        report.save({"cells": done, "left": rest, "running": None}, record)
        remaining = until - time.monotonic()
        told = {**settings, "done": done, "seconds": max(0.0, remaining - START_SECONDS)}
        if settings["tiny"]:
            told["seconds"] = remaining
        code, reason = _ended(name, told, record, log, remaining)
        found = _record(record, done)
        if code == 0:
            return {"cells": found["cells"], "left": found["left"], "reason": None}
        if code is None or found["running"] is None:  # out of time, or not in a cell: no second try
            return {"cells": found["cells"], "left": _rest(found), "reason": reason}
        done, rest = found["cells"] | {found["running"]: {"failed": reason}}, found["left"]


def _ended(
    name: str, told: Mapping[str, Any], record: Path, log: Path, seconds: float
) -> tuple[int | None, str]:
    """Run a part's process to its end, or end it with all that it started; return its code and a reason."""
    words = ["--part", name, "--settings", json.dumps(told), "--record", str(record)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(told["threads"]),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_parts", *words],
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            _end_group(process)
            return None, f"ended after {seconds:.0f} s: the budget was used up"
        except BaseException:  # an interrupt: what was started must not go on alone
            _end_group(process)
            raise
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return code, f"the process ended with {code}: {lines[-1].strip() if lines else 'no word'}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _place(name: str, settings: Mapping[str, Any]) -> Path:
    return Path(settings["work"]) / f"gpu-{name}.json"


def _record(path: Path, done: Mapping[str, Any]) -> Record:
    nothing = {"cells": dict(done), "left": [], "running": None}
    found: Record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else nothing
    return found


def _rest(record: Mapping[str, Any]) -> list[str]:
    """Return the cells that are not done, the one in which the process ended with them."""
    return [*record["left"], *([record["running"]] if record["running"] else [])]


def state_of(record: Mapping[str, Any]) -> str:
    """Return what became of a part: done, partial (cells are left), failed (no cell went well)."""
    if record["left"]:
        return "partial"
    if record["reason"]:
        return "failed"
    cells = record["cells"].values()
    return "failed" if cells and all("failed" in cell for cell in cells) else "done"


def measure(
    out: Record,
    parts: Sequence[str],
    settings: Mapping[str, Any],
    budget: float,
    keep: Callable[[Record], None],
    run: RunPart = run_part,
    clock: Callable[[], float] = time.monotonic,
) -> Record:
    """Run the parts that are not done, while the budget lasts; after each the whole is kept.

    Args:
        out: of this or an earlier call; filled.
        parts: names, in order.
        settings: of every part, without `done`.
        budget: seconds for all parts.
        keep: called with the whole after every part.
        run: runs one part.
        clock: in seconds.
    Returns:
        `out`, with `left`: the names of parts, of this or an earlier call, that are to be done yet.
    """
    began = clock()
    out.setdefault("parts", {})

    def put(name: str, record: Record, at: float) -> None:
        state, before = state_of(record), out["parts"].get(name, {}).get("seconds", 0.0)
        out["parts"][name] = {"state": state, "seconds": round(before + clock() - at, 1), **record}
        out["left"] = left(out["parts"], parts)
        shares(out["parts"])
        keep(out)
        click.echo(f"{name}: {state}{', ' + record['reason'] if record['reason'] else ''}", err=True)

    for name in parts:
        earlier = out["parts"].get(name, {})
        if earlier.get("state") == "done":
            continue
        remaining = budget - (clock() - began)
        least = TINY_SECONDS if settings["tiny"] else LEAST_SECONDS[name]
        if remaining < least:
            click.echo(f"{name}: left, {remaining:.0f} s are too few", err=True)
            continue
        click.echo(f"{name}: begins, {remaining:.0f} s are left", err=True)
        # What was not measured may be by now: an export that had not fitted before, a package.
        cells = earlier.get("cells", {}).items()
        again = {"failed", "not_measured", "disturbed"}
        done = {cell: about for cell, about in cells if not again & about.keys()}
        at = clock()
        _place(name, settings).unlink(missing_ok=True)  # of an earlier call
        try:
            record = run(name, {**settings, "done": done}, remaining)
        except Exception as error:  # the other parts may go well
            found, reason = _record(_place(name, settings), done), f"{type(error).__name__}: {error}"
            record = {"cells": found["cells"], "left": _rest(found), "reason": reason.splitlines()[0]}
        except BaseException:  # an interrupt: what the part's process had finished is kept
            found = _record(_place(name, settings), done)
            put(name, {"cells": found["cells"], "left": _rest(found), "reason": "interrupted"}, at)
            raise
        put(name, record, at)
    out["left"] = left(out["parts"], parts)
    return out


def left(parts: Mapping[str, Any], asked: Sequence[str]) -> list[str]:
    """Return the names of the parts that were asked for, now or in an earlier call, and are not done."""
    names = [name for name in PARTS if name in asked or name in parts]
    return [name for name in names if parts.get(name, {}).get("state") != "done"]


def shares(parts: Mapping[str, Any]) -> None:
    """Put beside each rate its share of the measured matrix product's in the same precision, in place."""
    limits = parts.get("limits", {}).get("cells", {}).get("products", {}).get("tera_flops", {})
    for part in parts.values():
        for cell in part["cells"].values():
            if isinstance(cell.get("tera_flops"), float) and cell.get("precision") in limits:
                share = cell["tera_flops"] / limits[cell["precision"]]
                cell["share_of_the_matrix_rate"] = float(f"{share:.3g}")


def go_on(path: Path | None, tiny: bool, machine: Mapping[str, Any], threads: int) -> Record:
    """Return what an earlier call left, or nothing.

    Raises:
        UsageError: the file is of another benchmark, another device, other packages or threads, or of the
            other size.
    """
    if path is None or not path.exists():
        return {}
    cure = "name another file, or move this one away"
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise click.UsageError(f"--json {path} is no JSON; {cure}") from None
    if not _is_ours(found):
        raise click.UsageError(f"--json {path} is not of this benchmark, or damaged; {cure}")
    there, here = found["machine"].get("accelerator"), machine["accelerator"]
    if there != here:
        raise click.UsageError(
            f"--json {path} was measured on {there or 'a CPU'}, this is {here or 'a CPU'}; {cure}"
        )
    if found["tiny"] != tiny:
        raise click.UsageError(f"--json {path} is {'' if found['tiny'] else 'not '}of a --quick run; {cure}")
    versions = found["machine"]["versions"]
    for name, version in machine["versions"].items():
        if (of_then := versions.get(name, version)) != version:
            raise click.UsageError(
                f"--json {path} was measured with {name} {of_then}, this is {version}; {cure}"
            )
    if (of_then := found["threads"]) != threads:
        raise click.UsageError(f"--json {path} was measured with --threads {of_then}, not {threads}; {cure}")
    since = found["machine"].get("since", found["machine"].get("date", machine["date"]))
    return {**found, "machine": {**machine, "since": since}}


def _is_ours(found: Any) -> bool:
    """Return whether something read from a file is what this benchmark writes, as far as it is read again."""
    kinds = {"parts": dict, "machine": dict, "tiny": bool, "threads": int}
    if not isinstance(found, dict) or found.get("benchmark") != "gpu":
        return False
    if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        return False
    if not isinstance(found["machine"].get("versions"), dict):
        return False
    return all(
        isinstance(part, dict)
        and isinstance(part.get("cells"), dict)
        and all(isinstance(cell, dict) for cell in part["cells"].values())
        for part in found["parts"].values()
    )


@click.command(cls=Command)
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Which, in this order.")
@click.option(
    "--budget-seconds", "budget", default=540.0, show_default=True, type=report.SECONDS, help="Of all."
)
@click.option(
    "--peer-script",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="diffusers' train_dreambooth_lora.py, to measure it too.",
)
@click.option("--threads", type=click.IntRange(1), help="Of each process.  [default: the machine's cores]")
@click.option("--json", "json_path", type=report.A_JSON, help="Where the figures go; gone on with.")
@click.option("--plot", "plot_path", type=report.AN_IMAGE, help="The figures as bars, as PNG.")
@click.option(
    "--work-dir",
    type=report.A_FOLDER,
    default=ROOT / "benchmarks/.cache/gpu",
    help="Keeps bases and exports (sd15 8 GB, sdxl 17).  [default: benchmarks/.cache]",
)
@click.option(
    "--quick", is_flag=True, help="Tiny bases, on a GPU too: checks the machinery, measures nothing."
)
def main(
    parts: str,
    budget: float,
    peer_script: Path | None,
    threads: int | None,
    json_path: Path | None,
    plot_path: Path | None,
    work_dir: Path,
    quick: bool,
) -> None:
    """Measure what a GPU makes of training and inference and print JSON."""
    chosen = report.chosen(parts, PARTS, "parts")
    if peer_script is not None:
        check_script(peer_script)
    tiny, machine = quick or not torch.cuda.is_available(), report.machine()
    if tiny and not quick:
        click.echo("no GPU here: tiny bases on the CPU, which measures nothing", err=True)
    threads = report.threads_of(threads)
    out = {"benchmark": "gpu", "quick": tiny, "tiny": tiny, "threads": threads, "machine": machine}
    out |= go_on(json_path, tiny, machine, threads)
    settings = {
        "work": str(work_dir.resolve()),
        "tiny": tiny,
        "threads": threads,
        "script": None if peer_script is None else str(peer_script.resolve()),
    }

    def keep(found: Record) -> None:
        if json_path is not None:
            report.save({**found, "command": report.command()}, json_path)

    measure(out, chosen, settings, budget, keep)
    report.write(out, json_path)
    if plot_path is not None:
        plot.save(out, plot_path)


if __name__ == "__main__":
    main()
