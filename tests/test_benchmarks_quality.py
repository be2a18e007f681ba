"""The arithmetic of `benchmarks.quality`: its search, its means and differences, its order and tables."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba", reason="the benchmarks draw their own pictures")

import torch

from benchmarks import quality_plan, quality_table
from benchmarks.quality_figures import summary, table
from benchmarks.quality_plan import (
    METHODS,
    SEARCH_SUBJECTS,
    SEARCHED,
    SEEDS,
    SUBJECTS,
    recipe,
    share,
    works,
)
from benchmarks.quality_plot import SIZE, pareto
from benchmarks.quality_runs import best_rates, fresh, main_precision, search
from benchmarks.toybox_runs import read_runs
from dbadapter import metrics
from dbadapter.config import TrainConfig
from dbadapter.presets import PRESETS
from dbadapter.score import overall
from dbadapter.toybox.subjects import SUBJECTS as TUNED_ON
from tests.quality_lines import OTHER, PRECISION, RATES, line, searches


def test_the_subjects_are_held_out() -> None:
    assert len(SUBJECTS) >= 8
    assert len(SEEDS) == 3
    assert not set(SUBJECTS) & {*TUNED_ON, *SEARCH_SUBJECTS}
    assert not {subject.noun for subject in SUBJECTS} & {subject.noun for subject in SEARCH_SUBJECTS}


def test_every_method_and_subject_comes_with_every_seed_the_main_ones_first() -> None:
    found = list(works("compare", RATES, "bf16"))
    assert len({work.key for work in found}) == len(found) == len(METHODS) * len(SUBJECTS) * len(SEEDS)
    first = found[: 4 * len(SUBJECTS)]
    assert {work.method for work in first} == {name for name, method in METHODS.items() if method.main}
    assert {work.seed for work in first} == {0}
    assert {work.method for work in works("compare", RATES, "bf16", ["rank-1"])} == {"rank-1"}
    assert share(SUBJECTS, (1, 2)) == list(SUBJECTS[::2])
    assert share(SUBJECTS, (2, 2)) == list(SUBJECTS[1::2])
    assert list(works("compare", {}, "bf16")) == []  # nothing was searched


def test_every_method_is_searched() -> None:
    assert list(SEARCHED) == list(METHODS)
    assert len(list(works("search", {}, "no"))) == sum(map(len, SEARCHED.values())) * len(SEARCH_SUBJECTS)


def test_the_options_are_ones_that_train_takes() -> None:
    from dbadapter.cli import main

    known = {
        option for param in main.commands["train"].params for option in (*param.opts, *param.secondary_opts)
    }
    for method in METHODS.values():
        assert {word for word in method.options if word.startswith("--")} <= known
    assert TrainConfig.prior == "distill"  # the default that the methods' names speak of


def test_committed_runs_are_of_todays_recipe_and_score() -> None:
    runs = read_runs(Path("benchmarks/results/quality.jsonl"))
    assert fresh(runs) == runs
    for run in runs:
        again = overall(
            {name: {"value": run[name]} for name in run["before"]},
            {name: {"value": value} for name, value in run["before"].items()},
            run["ceiling"],
        )
        assert again == {name: pytest.approx(run[name]) for name in again}


def test_the_rate_with_the_best_mean_score_wins() -> None:
    runs = [
        line("adapter", subject.name, 0, 0, "search", score=score, rate=rate)
        for rate, scores in ((1e-3, (0.5, 0.7)), (2e-3, (0.9, 0.1)), (4e-3, (0.65, 0.6)))
        for subject, score in zip(SEARCH_SUBJECTS, scores, strict=True)
    ]
    found = {rate: about["score"] for rate, about in search(runs)["adapter"].items()}
    assert found == {"0.001": 0.6, "0.002": 0.5, "0.004": 0.625}
    assert best_rates(runs) == {"adapter": 4e-3}
    assert summary(runs)["best_at_the_edge"] == ["adapter"]
    assert best_rates(runs[:-1]) == {}
    runs += [line("adapter", "a", 0, 0.7, rate=1e-3), line("adapter", "a", 0, 0.8, rate=4e-3)]
    assert summary(runs)["methods"]["adapter"]["score"]["value"] == pytest.approx(0.8)
    assert summary(runs)["methods"]["adapter"]["learning_rate"] == 4e-3
    elsewhere = summary([*runs, *searches()[6:], line("full", "a", 0, 0.9, rate=3.0)])["other_rates"]
    assert [(of["method"], of["learning_rate"]) for of in elsewhere] == [("adapter", 1e-3), ("full", 3.0)]
    assert elsewhere[1]["minus_adapter"]["score"]["value"] == pytest.approx(0.1)  # at the adapter's own rate


def test_a_run_in_another_precision_counts_where_none_in_the_main_one_does(tmp_path: Path) -> None:
    runs = [line(method, s, 0, 0.5) for method in ("adapter", "full") for s in "abc"]
    runs += [line("adapter", s, 0, 0.7, precision=OTHER) for s in "abc"]
    runs += [line("full", s, 0, 0.6, precision=OTHER) for s in "abc"]
    runs += [line("full", s, 0, 0.6, precision=OTHER, rate=1) for s in "abc"]  # not at the rate of the search
    runs += [line("rank-4", s, 0, 0.5, precision=OTHER) for s in "abcdefgh"]  # most, but the defaults'
    whole = [*runs, *searches()]
    assert len({run["key"] for run in whole}) == len(whole)
    found = summary(whole)
    assert found["precision"] == main_precision(whole) == PRECISION
    assert found["methods"]["adapter"]["score"]["value"] == 0.5
    assert found["methods"]["adapter"]["runs_in"] == {PRECISION: 3}
    assert [(of["method"], of["learning_rate"], of["runs_in"]) for of in found["other_rates"]] == [
        ("full", 1, {OTHER: 3})
    ]
    beside = found["other_precisions"][OTHER]
    assert set(beside) == {"adapter", "full"}  # those in both
    assert beside["adapter"]["score"]["value"] == 0.7
    assert beside["adapter"]["minus_main_precision"]["score"]["value"] == 0.2
    assert beside["full"]["minus_adapter"]["score"]["value"] == -0.1
    (tmp_path / "q.json").write_text(json.dumps(found))
    shown = quality_table.precisions(tmp_path / "q.json")
    assert f"| `adapter`: {OTHER} - {PRECISION} | 3 x 1 | **+.200 [+.200, +.200]** |" in shown
    assert f"| {OTHER}: `full` - `adapter` | 3 x 1 | **-.100 [-.100, -.100]** |" in shown
    once = [run for run in searches() if run["subject"] == SEARCH_SUBJECTS[0].name]
    again = [{**run, "precision": OTHER, "score": 0.1} for run in once]
    best = RATES["rank-1"]  # its one subject twice: (0.9 + 0.1) / 2, the other 0.9
    assert search([*searches(), *again])["rank-1"][f"{best:g}"]["score"] == 0.7
    searched = [{**run, "precision": OTHER} for run in searches()]
    assert best_rates(searched) == RATES  # the search may be in any
    assert main_precision([]) is None


def test_seconds_and_memory_are_of_the_main_precision_alone(tmp_path: Path) -> None:
    runs = [line("adapter", s, seed, 0.5, cpu_seconds=100.0) for s in "abc" for seed in (0, 1)]
    runs += [line("full", s, 0, 0.6, cpu_seconds=120.0) for s in "abc"]
    runs += [line("full", s, 1, 0.8, cpu_seconds=900.0, precision=OTHER) for s in "abc"]
    runs += [line("rank-1", s, 0, 0.8, cpu_seconds=900.0, precision=OTHER) for s in "abc"]
    runs.append(line("rank-1", "a", 1, 0.9, precision=OTHER))  # no other subject has that seed
    runs.append(line("full-unet", "a", 0, 0.5))  # one subject's seconds are not three's
    runs += [line("full-unet", s, 0, 0.5, precision=OTHER) for s in "bc"]
    found = summary([*runs, *searches()])
    full, rank = found["methods"]["full"], found["methods"]["rank-1"]
    assert found["methods"]["full-unet"]["subjects"] == 3
    assert "cpu_seconds" not in found["methods"]["full-unet"]
    assert (full["seeds"], full["runs_in"]) == (2, {PRECISION: 3, OTHER: 3})
    assert full["score"]["value"] == 0.7
    assert full["cpu_seconds"]["value"] == 120
    assert full["minus_adapter"]["score"]["value"] == 0.2  # of both seeds
    assert full["minus_adapter"]["cpu_seconds"]["value"] == 20
    assert rank["minus_adapter"]["score"]["value"] == 0.3
    for of in (rank, rank["minus_adapter"]):
        assert not {"cpu_seconds", "peak_memory_mb"} & set(of)
    (tmp_path / "q.json").write_text(json.dumps(found))
    rows = {row.split(" | ")[0]: row for row in quality_table.means(tmp_path / "q.json").splitlines()}
    row = rows["| `rank-1`: adapter, rank 1"]
    assert f"| 3 x 1, 3 in {OTHER} |" in row
    assert row.endswith(" | .80 [.80, .80] |  |  | 0 kB |")
    row = rows["| `full`: full fine-tuning, UNet and text encoder"]
    assert f"| 3 x 2, 3 in {OTHER} |" in row
    assert "| 120 [120, 120] |" in row
    assert "| `rank-1` | 3 |" in quality_table.compared(path=tmp_path / "q.json")


def test_a_method_without_seconds_takes_those_of_another_rate(tmp_path: Path) -> None:
    def bare(run: dict[str, Any]) -> dict[str, Any]:
        return {name: of for name, of in run.items() if name not in ("cpu_seconds", "peak_memory_mb")}

    runs = [line("adapter", s, 0, 0.5, cpu_seconds=100.0) for s in "abc"]
    runs += [line("full-unet", s, 0, 0.6, cpu_seconds=900.0, precision=OTHER) for s in "abc"]
    runs += [line("full-unet", s, 0, 0.1, cpu_seconds=110.0, rate=1) for s in "abc"]
    runs += [line("full-unet", s, seed, 0.1, cpu_seconds=120.0, rate=2) for s in "abc" for seed in (0, 1)]
    runs += [line("rank-4", s, 0, 0.7, cpu_seconds=90.0) for s in "abc"]  # some of its own: no other's beside
    runs += [bare(line("rank-4", s, 1, 0.7)) for s in "abc"]
    runs += [line("rank-4", s, 1, 0.7, cpu_seconds=50.0, rate=1) for s in "abc"]
    runs += [bare(line("rank-1", s, 0, 0.7)) for s in "abc"]
    runs += [bare(line("rank-1", s, 0, 0.8, precision=OTHER)) for s in "abc"]
    found = summary([*runs, *searches()])
    own, bare_one = found["methods"]["full-unet"], found["methods"]["rank-1"]
    assert (own["score"]["value"], own["cpu_seconds"]["value"], own["costs_at_rate"]) == (0.6, 120, 2)
    assert "cpu_seconds" not in own["minus_adapter"]
    assert all("cpu_seconds" not in about.get("minus_own_rate", {}) for about in found["other_rates"])
    assert found["methods"]["rank-4"]["cpu_seconds"]["value"] == 90
    assert "costs_at_rate" not in found["methods"]["rank-4"]
    (tmp_path / "q.json").write_text(json.dumps(found))
    shown = quality_table.means(tmp_path / "q.json")
    assert "| 120 [120, 120] at 2 | 0 [0, 0] at 2 |" in shown
    assert "cpu_seconds" not in bare_one
    assert "cpu_seconds" not in bare_one["minus_adapter"]
    assert bare_one["score"]["value"] == 0.7
    beside = found["other_precisions"][OTHER]["rank-1"]
    assert beside["minus_main_precision"]["score"]["value"] == 0.1
    assert "cpu_seconds" not in beside


def test_how_far_two_runs_lie_apart_by_hand(tmp_path: Path) -> None:
    runs = [line("adapter", "a", 0, 0.5), line("adapter", "a", 0, 0.53, precision=OTHER)]
    runs += [line("adapter", "b", 0, 0.5), line("adapter", "b", 0, 0.54, precision=OTHER)]
    runs += [line("adapter", "a", 1, 0.7), line("full", "a", 0, 0.1)]  # another seed; another method
    runs += [line("full-unet", "a", seed, seed / 2) for seed in (0, 1)]  # in one precision alone
    found = summary([*runs, *searches()])["apart"]
    assert (found["precision"]["pairs"], found["seed"]["pairs"]) == (2, 1)
    assert found["precision"]["likeness"] == round(((0.03**2 + 0.04**2) / 2) ** 0.5, 4)
    assert found["seed"]["likeness"] == 0.2
    (tmp_path / "q.json").write_text(json.dumps({"apart": found}))
    assert "| another precision | 2 | .0354 |" in quality_table.apart(tmp_path / "q.json")
    assert found["precision"]["of"] == found["seed"]["of"] == ["adapter"]
    assert summary(searches())["apart"]["seed"] == {"pairs": 0, "of": []}


def test_runs_of_another_recipe_count_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [*searches(), line("adapter", "a", 0, 0.5), line("adapter", "b", 0, 0.9, recipe="older")]
    runs.append({key: value for key, value in line("adapter", "c", 0, 0.9).items() if key != "precision"})
    assert summary(runs)["methods"]["adapter"]["subjects"] == 1
    assert recipe("full") != recipe("adapter") != recipe("adapter", quick=True)
    now = recipe("adapter")
    monkeypatch.setitem(PRESETS, "toybox", replace(PRESETS["toybox"], learning_rate=1.0))  # set by the search
    assert recipe("adapter") == now
    with monkeypatch.context() as patch:
        patch.setitem(quality_plan._FIRST, "optimizer", "prodigy")  # type: ignore[index]
        assert recipe("adapter") != now
    monkeypatch.setitem(PRESETS, "toybox", replace(PRESETS["toybox"], guidance_scale=7.5))
    assert recipe("adapter") != now
    assert summary(runs)["methods"] == {}


def test_figures_are_means_over_subjects_and_seeds_that_all_have() -> None:
    runs = [line("adapter", s, seed, v) for s, seed, v in (("a", 0, 0.1), ("a", 1, 0.9), ("b", 0, 0.3))]
    assert table(runs, "adapter", "score").tolist() == [[0.1], [0.3]]
    runs += [line("full", "a", 0, 0.2), line("full", "b", 0, 0.6), line("adapter-no-prior", "a", 0, 0.5)]
    assert summary(runs)["methods"] == {}  # no rate was searched yet
    found = summary([*runs, *searches()])
    assert found["methods"]["adapter"]["subject_fidelity"]["value"] == 0.2
    assert found["methods"]["adapter"]["score"]["high"] == 1.0  # a share's interval ends at all
    assert found["methods"]["adapter"]["seeds"] == 1
    assert found["methods"]["full"]["minus_adapter"]["score"]["value"] == 0.2
    assert found["before"]["ceiling"] == 0.9
    assert set(found["methods"]) == {"adapter", "full", "adapter-no-prior"}
    assert pareto(found["methods"]).size == SIZE
    with pytest.raises(ValueError, match="nothing to draw"):
        pareto({})


def test_seeds_are_no_subjects() -> None:
    """A second seed of the same subjects adds no subject: only the subjects' means vary."""
    values = {"a": (0.5, 0.7), "b": (0.6, 0.6), "c": (0.7, 0.8)}
    runs = [line("adapter", s, n, v) for s, both in values.items() for n, v in enumerate(both)]
    runs += [line("full", s, n, v + 0.1) for s, both in values.items() for n, v in enumerate(both)]
    runs += [line("full-unet", s, n, v) for s, both in values.items() for n, v in enumerate(both)]
    found = summary([*runs, *searches()])["methods"]
    means = metrics.estimate(torch.tensor([[0.6], [0.6], [0.75]]), shares=False)
    assert found["adapter"]["likeness"] == pytest.approx(asdict(means), abs=1e-3)
    assert found["full"]["minus_adapter"]["likeness"]["count"] == 3
    assert found["full-unet"]["minus_full"]["likeness"]["value"] == -0.1
    assert "minus_full" not in found["full"]


