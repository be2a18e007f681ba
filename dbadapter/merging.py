"""Weighted sums of adapters as one adapter: exact, or of a given rank with the error that this costs.

    W = sum_i w_i (alpha_i / r_i) B_i A_i

Each weight acts once, and no factor of one adapter meets another's (no cross terms, which adding A and B
separately would make).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dbadapter import low_rank
from dbadapter.adapter import Adapter, LoraWeights, same_family
from dbadapter.adapter_file import read_adapter, write_adapter
from dbadapter.adapter_metadata import prediction_of
from dbadapter.errors import AdapterError, UsageError
from dbadapter.low_rank import Factors

__all__ = ["DTYPES", "RECORD", "Merged", "common_alpha", "lora_weights", "merge", "write_merged"]

DTYPES = {"float16": torch.float16, "float32": torch.float32}
# The header's entry, JSON, that says what was merged and what it cost.
RECORD = "dbadapter.merge"
_LAYERS_PER_BLOCK = "dbadapter.layers_per_block"
_PREDICTION = "modelspec.prediction_type"
_TRIGGER = "modelspec.trigger_phrase"
_TAGS = "ss_tag_frequency"
# A sum this much smaller than its terms is rounding: its terms took each other away.
_NOTHING = 1e-7

Source = str | PathLike[str] | Adapter


@dataclass(frozen=True, eq=False)
class Merged:
    """One adapter made of several, and how far it is from their sum.

    Attributes:
        adapter: its factors in the dtype of the file, one alpha for all layers.
        errors: layer -> ||sum - adapter|| / ||sum||, Frobenius norms, rounding to the dtype included; 0 where
            the terms of the sum take each other away.
        error: the same over all layers together.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    error: float


def merge(
    adapters: Mapping[Source, float], *, rank: int | None = None, dtype: torch.dtype = torch.float16
) -> Merged:
    """Return the weighted sum of adapters as one adapter: by joining them along the rank, or of a given rank.

    Ranks, alphas, layers, formats and the shape of 1x1 convolutions may differ.

    Args:
        adapters: file or Adapter -> weight; one of weight 0 is left out.
        rank: at most so large in every layer, the nearest there is (see `low_rank.approximate`); None is
            exact, and the ranks add up.
        dtype: of the result, float16 or float32: the only rounding there is.
    Raises:
        AdapterError: a file cannot be read, the bases' families, predictions or layers' shapes differ, no
            layer is left, or a number is too large for float16.
        UsageError: an impossible rank, weight or dtype.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"The rank must be at least 1, got {rank}")
    if dtype not in DTYPES.values():
        raise UsageError(f"dtype must be float16 or float32, got {dtype}")
    for source, weight in adapters.items():
        if not math.isfinite(weight):
            raise UsageError(f"The weight of {_name(source)} must be a finite number, got {weight}")
    used = {source: weight for source, weight in adapters.items() if weight != 0}
    if not used:
        raise UsageError("Nothing to merge: give at least one adapter with a weight that is not 0")
    loaded = [s if isinstance(s, Adapter) else read_adapter(s) for s in used]
    names = [_name(source) for source in used]
    given = list(zip(loaded, used.values(), names, strict=True))
    family = _family(loaded, names)
    metadata = _metadata(loaded, names)
    terms = {
        name: [_Term(a.modules[name], w, n) for a, w, n in given if name in a.modules]
        for name in dict.fromkeys(module for adapter in loaded for module in adapter.modules)
    }
    shapes = {name: _shape(name, each, family) for name, each in terms.items()}
    alpha = common_alpha(
        low_rank.rank_of_approximation(sum(term.lora.rank for term in each), _sides(shapes[name]), rank)
        for name, each in terms.items()
    )
    modules: dict[str, LoraWeights] = {}
    measured: dict[str, tuple[float, float, float]] = {}
    for name, each in terms.items():
        parts = [(_flat(term.lora), term.weight * term.lora.scaling) for term in each]
        total = low_rank.join(parts)
        kept = total if rank is None else low_rank.approximate(total, rank)
        modules[name] = lora_weights(name, kept, shapes[name], alpha, dtype)
        sizes = sum(abs(weight) * low_rank.norm(factors) for factors, weight in parts)
        measured[name] = (
            low_rank.distance(total, _scaled(modules[name])),
            low_rank.norm(total),
            sizes,
        )
    record: dict[str, Any] = {
        "adapters": [_about(*each) for each in given],
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
    }
    errors = {name: _relative(*figures) for name, figures in measured.items()}
    error = _relative(*(math.hypot(*column) for column in zip(*measured.values(), strict=True)))
    record |= {"relative_error": _rounded(error)}
    if rank is not None:
        record["layers"] = {name: _rounded(value) for name, value in errors.items()}
    metadata[RECORD] = json.dumps(record, ensure_ascii=False)
    return Merged(Adapter(family, dict(sorted(modules.items())), metadata), errors, error)


def write_merged(path: str | PathLike[str], merged: Merged, *, overwrite: bool = False) -> None:
    """Write a merged adapter in its own dtype, and NAME.json beside it.

    Raises:
        AdapterError: no file said which family of bases it is for.
        OutputError: an output exists already, or cannot be written.
    """
    if merged.adapter.family == "unknown":
        raise AdapterError(
            "None of the files says which family of bases it is for, nor do its layers: merge it together "
            "with an adapter that says it"
        )
    write_adapter(path, merged.adapter, dtype=_dtype_of(merged.adapter), overwrite=overwrite)


def _dtype_of(adapter: Adapter) -> torch.dtype:
    """Return the dtype of an adapter's factors."""
    return next(iter(adapter.modules.values())).lora_A.dtype


