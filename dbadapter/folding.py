"""alpha where a format has no place for it: the scale goes into lora_B, and comes out again bit for bit.

    B' = (alpha / rank) B,  alpha' = rank:  the same weight change for a tool that takes the scale as 1

A power of two changes no digit; any other scale needs a wider dtype, in which B' / (alpha / rank) rounds back
to the very B. The header tells alpha and dtype, so that reading restores both.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbadapter import keys
from dbadapter.adapter import LoraWeights
from dbadapter.errors import AdapterError
from dbadapter.safetensors_file import DTYPES, NAMES
from dbadapter.safetensors_header import parse_json

__all__ = ["FOLDED", "Folded", "Foldings", "fold"]

FOLDED = "dbadapter.folded"  # the header's entry


class Folded(NamedTuple):
    """How a layer was before its scale went into lora_B."""

    alpha: float
    dtype: torch.dtype


def fold(weights: LoraWeights) -> Tensor | None:
    """Return lora_B times alpha / rank, in the first dtype that keeps it exactly; None if none does.

    The dtypes are its own, float32 and float64. What remains is a scale of 0, or digits of float64.
    """
    scale, b = weights.scaling, weights.lora_B
    if not (math.isfinite(scale) and scale != 0):
        return None
    for dtype in dict.fromkeys((b.dtype, torch.float32, torch.float64)):
        product = b.double() * scale
        folded = product.to(dtype)
        # In its own dtype every digit must stay; a wider one has digits to spare.
        fits = (
            torch.equal(folded.double(), product) if dtype == b.dtype else dtype.itemsize > b.dtype.itemsize
        )
        if fits and torch.isfinite(folded).all() and torch.equal(_unfolded(folded, scale, b.dtype), b):
            return folded
    return None


class Foldings:
    """Canonical layer name -> how it was, with a component's name for all of its layers alike."""

    def __init__(self, entries: Mapping[str, Folded | None]) -> None:
        """Take the entries; None says that a layer was not folded."""
        self._entries = dict(entries)

    @classmethod
    def of_header(cls, metadata: Mapping[str, str]) -> Foldings:
        """Return what a header says.

        Raises:
            AdapterError: it is no JSON, or tells an alpha or a dtype that cannot be.
        """
        text = metadata.get(FOLDED)
        if text is None:
            return cls({})
        try:
            said = parse_json(text.encode("utf-8", "replace"))
        except AdapterError as error:
            raise AdapterError(
                f"{FOLDED} in the header is no JSON ({error}): convert the adapter again"
            ) from None
        if not isinstance(said, dict):
            raise AdapterError(f"{FOLDED} in the header must be a JSON object: convert the adapter again")
        return cls({name: _entry(name, value) for name, value in said.items()})

    def restored(self, name: str, weights: LoraWeights) -> LoraWeights:
        """Return a layer as it was; as it is where folding it again would not give what the file holds.

        The latter is so when another program changed the tensors and kept the header.
        """
        entry = self._entries.get(name if name in self._entries else keys.component_of(name))
        if entry is None or weights.scaling == 0:
            return weights
        scale = entry.alpha / weights.rank / weights.scaling
        if not math.isfinite(scale) or scale == 0:
            return weights
        b = _unfolded(weights.lora_B, scale, entry.dtype)
        if not torch.equal((b.double() * scale).to(weights.lora_B.dtype), weights.lora_B):
            return weights
        return LoraWeights(weights.lora_A, b, entry.alpha)

    def to_header(self) -> str:
        """Return the header's text, in which what most layers of a component share is said once."""
        common: dict[str, Folded | None] = {}
        for component in keys.COMPONENTS:
            own = [e for name, e in self._entries.items() if keys.component_of(name) == component]
            if own:
                common[component] = Counter(own).most_common(1)[0][0]
        odd = {n: e for n, e in self._entries.items() if e != common[keys.component_of(n)]}
        said = {
            name: None if e is None else {"alpha": e.alpha, "dtype": NAMES[e.dtype]}
            for name, e in {**common, **odd}.items()
        }
        return json.dumps(said, sort_keys=True)


def _unfolded(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (b.double() / scale).to(dtype)


def _entry(name: str, value: Any) -> Folded | None:
    if value is None:
        return None
    alpha, dtype = (value.get("alpha"), value.get("dtype")) if isinstance(value, dict) else (None, None)
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not 0 < abs(alpha) < 1e9
        or not isinstance(dtype, str)
        or dtype not in DTYPES
    ):
        raise AdapterError(
            f"{FOLDED} in the header must tell alpha and dtype of {name[:60]!r}: convert it again"
        )
    return Folded(float(alpha), DTYPES[dtype])
