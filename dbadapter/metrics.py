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
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


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
    """Return each picture's nearest photograph and their cosine: a copy shows as a value near 1.

    Returns:
        Indices, shape (n,), and cosines, shape (n,).
    """
    best = (_units(pictures) @ _units(photographs).T).max(1)
    return best.indices, best.values


def estimate(values: Tensor, *, shares: bool | None = None, draws: int = DRAWS, seed: int = 0) -> Figure:
    """Return the mean of a table of prompts x seeds with a bootstrap interval over both.

    Prompts and seeds are drawn with replacement, each for itself, because pictures that share a prompt, or a
    seed, are alike (Owen 2007, "The pigeonhole bootstrap"). Over one row or column only the other is drawn.
    A bootstrap of few units is too narrow, so its interval is widened as Student's is beside the normal one,
    with the degrees of freedom of whichever of prompts and seeds matters (Satterthwaite 1946). For a share
    (all values 0 or 1) it is Wilson's, with the number of pictures that the bootstrap's variance is worth: a
    share of 1 of few pictures is no certainty. With fewer than three prompts and seeds nothing is known
    (value -/+ 2).

    Args:
        values: shape (prompts, seeds).
        shares: every value is right (1) or wrong (0); None: so they are if all are 0 or 1.
    """
    values = values.double()
    means, freedom = _drawn(values, draws, seed), _freedom(values)
    if shares is None:
        shares = _are_shares(values)
    if shares and freedom is not None:
        return _share(float(values.mean()), _worth(values, means, draws, seed), freedom, values.numel())
    return _figure(float(values.mean()), means, freedom, values.numel())


