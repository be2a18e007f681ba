"""The commands `benchmarks.quality` and `benchmarks.select`: what is run, refused, and not run again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("numba", reason="the benchmarks draw their own pictures")

import click
from click.testing import CliRunner, Result

from benchmarks import class_noun, quality, quality_table, select, subject, toybox_runs
from benchmarks import toybox as toybox_benchmark
from benchmarks.quality_figures import summary
from benchmarks.quality_plan import (
    PRECISIONS,
    SEARCH_SUBJECTS,
    SEARCHED,
    SUBJECTS,
    Work,
)
from benchmarks.quality_runs import SCORES, best_rates, searched
from benchmarks.toybox_runs import append, read_runs
from dbadapter.errors import BaseError
from dbadapter.toybox.subjects import Subject
from tests.quality_lines import OTHER, PRECISION, RATES, line, searches

ABOUT = ("key", "stage", "method", "subject", "seed", "rate", "precision", "quick", "recipe")


def fake_runs(monkeypatch: pytest.MonkeyPatch, made: list[str]) -> None:
    """Let nothing be trained; note what would be."""

    def run(bench: object, work: Work) -> dict[str, Any]:
        made.append(work.key)
        return line(work.method, work.subject.name, work.seed, 0.6, work.stage, rate=work.rate, seconds=1.0)

    monkeypatch.setattr(quality, "Bench", lambda *_: None)
    monkeypatch.setattr(quality, "run", run)


def test_time_that_is_over_leaves_a_summary(tmp_path: Path) -> None:
    for run in (searches()[0], line("adapter", "a", 0, 0.5)):
        append(tmp_path / "runs.jsonl", run)
    words = ["--seconds", "0", "--runs", str(tmp_path / "runs.jsonl"), "--json", str(tmp_path / "q.json")]
    done = CliRunner().invoke(quality.main, words)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "q.json").read_text())["compared"] == 0


def test_a_run_in_another_precision_is_run_again_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, made = tmp_path / "runs.jsonl", []
    for each in (*searches(precision=OTHER), line("adapter", SUBJECTS[0].name, 0, 0.5, precision=OTHER)):
        append(runs, each)

    fake_runs(monkeypatch, made)
    words = ["--methods", "adapter", "--seeds", "0", "--runs", str(runs)]
    done = CliRunner().invoke(quality.main, words)
    assert done.exit_code == 0, done.output
    keys = [f"compare/adapter/{s.name}/seed-0/rate-{RATES['adapter']:g}/{PRECISION}" for s in SUBJECTS]
    assert made == keys[1:]
    assert f"runs.jsonl holds runs in {OTHER}; what is missing is run in {PRECISION}" in done.output
    named = next(word for word, name in PRECISIONS.items() if name == PRECISION)
    done = CliRunner().invoke(quality.main, [*words, "--mixed-precision", named])
    assert done.exit_code == 0, done.output
    assert made == [*keys[1:], keys[0]]


def test_quick_lines_count_as_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, made = tmp_path / "runs.jsonl", []
    for each in (*searches(quick=True), line("adapter", SUBJECTS[0].name, 0, 0.5, quick=True)):
        append(runs, each)
    fake_runs(monkeypatch, made)
    words = [
        "--methods",
        "adapter",
        "--seeds",
        "100",
        "--runs",
        str(runs),
        "--json",
        str(tmp_path / "q.json"),
    ]
    done = CliRunner().invoke(quality.main, words)
    assert done.exit_code == 0, done.output
    searched = len(SEARCHED["adapter"]) * len(SEARCH_SUBJECTS)  # of one seed, whatever --seeds says
    assert [key.split("/")[0] for key in made] == ["search"] * searched + ["compare"] * len(SUBJECTS)
    assert json.loads((tmp_path / "q.json").read_text())["methods"]["adapter"]["score"]["value"] == 0.6
    assert len(read_runs(runs)) == len(searches()) + 1 + len(made)
    assert summary(read_runs(runs), quick=True)["methods"]["adapter"]["score"]["value"] == 0.5


@pytest.mark.parametrize("command", [quality.main, select.main])
def test_a_summary_of_nothing_replaces_none(command: click.Command, tmp_path: Path) -> None:
    out, runs = tmp_path / "out.json", tmp_path / "runs.jsonl"
    out.write_text("{}")
    words = ["--seconds", "0", "--json", str(out), "--runs", str(runs)]
    for content, said in (("", "it has no line of a run"), ('{"key": "a"}\n', "none of its 1 lines counts")):
        runs.write_text(content)
        done = CliRunner().invoke(command, words)
        assert done.exit_code == 1
        assert f"Error: --runs {runs}: {said}" in done.output
        assert out.read_text() == "{}"


@pytest.mark.parametrize("command", [quality.main, select.main])
def test_a_summary_never_replaces_the_runs(command: click.Command, tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    append(runs, line("adapter", "a", 0, 0.5))
    before = runs.read_bytes()
    (tmp_path / "link.json").symlink_to(runs)
    words = ["--seconds", "0", "--runs", str(runs), "--json"]
    done = CliRunner().invoke(command, [*words, str(runs)])
    assert done.exit_code == 2
    assert "runs.jsonl must end in .json" in done.output
    CliRunner().invoke(command, [*words, str(tmp_path / "link.json")])
    assert runs.read_bytes() == before


def test_a_run_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, made = tmp_path / "runs.jsonl", list[str]()
    for each in searches():
        append(runs, each)
    fake_runs(monkeypatch, made)
    fake = quality.run

    def run(bench: Any, work: Work) -> dict[str, Any]:
        if work.subject == SUBJECTS[1]:
            raise BaseError("the pictures are not finite")
        return fake(bench, work)

    monkeypatch.setattr(quality, "run", run)
    words = ["--methods", "adapter", "--seeds", "0", "--runs", str(runs), "--json", str(tmp_path / "q.json")]
    done = CliRunner().invoke(quality.main, words)
    assert done.exit_code == 1
    assert "the pictures are not finite" in done.output
    assert "Error: 1 failed and are missing: compare/adapter/teapot-101" in done.output
    assert len(made) == len(SUBJECTS) - 1
    assert json.loads((tmp_path / "q.json").read_text())["methods"]["adapter"]["subjects"] == len(made)


def test_a_search_that_is_not_complete_keeps_no_other_method_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, made = tmp_path / "runs.jsonl", list[str]()
    for each in searches():
        if (each["method"], each["rate"]) != ("rank-2", RATES["rank-2"]):
            append(runs, each)
    fake_runs(monkeypatch, made)
    words = ["--methods", "rank-1,rank-2", "--seeds", "0", "--runs", str(runs)]
    done = CliRunner().invoke(quality.main, [*words, "--stage", "compare"])
    assert done.exit_code == 1
    assert (
        "Error: no rate is known for rank-2: run --stage search or wait for the other --part" in done.output
    )
    assert len(made) == len(SUBJECTS)


DIVERGED = (
    click.ClickException("training failed (1): the loss is not finite at step 3: lower --learning-rate"),
    click.ClickException("training failed (1): A weight of x is not finite: the training diverged, lower it"),
    BaseError("the model gave values that are not finite (NaN); use float32"),
)


def search_of_rank_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: Callable[[Work], Exception | None]
) -> Result:
    """Search and compare one method; its first rate was never tried, and is the best where it goes well."""
    for each in searches():
        if (each["method"], each["rate"]) != ("rank-2", RATES["rank-2"]):
            append(tmp_path / "runs.jsonl", each)

    class NoBench:
        work = tmp_path / "work"

        def __init__(self, *_: object) -> None:
            pass

        def subject(self, subject: Subject) -> tuple[Path, Any, None]:
            return tmp_path, SimpleNamespace(settings=SimpleNamespace(guidance_scale=3.0)), None

        def score(self, subject: Subject, made: Path) -> tuple[None, dict[str, Any]]:
            return None, {key: of for key, of in line("adapter", "a", 0, 0.8).items() if key not in ABOUT}

    def train(folder: Path, output: Path, noun: str, options: list[str]) -> toybox_runs.Cost:
        rate = float(options[options.index("--learning-rate") + 1])
        subject = next(each for each in (*SUBJECTS, *SEARCH_SUBJECTS) if each.name == output.parent.name)
        stage = "search" if subject in SEARCH_SUBJECTS else "compare"
        (output / "model").mkdir(parents=True)
        if error := fails(Work(stage, "rank-2", subject, 0, rate, "no")):
            raise error
        return toybox_runs.Cost(1.0, 1.0, 1.0)

    monkeypatch.setattr(quality, "Bench", NoBench)
    monkeypatch.setattr(quality, "train", train)
    monkeypatch.setattr(quality, "keep_sheet", lambda *_: None)
    words = ["--methods", "rank-2", "--seeds", "0", "--runs", str(tmp_path / "runs.jsonl")]
    done = CliRunner().invoke(quality.main, [*words, "--json", str(tmp_path / "q.json")])
    assert not list((tmp_path / "work").glob("*/*"))  # no model is left, whatever came of it
    return done


@pytest.mark.parametrize("error", DIVERGED)
def test_a_rate_that_diverges_for_one_subject_is_never_the_best(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = search_of_rank_2(
        monkeypatch, tmp_path, lambda work: error if work.subject == SEARCH_SUBJECTS[1] else None
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "q.json").read_text())
    first = found["search"]["rank-2"][f"{RATES['rank-2']:g}"]
    assert (first["score"], first["diverged"]) == (0.4, 1)
    assert found["methods"]["rank-2"]["learning_rate"] == SEARCHED["rank-2"][1]
    assert quality_table.searched(tmp_path / "q.json").count("| .40 (1 diverged) |") == 1


def test_what_diverges_in_the_comparison_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = search_of_rank_2(
        monkeypatch, tmp_path, lambda work: DIVERGED[0] if work.subject in SUBJECTS else None
    )
    assert done.exit_code == 1
    assert f"Error: {len(SUBJECTS)} failed and are missing: compare/rank-2/mug-100" in done.output


def test_a_base_that_is_broken_is_no_rate_that_diverges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = BaseError("base toybox gave class latents that are not finite; its weights are broken")
    done = search_of_rank_2(monkeypatch, tmp_path, lambda work: broken)
    assert done.exit_code == 1
    assert not any("diverged" in run for run in read_runs(tmp_path / "runs.jsonl"))
    assert "Error: 2 failed and are missing: search/rank-2/car-200" in done.output


def test_a_method_that_diverges_at_every_rate_is_not_compared() -> None:
    runs = searches()
    bad = [
        {**run, "diverged": "x", **dict.fromkeys(SCORES, 0.0)} if run["method"] == "full" else run
        for run in runs
    ]
    assert "full" in searched(bad)
    assert set(best_rates(bad)) == set(SEARCHED) - {"full"}


def test_without_numba_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toybox_runs, "find_spec", lambda name: None)
    with pytest.raises(click.ClickException, match=r"pip install 'dbadapter\[pretrain\]'"):
        toybox_runs.Bench(tmp_path, quality.QUICK)
    words = ["--json", str(tmp_path.parent / "out.json")]
    for command in (subject.main, toybox_benchmark.main):
        assert "Error: numba draws the pictures" in CliRunner().invoke(command, words).output
    assert "pip install" in CliRunner().invoke(class_noun.main, [*words, "--data", str(tmp_path)]).output


@pytest.mark.parametrize(("command", "path"), [(quality.main, quality.RUNS), (select.main, select.RUNS)])
def test_quick_runs_stay_out_of_the_real_ones(command: click.Command, path: Path) -> None:
    for words in ((), ("--runs", str(path.resolve()))):
        done = CliRunner().invoke(command, ["--quick", *words])
        assert done.exit_code == 2
        assert "pass --runs as well" in done.output


def test_bad_words(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text("hello\n")
    (tmp_path / "captions.jsonl").write_text('{"file_name": "a.png"}\n')
    assert "--part must be like 1/2" in CliRunner().invoke(quality.main, ["--part", "3/2"]).output
    assert "--part must be like 1/2" in CliRunner().invoke(select.main, ["--part", "one"]).output
    assert "unknown seeds 7" in CliRunner().invoke(quality.main, ["--seeds", "0,7"]).output
    assert "unknown methods best" in CliRunner().invoke(quality.main, ["--methods", "best"]).output
    for words, said in (
        (["--methods", ""], "--methods names none"),
        (["--methods", ","], "--methods names none"),
        (["--part", "²/2"], "--part must be like 1/2"),
        (["--plot", "p.xyz"], "p.xyz must end in .png"),
        (["--json", "runs.jsonl"], "runs.jsonl must end in .json"),
        (["--json", ""], "nothing is no name"),
        (["--runs", "prompts.txt"], "prompts.txt must end in .jsonl"),
        (["--json", str(tmp_path)], "is a directory"),
        (["--runs", str(tmp_path)], "is a directory"),
        (["--seconds", "-1"], "not in the range"),
        (["--seconds", "nan"], "nan is no number of seconds"),
        (["--json", f"{tmp_path}/new/"], "ends as a folder does"),
        (["--json", os.devnull], "is a device or a broken link"),
        (["--runs", str(tmp_path / "captions.jsonl")], "captions.jsonl holds no line of a run"),
        (["--runs", str(tmp_path / "notes.jsonl")], "notes.jsonl holds no line of a run"),
        (["--runs", f"{__file__}/runs.jsonl"], f"nothing can be written in {__file__}"),
        (["--work-dir", f"{__file__}/work"], f"nothing can be written in {__file__}"),
        (["--quick", "--methods", "rank-1", "--runs", "r.jsonl"], "--quick runs adapter and full alone"),
    ):
        done = CliRunner().invoke(quality.main, words)
        assert done.exit_code == 2
        assert said in done.output
        assert len(done.output.strip().splitlines()) == 1


def test_a_quick_run_and_going_on(tmp_path: Path) -> None:
    """One adapter and one whole model, two steps each, for real; the second call finds all done."""
    runs = tmp_path / "runs.jsonl"
    for each in searches(quick=True):
        append(runs, each)
    words = ["--quick", "--stage", "compare", "--runs", str(runs), "--work-dir", str(tmp_path / "work")]
    done = CliRunner().invoke(quality.main, [*words, "--json", str(tmp_path / "a.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["methods"]) == {"adapter", "full"}
    adapter, full = found["methods"]["adapter"], found["methods"]["full"]
    assert full["bytes"]["value"] > 20 * adapter["bytes"]["value"]
    assert adapter["peak_memory_mb"]["value"] > 100
    assert len(list((tmp_path / "work").rglob("*-0-*.png"))) == 2
    size = runs.stat().st_size
    again = CliRunner().invoke(quality.main, words)
    assert again.exit_code == 0
    assert runs.stat().st_size == size


def test_a_part_waits_for_the_others_share_of_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, slept = tmp_path / "runs.jsonl", []
    mine, others = searches(quick=True)[::2], searches(quick=True)[1::2]
    for each in (*mine, line("adapter", SUBJECTS[0].name, 0, 0.5, quick=True)):
        append(runs, each)

    def the_others_go_on(seconds: float) -> None:
        slept.append(seconds)
        append(runs, others.pop(0))

    monkeypatch.setattr(quality.time, "sleep", the_others_go_on)
    words = ["--quick", "--methods", "adapter", "--runs", str(runs), "--part", "1/2"]
    done = CliRunner().invoke(quality.main, words)
    assert done.exit_code == 0, done.output
    assert len(slept) == len(SEARCHED["adapter"])
    assert done.output.count("waiting for the other parts to search the rate of adapter") == 1


def test_a_part_waits_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "PATIENCE", 0.0)
    monkeypatch.setattr(quality.time, "sleep", lambda _: None)
    fake_runs(monkeypatch, [])
    words = ["--methods", "adapter", "--runs", str(tmp_path / "runs.jsonl"), "--part", "1/2"]
    done = CliRunner().invoke(quality.main, words)
    assert done.exit_code == 1
    assert "no other part seems to be at work" in done.output
