"""The adapter of a full fine-tune: the change of every layer, cut to a rank by its singular values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbadapter import keys, low_rank
from dbadapter.adapter import Adapter, LoraWeights, adaptable_layers, same_family
from dbadapter.base import Base, pick_device
from dbadapter.errors import BaseError, UsageError
from dbadapter.low_rank import Factors
from dbadapter.merging import common_alpha, lora_weights

__all__ = ["RECORD", "Extracted", "extract"]

# The header's entry, JSON, that says what was kept.
RECORD = "dbadapter.extract"
# Squared singular values below this part of the largest are rounding of the float64 that they come from.
_ROUNDING = 1e-14

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Extracted:
    """An adapter that stands for the difference of two models, and what it leaves out.

    Attributes:
        adapter: of the layers that changed, in the dtype of the file.
        energy: layer -> share of the change that its rank keeps, sum of the kept sigma^2 / sum of all.
        total_energy: the same over all layers together.
        left_out: kind of parameter that changed and that an adapter cannot hold -> how many of them.
    """

    adapter: Adapter
    energy: Mapping[str, float]
    total_energy: float
    left_out: Mapping[str, int]


def extract(
    base: Base,
    tuned: Base,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float16,
    progress: Progress = lambda done, total: None,
) -> Extracted:
    """Return the adapter that is nearest to what a full fine-tune changed, layer by layer.

        W_tuned - W_base = U S V^T,   B A = U_r U_r^T (W_tuned - W_base)      (Eckart and Young 1936)

    Args:
        base: what the fine-tune began with.
        tuned: what it gave.
        rank: of every layer; where a change needs less, less is kept.
        energy: or the share of each layer's squared change that is kept, from which follows its rank.
        dtype: of the adapter, float16 or float32.
        progress: called with the layers done and all of them.
    Raises:
        UsageError: neither or both of rank and energy, or an impossible one.
        BaseError: the models are of different architectures, or do not differ.
        AdapterError: a number is too large for the dtype.
    """
    if (rank is None) == (energy is None):
        raise UsageError("Give either --rank N or --energy X")
    if rank is not None and rank < 1:
        raise UsageError(f"The rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"The energy to keep must be greater than 0 and at most 1, got {energy}")
    pairs = _pairs(base, tuned)
    changed = {name: pair for name, pair in pairs.items() if _differ(*pair)}
    if not changed:
        raise BaseError(
            f"{tuned.name} has the layers of {base.name}, bit for bit or rounded: there is nothing to extract"
        )
    found: dict[str, tuple[Factors, tuple[int, ...]]] = {}
    kept: dict[str, tuple[float, float]] = {}
    for number, (name, (before, after)) in enumerate(changed.items()):
        # Layer by layer to where it is fast; both models together may not fit there.
        change = (after.double() - before.double()).flatten(1).to(pick_device())
        product, *energies = _nearest(change, rank, energy)
        # In float32 while the rest is done: float64 would double the memory.
        found[name] = Factors(product.lora_A.float().cpu(), product.lora_B.float().cpu()), tuple(after.shape)
        kept[name] = (energies[0], energies[1])
        progress(number + 1, len(changed))
    alpha = common_alpha(factors.rank for factors, _ in found.values())
    modules: dict[str, LoraWeights] = {}
    for name, (factors, shape) in sorted(found.items()):
        product = Factors(factors.lora_A.double(), factors.lora_B.double())
        modules[name] = lora_weights(name, product, shape, alpha, dtype)
    shares = {name: part / whole for name, (part, whole) in kept.items()}
    total = sum(part for part, _ in kept.values()) / sum(whole for _, whole in kept.values())
    left_out = _left_out(base, tuned, set(pairs))
    record = {
        "base": base.name,
        "tuned": tuned.name,
        "rank": rank,
        "energy": energy,
        "kept": _rounded(total),
        "layers": {name: _rounded(share) for name, share in shares.items()},
        "left_out": left_out,
    }
    metadata = {
        RECORD: json.dumps(record, ensure_ascii=False),
        "dbadapter.base": base.name,
        "ss_sd_model_name": base.name,
        "modelspec.prediction_type": "v" if tuned.prediction_type == "v_prediction" else "epsilon",
    }
    if base.family == "sdxl":
        metadata["dbadapter.layers_per_block"] = str(base.unet.config.layers_per_block)
    return Extracted(Adapter(base.family, modules, metadata), shares, total, left_out)


def _nearest(change: Tensor, rank: int | None, energy: float | None) -> tuple[Factors, float, float]:
    """Return the nearest product of a rank, or that keeps a share of the energy; kept and whole energy."""
    values, vectors = low_rank.dominant(change)
    whole = float(values.sum())
    needed = int((values > _ROUNDING * values[0]).sum())
    if energy is not None:
        reached = values.cumsum(0) >= energy * whole * (1 - _ROUNDING)
        rank = int(reached.int().argmax()) + 1
    r = max(1, min(needed, rank or needed))
    basis = vectors[:, :r]
    if change.shape[0] <= change.shape[1]:
        product = Factors(basis.T @ change, basis)
    else:
        product = Factors(basis.T, change @ basis)
    return product, min(float(values[:r].sum()), whole), whole


def _rounded(share: float) -> float:
    return float(f"{share:.6g}")


def _models(base: Base) -> dict[str, nn.Module]:
    return {"unet": base.unet, **base.text_encoders}


def _pairs(base: Base, tuned: Base) -> dict[str, tuple[Tensor, Tensor]]:
    """Return every layer's weight in both models.

    Raises:
        BaseError: they are of different architectures, predict different things, or are not finite.
    """
    if not same_family(base.family, tuned.family):
        raise BaseError(
            f"{base.name} is of family {base.family}, {tuned.name} of {tuned.family}: pass the base that it "
            "was tuned from"
        )
    before, after = _weights(base), _weights(tuned)
    for name in [*before, *after]:
        shapes = [tuple(weights[name].shape) if name in weights else None for weights in (before, after)]
        if shapes[0] != shapes[1]:
            raise BaseError(
                f"{base.name} and {tuned.name} differ in more than weights: {name} has the shape {shapes[0]} "
                f"in one and {shapes[1]} in the other; pass the base that it was tuned from"
            )
    for which, weights in ((base, before), (tuned, after)):
        if broken := next((name for name, value in weights.items() if not torch.isfinite(value).all()), None):
            raise BaseError(f"{which.name} has values that are not finite in {broken}: it cannot be used")
    if base.prediction_type != tuned.prediction_type:
        raise BaseError(
            f"{base.name} predicts {base.prediction_type}, {tuned.name} {tuned.prediction_type}: pass the "
            "base that it was tuned from"
        )
    return {name: (before[name], after[name]) for name in before}


def _weights(base: Base) -> dict[str, Tensor]:
    return {
        name: layer.get_parameter("weight").detach()
        for component, model in _models(base).items()
        for name, layer in adaptable_layers(model, component).items()
    }


def _differ(before: Tensor, after: Tensor) -> bool:
    """Tell whether a weight was changed; one that was only rounded to half precision was not."""
    if torch.equal(before, after):
        return False
    for half in (torch.float16, torch.bfloat16):
        for one, other in ((before, after), (after, before)):
            if torch.equal(one.to(half).to(one.dtype), other):
                return False
    return True


def _left_out(base: Base, tuned: Base, layers: set[str]) -> dict[str, int]:
    """Return how many parameters changed that no LoRA holds, by kind: norms, biases, embeddings, the VAE."""
    found = {"norms": 0, "biases": 0, "embeddings": 0, "VAE weights": 0}
    for kind, before, after in _others(base, tuned, layers):
        if before.shape != after.shape or _differ(before, after):
            found[kind] += 1
    return {kind: number for kind, number in found.items() if number}


def _others(base: Base, tuned: Base, layers: set[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    afters = {component: dict(model.named_parameters()) for component, model in _models(tuned).items()}
    for component, model in _models(base).items():
        for path, before in model.named_parameters():
            module, _, leaf = path.rpartition(".")
            after = afters[component].get(path)
            if after is None or (leaf == "weight" and keys.canonical_module(component, module) in layers):
                continue
            kind: Any = type(model.get_submodule(module))
            if issubclass(kind, nn.Embedding):
                yield "embeddings", before, after
            elif issubclass(kind, nn.Linear | nn.Conv2d):
                yield "biases", before, after
            else:
                yield "norms", before, after
    others = dict(tuned.vae.named_parameters())
    for path, before in base.vae.named_parameters():
        if path in others:
            yield "VAE weights", before, others[path]
