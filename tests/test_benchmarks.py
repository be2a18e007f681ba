"""The benchmarks' arithmetic, and that each command knows its options; their figures are not tested."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba", reason="the benchmarks draw their own pictures")

import click
import torch
from click.testing import CliRunner
from PIL import Image
from torch.nn.functional import normalize

from benchmarks import report, subject
from benchmarks import toybox as toybox_benchmark
from dbadapter.base import load_base
from dbadapter.errors import BaseError
from dbadapter.toybox.judges import load_judges
from dbadapter.toybox.subjects import SUBJECTS, Subject


def test_similarity_is_the_mean_cosine_over_all_pairs() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert subject.similarity(vectors, torch.tensor([[1.0, 0.0]])) == pytest.approx(0.5)


def test_diversity_leaves_out_the_pairs_of_a_picture_with_itself() -> None:
    same = torch.ones(4, 3) / 3**0.5
    assert subject.diversity(same) == pytest.approx(0, abs=1e-6)
    assert subject.diversity(torch.eye(4)) == pytest.approx(1)
    vectors = normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    pairs = [1 - float(a @ b) for i, a in enumerate(vectors) for j, b in enumerate(vectors) if i != j]
    assert subject.diversity(vectors) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_the_summary_is_the_mean_over_subjects_with_the_twin_beside_it() -> None:
    def row(value: float) -> dict[str, object]:
        return {
            "similarity_before": value,
            "similarity_ceiling": 1.0,
            "similarity_floor": 0.0,
            "variants": {"default": {"seconds": value}, "no_prior": {"seconds": 2 * value}},
        }

    out = subject.summary({"a": row(1.0), "b": row(3.0)}, ["default", "no_prior"])
    assert out["seconds"] == 2.0
    assert out["no_prior"]["seconds"] == 4.0
    assert out["no_prior"]["similarity_before"] == 2.0
    assert out["similarity_before"] == 2.0


def test_the_machine_is_named_by_its_kind() -> None:
    import platform

    about = report.machine()
    assert about["cores"]
    assert platform.node() not in str(about) or not platform.node()


@pytest.mark.parametrize("command", [subject.main, toybox_benchmark.main])
def test_help_and_unknown_variants(command: object) -> None:
    assert "--json" in CliRunner().invoke(command, ["--help"]).output  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "said"), [("best", "unknown variants best; known: default"), ("", "--variants names none")]
)
def test_an_unknown_variant_is_a_usage_error(words: str, said: str) -> None:
    result = CliRunner().invoke(subject.main, ["--variants", words])
    assert result.exit_code == 2
    assert said in result.output


def test_what_is_no_base_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(toybox_benchmark.main, ["--base", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: base ")
    assert len(result.output.splitlines()) == 1


def test_a_subject_that_fails_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = dict.fromkeys(("similarity_before", "similarity_ceiling", "similarity_floor"), 1.0)

    def measure(base: object, judge: object, about: Subject, *more: object) -> dict[str, object]:
        if about == SUBJECTS[0]:
            raise click.ClickException("training failed (1): no word")
        return {**figures, "variants": {"default": {"seconds": 2.0}}}

    for name in ("load_base", "load_judges"):
        monkeypatch.setattr(subject, name, lambda *_: None)
    monkeypatch.setattr(subject, "measure", measure)
    out = tmp_path / "out.json"
    words = ["--variants", "default", "--json", str(out), "--subjects"]
    result = CliRunner().invoke(subject.main, [*words, "2"])
    assert result.exit_code == 1
    assert f"Error: 1 failed and are missing: {SUBJECTS[0].name}" in result.output
    assert list(json.loads(out.read_text())["subjects"]) == [SUBJECTS[1].name]
    before = out.read_text()
    assert CliRunner().invoke(subject.main, [*words, "1"]).exit_code == 1
    assert out.read_text() == before


def test_a_failed_subjects_adapter_does_not_stay_on_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[dict[Path, float]] = []
    drawn = iter(([Image.new("RGB", (64, 64))],) * 2)

    def pictures(*_: object, **more: object) -> list[Image.Image]:
        try:
            return next(drawn) * 6
        except StopIteration:
            raise BaseError("the model gave values that are not finite") from None

    monkeypatch.setattr(subject, "pictures", pictures)
    monkeypatch.setattr(subject, "train", lambda *_: None)
    monkeypatch.setattr(subject.lora, "apply", lambda pipeline, adapters: applied.append(adapters))
    base, judge = load_base("toybox"), load_judges()
    with pytest.raises(BaseError):
        subject.measure(base, judge, SUBJECTS[0], ["default"], tmp_path, [], None, True)
    assert [len(adapters) for adapters in applied] == [1, 0]


def test_an_image_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    class Full(Image.Image):
        def save(self, path: Any, *more: Any, **other: Any) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    report.save_image(Image.new("RGB", (2, 2)), tmp_path / "new/a.png")
    before = (tmp_path / "new/a.png").read_bytes()
    with pytest.raises(click.ClickException, match=r"a\.png cannot be written \(No space left on device\)"):
        report.save_image(Full(), tmp_path / "new/a.png")
    assert (tmp_path / "new/a.png").read_bytes() == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_threads_are_those_of_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, threads in (("4,2", 4), (" 3 ", 3), ("", os.cpu_count()), ("many", os.cpu_count())):
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        assert report.threads_of(None) == threads
        assert report.threads_of(7) == 7


def test_a_temporary_folder_goes_with_its_command(tmp_path: Path) -> None:
    used = []

    @click.command()
    def command() -> None:
        used.append(report.work_folder(None, "nothing"))
        (used[0] / "inside").mkdir()
        assert report.work_folder(tmp_path, "nothing") == tmp_path

    assert CliRunner().invoke(command).exit_code == 0
    assert used
    assert not used[0].exists()
    assert tmp_path.exists()


def test_the_reason_of_a_command_is_its_last_line() -> None:
    said = "Warning: w\nError: resolution must be a multiple of 8, got 33\n\n"
    assert report.last_word(said, "no word") == "resolution must be a multiple of 8, got 33"
    assert report.last_word(" \n", "no word") == "no word"
