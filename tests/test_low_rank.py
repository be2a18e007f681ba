"""Products of thin matrices, against the matrices themselves in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbadapter import low_rank
from dbadapter.low_rank import Factors


def product(factors: Factors) -> torch.Tensor:
    return factors.lora_B.double() @ factors.lora_A.double()


def factors(rank: int, inner: int, outer: int, seed: int = 0, scale: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
    return Factors(a, torch.randn(outer, rank, generator=generator, dtype=torch.float64) * scale)


@st.composite
def sums(draw: st.DrawFn) -> list[tuple[Factors, float]]:
    inner, outer = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    weights = st.floats(-3, 3, width=16).filter(lambda w: abs(w) > 1e-2)
    return [
        (factors(draw(st.integers(1, 6)), inner, outer, draw(st.integers(0, 999))), draw(weights))
        for _ in range(draw(st.integers(1, 3)))
    ]


@given(sums(), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_a_sum_and_its_approximation(terms: list[tuple[Factors, float]], rank: int) -> None:
    joined = low_rank.join(terms)
    wanted = sum((product(f) * w for f, w in terms), torch.zeros(()))
    torch.testing.assert_close(product(joined), wanted, atol=1e-12, rtol=1e-12)
    assert low_rank.norm(joined) == pytest.approx(float(wanted.norm()), rel=1e-6, abs=1e-6)
    cut = low_rank.approximate(joined, rank)
    sides = (wanted.shape[0], wanted.shape[1])
    assert cut.rank == low_rank.rank_of_approximation(joined.rank, sides, rank)
    left, values, right = torch.linalg.svd(wanted, full_matrices=False)
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    best = float((wanted - nearest).norm())
    assert float((wanted - product(cut)).norm()) == pytest.approx(best, abs=1e-9)
    assert low_rank.distance(joined, cut) == pytest.approx(best, abs=1e-6)


def test_what_takes_itself_away_is_nothing_at_any_rank() -> None:
    given = factors(3, 7, 5)
    joined = low_rank.join([(given, 1.0), (given, -1.0)])
    assert product(joined).abs().max() < 1e-14
    assert product(low_rank.approximate(joined, 2)).abs().max() < 1e-12


@pytest.mark.parametrize(("outer", "inner"), [(4, 9), (9, 4), (5, 5)])
def test_singular_values_of_the_shorter_side(outer: int, inner: int) -> None:
    matrix = product(factors(4, inner, outer))
    values, vectors = low_rank.dominant(matrix)
    torch.testing.assert_close(values.sqrt(), torch.linalg.svdvals(matrix), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e4])
def test_float16_keeps_its_precision_whatever_the_scale(scale: float) -> None:
    """Rounded as they are, the factors of the first lose most of themselves, and the last are infinite."""
    given = factors(8, 64, 48, scale=scale)
    big = Factors(given.lora_A * 100, given.lora_B)
    stored = low_rank.store(big, torch.float16)
    assert stored.lora_A.dtype == torch.float16
    assert low_rank.distance(big, stored) / low_rank.norm(big) < 2**-11


def test_what_float16_holds_stays_bit_for_bit() -> None:
    given = Factors(*(f.half().double() for f in factors(2, 6, 5, scale=1e-2)))
    stored = low_rank.store(given, torch.float16)
    assert all(torch.equal(s.double(), g) for s, g in zip(stored, given, strict=True))
    assert low_rank.distance(given, stored) == 0


def test_half_of_a_product_that_is_zero_cannot_spoil_it() -> None:
    given = Factors(torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[0.1, 1e9]]).double())
    stored = low_rank.store(given, torch.float16)
    assert torch.isfinite(stored.lora_B).all()
    torch.testing.assert_close(product(stored), product(given), atol=1e-4, rtol=0)


def test_float32_is_rounded_and_no_more() -> None:
    given = factors(2, 6, 5, scale=1e-9)
    assert torch.equal(low_rank.store(given, torch.float32).lora_A, given.lora_A.float())