def common_alpha(ranks: Iterable[int]) -> float:
    """Return the one alpha for layers of these ranks: the most common one.

    One, although ranks may differ: diffusers reads the alphas of UNet attention layers wrongly where they
    differ from layer to layer. B makes up for it (see `lora_weights`).
    """
    return float(Counter(ranks).most_common(1)[0][0])


def lora_weights(
    name: str, product: Factors, shape: Sequence[int], alpha: float, dtype: torch.dtype
) -> LoraWeights:
    """Return a layer's factors in a dtype, so that (alpha / rank) B A is the product.

    Args:
        name: of the layer, for messages.
        product: in float64: it is rounded once.
        shape: of the layer's weight.
        alpha: see `common_alpha`.
        dtype: float16 or float32.
    Raises:
        AdapterError: a number is too large for the dtype.
    """
    a, b = low_rank.store(Factors(product.lora_A, product.lora_B * (product.rank / alpha)), dtype)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        cure = "pass --dtype float32" if dtype == torch.float16 else "give the adapters less weight"
        raise AdapterError(f"A weight of {name} is too large for {dtype}: {cure}")
    ones = (1,) * (len(shape) - 2)
    return LoraWeights(a.reshape(-1, *shape[1:]), b.reshape(*b.shape, *ones).contiguous(), alpha)


def _scaled(lora: LoraWeights) -> Factors:
    """Return a layer's factors as a product without a scale, in float64."""
    a, b = _flat(lora)
    return Factors(a.double(), b.double() * lora.scaling)


class _Term(NamedTuple):
    """One adapter's part in the sum of a layer."""

    lora: LoraWeights
    weight: float
    source: str


def _family(adapters: Sequence[Adapter], names: Sequence[str]) -> str:
    """Return the one family of all, "unknown" where none says it."""
    first, family = names[0], adapters[0].family
    for adapter, name in zip(adapters[1:], names[1:], strict=True):
        if not same_family(adapter.family, family):
            raise AdapterError(
                f"{first} is for a base of family {family}, {name} for {adapter.family}: "
                "only adapters of one family can be merged"
            )
        # toybox is built like SD1; of both, the result is for SD1's.
        if family == "unknown" or (family, adapter.family) == ("toybox", "sd1"):
            first, family = name, adapter.family
    return family


