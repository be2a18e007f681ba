"""Aspect-ratio buckets: the sizes that pictures are trained at, and which of them fits a picture best."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from dbadapter.errors import UsageError

__all__ = ["bucket_sizes", "nearest_bucket"]


def bucket_sizes(resolution: int, multiple: int, max_ratio: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Return (width, height) of every bucket, from the narrowest to the widest; the square is among them.

    For each short side the long one is the largest that keeps

        width * height <= resolution**2        (NovelAI, "Aspect Ratio Bucketing", 2022)

    so that no bucket needs more memory than the square, and none is a part of another. A picture and the
    same picture on its side have buckets alike.

    Args:
        resolution: side of the square in pixels, a multiple of `multiple`.
        multiple: what every side is a multiple of, in pixels: 8 for the VAE alone, 64 as SDXL was trained.
        max_ratio: of the long side to the short one, at least 1; 1 leaves the square alone.
    Raises:
        UsageError: a resolution that is no multiple, or a number out of range.
    """
    if multiple < 1 or resolution < 1 or resolution % multiple:
        raise UsageError(
            f"resolution must be a multiple of {max(multiple, 1)} that is greater than 0, got {resolution}"
        )
    if not max_ratio >= 1:
        raise UsageError(f"the highest aspect ratio of the buckets must be at least 1, got {max_ratio}")
    sizes = set()
    for short in range(multiple, resolution + 1, multiple):
        long = resolution**2 // short // multiple * multiple
        if long <= max_ratio * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=lambda size: (Fraction(*size), size)))


def nearest_bucket(size: tuple[int, int], buckets: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket that is nearest to a picture by the logarithm of the aspect ratio.

    Of two equally near ones the larger is taken, then the narrower, whatever their order.

    Args:
        size: (width, height) of the upright picture in pixels.
        buckets: at least one (width, height).
    """
    width, height = size

    def distance(bucket: tuple[int, int]) -> tuple[Fraction, int, tuple[int, int]]:
        # exp of the difference of the logarithms, as a fraction: floats would decide ties by rounding.
        ratio = Fraction(width * bucket[1], height * bucket[0])
        return max(ratio, 1 / ratio), -bucket[0] * bucket[1], bucket

    return min(buckets, key=distance)
