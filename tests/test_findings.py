"""The table of findings: every result is in it, from its own numbers, with a command that exists."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import findings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted(findings.RESULTS.glob("*.json"))
MACHINE = {"processor": "P", "cores": 2, "accelerator": None, "date": "2026-01-02"}


def write(folder: Path, name: str, **content: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"command": "python -m benchmarks.toybox", "machine": MACHINE} | content))
    return path


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_has_a_machine_a_date_and_a_command_that_exists(path: Path) -> None:
    found = findings.read(path)
    assert found["machine"]["processor"]
    datetime.date.fromisoformat(found["machine"]["date"])
    module = re.match(r"python -m (benchmarks\.\w+)", found["command"])
    assert module is not None
    assert importlib.util.find_spec(module[1]) is not None


def test_every_file_of_the_results_is_in_the_table() -> None:
    table = findings.table()
    for path in findings.RESULTS.iterdir():
        assert f"(results/{path.name})" in table or path.suffix == ".png"


def test_the_readme_holds_the_table_as_it_is() -> None:
    readme = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert findings.table() in readme, "run make benchmarks-readme"


def test_no_quick_run_is_among_the_results() -> None:
    assert not [path.name for path in RESULTS if json.loads(path.read_text()).get("quick")]


def test_the_table_needs_nothing_heavy() -> None:
    code = (
        "import sys, benchmarks.findings; print([m for m in ('torch', 'numpy', 'click') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_row_is_made_of_the_numbers(tmp_path: Path) -> None:
    numbers = {"noun_agreement": 0.5, "context_agreement": 0.25, "pictures": 8, "vae_psnr": 20.0}
    path = write(tmp_path, "toybox.json", benchmark="toybox", **numbers)
    (tmp_path / "toybox-pretrain.jsonl").write_text("{}\n")
    (tmp_path / "toybox.jsonl").write_text("{}\n")
    logs = findings.logs_of(tmp_path)["toybox"]
    row = findings.row(path, logs)
    assert "right noun in 50.0% and the right place in 25.0% of 8 pictures" in row
    assert "| `python -m benchmarks.toybox` | 2 cores, P | 2026-01-02 |" in row
    assert "[toybox](results/toybox.json)" in row
    assert "results/toybox-pretrain.jsonl" in row
    assert "results/toybox.jsonl" in row


def test_a_log_belongs_to_the_longest_name(tmp_path: Path) -> None:
    for name in ("a.json", "a-b.json"):
        write(tmp_path, name, benchmark="toybox")
    (tmp_path / "a-b-c.jsonl").write_text("")
    assert findings.logs_of(tmp_path) == {"a": [], "a-b": ["a-b-c.jsonl"]}
    (tmp_path / "quality.jsonl").write_text("{}\n{}\n")
    assert findings.unfinished(tmp_path) == [tmp_path / "quality.jsonl"]
    (tmp_path / "other.csv").write_text("")
    with pytest.raises(ValueError, match=r"other\.csv belongs to no result"):
        findings.logs_of(tmp_path)


def test_runs_without_a_summary_have_a_row(tmp_path: Path) -> None:
    (tmp_path / "quality.jsonl").write_text("{}\n{}\n")
    row = findings.table(tmp_path).splitlines()[-1]
    assert row.startswith("| 2 runs so far, no summary yet | `python -m benchmarks.quality` |")


def test_what_a_result_lacks_is_said_with_the_cure(tmp_path: Path) -> None:
    assert findings.read(write(tmp_path, "a.json", benchmark="toybox", command=None))["command"] == (
        "python -m benchmarks.toybox"
    )
    with pytest.raises(ValueError, match="says no benchmark; write it by"):
        findings.read(write(tmp_path, "a.json"))
    with pytest.raises(ValueError, match="has no function; add one there"):
        findings.read(write(tmp_path, "a.json", benchmark="new"))


def test_a_gpu_is_named_as_the_machine() -> None:
    assert findings.kind({"machine": MACHINE | {"accelerator": "Some GPU"}}) == "Some GPU"
    assert findings.kind({"machine": MACHINE, "threads": 1}) == "1 of 2 cores, P"


def test_a_gpus_line_names_its_limits_and_what_was_reached() -> None:
    products = {"tera_flops": {"bf16": 700.0, "fp32": 50.0}}
    step = {"step_seconds": 0.05, "share_of_the_matrix_rate": 0.4}
    parts = {
        "limits": {"state": "done", "cells": {"products": products}},
        "train-sd15": {
            "state": "partial",
            "cells": {"base": {}, "adapter_bf16": step, "x": {"failed": "no"}},
        },
        "infer-sd15": {"state": "done", "cells": {"cuda_eager": {"call_seconds": 0.02}}},
    }
    assert findings.FINDINGS["gpu"]({"parts": parts}) == (
        "2 of 3 parts measured whole; matrix products in TFLOP/s: bf16 700, fp32 50; SD1.5 a step: "
        "adapter_bf16 50 ms (40% of the matrix rate); SD1.5 a call: cuda_eager 20 ms"
    )


def test_costs_that_were_not_measured_say_why() -> None:
    found = {
        "bases": {
            "sd15": {"resolution": 256, "defaults": {"not_measured": {"full": "not tried: 20 GB"}}},
            "sdxl": {"not_measured": "not tried on a CPU"},
        }
    }
    line = findings.FINDINGS["cost"](found)
    assert line == "SD1.5, defaults: full fine-tuning not tried: 20 GB; SDXL: not tried on a CPU"
