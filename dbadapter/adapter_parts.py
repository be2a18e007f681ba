"""From a file's named tensors to an adapter's layers: what belongs together, shapes, values, alpha."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dbadapter import adapter_kinds, keys
from dbadapter.adapter import LoraWeights
from dbadapter.errors import AdapterError
from dbadapter.folding import Foldings
from dbadapter.keys import Part
from dbadapter.peft_config import PeftAlphas
from dbadapter.safetensors_file import DTYPES, check_finite, read_tensors
from dbadapter.safetensors_header import Header

__all__ = ["MAX_RANK", "Parts", "layers_of", "parts_of", "text_width"]

MAX_RANK = 16_384  # joining many adapters adds their ranks; no layer of Stable Diffusion is so wide

Parts = dict[str, dict[Part, str]]
"""Canonical layer name -> part -> the tensor's name in the file."""


def parts_of(header: Header, split: Callable[[str], tuple[str, Part]], prefix: str = "") -> Parts:
    """Return which tensors make which layer; nothing but the header is looked at.

    Args:
        header: of the file.
        split: a tensor's name -> (canonical layer name, part).
        prefix: of all names, which says nothing.
    Raises:
        AdapterError: a key is none of a plain LoRA, is there twice, or a layer is incomplete or of shapes
            that do not fit together.
    """
    adapter_kinds.refuse_kinds(key.removeprefix(prefix) for key in header.entries)
    parts: Parts = {}
    for key, entry in header.entries.items():
        module, part = split(key)
        if entry.dtype not in DTYPES:
            raise AdapterError(
                f"{key!r} has dtype {entry.dtype}; {', '.join(DTYPES)} are read: pass such a file"
            )
        if part in parts.setdefault(module, {}):
            raise AdapterError(f"Two keys give {part} of {module}, the second is {key!r}")
        parts[module][part] = key
    if not parts:
        raise AdapterError("The file holds no LoRA layers")
    for module, found in parts.items():
        _check_shapes(module, found, header)
    return dict(sorted(parts.items()))


def layers_of(path: Path, header: Header, parts: Parts, alphas: PeftAlphas) -> dict[str, LoraWeights]:
    """Return the layers by canonical name, in the file's own dtype.

    Args:
        path: of the file.
        header: of the file.
        parts: what `parts_of` found.
        alphas: for layers without an alpha tensor.
    Raises:
        AdapterError: values are not finite, or the file cannot be read.
    """
    foldings = Foldings.of_header(header.metadata)
    tensors = read_tensors(path, header)
    for key, tensor in tensors.items():
        check_finite(key, tensor)
    layers = {}
    for module, found in parts.items():
        values = {part: tensors[key] for part, key in found.items()}
        a, b = values["lora_A"], values["lora_B"]
        if "lora_mid" in values:
            a = _without_core(a, values["lora_mid"], module)
        # The convention of kohya, diffusers and PEFT: without alpha the scale alpha / rank is 1.
        alpha = float(values["alpha"].item()) if "alpha" in values else alphas.of(module, a.shape[0])
        layers[module] = foldings.restored(module, LoraWeights(a, b, alpha))
    return layers


def text_width(layers: Mapping[str, LoraWeights]) -> int | None:
    """Return in_features of a cross-attention key projection, which tells SD1, SD2 and SDXL apart."""
    widths = (w.lora_A.shape[1] for name, w in layers.items() if name.endswith(".attn2.to_k"))
    return next(widths, None)


def _check_shapes(module: str, found: Mapping[Part, str], header: Header) -> None:
    for part in ("lora_A", "lora_B"):
        if part not in found:
            present = " and ".join(sorted(found))
            raise AdapterError(f"{module} has {present} but no {part}: the file is incomplete")
    keys.component_of(module)
    shapes = {part: header.entries[key].shape for part, key in found.items()}
    alpha = shapes.get("alpha", ())
    if any(dimension != 1 for dimension in alpha):
        raise AdapterError(f"alpha of {module} must be one number, got shape {alpha}")
    a = shapes["lora_A"]
    if "lora_mid" in shapes:
        mid = shapes["lora_mid"]
        if len(a) != 4 or len(mid) != 4 or a[2:] != (1, 1) or mid[1] != a[0] or 0 in mid:
            raise AdapterError(f"{module} has a Tucker core {mid} that does not fit its lora_A {a}")
        a = (mid[0], a[1], *mid[2:])
    try:
        # On the meta device: the same checks as for values, without any.
        LoraWeights(torch.empty(a, device="meta"), torch.empty(shapes["lora_B"], device="meta"), 1.0)
    except AdapterError as error:
        raise AdapterError(f"{module}: {error}") from None
    if a[0] > MAX_RANK:
        raise AdapterError(f"{module} has rank {a[0]}, at most {MAX_RANK} is read")


def _without_core(a: Tensor, core: Tensor, module: str) -> Tensor:
    """Return lora_A of the same convolution without LoCon's Tucker core (LyCORIS, `rebuild_tucker`).

        A'[i, c, y, x] = sum_j mid[i, j, y, x] A[j, c]

    Summed in float64 and rounded once, to float32: sums have more digits than float16 holds.
    """
    product = torch.einsum("ijyx,jc->icyx", core.double(), a.flatten(1).double())
    folded = product.to(torch.promote_types(torch.float32, a.dtype))
    check_finite(f"{module}.lora_mid", folded)
    return folded.contiguous()
