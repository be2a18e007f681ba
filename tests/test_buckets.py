"""Buckets: none larger than the square, the same for a picture on its side; the nearest by aspect ratio."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbadapter.buckets import bucket_sizes, nearest_bucket
from dbadapter.errors import UsageError

MULTIPLES = st.sampled_from([8, 16, 32, 64])


def test_buckets_of_sdxl() -> None:
    """All are sizes that SDXL was trained at (Podell et al. 2023, appendix I)."""
    assert bucket_sizes(1024, 64) == (
        *[(768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)],
        *[(1088, 960), (1152, 896), (1216, 832), (1344, 768)],
    )


@given(st.integers(1, 24), MULTIPLES, st.floats(1, 4))
def test_buckets_fit_the_memory_of_the_square(sides: int, multiple: int, max_ratio: float) -> None:
    resolution = sides * multiple
    buckets = bucket_sizes(resolution, multiple, max_ratio)
    assert (resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    for width, height in buckets:
        assert width % multiple == height % multiple == 0
        assert width * height <= resolution**2
        assert max(width, height) <= max_ratio * min(width, height)
        assert (height, width) in buckets
        for other in set(buckets) - {(width, height)}:
            assert other[0] < width or other[1] < height  # none is a part of another
    ratios = [width / height for width, height in buckets]
    assert ratios == sorted(ratios)


def test_ratio_of_one_leaves_the_square() -> None:
    assert bucket_sizes(512, 64, 1) == ((512, 512),)


@pytest.mark.parametrize(
    ("resolution", "multiple", "max_ratio", "message"),
    [
        (500, 64, 2.0, "must be a multiple of 64 that is greater than 0, got 500"),
        (0, 64, 2.0, "greater than 0, got 0"),
        (512, 0, 2.0, "resolution must be a multiple of 1"),
        (512, 64, 0.5, "must be at least 1, got 0.5"),
        (512, 64, math.nan, "must be at least 1, got nan"),
    ],
)
def test_impossible_buckets_are_refused(
    resolution: int, multiple: int, max_ratio: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bucket_sizes(resolution, multiple, max_ratio)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4032, 3024), (1152, 896)),
        ((3024, 4032), (896, 1152)),
        ((1920, 1080), (1344, 768)),
        ((100, 100), (1024, 1024)),
        ((5000, 100), (1344, 768)),
        ((1, 9000), (768, 1344)),
    ],
)
def test_nearest_bucket(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert nearest_bucket(size, bucket_sizes(1024, 64)) == expected


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_nearest_is_by_the_logarithm(width: int, height: int) -> None:
    buckets = bucket_sizes(512, 64)
    chosen = nearest_bucket((width, height), buckets)
    distances = {bucket: abs(math.log(width * bucket[1] / (height * bucket[0]))) for bucket in buckets}
    assert distances[chosen] <= min(distances.values()) + 1e-12


def test_ties_do_not_depend_on_the_order() -> None:
    # A square is as far from 2:1 as from 1:2; 512 x 512 and 256 x 256 are of one ratio.
    for buckets in permutations([(64, 128), (128, 64)]):
        assert nearest_bucket((7, 7), buckets) == (64, 128)
    for buckets in permutations([(256, 256), (512, 512), (384, 512)]):
        assert nearest_bucket((9, 9), buckets) == (512, 512)