def test_all_pictures_right_are_no_certainty() -> None:
    runs = [line("adapter", s, 0, 0.5, class_fidelity=1.0, diversity=0.8) for s in "abcdefgh"]
    found = summary([*runs, *searches()])["methods"]["adapter"]
    assert found["class_fidelity"]["high"] == 1
    assert 0.95 < found["class_fidelity"]["low"] < 0.99  # one picture of 144 otherwise
    assert found["diversity"]["low"] == found["diversity"]["high"] == 0.8
    runs += [line("full", s, 0, 0.5, class_fidelity=1.0, diversity=0.8) for s in "abcdefgh"]
    pairs = summary([*runs, *searches()])["methods"]["full"]["minus_adapter"]
    for name in ("class_fidelity", "class_obedience"):
        assert -0.05 < pairs[name]["low"] < 0 < pairs[name]["high"] < 0.05
    assert pairs["diversity"]["low"] == pairs["diversity"]["high"] == 0


def test_targets_by_hand() -> None:
    def rows(method: str, **figures: float) -> list[dict[str, Any]]:
        return [line(method, subject, 0, 0.5, **figures) for subject in "ab"]

    runs = rows(
        "adapter", class_kept=0.95, class_spread=0.9, class_obedience=1.0, bytes=10, peak_memory_mb=100
    )
    runs += rows("full", bytes=600, peak_memory_mb=200)
    runs += rows("adapter-no-prior", class_kept=0.4, class_spread=0.85, rate=RATES["adapter"])
    runs += rows("adapter-no-prior", class_kept=0.9, class_spread=0.9, likeness=0.1)  # at its own
    found = summary([*runs, *searches()])["targets"]
    assert found["file_50_times_smaller"] == {"ratio": 60.0, "met": True}
    assert found["memory_below_full"] == {"ratio": 0.5, "met": True}
    elsewhere = [{**run, "precision": OTHER} if run["method"] == "full" else run for run in runs]
    elsewhere.append(line("full", "z", 0, 0.5, peak_memory_mb=50))  # the adapter has no such subject
    assert summary([*elsewhere, *searches()])["targets"]["memory_below_full"] == {}
    assert (found["subjects"], found["runs"]) == (2, 2)
    fidelity = found["fidelity_at_least_full_minus_interval"]
    assert fidelity["full_minus_adapter"]["value"] == 0
    assert not fidelity["met"]  # of two subjects nothing is known
    assert not fidelity["met_in_pairs"]
    runs += [line(m, s.name, 0, 0.5) for m in ("adapter", "full", "adapter-no-prior") for s in SUBJECTS[:6]]
    runs.append(line("full", "c", 0, 0.9))  # no other method has it
    found = summary([*runs, *searches()])["targets"]
    assert (found["subjects"], found["runs"]) == (8, 8)
    fidelity = found["fidelity_at_least_full_minus_interval"]
    assert fidelity["met"]
    assert fidelity["met_in_pairs"]
    likeness = {"adapter": 0.5, "full": 0.51, "adapter-no-prior": 0.5}
    paired = [
        line(method, subject.name, 0, value + number / 50)
        for method, value in likeness.items()
        for number, subject in enumerate(SUBJECTS)
    ]
    fidelity = summary([*paired, *searches()])["targets"]["fidelity_at_least_full_minus_interval"]
    assert (fidelity["met"], fidelity["met_in_pairs"]) == (True, False)  # a little behind with every subject
    found = summary([*runs[:8], *searches()])["targets"]
    slow = found["the_same_at_its_own_rate"]
    assert slow["class_kept"] == {"with": 0.05, "without": 0.1, "met": True}
    assert slow["likeness"] == {"with": 0.5, "without": 0.1}
    kept = found["forgetting_at_most_half_of_no_prior"]
    assert kept["class_kept"] == {"with": 0.05, "without": 0.6, "met": True}
    lost = round(1 - (0.95 * 0.9) ** (1 / 3), 4), round(1 - (0.4 * 0.85 * 0.5) ** (1 / 3), 4)
    assert kept["all"] == {"with": lost[0], "without": lost[1], "met": True}
    assert kept["class_spread"] == {"with": 0.1, "without": 0.15, "met": False}
    assert kept["likeness"] == {"with": 0.5, "without": 0.5}
    assert kept["runs"] == slow["runs"] == 2


