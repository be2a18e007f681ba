"""The files of finished runs: a line each, which of them count, and what keeps them from being lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba", reason="the benchmarks draw their own pictures")

import click
from click.testing import CliRunner

from benchmarks import quality, report, select, toybox_runs
from benchmarks.quality_runs import fresh
from benchmarks.toybox_runs import append, read_runs
from tests.quality_lines import PRECISION, line, searches


def test_a_line_that_was_cut_is_run_again(tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    append(runs, {"key": "a", "score": 1})
    append(runs, {"key": "b", "score": 2})
    with runs.open("a") as file:
        file.write('{"key": "c", "sco')
    assert [run["key"] for run in read_runs(runs)] == ["a", "b"]
    append(runs, {"key": "d"})
    append(runs, {"key": "e"})
    assert [run["key"] for run in read_runs(runs)] == ["a", "b", "d", "e"]
    with runs.open("ab") as file:
        file.write(b'3\nnull\n{"score": 1}\n{"key": 1}\n"\xff"\n\0\0\n')
    append(runs, {"key": "f", "quick": False, "precision": PRECISION, "method": "no more"})
    append(runs, {**line("adapter", "a", 0, 0.5), "key": "g", "method": "no more", "recipe": None})
    append(runs, {**line("adapter", "a", 0, 0.5), "key": "h", "method": ["adapter"]})
    append(runs, {name: of for name, of in line("adapter", "a", 0, 0.5).items() if name != "stage"})
    keys = [run["key"] for run in read_runs(runs)]
    assert keys == ["a", "b", "d", "e", "f", "g", "h", line("adapter", "a", 0, 0.5)["key"]]
    assert fresh(read_runs(runs)) == []
    assert select.fresh(read_runs(runs)) == []
    assert read_runs(tmp_path / "none.jsonl") == []


DAMAGED = {
    "score": None,
    "drift": "0.5",
    "seed": True,
    "rate": float("nan"),
    "subject": ["a"],
    "precision": [1],
    "before": {"drift": 0.5},
    "bytes": {},
    "class_kept": -0.5,
    "ceiling": 10**400,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_costs_itself_alone(name: str) -> None:
    whole = line("adapter", "a", 0, 0.5)
    assert fresh([whole]) == [whole]
    assert fresh([{**whole, name: DAMAGED[name]}]) == []
    without = {key: value for key, value in whole.items() if key != name}
    assert fresh([without]) == []


def test_a_machine_that_cannot_be_read_is_passed_over() -> None:
    about = {"date": "2026-02-03", "processor": "B", "instructions": ["avx2"]}
    odd = {"date": "2026-02-04", "processor": "C", "instructions": 3}
    other = {"date": "2026-02-01", "processor": "B", "instructions": ["avx2", "avx512_bf16"]}
    told = [
        {"machine": {}},
        {"machine": about, "threads": [1]},
        {"machine": 3},
        {"machine": odd},
        {"machine": other},
    ]
    found = report.of_runs(told)
    assert found == {
        "machine": {**about, "since": "2026-02-01", "instructions": ["avx2", "avx512_bf16"]},
    }
    untold = {"machine": {"date": "2026-02-02", "processor": "B"}}
    assert "instructions" not in report.of_runs([*told, untold])["machine"]
    assert report.of_runs(told[:1]) == {}


def test_a_summary_tells_its_runs_machine() -> None:
    def run(day: str, processor: str, **more: Any) -> dict[str, Any]:
        return {"machine": {"date": day, "processor": processor, "cores": 2}, "threads": 1, **more}

    runs = [run("2026-02-03", "B"), run("2026-02-01", "A"), {"threads": 1}]
    found = report.of_runs(runs)
    about = {"processor": "A and B", "cores": 2, "date": "2026-02-03", "since": "2026-02-01"}
    assert found == {"machine": about, "threads": 1}
    assert "threads" not in report.of_runs([*runs, run("2026-02-02", "A", threads=2)])
    assert report.of_runs([{"threads": 1}]) == {}


def test_what_the_system_refuses_costs_one_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"

    def refused() -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    def broken() -> dict[str, Any]:
        raise RuntimeError("a fault of ours")

    @click.command()
    def command() -> None:
        assert toybox_runs.attempt("a", refused, runs) is None
        assert toybox_runs.attempt("b", lambda: {"key": "b"}, runs) == {"key": "b"}
        toybox_runs.attempt("c", lambda: {"key": "c", "score": 3}, runs / "no.jsonl")

    done = CliRunner().invoke(command)
    assert done.exit_code == 1
    assert "a: [Errno 28] No space left on device" in done.output
    assert '{"key": "c", "score": 3}' in done.output
    assert "nothing can be added to it (File exists); the line of c is above" in done.output
    assert read_runs(tmp_path / "runs.jsonl") == [{"key": "b"}]
    with pytest.raises(RuntimeError, match="a fault of ours"):
        toybox_runs.attempt("d", broken, runs)


def test_runs_that_cannot_be_added_to_are_refused_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs.jsonl"
    append(runs, searches()[0])
    opened = Path.open

    def refused(self: Path, mode: str = "r", *more: Any, **other: Any) -> Any:
        if "a" in mode:
            raise PermissionError(13, "Permission denied")
        return opened(self, mode, *more, **other)

    monkeypatch.setattr(Path, "open", refused)
    for command in (quality.main, select.main):
        done = CliRunner().invoke(command, ["--runs", str(runs)])
        assert done.exit_code == 2
        assert "runs.jsonl: nothing can be added to it (Permission denied)" in done.output
    assert CliRunner().invoke(quality.main, ["--runs", str(runs), "--stage", "summary"]).exit_code == 0


def test_a_line_that_is_written_in_part_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, line: bytes) -> int:
            return int(self.file.write(line[:9]))

    runs = tmp_path / "runs.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *words, **more: Full(opened(self, *words, **more)))
        with pytest.raises(click.ClickException, match="the line of a is above"):
            toybox_runs.attempt("a", lambda: {"key": "a"}, runs)
    assert read_runs(runs) == []
    toybox_runs.check_log(runs)  # it is the benchmark's own, all the same
    append(runs, {"key": "b"})
    assert read_runs(runs) == [{"key": "b"}]
