"""The benchmark `benchmarks.select`: its arithmetic, its committed runs, a quick one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba", reason="the benchmarks draw their own pictures")

from click.testing import CliRunner

from benchmarks import quality_table, select
from benchmarks.quality_plan import SUBJECTS
from benchmarks.toybox_runs import read_runs
from tests.quality_lines import PRECISION


def test_best_against_last_by_hand(tmp_path: Path) -> None:
    def row(subject: str, best: float, last: float) -> dict[str, Any]:
        sides = {
            side: {**dict.fromkeys(select.COMPARED, value), "step": 3, "seconds": 1.0, "cpu_seconds": 1.0}
            for side, value in (("best", best), ("last", last))
        }
        return {
            "key": subject,
            "kind": "overfitting",
            "subject": subject,
            "precision": PRECISION,
            "quick": False,
            "recipe": select.recipe("overfitting"),
            **sides,
        }

    others = [{**row("b", 0.8, 0.5), "recipe": recipe} for recipe in ("older", None)]
    unknown = [{**row("b", 0.8, 0.5), "kind": kind} for kind in ("no more", ["overfitting"])]
    assert select.fresh([row("a", 0.8, 0.5), *others, *unknown]) == [row("a", 0.8, 0.5)]
    whole = select.summary([row("a", 0.8, 0.5), row("b", 0.6, 0.5)])
    found = whole["overfitting"]
    assert found["best"]["score"] == 0.7
    assert found["best_minus_last"]["score"]["value"] == pytest.approx(0.2)
    assert found["subjects"] == 2
    (tmp_path / "s.json").write_text(json.dumps({"quick": False, **whole}))
    shown = quality_table.chosen(tmp_path / "s.json").splitlines()
    assert "| overfitting | score | .70 | .50 | +.200 [-1.800, +2.200] |" in shown
    assert shown[-2] == "| overfitting | step | 3 | 3 |  |"


def test_shares_of_pictures_that_are_alike_are_no_certainty() -> None:
    side = {**dict.fromkeys(select.COMPARED, 0.5), "step": 3, "seconds": 1.0, "cpu_seconds": 1.0}
    rows = [{"kind": "default", "precision": PRECISION, "best": side, "last": side}] * 4
    found = select.summary(rows)["default"]["best_minus_last"]
    for name in ("class_obedience", "class_fidelity", "obedience"):
        assert found[name]["low"] < 0 < found[name]["high"]
    assert found["drift"]["low"] == found["drift"]["high"] == 0


def test_committed_runs_of_select_are_of_todays_recipe() -> None:
    runs = read_runs(select.RUNS)
    assert len(select.fresh(runs)) == len(runs) == 2 * len(SUBJECTS)


def test_a_quick_run_of_select(tmp_path: Path) -> None:
    words = ["--quick", "--runs", str(tmp_path / "runs.jsonl"), "--work-dir", str(tmp_path / "work")]
    done = CliRunner().invoke(select.main, [*words, "--json", str(tmp_path / "a.json")])
    assert done.exit_code == 0, done.output
    about = json.loads((tmp_path / "a.json").read_text())["overfitting"]
    assert about["subjects"] == 1
    assert about["best"]["step"] <= about["last"]["step"] == 3
    assert sorted(path.name for path in (tmp_path / "work/mug-100").glob("*.png")) == [
        "overfitting-selection.png",
        "overfitting.png",
    ]
