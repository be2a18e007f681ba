"""The benchmark of costs: what does not fit is told, estimates are read as the command prints them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import cost, gpu_training, plot, report, training_runs
from benchmarks.cost_peer import bytes_of
from benchmarks.findings import RESULTS
from benchmarks.inference_figures import _COLOURS
from dbadapter import toybox


def job(work: Path) -> training_runs.Job:
    example = toybox.example_subject().folder
    return training_runs.Job("toybox", toybox.folder(), "toybox", example, example, 1, "mug", 64, 1, work, 1)


def test_an_estimate_is_read_as_the_command_prints_it(tmp_path: Path) -> None:
    words = cost.side_arguments(job(tmp_path), ["--full", "--prior", "none"])
    found = cost.estimate(words, tmp_path)
    assert 400 < found["peak_memory_mb"] < 4000
    assert 60 < found["file_mb"] < 75
    assert not (tmp_path / "none").exists()


def test_words_that_have_changed_are_told() -> None:
    with pytest.raises(click.ClickException, match="told no memory"):
        cost.read_estimate("# Trains everything")


def test_only_an_adapter_has_a_rank(tmp_path: Path) -> None:
    assert "--rank" in cost.side_arguments(job(tmp_path), [])
    full = cost.side_arguments(job(tmp_path), ["--full"])
    assert "--rank" not in full
    assert full[full.index("--train-batch-size") + 1] == "1"


def test_a_run_is_tried_only_where_it_fits() -> None:
    assert cost.refusal(1000, None) is None
    assert cost.refusal(1000, 1000 + cost.MARGIN_MB) is None
    told = cost.refusal(20_000, 16_000)
    assert told is not None
    assert told.startswith("not tried: an estimated 20,000 MB")
    assert "16,000 MB that are free" in told


def side(step: float, memory: float, size: int) -> dict[str, Any]:
    return {
        "begins": [2.0],
        "ends": [3.0, 3.0 + step, 3.0 + 2 * step],
        "cpu": [1.0, 1.0 + step, 1.0 + 2 * step],
        "imports_seconds": 1.0,
        "imports_memory_mb": 100.0,
        "startup_peak_memory_mb": 150.0,
        "peak_memory_mb": 100.0 + memory,
        "memory_of": "process",
        "threads": 1,
        "patches": [],
        "command": "dbadapter train",
        "file_bytes": size,
        "writing_seconds": 0.1,
    }


def test_a_side_that_fails_or_does_not_fit_leaves_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(job: Any, kind: str, name: str, words: list[str], steps: int, program: str) -> dict[str, Any]:
        if "--full" in words and "--prior" in words:
            raise click.ClickException("it failed: ended by signal 9 (all of it: some.log)")
        return side(2.0, 60.0, 5000) if "--full" in words else side(1.0, 20.0, 10)

    monkeypatch.setattr(cost, "run", run)
    monkeypatch.setattr(cost, "free_mb", lambda: 2000.0)
    estimates = {"peak_memory_mb": 500.0, "file_mb": 1.0}
    monkeypatch.setattr(cost, "estimate", lambda words, work: estimates)
    both = cost.compare(job(tmp_path), [], "defaults", 1, 1, 2)
    assert both["ratios"]["step_seconds"] == 2
    assert both["ratios"]["peak_memory"] == 3
    assert both["ratios"]["file"] == 500
    died = cost.compare(job(tmp_path), ["--prior", "none"], "unet_only", 1, 1, 2)
    assert died["not_measured"] == {"full": "it failed: ended by signal 9"}
    assert died["adapter"]["step_seconds_by_run"] == [1.0, 1.0]
    assert "ratios" not in died
    estimates["peak_memory_mb"] = 1500.0
    assert set(cost.compare(job(tmp_path), [], "defaults", 1, 1, 1)["not_measured"]) == {"adapter", "full"}


def test_sdxl_on_a_cpu_is_told_with_its_weights() -> None:
    told = cost.sdxl_on_a_cpu()
    assert told.startswith("not tried on a CPU")
    assert "39,176 of the UNet" in told


def test_a_folders_bytes_are_those_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    assert (bytes_of(tmp_path), bytes_of(tmp_path / "b")) == (8, 3)


def test_unknown_tables_are_refused() -> None:
    result = CliRunner().invoke(cost.main, ["--tables", "best"])
    assert result.exit_code == 2
    assert "unknown tables best; known: defaults, unet_only" in result.output


# --- what every benchmark writes


def test_the_command_line_is_told_without_this_machines_places() -> None:
    words = [
        "/home/x/benchmarks/cost.py",
        "--base",
        "sd15",
        "--work-dir",
        "/tmp/w",
        "--json",
        "/tmp/a/out.json",
    ]
    assert report.command(words) == "python -m benchmarks.cost --base sd15 --json out.json"
    words = ["benchmarks/gpu.py", "--work-dir=/tmp/w", "--json=benchmarks/results/gpu.json", "--quick"]
    assert report.command(words) == "python -m benchmarks.gpu --json=benchmarks/results/gpu.json --quick"
    assert report.command(["/usr/bin/pytest", "-q"]) is None


def test_a_file_is_renamed_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new/out.json"
    report.save({"a": 1}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in path.parent.iterdir()] == ["out.json"]

    def refuse(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(click.ClickException, match=r"out\.json cannot be written"):
        report.save({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_run_that_the_system_ended_says_so(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (tmp_path / "records").mkdir()
    if sys.platform == "win32":
        pytest.skip("no signals there")
    with pytest.raises(
        click.ClickException, match="ended by signal 9; 9 is the system's where memory runs out"
    ):
        training_runs.run(job(tmp_path), "ours", "name", ["train"], 1, program="dies")


# --- the bars

FIGURES = ("step_seconds", "peak_memory_mb", "startup_seconds", "file_bytes")


def bars_of(path: Path) -> list[int]:
    """The length of each bar, to some pixels: letters are other ones with another font library."""
    image = np.asarray(Image.open(path).convert("RGB"), int)
    colours = [tuple(int(text[i : i + 2], 16) for i in (1, 3, 5)) for text in set(_COLOURS.values())]
    rows = sum((image == colour).all(2).sum(1) for colour in colours)
    return [round(int(row) / 20) for row, before in zip(rows[1:], rows, strict=False) if row > 0 == before]


@pytest.mark.parametrize("name", ["cost-sd15", "cost-toybox", "gpu"])
def test_results_are_drawn(name: str, tmp_path: Path) -> None:
    path = RESULTS / f"{name}.json"
    groups = plot.groups_of(json.loads(path.read_text(encoding="utf-8")))
    assert all(value > 0 for values in groups.values() for value in values.values())
    done = CliRunner().invoke(plot.main, [str(path), str(tmp_path / "new/bars.png")])
    assert done.exit_code == 0, done.output
    drawn, kept = (bars_of(each) for each in (tmp_path / "new/bars.png", path.with_suffix(".png")))
    assert drawn == kept, f"draw it again: python -m benchmarks.plot {path}"


def test_bars_are_the_figures() -> None:
    side = {"step_seconds": 2.0, "peak_memory_mb": 3000.0, "startup_seconds": 4.0, "file_bytes": 5 * 2**20}
    died = {**side, "file_bytes": None}
    bases = {"sd15": {"resolution": 256, "defaults": {"adapter": side, "full": died}, "unet_only": {}}}
    groups = plot.groups_of({"benchmark": "cost", "bases": {**bases, "sdxl": {"not_measured": "no GPU"}}})
    where = "SD1.5's size, 256 pixels, defaults"
    assert groups == {
        f"{where}: seconds a step": {"adapter": 2.0, "full fine-tuning": 2.0},
        f"{where}: peak memory, MB": {"adapter": 3000.0, "full fine-tuning": 3000.0},
        f"{where}: start-up, seconds": {"adapter": 4.0, "full fine-tuning": 4.0},
        f"{where}: file, MB": {"adapter": 5.0},
    }
    cells = {"eager": {"call_seconds": 0.5}, "merged": {"failed": "no"}}
    parts = {"infer-sdxl": {"cells": cells}, "limits": {"cells": {"copies": {"giga_bytes": 1.0}}}}
    assert plot.groups_of({"benchmark": "gpu", "parts": parts}) == {
        "SDXL's size: a UNet call, milliseconds": {"eager": 500.0}
    }


def test_every_training_cell_has_a_label() -> None:
    cells = {*gpu_training.TRAINED, *gpu_training.ON_THE_SCRIPTS_JOB}
    assert set(plot.LABELS) == cells | set(cost.SIDES)


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    bases = {"toybox": {"resolution": 64, "defaults": {"adapter": dict.fromkeys(FIGURES, "fast")}}}
    for content, said in (
        ("{", "is no JSON"),
        ("[]", "it is no result of benchmarks.cost or benchmarks.gpu"),
        (json.dumps({"benchmark": "cost", "bases": bases}), "it is no whole result"),
        ('{"benchmark": "select"}', "it is no result of benchmarks.cost or benchmarks.gpu"),
        ('{"benchmark": "gpu"}', "it is no whole result"),
        ('{"benchmark": "gpu", "parts": {}}', "a.png is not written: nothing was measured"),
    ):
        path.write_text(content)
        done = CliRunner().invoke(plot.main, [str(path), str(tmp_path / "a.png")])
        assert (done.exit_code, len(done.output.splitlines())) == (1, 1)
        assert said in done.output
        assert not (tmp_path / "a.png").exists()


def test_bars_without_length_and_of_quick_runs_are_drawn(tmp_path: Path) -> None:
    bases = {"toybox": {"resolution": 64, "defaults": {"adapter": dict.fromkeys(FIGURES, 0)}}}
    whole = {"benchmark": "cost", "quick": True, "bases": bases}
    titles = list(plot.groups_of(whole))
    assert len(titles) == len(FIGURES)
    assert all(title.endswith("(--quick: measures nothing)") for title in titles)
    plot.save(whole, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
