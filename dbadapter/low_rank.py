"""Products of two thin matrices, B A: joined, cut to a rank, measured, made to fit a dtype. Pure functions.

A is (rank, in), B is (out, rank); the product itself is only formed where that is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Factors", "approximate", "distance", "dominant", "join", "norm", "rank_of_approximation", "store"]


class Factors(NamedTuple):
    """The two factors of B A."""

    lora_A: Tensor  # noqa: N815 (the papers' name)
    lora_B: Tensor  # noqa: N815

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.lora_A.shape[0]


def join(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """Return the weighted sum of products as one product, in float64; there are no cross terms.

        sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]

    Args:
        parts: factors of one layer, with their weights; at least one.
    """
    return Factors(
        torch.cat([factors.lora_A.double() for factors, _ in parts]),
        torch.cat([factors.lora_B.double() * weight for factors, weight in parts], dim=1),
    )


def approximate(factors: Factors, rank: int) -> Factors:
    """Return the product of this rank that is nearest to B A, singular values shared between both factors.

        B A = Q_B (R_B R_A^T) Q_A^T, and the small matrix within is cut (Eckart and Young 1936)

    Where the rank of B A is no smaller than its sides, the product is formed and cut itself. What has the
    rank already, or less, comes back as it is.

    Args:
        factors: in float64, else small singular values drown in rounding.
        rank: at least 1.
    """
    a, b = factors
    if factors.rank <= rank:
        return factors
    if factors.rank >= min(a.shape[1], b.shape[0]):
        left, values, right = torch.linalg.svd(b @ a, full_matrices=False)
    else:
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        # Cut first: the tall products are then no wider than the result.
        left, right = q_b @ left[:, :rank], right[:rank] @ q_a.T
    root = values[:rank].sqrt()
    return Factors(root[:, None] * right[:rank], left[:, :rank] * root)


def rank_of_approximation(joined: int, sides: Sequence[int], rank: int | None) -> int:
    """Return the rank that `approximate` gives, or that a product has where nothing is cut.

    Args:
        joined: rank before.
        sides: of the product, (out, in).
        rank: asked for; None cuts nothing.
    """
    return joined if rank is None or joined <= rank else min(rank, *sides)


def dominant(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix's squared singular values, and the singular vectors of its shorter side.

    From the eigenvectors of M M^T or M^T M in float64, the smaller of both: for the weights of a convolution
    that is many times faster than a singular value decomposition. Singular values below 1e-8 of the largest
    are lost, which is below what a float32 matrix can hold.

    Args:
        matrix: (out, in), float64.
    Returns:
        Values, descending, none negative, shape (k,); vectors as columns, shape (k, k), k = min(out, in).
    """
    square = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(square)
    return values.flip(0).clamp(min=0.0), vectors.flip(1)


def norm(factors: Factors) -> float:
    """Return the Frobenius norm of B A from the factors alone.

    ||B A||^2 = sum over i, j of (B^T B)_ij (A A^T)_ij. Cancellation leaves an error of about 1e-8 of
    the norms of the single terms.
    """
    a, b = factors.lora_A.double(), factors.lora_B.double()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def distance(one: Factors, other: Factors) -> float:
    """Return the Frobenius norm of the difference of two products; 0 where both factors are the same."""
    if one.rank == other.rank and torch.equal(one.lora_A, other.lora_A.to(one.lora_A)):
        # Apart from the rest, so that no rounding of the shared factor is in the figure.
        return norm(Factors(one.lora_A, one.lora_B.double() - other.lora_B.double()))
    return norm(join([(one, 1.0), (other, -1.0)]))


def store(factors: Factors, dtype: torch.dtype) -> Factors:
    """Return the factors rounded once to a dtype, scaled so that float16 neither over- nor underflows.

    float16 is precise from 6e-5 to 65504 only, and B is often thousands of times smaller than A. So column i
    of B takes over a power of two from row i of A, until both have about the same largest number. A power of
    two rounds nothing, and B A stays what it was. What float16 can hold as it is stays as it is.

    Returns:
        In the dtype; a number too large for it is infinite.
    """
    stored = Factors(factors.lora_A.to(dtype), factors.lora_B.to(dtype))
    if dtype != torch.float16 or all(torch.equal(s.to(f), f) for s, f in zip(stored, factors, strict=True)):
        return stored
    a, b = factors
    rows, columns = a.abs().amax(1), b.abs().amax(0)
    used = (rows > 0) & (columns > 0)
    one = torch.ones_like(rows)
    exponent = (torch.log2(torch.where(used, columns / rows, one)) / 2).round()
    # Where one of both is zero the product is, whatever the other holds.
    up, down = torch.exp2(exponent) * used, torch.exp2(-exponent) * used
    return Factors((a * up[:, None]).to(dtype), (b * down).to(dtype))