def test_tables_of_the_readme(tmp_path: Path) -> None:
    runs = [line("adapter", s, 0, 0.5, bytes=460_000) for s in "abc"]
    runs += [line("full", s, 0, 0.25, bytes=73_800_000, cpu_seconds=99.6) for s in "abc"]
    (tmp_path / "q.json").write_text(json.dumps(summary([*runs, *searches()])))
    shown = quality_table.means(tmp_path / "q.json").splitlines()
    assert len({row.count("|") for row in shown}) == 1
    assert "| `full`: full fine-tuning, UNet and text encoder | 2.5e-05 | 3 x 1 | .25 [" in shown[-1]
    assert shown[-1].endswith("| 100 [100, 100] | 0 [0, 0] | 73.8 MB |")
    assert shown[-2].endswith("| 460 kB |")
    assert "| **-.250 [-.250, -.250]** |" in quality_table.compared(path=tmp_path / "q.json")
    runs += [line("full", s, 0, 0.75, rate=4e-4, bytes=73_800_000) for s in "abc"]
    again = summary([*runs, *searches()])
    (tmp_path / "q.json").write_text(json.dumps(again))
    assert quality_table.means(tmp_path / "q.json").splitlines() == shown
    assert "| `full` | 0.0004 | 3 x 1 | .75 [" in quality_table.others(tmp_path / "q.json")
    row = quality_table.rates(tmp_path / "q.json").splitlines()[-1]
    assert row.startswith("| `full`: 0.0004 - 2.5e-05 | 3 | **+.500 [+.500, +.500]** |")
    assert again["compared"] == 6
    assert "| `full` | 2.5e-05 | **.90** | .50 | .50 |" in quality_table.searched(tmp_path / "q.json")