def pair_estimate(table: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Figure:
    """Return the mean over pairs of different pictures, with a bootstrap interval over the pictures.

    A picture that is drawn twice makes no pair with itself. Widened for few pictures as in `estimate`.

    Args:
        table: of every pair, symmetric, shape (n, n), n at least 2; the diagonal does not count.
    """
    table = table.double()
    means = _drawn_pairs(table, draws, seed)
    return _figure(float(_off_diagonal(table).mean()), means, _freedom(table[:, :1]), _pairs(table))


def difference(
    one: Tensor, other: Tensor, *, shares: bool | None = None, draws: int = DRAWS, seed: int = 0
) -> Figure:
    """Return the mean of one - other, paired by prompt and seed, with its interval: does zero lie in it?

    Student's interval with the bootstrap's standard error: a percentile one leans where most pairs are equal.
    Of two shares it is made of Wilson's for what only one and what only the other has right (Newcombe 1998,
    "Improved confidence intervals for the difference between binomial proportions based on paired data", and
    Zou and Donner 2008 for the square-and-add), both by the number of pictures that the bootstrap's variance
    is worth. Where no pair differs in any other figure the interval has no width: nothing varied.

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
    means, freedom = _drawn(change, draws, seed), _freedom(change)
    if shares is None:
        shares = _are_shares(one) and _are_shares(other)
    value = float(change.mean())
    if freedom is None:
        return _figure(value, means, freedom, change.numel())
    if not shares:
        return _students(value, means, freedom, change.numel())
    worth = _worth(change, means, draws, seed)
    won = _share(float((change > 0).double().mean()), worth, freedom, change.numel())
    lost = _share(float((change < 0).double().mean()), worth, freedom, change.numel())
    # A picture that one of them won is none that it lost: the two shares go against each other.
    room = (1 - won.value) * (1 - lost.value)
    together = -((won.value * lost.value / room) ** 0.5) if room > 0 else 0.0

    def reach(a: float, b: float) -> float:
        return float((a * a - 2 * together * a * b + b * b) ** 0.5)

    low = value - reach(won.value - won.low, lost.high - lost.value)
    high = value + reach(won.high - won.value, lost.value - lost.low)
    return Figure(value, max(low, -1.0), min(high, 1.0), change.numel())


def pair_difference(one: Tensor, other: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Figure:
    """Return the mean over pairs of one - other, paired by picture: what `difference` is for `pair_estimate`.

    Student's interval with the standard error of a bootstrap over the pictures, which both share by seed.

    Args:
        one: of every pair, symmetric, shape (n, n), n at least 2; the diagonal does not count.
        other: of pictures drawn with the same seeds, in the same order.
    Raises:
        ValueError: the tables differ in shape.
    """
    _check_paired(one, other)
    change = one.double() - other.double()
    means, freedom = _drawn_pairs(change, draws, seed), _freedom(change[:, :1])
    value = float(_off_diagonal(change).mean())
    if freedom is None:
        return _figure(value, means, freedom, _pairs(change))
    return _students(value, means, freedom, _pairs(change))


def is_known(low: float, high: float) -> bool:
    """Return whether an interval says anything: of fewer than three prompts and seeds it does not."""
    return high - low < 2 * NOTHING_KNOWN - 1e-6


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


def _freedom(values: Tensor) -> float | None:
    """Return the degrees of freedom of a table's mean, None of fewer than three rows and columns.

    Satterthwaite's, of the variances that rows and that columns give the mean: where three prompts differ
    much, forty seeds of each make them no more than three.
    """
    rows, columns = values.shape
    if max(rows, columns) < 3:
        return None
    if min(rows, columns) == 1:
        return float(max(rows, columns) - 1)
    by_row = float(values.mean(1).var()) / rows
    by_column = float(values.mean(0).var()) / columns
    if by_row + by_column == 0:
        return float(max(rows, columns) - 1)
    return (by_row + by_column) ** 2 / (by_row**2 / (rows - 1) + by_column**2 / (columns - 1))


def _student(freedom: float) -> float:
    """Return Student's t at 97.5 %, at least 1; beyond the table by Cornish and Fisher's first terms."""
    if freedom <= len(_STUDENT):
        below = max(min(int(freedom), len(_STUDENT) - 1), 1)
        share = (1 / below - 1 / max(freedom, 1.0)) / (1 / below - 1 / (below + 1))
        return _STUDENT[below - 1] + share * (_STUDENT[below] - _STUDENT[below - 1])
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _unbiased(freedom: float) -> float:
    """Return what a bootstrap's standard error of few units lacks, as a factor."""
    return float(((freedom + 1) / freedom) ** 0.5)


def _figure(value: float, means: Tensor, freedom: float | None, count: int) -> Figure:
    if freedom is None:
        return Figure(value, value - NOTHING_KNOWN, value + NOTHING_KNOWN, count)
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    wider = _student(freedom) / _NORMAL * _unbiased(freedom)
    return Figure(value, value - wider * (value - low), value + wider * (high - value), count)


def _students(value: float, means: Tensor, freedom: float, count: int) -> Figure:
    """Return a difference with Student's interval by the bootstrap's standard error."""
    half = _student(freedom) * float(means.std()) * _unbiased(freedom)
    return Figure(value, value - half, value + half, count)


def _worth(values: Tensor, means: Tensor, draws: int, seed: int) -> float:
    """Return how many independent pictures the bootstrap's variance is worth.

    Where all are alike it is what one picture more or less would leave: all right is worth no less than all
    but one.
    """
    variance, drawn = float(values.var(correction=0)), float(means.var())
    if variance == 0:
        values = values.clone()
        values[0, 0] += 1
        variance, drawn = float(values.var(correction=0)), float(_drawn(values, draws, seed).var())
    return min(max(variance / drawn, 1.0), float(values.numel()))


def _share(value: float, worth: float, freedom: float, count: int) -> Figure:
    """Return a share with Wilson's interval (Wilson 1927) by as many pictures as it is worth."""
    q = _student(freedom) ** 2 / worth
    middle = (value + q / 2) / (1 + q)
    half = (q * value * (1 - value) + q * q / 4) ** 0.5 / (1 + q)
    return Figure(value, max(min(value, middle - half), 0.0), min(max(value, middle + half), 1.0), count)
