"""Layers whose adapter is an input of the graph, so that one graph serves many subjects.

Every adapted layer computes W x + b + B A x (Hu et al. 2021, section 4.1, with the scale folded into B). A
and B come from outside, with a rank that is free; where none are given the graph's own default has rank 0,
which adds nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbadapter import lora

__all__ = [
    "FACTORS",
    "SwappableGraph",
    "attach_defaults",
    "example_factors",
    "factor_dims",
    "structure_copy",
    "swappable_layers",
]

FACTORS = ("lora_A", "lora_B")


class SwappableLayer(nn.Module):
    """A layer with the factors that the graph was called with."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A: Tensor | None = None
        self.lora_B: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (lora_A, lora_B) of this call."""
        if self.lora_A is None or self.lora_B is None:
            raise ValueError("the graph gives every layer its factors before the model runs")
        return self.lora_A, self.lora_B


class SwappableLinear(SwappableLayer):
    """W x + b + B A x, for factors of shape (rank, in) and (out, rank)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output, (..., out), of x, (..., in).

        As a product of rows that adds to what the layer gave: one operation (Gemm) less than a product and a
        sum, and one pass less over the output.
        """
        lora_A, lora_B = self.factors()
        rows = x.flatten(0, -2)
        out = torch.addmm(self.base_layer(rows), rows @ lora_A.T, lora_B.T)
        whole: Tensor = out.unflatten(0, x.shape[:-1])
        return whole


class SwappableConv2d(SwappableLayer):
    """The same for factors of shape (rank, in, kh, kw) and (out, rank, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output, (batch, out, height, width)."""
        lora_A, lora_B = self.factors()
        base: Any = self.base_layer
        down = F.conv2d(x, lora_A, None, base.stride, base.padding, base.dilation)
        out: Tensor = base(x) + F.conv2d(down, lora_B)
        return out


class SwappableGraph(nn.Module):
    """A component's graph, called with its own inputs and then lora_A and lora_B of each layer in turn."""

    def __init__(self, component: nn.Module, inputs: int, layers: Sequence[SwappableLayer]) -> None:
        super().__init__()
        self.component = component  # not `graph`: a traced module has one of its own
        self.inputs = inputs
        self.layers = list(layers)  # already the component's submodules

    def forward(self, *values: Tensor) -> Any:
        """Return what the component's graph returns."""
        factors = values[self.inputs :]
        for number, layer in enumerate(self.layers):
            layer.lora_A, layer.lora_B = factors[2 * number : 2 * number + 2]
        return self.component(*values[: self.inputs])


def structure_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose layers may be replaced; the weights are the very same tensors."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied: nn.Module = copy.deepcopy(model, shared)
    return copied


def swappable_layers(model: nn.Module, component: str, targets: Sequence[str]) -> dict[str, SwappableLayer]:
    """Replace the layers that an adapter may change, in place; return them by canonical name.

    Args:
        model: a UNet or a text encoder of which nothing else is wanted, see `structure_copy`.
        targets: of `lora.TARGETS`; text encoders have their attention, whatever is said.
    """
    found: dict[str, SwappableLayer] = {}
    for name, layer in lora.target_layers(model, component, targets).items():
        kind = SwappableLinear if isinstance(layer, nn.Linear) else SwappableConv2d
        found[name] = kind(layer)
    paths = {id(layer): path for path, layer in model.named_modules()}
    for wrapped in found.values():
        model.set_submodule(paths[id(wrapped.base_layer)], wrapped)
    return found


def factor_dims(layers: Mapping[str, SwappableLayer]) -> dict[str, tuple[str | int, ...]]:
    """Return the graph's input names and dimensions: lora_A (rank, in, ...), lora_B (out, rank, ...).

    Each layer has a rank of its own: adapters that are mixed need not cover the same layers.
    """
    dims: dict[str, tuple[str | int, ...]] = {}
    for name, layer in layers.items():
        weight = layer.base_layer.get_parameter("weight")
        ones = (1,) * (weight.ndim - 2)
        rank = f"rank of {name}"
        dims[f"{name}.lora_A"] = (rank, *weight.shape[1:])
        dims[f"{name}.lora_B"] = (weight.shape[0], rank, *ones)
    return dims


def example_factors(layers: Mapping[str, SwappableLayer], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return random factors of rank 3, which torch.export does not take for a constant as it would 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(*[3 if isinstance(dim, str) else dim for dim in dims], generator=generator).to(
            dtype
        )
        for name, dims in factor_dims(layers).items()
    }


def attach_defaults(model: Any, layers: Mapping[str, SwappableLayer]) -> None:
    """Give every factor input of an exported model its default of rank 0; call it after all graph passes.

    Earlier, a pass may take the default for a constant and fold the input away (seen with NhwcConv).

    Args:
        model: an `onnx_ir.Model`.
    """
    import onnx_ir as ir

    inputs = {value.name: value for value in model.graph.inputs}
    for name, dims in factor_dims(layers).items():
        value = inputs[name]
        shape = [0 if isinstance(dim, str) else dim for dim in dims]
        value.const_value = ir.tensor(torch.zeros(shape).numpy().astype(value.dtype.numpy()), name=name)
        model.graph.register_initializer(value)
