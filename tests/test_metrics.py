"""DreamBooth's figures against hand calculations, and whether the intervals cover."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbadapter import metrics

EAST, NORTH = [1.0, 0.0], [0.0, 2.0]
DIAGONAL = [3.0, 3.0]
HALF = math.sqrt(0.5)


def test_similarity_by_hand() -> None:
    found = metrics.similarity(torch.tensor([EAST, DIAGONAL]), torch.tensor([EAST, NORTH]))
    assert found.tolist() == pytest.approx([(1 + 0) / 2, (HALF + HALF) / 2])


def test_a_perfect_copy_scores_the_ceiling_and_noise_the_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    subject = torch.randn(1, 4096, generator=generator)
    photographs = subject + 0.3 * torch.randn(6, 4096, generator=generator)
    more = subject + 0.3 * torch.randn(20, 4096, generator=generator)
    noise = torch.randn(20, 4096, generator=generator)
    ceiling = metrics.subject_ceiling(photographs)
    assert float(metrics.similarity(more, photographs).mean()) == pytest.approx(ceiling, abs=0.01)
    assert float(metrics.similarity(noise, photographs).mean()) == pytest.approx(0, abs=0.01)


def test_a_memorising_adapter_is_caught() -> None:
    generator = torch.Generator().manual_seed(0)
    photographs = torch.randn(4, 256, generator=generator)
    assert metrics.closest(photographs) < 0.3
    which, cosine = metrics.nearest(photographs[[2, 0]] * 3, photographs)
    assert which.tolist() == [2, 0]
    assert cosine.tolist() == pytest.approx([1, 1])
    copies = photographs[0].repeat(5, 1)
    assert metrics.pair_estimate(metrics.distances(copies)).value == pytest.approx(0, abs=1e-9)


def test_prompt_similarity_and_drift_by_hand() -> None:
    pictures, prompts = torch.tensor([EAST, NORTH]), torch.tensor([DIAGONAL, NORTH])
    assert metrics.prompt_similarity(pictures, prompts).tolist() == pytest.approx([HALF, 1])
    assert metrics.drift(pictures, prompts).tolist() == pytest.approx([1 - HALF, 0])


def test_ceiling_and_diversity_by_hand() -> None:
    three = torch.tensor([EAST, NORTH, DIAGONAL])
    assert metrics.subject_ceiling(three) == pytest.approx((0 + HALF + HALF) / 3)
    assert metrics.pair_estimate(metrics.distances(three)).value == pytest.approx(1 - 2 * HALF / 3)
    with pytest.raises(ValueError, match="at least two pictures, got 1"):
        metrics.subject_ceiling(three[:1])


def test_torchmetrics_agrees() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional")
    generator = torch.Generator().manual_seed(0)
    pictures, photographs = (torch.randn(n, 32, generator=generator).double() for n in (9, 4))
    pairs = torchmetrics.pairwise_cosine_similarity(pictures, photographs)
    torch.testing.assert_close(metrics.similarity(pictures, photographs), pairs.mean(1))
    torch.testing.assert_close(metrics.nearest(pictures, photographs)[1], pairs.max(1).values)
    alone = torchmetrics.pairwise_cosine_similarity(photographs)  # the diagonal is zero
    assert metrics.subject_ceiling(photographs) == pytest.approx(float(alone.sum()) / 12)
    assert metrics.pair_estimate(metrics.distances(photographs)).value == pytest.approx(
        1 - float(alone.sum()) / 12
    )
    own = torchmetrics.cosine_similarity(pictures[:4], photographs, reduction="none")
    torch.testing.assert_close(metrics.prompt_similarity(pictures[:4], photographs).float(), own.float())


def test_differences_are_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(8, 4, generator=generator)  # some prompts are hard for both
    better = metrics.difference(hard + 0.05, hard)
    assert (better.low, better.value, better.high) == pytest.approx((0.05, 0.05, 0.05))
    with pytest.raises(ValueError, match=r"got \(8, 4\) and \(8, 3\)"):
        metrics.difference(hard, hard[:, :3])


def test_the_interval_of_a_mean_covers() -> None:
    """Prompts and seeds have effects of their own; a bootstrap over pictures alone would miss that."""
    generator = torch.Generator().manual_seed(1)
    inside = 0
    for trial in range(200):
        prompts = torch.randn(20, 1, generator=generator)
        seeds = 0.5 * torch.randn(1, 12, generator=generator)
        table = prompts + seeds + torch.randn(20, 12, generator=generator)
        found = metrics.estimate(table, draws=400, seed=trial)
        inside += found.low <= 0 <= found.high
    assert 0.92 <= inside / 200 <= 0.99


@pytest.mark.parametrize(
    ("rows", "columns", "share"), [(10, 1, 0.9), (6, 3, 0.95), (8, 3, 0.95), (8, 3, 0.5), (10, 4, 1.0)]
)
def test_the_interval_of_a_share_covers(rows: int, columns: int, share: float) -> None:
    """Also where every picture is right: a percentile interval has no width then."""
    generator = torch.Generator().manual_seed(3)
    inside = 0
    for trial in range(200):
        table = (torch.rand(rows, columns, generator=generator) < share).double()
        found = metrics.estimate(table, draws=300, seed=trial)
        assert 0 <= found.low <= found.value <= found.high <= 1
        inside += found.low <= share <= found.high
    assert inside / 200 >= 0.93


@pytest.mark.parametrize(("first", "second"), [(0.9, 0.9), (0.95, 0.7), (1.0, 1.0), (1.0, 0.95)])
def test_the_interval_between_shares_covers(first: float, second: float) -> None:
    generator = torch.Generator().manual_seed(5)
    inside = 0
    for _ in range(200):
        one, other = ((torch.rand(8, 3, generator=generator) < share).double() for share in (first, second))
        found = metrics.difference(one, other)
        assert -1 <= found.low <= found.value <= found.high <= 1
        inside += found.low <= first - second <= found.high
    assert inside / 200 >= 0.93


@pytest.mark.parametrize(("rows", "columns", "of_rows", "of_columns"), [(3, 40, 1, 0), (25, 4, 0, 0.6)])
def test_the_interval_goes_by_what_matters(
    rows: int, columns: int, of_rows: float, of_columns: float
) -> None:
    """Many seeds of three prompts that differ are no many units, nor many prompts of four seeds."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for trial in range(200):
        table = of_rows * torch.randn(rows, 1, generator=generator) + torch.randn(
            rows, columns, generator=generator
        )
        table += of_columns * torch.randn(1, columns, generator=generator)
        found = metrics.estimate(table, draws=300, seed=trial)
        inside += found.low <= 0 <= found.high
    assert 0.92 <= inside / 200 <= 0.99