def _shape(name: str, terms: Sequence[_Term], family: str) -> tuple[int, ...]:
    """Return the shape of the layer's weight; a linear layer and a 1x1 convolution are the same map."""
    shapes = [(term.lora.lora_B.shape[0], *term.lora.lora_A.shape[1:]) for term in terms]
    plain = [shape[:2] if shape[2:] == (1, 1) else shape for shape in shapes]
    for shape, term in zip(plain, terms, strict=True):
        if shape != plain[0]:
            raise AdapterError(
                f"At {name}, {terms[0].source} changes weights of shape {plain[0]}, {term.source} those of "
                f"shape {shape}: they were trained on different bases and cannot be merged"
            )
    linear = family in ("sd2", "sdxl") and name.endswith((".proj_in", ".proj_out"))
    return min(shapes, key=len) if linear else max(shapes, key=len)


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _flat(lora: LoraWeights) -> Factors:
    return Factors(lora.lora_A.flatten(1), lora.lora_B.flatten(1))


def _relative(difference: float, size: float, terms: float) -> float:
    return difference / size if size > _NOTHING * terms else 0.0


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _name(source: Source) -> str:
    return "an adapter in memory" if isinstance(source, Adapter) else Path(source).name


def _about(adapter: Adapter, weight: float, name: str) -> dict[str, Any]:
    """Return what the result says of one of its parts: never more of a path than the file's name."""
    ranks = sorted({lora.rank for lora in adapter.modules.values()})
    found = {"file": name, "weight": weight, "layers": len(adapter.modules), "ranks": ranks}
    digest = adapter.metadata.get("sshs_model_hash")
    return found | ({"sshs_model_hash": digest} if digest else {})


def _metadata(adapters: Sequence[Adapter], names: Sequence[str]) -> dict[str, str]:
    """Return what all files say alike, and the words of each; a single file's entries all stay.

    Raises:
        AdapterError: the bases predict different things, or their UNets are counted differently.
    """
    headers = [adapter.metadata for adapter in adapters]
    kept = {k: v for k, v in headers[0].items() if all(h.get(k) == v for h in headers[1:])}
    said = [prediction_of(header) for header in headers]
    if odd := _different(said, names):
        raise AdapterError(f"{odd}: adapters of bases that predict different things cannot be merged")
    if odd := _different([header.get(_LAYERS_PER_BLOCK, "") for header in headers], names):
        raise AdapterError(f"{odd} layers per block: they were trained on different bases")
    for key in (_PREDICTION, _LAYERS_PER_BLOCK, "dbadapter.base", "ss_sd_model_name"):
        values = {header[key] for header in headers if header.get(key)}
        if len(values) == 1 or (values and key == _PREDICTION):  # of which there are two spellings
            kept[key] = min(values)
    if triggers := list(dict.fromkeys(h[_TRIGGER] for h in headers if h.get(_TRIGGER))):
        kept[_TRIGGER] = ", ".join(triggers)
    if tags := _tags(headers):
        kept[_TAGS] = json.dumps(tags, ensure_ascii=False)
    return kept


def _different(values: Sequence[str], names: Sequence[str]) -> str:
    """Return "a says x, b says y" of the first two that differ, "" where all that say anything agree."""
    said = [(value, name) for value, name in zip(values, names, strict=True) if value]
    for value, name in said[1:]:
        if value != said[0][0]:
            return f"{said[0][1]} says {said[0][0]}, {name} says {value}"
    return ""


def _tags(headers: Iterable[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    """Return the training tags of all files together, as user interfaces show them, but for broken ones."""
    found: dict[str, dict[str, int]] = {}
    for header in headers:
        try:
            folders = json.loads(header.get(_TAGS, "{}"))
        except (ValueError, RecursionError):
            continue
        for folder, tags in folders.items() if isinstance(folders, dict) else ():
            for tag, count in tags.items() if isinstance(tags, dict) else ():
                if isinstance(count, int):
                    own = found.setdefault(str(folder), {})
                    own[str(tag)] = own.get(str(tag), 0) + count
    return found
