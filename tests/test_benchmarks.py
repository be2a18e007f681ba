"""The benchmarks' arithmetic, and that each command knows its options; their figures are not tested."""

from __future__ import annotations

import pytest

pytest.importorskip("numba", reason="the benchmarks draw their own pictures")

import torch
from click.testing import CliRunner
from torch.nn.functional import normalize

from benchmarks import report, subject
from benchmarks import toybox as toybox_benchmark


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


def test_an_unknown_variant_is_a_usage_error() -> None:
    result = CliRunner().invoke(subject.main, ["--variants", "best"])
    assert result.exit_code == 2
    assert "unknown variants best" in result.output
