"""Each benchmark's command in its shortest setting, as somebody runs it; what it prints has the usual keys.

`benchmarks.training` is not here: it needs diffusers' script. `benchmarks.gpu` has tests of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def quick(name: str, tmp_path: Path, *words: str) -> dict[str, Any]:
    """Run one command with --quick and return its JSON, in which no place of this machine is named."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(out), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    found: dict[str, Any] = json.loads(text)
    assert found["benchmark"] == name
    assert found["quick"] is True
    assert found["command"].startswith(f"python -m benchmarks.{name} --quick")
    assert found["machine"]["date"]
    return found


def test_cost(tmp_path: Path) -> None:
    words = ("--work-dir", str(tmp_path / "work"), "--plot", str(tmp_path / "cost.png"))
    table = quick("cost", tmp_path, *words)["bases"]["sd15"]["defaults"]
    assert (tmp_path / "cost.png").stat().st_size > 1000
    assert table["not_measured"] == {}
    assert table["ratios"]["file"] > 50
    assert table["full"]["trained"]["parameters"] > 50 * table["adapter"]["trained"]["parameters"]


def test_merging(tmp_path: Path) -> None:
    tables = quick("merging", tmp_path, "--work-dir", str(tmp_path / "work"))["tables"]
    assert all(tables[name]["toybox"]["ratios"]["seconds"] > 0 for name in ("exact", "rank", "bake"))


@pytest.mark.slow  # pictures of a whole base, a training run
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the benchmark draws its own pictures")
@pytest.mark.parametrize("name", ["toybox", "subject"])
def test_those_on_toybox(name: str, tmp_path: Path) -> None:
    assert quick(name, tmp_path)["noun_agreement"] >= 0
