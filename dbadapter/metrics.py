"""DreamBooth's figures as functions of embeddings, and how sure each is. Pure.

Ruiz et al. 2023 (arXiv 2208.12242), section 4.1 and supplement: subject fidelity (DINO, CLIP-I), prompt
fidelity (CLIP-T), prior preservation (PRES) and diversity (DIV). A figure carries the paper's name only where
the paper's model gave the embeddings; what takes another says so (`encoders`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Figure",
    "closest",
    "difference",
    "distances",
    "drift",
    "estimate",
    "is_known",
    "nearest",
    "pair_estimate",
    "prompt_similarity",
    "similarity",
    "subject_ceiling",
]

DRAWS = 2000
CONFIDENCE = 0.95
NOTHING_KNOWN = 2.0  # wider than any cosine, so that fewer than three units never show anything
_NORMAL = 1.959964
# Student's t at 97.5 % for 1 to 10 degrees of freedom.
_STUDENT = (
    *(12.70620, 4.30265, 3.18245, 2.77645, 2.57058),
    *(2.44691, 2.36462, 2.30600, 2.26216, 2.22814),
)


@dataclass(frozen=True)
class Figure:
    """A mean with its interval of 95 % confidence, and how many pictures or pairs it is of."""

    value: float
    low: float
    high: float
    count: int


def similarity(pictures: Tensor, photographs: Tensor) -> Tensor:
    """Return how much each picture shows the subject: subject fidelity, and PRES of class pictures.

        s_i = mean over j of cos(e_i, r_j)

    The mean over the pictures is the paper's average pairwise cosine similarity, since every picture meets
    the same photographs. For pictures of "a photo of a CLASS" it is PRES: high means that the class has
    become the subject.

    Args:
        pictures: embeddings e, shape (n, d), of any length.
        photographs: embeddings r, shape (m, d).
    Returns:
        Shape (n,).
    """
    return (_units(pictures) @ _units(photographs).T).mean(1)


def subject_ceiling(photographs: Tensor) -> float:
    """Return what photographs of one subject score among themselves: the mean cosine of different ones.

    Args:
        photographs: embeddings, shape (m, d), m at least 2.
    Raises:
        ValueError: there is one only.
    """
    return float(1 - _off_diagonal(distances(photographs)).mean())


def closest(photographs: Tensor) -> float:
    """Return the largest cosine of two different photographs: a picture well above it is a copy of one.

    Args:
        photographs: embeddings, shape (m, d), m at least 2.
    """
    return float(1 - _off_diagonal(distances(photographs)).min())


def prompt_similarity(pictures: Tensor, prompts: Tensor) -> Tensor:
    """Return the cosine of each picture's embedding and its own prompt's: prompt fidelity, CLIP-T.

    Args:
        pictures: shape (n, d), from the image side of a model of pictures and text.
        prompts: shape (n, d), from its text side; row i belongs to picture i.
    """
    return (_units(pictures) * _units(prompts)).sum(1)


def drift(pictures: Tensor, before: Tensor) -> Tensor:
    """Return how far each picture is from the one that the base draws for the same prompt and seed.

    d_i = 1 - cos(e_i, b_i)
    """
    return (1 - prompt_similarity(pictures, before)).clamp(min=0)  # equal ones round to a hair below


def distances(pictures: Tensor) -> Tensor:
    """Return 1 - cosine of every pair, shape (n, n): its mean off the diagonal is the diversity.

    The paper's DIV is the mean LPIPS of pairs that show the subject by the same prompt; this is taken of
    pictures of the class, by an embedding's distance, and goes by the encoder's name.
    """
    units = _units(pictures)
    return 1 - units @ units.T


def nearest(pictures: Tensor, photographs: Tensor) -> tuple[Tensor, Tensor]:
    """Return each picture's nearest photograph and their cosine; a copy is nearer than photographs are.

    Returns:
        Indices, shape (n,), and cosines, shape (n,).
    """
    best = (_units(pictures) @ _units(photographs).T).max(1)
    return best.indices, best.values


def estimate(values: Tensor, *, shares: bool | None = None, draws: int = DRAWS, seed: int = 0) -> Figure:
    """Return the mean of a table of prompts x seeds with a bootstrap interval over both.

    Prompts and seeds are drawn with replacement, each for itself, because pictures that share a prompt, or a
    seed, are alike (Owen 2007, "The pigeonhole bootstrap"). Over one row or column only the other is drawn.
    That counts thrice what is a single picture's alone, and of few units it is too narrow: its ends are moved
    to what the variance by mean squares and Student's t give (`_spread`). For a share (all values 0 or 1) the
    interval is Wilson's, with the number of pictures that this variance is worth: a share of 1 of few
    pictures is no certainty. With fewer than three prompts and seeds nothing is known (value -/+ 2).

    Args:
        values: shape (prompts, seeds).
        shares: every value is right (1) or wrong (0); None: so they are if all are 0 or 1.
    """
    values = values.double()
    value, count, spread = float(values.mean()), values.numel(), _spread(values)
    if spread is None:
        return _unknown(value, count)
    if _are_shares(values) if shares is None else shares:
        return _share(value, _worth(values), spread.freedom, count)
    return _scaled(value, _drawn(values, draws, seed), spread, count)


def pair_estimate(table: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Figure:
    """Return the mean over pairs of different pictures, with a bootstrap interval over the pictures.

    A picture that is drawn twice makes no pair with itself. The ends are moved as in `estimate`, by the
    jackknife's variance; of two pictures nothing is known.

    Args:
        table: of every pair, symmetric, shape (n, n), n at least 2; the diagonal does not count.
    """
    table = table.double()
    value, count, spread = float(_off_diagonal(table).mean()), _pairs(table), _pair_spread(table)
    if spread is None:
        return _unknown(value, count)
    return _scaled(value, _drawn_pairs(table, draws, seed), spread, count)


def difference(one: Tensor, other: Tensor, *, shares: bool | None = None) -> Figure:
    """Return the mean of one - other, paired by prompt and seed, with its interval: does zero lie in it?

    Student's interval by the variance of `_spread`. Of two shares it is made of Wilson's for what only one
    and what only the other has right (Newcombe 1998, "Improved confidence intervals for the difference
    between binomial proportions based on paired data", and Zou and Donner 2008 for the square-and-add), both
    by the number of pictures that this variance is worth. Where no pair differs in any other figure the
    interval has no width: nothing varied.

    Args:
        one: shape (prompts, seeds).
        other: of the same prompts and seeds.
        shares: every value is right (1) or wrong (0); None: so they are if all are 0 or 1.
    Raises:
        ValueError: the tables differ in shape.
    """
    _check_paired(one, other)
    one, other = one.double(), other.double()
    change = one - other
    value, count, spread = float(change.mean()), change.numel(), _spread(change)
    if spread is None:
        return _unknown(value, count)
    if not (_are_shares(one) and _are_shares(other) if shares is None else shares):
        return _students(value, spread, count)
    worth = _worth(change)
    won = _share(float((change > 0).double().mean()), worth, spread.freedom, count)
    lost = _share(float((change < 0).double().mean()), worth, spread.freedom, count)
    # A picture that one of them won is none that it lost: the two shares go against each other.
    room = (1 - won.value) * (1 - lost.value)
    together = -((won.value * lost.value / room) ** 0.5) if room > 0 else 0.0

    def reach(a: float, b: float) -> float:
        return float((a * a - 2 * together * a * b + b * b) ** 0.5)

    low = value - reach(won.value - won.low, lost.high - lost.value)
    high = value + reach(won.high - won.value, lost.value - lost.low)
    return Figure(value, max(low, -1.0), min(high, 1.0), count)


def pair_difference(one: Tensor, other: Tensor) -> Figure:
    """Return the mean over pairs of one - other, paired by picture: what `difference` is for `pair_estimate`.

    Student's interval by the jackknife's variance over the pictures, which both share by seed.

    Args:
        one: of every pair, symmetric, shape (n, n), n at least 2; the diagonal does not count.
        other: of pictures drawn with the same seeds, in the same order.
    Raises:
        ValueError: the tables differ in shape.
    """
    _check_paired(one, other)
    change = one.double() - other.double()
    value, count, spread = float(_off_diagonal(change).mean()), _pairs(change), _pair_spread(change)
    return _unknown(value, count) if spread is None else _students(value, spread, count)


def is_known(low: float, high: float) -> bool:
    """Return whether an interval says anything: of fewer than three prompts and seeds it is value -/+ 2."""
    return abs(high - low - 2 * NOTHING_KNOWN) > 1e-6


def _drawn(values: Tensor, draws: int, seed: int) -> Tensor:
    """Return the means of tables whose rows and columns were drawn with replacement, shape (draws,)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = values.shape
    # Weights of rows and columns in each draw; w^T V u / (n m) is the mean of the drawn table.
    w = _counts(rows, draws, generator)
    u = _counts(columns, draws, generator)
    return torch.einsum("dr,rc,dc->d", w, values, u) / values.numel()


def _drawn_pairs(table: Tensor, draws: int, seed: int) -> Tensor:
    """Return the means over pairs of pictures that were drawn with replacement, shape (draws,)."""
    generator = torch.Generator().manual_seed(seed)
    table = table.clone().fill_diagonal_(0)
    w = _counts(len(table), draws, generator)
    pairs = w.sum(1) ** 2 - (w**2).sum(1)
    return torch.einsum("di,ij,dj->d", w, table, w)[pairs > 0] / pairs[pairs > 0]


def _pairs(table: Tensor) -> int:
    return len(table) * (len(table) - 1) // 2


def _check_paired(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"paired tables must have one shape, got {tuple(one.shape)} and {tuple(other.shape)}"
        )


def _are_shares(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _units(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.double(), dim=1)


def _off_diagonal(table: Tensor) -> Tensor:
    if len(table) < 2:
        raise ValueError(f"pairs need at least two pictures, got {len(table)}")
    return table[~torch.eye(len(table), dtype=torch.bool)]


def _counts(n: int, draws: int, generator: torch.Generator) -> Tensor:
    """Return how often each of n is drawn in n draws with replacement, shape (draws, n)."""
    drawn = torch.randint(n, (draws, n), generator=generator)
    return torch.zeros(draws, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(draws, n, dtype=torch.float64)
    )


@dataclass(frozen=True)
class _Spread:
    """The variance of a mean, and its degrees of freedom."""

    variance: float
    freedom: float


def _spread(values: Tensor) -> _Spread | None:
    """Return the variance of a table's mean over prompts and seeds, None of fewer than three of either.

    By the mean squares of rows, of columns and of what both leave (two-way random effects, a picture a cell):
    the larger of the first two, and what the smaller has above the third; the degrees of freedom are
    Satterthwaite's (1946). Where three prompts differ much, forty seeds of each make them no more than three.
    """
    rows, columns = values.shape
    if max(rows, columns) < 3:
        return None
    if min(rows, columns) == 1:
        return _Spread(float(values.var()) / values.numel(), values.numel() - 1.0)
    by_row, by_column = values.mean(1, keepdim=True), values.mean(0, keepdim=True)
    left = (values - by_row - by_column + values.mean()).square().sum()
    left_freedom = (rows - 1.0) * (columns - 1)
    rest = float(left) / left_freedom
    # Mean square, degrees of freedom.
    effects = [(float(by_row.var()) * columns, rows - 1.0), (float(by_column.var()) * rows, columns - 1.0)]
    (least, least_freedom), (most, most_freedom) = sorted(effects)
    if most <= rest:
        return _Spread(rest / values.numel(), left_freedom)
    above = max(least - rest, 0.0)
    freedom = (most + above) ** 2 / (most**2 / most_freedom + above**2 / least_freedom)
    return _Spread((most + above) / values.numel(), freedom)


def _pair_spread(table: Tensor) -> _Spread | None:
    """Return the jackknife's variance of the mean over pairs, None of fewer than three pictures."""
    n = len(table)
    if n < 3:
        return None
    table = table.clone().fill_diagonal_(0)
    without = (table.sum() - 2 * table.sum(1)) / ((n - 1) * (n - 2))
    return _Spread(float((without - without.mean()).square().sum()) * (n - 1) / n, n - 1.0)


def _student(freedom: float) -> float:
    """Return Student's t at 97.5 %, at least 1; beyond the table by Cornish and Fisher's first terms."""
    if freedom <= len(_STUDENT):
        below = max(min(int(freedom), len(_STUDENT) - 1), 1)
        share = (1 / below - 1 / max(freedom, 1.0)) / (1 / below - 1 / (below + 1))
        return _STUDENT[below - 1] + share * (_STUDENT[below] - _STUDENT[below - 1])
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _unknown(value: float, count: int) -> Figure:
    return Figure(value, value - NOTHING_KNOWN, value + NOTHING_KNOWN, count)


def _scaled(value: float, means: Tensor, spread: _Spread, count: int) -> Figure:
    """Return the interval of a bootstrap's means, as wide as Student's by the spread."""
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    drawn = float(means.var())
    scale = (spread.variance / drawn) ** 0.5 * _student(spread.freedom) / _NORMAL if drawn > 0 else 1.0
    return Figure(value, value - scale * (value - low), value + scale * (high - value), count)


def _students(value: float, spread: _Spread, count: int) -> Figure:
    half = _student(spread.freedom) * spread.variance**0.5
    return Figure(value, value - half, value + half, count)


def _worth(values: Tensor) -> float:
    """Return how many independent pictures the mean of a table is worth.

    Where all are alike it is what one picture more or less would leave: all right is worth no less than all
    but one.
    """
    if float(values.var(correction=0)) == 0:
        values = values.clone()
        values[0, 0] += 1
    spread = _spread(values)
    worth = float(values.var(correction=0)) / spread.variance if spread is not None else 1.0
    return min(max(worth, 1.0), float(values.numel()))


def _share(value: float, worth: float, freedom: float, count: int) -> Figure:
    """Return a share with Wilson's interval (Wilson 1927) by as many pictures as it is worth."""
    q = _student(freedom) ** 2 / worth
    middle = (value + q / 2) / (1 + q)
    half = (q * value * (1 - value) + q * q / 4) ** 0.5 / (1 + q)
    return Figure(value, max(min(value, middle - half), 0.0), min(max(value, middle + half), 1.0), count)