@pytest.mark.parametrize(
    ("prompts", "seeds", "of_prompts", "of_seeds", "widest"),
    [(25, 4, 0, 0, 1.3), (8, 3, 0, 0, 1.7), (25, 4, 0.5, 0, 1.25), (8, 2, 1, 0, 1.6), (4, 4, 1, 1, 1.6)],
)
def test_what_pictures_have_alone_counts_once(
    prompts: int, seeds: int, of_prompts: float, of_seeds: float, widest: float
) -> None:
    """The pigeonhole bootstrap alone counts it thrice: 25 x 4 such values got 1.8 times an exact interval."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for trial in range(300):
        table = torch.randn(prompts, seeds, generator=generator)
        table += of_prompts * torch.randn(prompts, 1, generator=generator)
        table += of_seeds * torch.randn(1, seeds, generator=generator)
        found.append(metrics.estimate(table, draws=200, seed=trial))
        paired = metrics.difference(table, torch.zeros_like(table), shares=False)
        assert paired.value == found[-1].value
    assert 0.92 <= sum(each.low <= 0 <= each.high for each in found) / 300 <= 0.995
    exact = 2 * 1.96 * float(torch.tensor([each.value for each in found]).std())
    assert float(torch.tensor([each.high - each.low for each in found]).median()) < widest * exact


@pytest.mark.parametrize(("of_prompts", "of_seeds"), [(0, 0.6), (0.5, 0.5)])
def test_two_seeds_are_too_few_where_seeds_matter(of_prompts: float, of_seeds: float) -> None:
    """By chance two are alike, and nothing tells it: a limit that docs/evaluation.md states."""
    generator = torch.Generator().manual_seed(7)
    inside = 0
    for trial in range(300):
        table = torch.randn(25, 2, generator=generator)
        table += of_prompts * torch.randn(25, 1, generator=generator)
        table += of_seeds * torch.randn(1, 2, generator=generator)
        found = metrics.estimate(table, draws=200, seed=trial)
        inside += found.low <= 0 <= found.high
    assert 0.8 <= inside / 300 <= 0.92


def test_shares_of_pictures_alone_are_worth_most_of_them() -> None:
    generator = torch.Generator().manual_seed(6)
    tables = [(torch.rand(25, 4, generator=generator) < 0.9).double() for _ in range(300)]
    found = [metrics.estimate(table) for table in tables]
    assert sum(each.low <= 0.9 <= each.high for each in found) / 300 >= 0.93
    assert float(torch.tensor([each.high - each.low for each in found]).median()) < 1.5 * 2 * 1.96 * 0.03


def test_all_right_is_worth_no_less_than_all_but_one() -> None:
    table = torch.ones(11, 4)
    right = metrics.estimate(table)
    table[4, 2] = 0
    assert right.low > metrics.estimate(table).low
    assert metrics.estimate(torch.zeros(11, 4), shares=False).high == 0  # cosines: nothing varied


def test_one_picture_shows_no_difference() -> None:
    """Nor which of the two comes first."""
    one = torch.ones(6, 3)
    other = one.clone()
    other[2, 1] = 0
    there, back = metrics.difference(one, other), metrics.difference(other, one)
    assert there.value == pytest.approx(1 / 18)
    assert there.low < 0 < there.high
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))
    same = metrics.difference(one, one)
    assert same.low == -same.high < -0.1
    assert metrics.difference(one / 3, one / 3).high == 0  # no shares: nothing varied


def test_half_of_the_pictures_show_a_difference() -> None:
    other = torch.ones(6, 3)
    other[::2] = torch.tensor([0.0, 0.0, 1.0])
    other[1::2] = torch.tensor([1.0, 1.0, 0.0])
    assert metrics.difference(torch.ones(6, 3), other).low > 0


def test_three_of_many_shares_show_no_difference() -> None:
    """Per-run shares, not pictures: a percentile interval ends at 0 on the side where nothing differs."""
    other = torch.tensor([[1.0], [1.0], [1.0], [17 / 18], [17 / 18], [1.0], [1.0], [17 / 18]])
    found = metrics.difference(torch.ones(8, 1), other, shares=False)
    assert found.low < 0 < found.high < 0.06
    same = metrics.difference(torch.ones(8, 1), torch.ones(8, 1), shares=False)
    assert same.low == same.high == 0


@pytest.mark.parametrize("rows", [4, 8])
def test_the_interval_of_few_values_covers(rows: int) -> None:
    generator = torch.Generator().manual_seed(4)
    inside = 0
    for trial in range(300):
        found = metrics.estimate(torch.randn(rows, 1, generator=generator), draws=300, seed=trial)
        inside += found.low <= 0 <= found.high
    assert 0.92 <= inside / 300 <= 0.99


def test_of_one_or_two_nothing_is_known() -> None:
    for table in (torch.tensor([[0.5]]), torch.tensor([[0.4, 0.6]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])):
        found = metrics.estimate(table)
        assert (found.low, found.high) == (found.value - 2, found.value + 2)
    one = metrics.difference(torch.tensor([[0.9]]), torch.tensor([[0.1]]))
    assert one.low < 0 < one.high
    assert metrics.pair_estimate(metrics.distances(torch.eye(2))).low < 0


def test_students_t() -> None:
    assert metrics._student(1.5) == pytest.approx(6.0, abs=1.2)  # 5.8 lies between its neighbours
    assert metrics._student(0.7) == metrics._student(1)
    assert metrics._student(9.5) == pytest.approx(2.244, abs=0.002)
    assert metrics._student(1) == 12.7062
    assert metrics._student(11) == pytest.approx(2.201, abs=0.003)
    assert metrics._student(30) == pytest.approx(2.042, abs=0.001)


@pytest.mark.parametrize("pictures", [3, 6, 24])
def test_the_interval_over_pairs_covers(pictures: int) -> None:
    generator = torch.Generator().manual_seed(2)
    truth = metrics.pair_estimate(metrics.distances(torch.randn(1500, 4, generator=generator) + 1)).value
    inside = 0
    for trial in range(150):
        table = metrics.distances(torch.randn(pictures, 4, generator=generator) + 1)
        found = metrics.pair_estimate(table, draws=400, seed=trial)
        inside += found.low <= truth <= found.high
    assert 0.90 <= inside / 150 <= 0.99


@pytest.mark.parametrize(("pictures", "covered"), [(6, (0.35, 0.7)), (24, (0.85, 0.99))])
def test_a_rare_kind_among_few_pictures_is_missed(pictures: int, covered: tuple[float, float]) -> None:
    """One picture in ten of another kind may never be drawn: a limit that docs/evaluation.md states."""
    generator = torch.Generator().manual_seed(8)

    def table(n: int) -> torch.Tensor:
        rare = (torch.rand(n, 1, generator=generator) < 0.1).float()
        return metrics.distances(
            torch.eye(8)[:1] + rare * 2 * torch.eye(8)[1:2] + 0.1 * torch.randn(n, 8, generator=generator)
        )

    truth = metrics.pair_estimate(table(2000), draws=2).value
    inside = 0
    for trial in range(150):
        found = metrics.pair_estimate(table(pictures), draws=300, seed=trial)
        inside += found.low <= truth <= found.high
    assert covered[0] <= inside / 150 <= covered[1]


def test_differences_of_pairs_are_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (metrics.distances(torch.randn(9, 4, generator=generator)) for _ in range(2))
    found, back = metrics.pair_difference(one, other), metrics.pair_difference(other, one)
    means = metrics.pair_estimate(one).value, metrics.pair_estimate(other).value
    assert found.value == pytest.approx(means[0] - means[1])
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert found.count == 36
    more = metrics.pair_difference(one + 0.05, one)
    assert (more.low, more.value, more.high) == pytest.approx((0.05, 0.05, 0.05))
    with pytest.raises(ValueError, match=r"got \(9, 9\) and \(8, 8\)"):
        metrics.pair_difference(one, other[:8, :8])
    two = metrics.pair_difference(one[:2, :2], other[:2, :2])
    assert not metrics.is_known(two.low, two.high)


def test_the_interval_of_a_difference_of_pairs_covers() -> None:
    """Of pictures of the same seeds, which go astray together; the other model's vary less."""
    generator = torch.Generator().manual_seed(3)

    def tables(pictures: int) -> list[torch.Tensor]:
        shared = torch.randn(pictures, 4, generator=generator)
        own = (0.6 * torch.randn(pictures, 4, generator=generator) for _ in range(2))
        return [
            metrics.distances(width * shared + each + 1) for width, each in zip((1, 0.7), own, strict=True)
        ]

    one, other = tables(1500)
    truth = metrics.pair_estimate(one).value - metrics.pair_estimate(other).value
    inside = 0
    for _ in range(150):
        found = metrics.pair_difference(*tables(18))
        inside += found.low <= truth <= found.high
    assert 0.90 <= inside / 150 <= 0.99


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_an_interval_repeats(prompts: int, seeds: int, seed: int) -> None:
    table = torch.randn(prompts, seeds, generator=torch.Generator().manual_seed(seed))
    found = metrics.estimate(table, draws=200, seed=seed)
    assert found.low <= found.high
    assert found.count == prompts * seeds
    assert found == metrics.estimate(table, draws=200, seed=seed)
